import type { AdapterHarness } from 'ambient-db/conformance'
import { sequelizeAdapter } from 'ambient-db/sequelize'
import { BaseError, type QueryOptions, type Sequelize } from 'sequelize'
import { type OwnPoolProbe, withOwnPools } from './own-pools.ts'

const insert = (handle: Sequelize, id: number, options: QueryOptions = {}) =>
  handle.query('insert into items (id) values ($1)', { ...options, bind: [id] })

/** How the suite uses a Sequelize, whatever its dialect. */
export const sequelizeOperations = {
  query: async (handle, sql, parameters) => {
    const [rows] = await handle.query(sql, parameters ? { bind: parameters } : {})
    return { rows }
  },
  driverError: (error) => (error instanceof BaseError && 'parent' in error ? error.parent : error),
  transaction: (handle, work) =>
    handle.transaction((transaction) => work({ insert: (id) => insert(handle, id, { transaction }) })),
  async beginTransaction(handle) {
    const transaction = await handle.transaction()
    return {
      insert: (id) => insert(handle, id, { transaction }),
      commit: () => transaction.commit(),
      rollback: () => transaction.rollback(),
    }
  },
} satisfies Partial<AdapterHarness<Sequelize>> & {
  query(handle: Sequelize, sql: string, parameters?: unknown[]): Promise<{ rows: unknown[] }>
}

interface Pool {
  readonly size: number
  readonly using: number
}

/** An engine with the pool of Sequelize, and what became of its connections. */
class SequelizeProbe implements OwnPoolProbe {
  readonly host: string | undefined
  readonly living: Set<unknown> = new Set()
  closed = false
  readonly #pool: Pool

  constructor(host: string | undefined, made: Sequelize) {
    this.host = host
    this.#pool = (made as unknown as { connectionManager: { pool: Pool } }).connectionManager.pool // not in its types
    made.addHook('afterConnect', (connection) => {
      this.living.add(connection)
      const gone = () => this.living.delete(connection)
      ;(connection as NodeJS.EventEmitter).on('end', gone).on('error', gone)
    })
    const close = made.close.bind(made)
    made.close = async () => {
      await close()
      this.closed = true
    }
  }

  get open(): number {
    return this.#pool.size
  }

  get busy(): number {
    return this.#pool.using
  }
}

/** A harness for a driver, with engines over the pool of Sequelize. */
export function withSequelizePools<Harness extends AdapterHarness<Sequelize>>(
  base: Harness,
  make: (connections: number) => Sequelize,
): Harness {
  return withOwnPools(base, sequelizeAdapter<Sequelize>, (connections, host) => {
    const engine = make(connections)
    return { engine, probe: new SequelizeProbe(host, engine) }
  })
}
