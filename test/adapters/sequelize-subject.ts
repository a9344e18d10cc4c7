import { type AmbientDatabase, defineDatabase } from 'ambient-db'
import type { AdapterHarness, EngineProbe, HarnessOptions } from 'ambient-db/conformance'
import { sequelizeAdapter } from 'ambient-db/sequelize'
import { BaseError, type QueryOptions, type Sequelize } from 'sequelize'
import { until } from '../support/gate.ts'

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
class SequelizeProbe implements EngineProbe {
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

/** Defines a database; `taken` hears of each engine that is more than what models are defined with, which needs no context. */
function define(
  open: (host?: string) => Sequelize,
  options: HarnessOptions<Sequelize>,
  taken: (engine: Sequelize) => void,
): AmbientDatabase<Sequelize, Sequelize> {
  const adapter = sequelizeAdapter(options.host === undefined ? () => open() : (host: string) => open(host))
  const createEngine = async (host: string | undefined) => {
    const engine = await adapter.createEngine(host)
    taken(engine)
    return engine
  }
  return defineDatabase({ name: 'main', ...options, adapter: { ...adapter, createEngine } })
}

/** A harness for a driver, with engines over the pool of Sequelize. */
export function withSequelizePools<Harness extends AdapterHarness<Sequelize>>(
  base: Harness,
  make: (connections: number) => Sequelize,
): Harness {
  let probes: SequelizeProbe[] = []
  return {
    ...base,
    engines: () => probes,
    async reset() {
      probes = []
      await base.reset()
    },
    async kill() {
      await base.kill?.()
      await until(async () => probes.every(({ living }) => living.size === 0), 'the clients to notice')
    },
    define({ connections = 10, ...options }: HarnessOptions<Sequelize> = {}) {
      const made = new WeakMap<Sequelize, SequelizeProbe>()
      const open = (host?: string) => {
        const engine = make(connections)
        made.set(engine, new SequelizeProbe(host, engine))
        return engine
      }
      return define(open, options, (engine) => probes.push(made.get(engine) as SequelizeProbe)) // open has set it
    },
  }
}
