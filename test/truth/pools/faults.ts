import type { Sabotage, Violation } from './stage.ts'

/** A fault that the harness must see. */
export interface Fault {
  readonly name: string
  readonly sabotage: Sabotage
  readonly scenario: string
  /** Where it is planted: with a pool, or on the only connection. */
  readonly single?: true
  readonly shows: Violation['kind']
}

/** Written for adapters whose engine is its pool. */
export const faults: readonly Fault[] = [
  {
    name: 'loses a slot now and then',
    sabotage: {
      mutate(adapter) {
        let releases = 0
        return {
          ...adapter,
          release: (engine, connection, broken) =>
            ++releases % 40 === 0 ? undefined : adapter.release(engine, connection, broken),
        }
      },
    },
    scenario: 'many units, and too little time',
    shows: 'lost slot',
  },
  {
    name: 'loses connections that come late',
    sabotage: {
      mutate: (adapter) => {
        const used = new WeakSet<object>()
        return {
          ...adapter,
          begin: (connection, settings) => {
            used.add(connection as object)
            return adapter.begin(connection, settings)
          },
          release: (engine, connection, broken) =>
            used.has(connection as object) ? adapter.release(engine, connection, broken) : undefined,
        }
      },
    },
    scenario: 'start-up is answered late, too late',
    shows: 'lost slot',
  },
  {
    name: 'waits for a connection without a bound',
    sabotage: { timeouts: { acquireTimeout: 10_000 } },
    scenario: 'inner contexts',
    shows: 'hang',
  },
  {
    name: 'says committed before COMMIT is answered',
    sabotage: {
      mutate: (adapter) => ({
        ...adapter,
        commit: async (connection) => {
          adapter.commit(connection).catch(() => {})
          return 'committed'
        },
      }),
    },
    scenario: 'COMMIT is answered late, but in time',
    shows: 'too early',
  },
  {
    name: 'says committed where it rolls back, now and then',
    sabotage: {
      mutate(adapter) {
        let commits = 0
        return {
          ...adapter,
          commit: async (connection) => {
            if (++commits % 20 !== 0) return adapter.commit(connection)
            await adapter.rollback(connection)
            return 'committed'
          },
        }
      },
    },
    scenario: 'many units, and time enough',
    shows: 'wrong outcome',
  },
  {
    name: 'does not wait in shutdown',
    sabotage: {
      async shutdown(database) {
        database.shutdown().catch(() => {})
      },
    },
    scenario: 'shutdown under load',
    shows: 'shutdown',
  },
  {
    name: 'ends what is under way in shutdown',
    sabotage: { timeouts: { settleTimeout: 1, acquireTimeout: 1500 } }, // who waits for a connection goes on to wait for it
    scenario: 'shutdown under load',
    shows: 'not served',
  },
  {
    name: 'leaves the pool of a former host open',
    sabotage: { mutate: (adapter) => ({ ...adapter, closeEngine: async () => {} }) },
    scenario: 'hosts changed under load',
    shows: 'leaked connection',
  },
  {
    name: 'takes an only connection for a pool',
    sabotage: {
      mutate: (adapter) => ({
        ...adapter,
        capabilities: (engine) => ({ ...adapter.capabilities(engine), singleConnection: false }),
      }),
    },
    scenario: 'an inner context, and only one connection',
    single: true,
    shows: 'wrong error',
  },
]
