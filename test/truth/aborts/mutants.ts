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
        const cancelling = new Map<unknown, NodeJS.Timeout | undefined>()
        return {
          ...adapter,
          async cancel(engine, connection) {
            await adapter.cancel?.(engine, connection)
            cancelling.set(connection, undefined)
          },
          release(engine, connection, broken) {
            clearInterval(cancelling.get(connection)) // that of the next borrower
            if (cancelling.has(connection) && cancelling.get(connection) === undefined) {
              cancelling.set(connection, setInterval(() => void adapter.cancel?.(engine, connection), 10).unref())
            }
            return adapter.release(engine, connection, broken)
          },
        }
      },
    },
    unit: 'a lock',
    way: 'signal',
    at: /^> select pg_advisory/,
    times: 8,
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
