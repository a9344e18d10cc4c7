import type { Adapter } from './adapter.ts'
import { notFromServer } from './traits.ts'

/** The driver that a library was configured with, and what its adapter takes for its pool. */
export interface ChosenDriver {
  readonly driver: Adapter<unknown, unknown, object>
  readonly pool: unknown
}

/** What an adapter leaves to the drivers, and not what is the library's own. */
type LeftToDrivers<Engine> = Omit<
  Adapter<unknown, Engine, object>,
  'createEngine' | 'closeEngine' | 'createHandle' | 'leftovers' | 'lookUpTransaction'
> &
  Required<Pick<Adapter<unknown, Engine, object>, 'leftovers' | 'lookUpTransaction'>>

/**
 * The part of an adapter that a library has from its driver, where only the engine tells which one that is: each call goes to the
 * driver of the engine or of the connection.
 *
 * @param chosen the driver of an engine that was created.
 */
export function byDriver<Engine>(chosen: (engine: Engine) => ChosenDriver): LeftToDrivers<Engine> {
  const drivers = new WeakMap<object, ChosenDriver['driver']>()
  let latest: ChosenDriver['driver'] | undefined
  const of = (connection: object) => drivers.get(connection) as ChosenDriver['driver'] // acquire has set it
  return {
    capabilities(engine) {
      const { driver, pool } = chosen(engine)
      latest = driver
      return driver.capabilities(pool)
    },
    async acquire(engine, onLost) {
      const { driver, pool } = chosen(engine)
      const connection = await driver.acquire(pool, onLost)
      drivers.set(connection, driver)
      return connection
    },
    release: (engine, connection, broken) => of(connection).release(chosen(engine).pool, connection, broken),
    begin: (connection, settings) => of(connection).begin(connection, settings),
    commit: (connection) => of(connection).commit(connection),
    rollback: (connection) => of(connection).rollback(connection),
    leftovers: (connection) => of(connection).leftovers?.(connection),
    savepoint: (connection, name) => of(connection).savepoint(connection, name),
    rollbackTo: (connection, name) => of(connection).rollbackTo(connection, name),
    releaseSavepoint: (connection, name) => of(connection).releaseSavepoint(connection, name),
    checkDeferred: async (connection) => of(connection).checkDeferred?.(connection),
    transactionStatus: (connection) => of(connection).transactionStatus?.(connection),
    afterError: async (connection) => of(connection).afterError?.(connection),
    probeTransaction: async (connection, error) => of(connection).probeTransaction?.(connection, error) ?? 'open',
    mayPipelineBegin: (connection) => of(connection).mayPipelineBegin?.(connection) ?? false,
    identifyTransaction: async (connection) => of(connection).identifyTransaction?.(connection),
    lookUpTransaction: async (engine, id, signal) => {
      const { driver, pool } = chosen(engine)
      return driver.lookUpTransaction?.(pool, id, signal) ?? 'unknown'
    },
    cancel: async (engine, connection) => of(connection).cancel?.(chosen(engine).pool, connection),
    traits: (error) => (latest?.traits ?? notFromServer)(error),
  }
}
