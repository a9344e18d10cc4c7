import type { EventEmitter } from 'node:events'
import type { Adapter } from '../../../src/adapter.ts'
import type { Violation } from './stage.ts'

type AnyAdapter = Adapter<unknown, unknown, unknown>
export type Mutate = (adapter: AnyAdapter) => AnyAdapter

/** A fault that the harness must see: an adapter made worse. */
export interface Mutant {
  readonly name: string
  readonly mutate: Mutate
  /** Units and messages at which it shows; a few, so that proving it takes no time. */
  readonly units: readonly string[]
  readonly labels: RegExp
  /** It is a fault only where COMMIT is answered with what the server did. */
  readonly tags?: true
  /** It is a fault only where a COMMIT without an answer can be looked up. */
  readonly lookups?: true
  /** What the harness must say of it. */
  readonly shows: Violation['kind']
}

/** An adapter that knows of a failed statement only what COMMIT is answered. */
const blind: Mutate = (adapter) => {
  const { transactionStatus: _, ...rest } = adapter
  const not = { failedStatementAborts: false, commitLookup: false }
  return { ...rest, capabilities: (engine) => ({ ...adapter.capabilities(engine), ...not }) }
}

/** Not a fault: what `blind` does not see is found at COMMIT. Shows that the first mutant is caught for the tag alone. */
export const control: Mutant = {
  name: 'reads nothing but the tag of COMMIT',
  mutate: blind,
  units: ['failure swallowed'],
  labels: /^[<>] [QC] (?:COMMIT|ROLLBACK)/i,
  tags: true,
  shows: 'wrong outcome',
}

/** The faults are put in at the driver: they are written for adapters whose engine is its pool. */
export const mutants: readonly Mutant[] = [
  {
    name: 'ignores the tag of COMMIT',
    mutate: (adapter) => ({
      ...blind(adapter),
      commit: async (connection) => {
        await adapter.commit(connection)
        return 'committed'
      },
    }),
    units: ['failure swallowed'],
    labels: /^[<>] [QC] (?:COMMIT|ROLLBACK)/i,
    tags: true,
    shows: 'wrong outcome',
  },
  {
    name: 'takes a lost answer to COMMIT for a rollback',
    mutate: (adapter) => ({
      ...adapter,
      commit: (connection) => adapter.commit(connection).catch(() => 'rolled-back'),
    }),
    units: ['one write', 'manual commit'],
    labels: /^< (?:C|OK) COMMIT/i,
    shows: 'wrong outcome',
  },
  {
    name: 'gives connections back without ROLLBACK',
    mutate: (adapter) => ({
      ...adapter,
      rollback: async () => {},
      release: (engine, connection, broken) =>
        broken ? adapter.release(engine, connection, broken) : (connection as { release(): void }).release(),
    }),
    units: ['failure thrown'],
    labels: /^< E(?!OF)/,
    shows: 'open transaction',
  },
  {
    name: 'listens to no error of its connections',
    mutate: (adapter) => ({
      ...adapter,
      acquire: async (engine, onLost) => {
        const connection = (await adapter.acquire(engine, onLost)) as EventEmitter
        return connection.removeAllListeners('error')
      },
    }),
    units: ['one write'],
    labels: /^< (?:C|OK) (?:INSERT|BEGIN)/i,
    shows: 'uncaught',
  },
  {
    name: 'lies about what it looks up',
    mutate: (adapter) => ({
      ...adapter,
      lookUpTransaction: async (engine, id, signal) => {
        const status = await adapter.lookUpTransaction?.(engine, id, signal)
        return status === 'committed' ? 'rolled-back' : status === 'rolled-back' ? 'committed' : 'unknown'
      },
    }),
    units: ['one write', 'manual commit'],
    labels: /^(?:< C|> [QP]) COMMIT/i,
    lookups: true,
    shows: 'wrong outcome',
  },
  {
    name: 'sends COMMIT again',
    mutate: (adapter) => {
      let pool: unknown
      const again = async () => {
        const connection = await adapter.acquire(pool, () => {})
        const answer = await adapter.commit(connection)
        await adapter.release(pool, connection)
        return answer
      }
      return {
        ...adapter,
        acquire: (engine, onLost) => {
          pool = engine
          return adapter.acquire(engine, onLost)
        },
        commit: (connection) => adapter.commit(connection).catch(again),
      }
    },
    units: ['one write', 'manual commit'],
    labels: /^> (?:[QP]|Query) COMMIT/i,
    shows: 'wrong outcome',
  },
]
