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
        /** Connections that were cancelled, and what goes on cancelling them: one request at a time, or their crowd slows itself down. */
        const cancelled = new Map<unknown, { goesOn: boolean } | undefined>()
        return {
          ...adapter,
          async cancel(engine, connection) {
            await adapter.cancel?.(engine, connection)
            cancelled.set(connection, undefined)
          },
          release(engine, connection, broken) {
            const before = cancelled.get(connection)
            if (before) {
              before.goesOn = false // that of the next borrower
            } else if (cancelled.has(connection)) {
              const request = { goesOn: true }
              cancelled.set(connection, request)
              const again = async () => {
                while (request.goesOn) {
                  await adapter.cancel?.(engine, connection)
                  await setTimeout(5, undefined, { ref: false })
                }
              }
              again().catch(() => {}) // the engine was closed
            }
            return adapter.release(engine, connection, broken)
          },
        }
      },
    },
    unit: 'a lock',
    way: 'signal',
    at: /^> select pg_advisory/,
    times: 16,
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
