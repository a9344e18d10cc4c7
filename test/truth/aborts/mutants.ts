import { setTimeout } from 'node:timers/promises'
import type { PoolClient } from 'pg'
import type { Mutate } from '../cuts/mutants.ts'
import type { Case } from './lab.ts'
import type { Finding, Way } from './stage.ts'

/** A fault that the harness must see. */
export interface Mutant {
  readonly name: string
  readonly fault: Pick<Case, 'mutate' | 'onlyRejects'>
  /** A unit, and the events behind which it shows. */
  readonly unit: string
  readonly way: Way
  readonly at: RegExp
  /** How often it is run; more than once if it shows by chance. */
  readonly times?: number
  /** What the harness must say of it. */
  readonly shows: Finding['kind']
}

const cancelNothing: Mutate = ({ cancel: _, ...adapter }) => adapter

/** The faults are put in at the driver: they are written for adapters whose engine is a pool of `pg`. */
export const mutants: readonly Mutant[] = [
  {
    name: 'claims to cancel statements, and does not',
    fault: { mutate: cancelNothing },
    unit: 'a lock',
    way: 'signal',
    at: /^> select pg_advisory/,
    shows: 'still running',
  },
  {
    name: 'lets a cancel request outlive the release of its connection',
    fault: {
      mutate: (adapter) => {
        /** Connections that were cancelled, and whether they are cancelled on and on. */
        const cancelled = new Map<unknown, boolean>()
        let closed = false
        return {
          ...adapter,
          async cancel(engine, connection) {
            await setTimeout(20) // so that it does not overtake the statement, which would leave nothing to release
            await adapter.cancel?.(engine, connection)
            if (!cancelled.has(connection)) cancelled.set(connection, false)
          },
          release(engine, connection, broken) {
            const again = async () => {
              // One request at a time: a crowd of them would slow itself down.
              while (!closed) {
                await adapter.cancel?.(engine, connection)
                await setTimeout(5, undefined, { ref: false })
              }
            }
            if (cancelled.get(connection) === false) {
              cancelled.set(connection, true)
              again().catch(() => {}) // the server is gone
            }
            return adapter.release(engine, connection, broken)
          },
          closeEngine(engine) {
            closed = true
            return adapter.closeEngine(engine)
          },
        }
      },
    },
    unit: 'a lock',
    way: 'signal',
    at: /^> select pg_advisory/,
    times: 4,
    shows: 'late cancel',
  },
  {
    name: 'gives connections back without ROLLBACK',
    fault: { mutate: (adapter) => ({ ...adapter, rollback: async () => {} }) },
    unit: 'several writes',
    way: 'timeout',
    at: /^< T/,
    shows: 'unfounded rollback',
  },
  {
    name: 'commits what was aborted',
    fault: {
      mutate: (adapter) => ({
        ...adapter,
        rollback: async (connection) => {
          await (connection as PoolClient).query('COMMIT')
        },
      }),
    },
    unit: 'several writes',
    way: 'signal',
    at: /^< T/,
    shows: 'wrong outcome',
  },
  {
    name: 'rejects the promise, and lets the work go on',
    fault: { onlyRejects: true },
    unit: 'a lock',
    way: 'signal',
    at: /^> select pg_advisory/,
    shows: 'still running',
  },
  {
    name: 'commits when the promise is rejected already',
    fault: { onlyRejects: true },
    unit: 'a lock',
    way: 'signal',
    at: /^> select pg_advisory/,
    shows: 'commit after the abort',
  },
  {
    name: 'loses the slot of a connection',
    fault: { mutate: (adapter) => ({ ...adapter, release: () => {} }) },
    unit: 'one write',
    way: 'signal',
    at: /^< T/,
    shows: 'lost slot',
  },
]
