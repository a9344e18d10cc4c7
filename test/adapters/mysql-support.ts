import type { AmbientDatabase } from 'ambient-db'
import type { AdapterHarness, EngineProbe, HarnessOptions } from 'ambient-db/conformance'
import { createPool, type Pool, type PoolOptions } from 'mysql2/promise'
import type { Capabilities } from '../../src/adapter.ts'
import { mysqlGate, until } from '../support/gate.ts'
import type { MysqlDatabase } from '../support/mysql.ts'
import { startProxy, type WireProxy } from '../support/proxy.ts'

const mysqlCapabilities: Capabilities = {
  savepoints: true,
  streaming: true,
  cancelling: true,
  failedStatementAborts: false,
  transactionStatus: true,
  pipelining: false,
  lossDetection: true,
  singleConnection: false,
  commitLookup: false,
}

/** What a harness for MySQL needs to know of one library. */
export interface MysqlSubject<Handle>
  extends Pick<AdapterHarness<Handle>, 'transaction' | 'beginTransaction' | 'stream' | 'driverError'> {
  readonly capabilities?: Partial<Capabilities>
  define(pool: (host?: string) => Pool, options: HarnessOptions<Handle>): AmbientDatabase<Handle, unknown>
  query(handle: Handle, sql: string, parameters?: unknown[]): Promise<{ rows: unknown }>
}

/** A pool and what became of its connections. */
export class MysqlPoolProbe implements EngineProbe {
  readonly host: string | undefined
  readonly pool: Pool
  readonly #living = new Set<unknown>()

  constructor(host: string | undefined, pool: Pool) {
    this.host = host
    this.pool = pool
    pool.pool.on('connection', (connection) => {
      this.#living.add(connection)
      const gone = () => this.#living.delete(connection)
      connection.on('end', gone)
      connection.on('error', gone)
    })
  }

  /** What mysql2 does not tell. */
  get #inside() {
    return this.pool.pool as unknown as Record<'_allConnections' | '_freeConnections', { length: number }> & {
      _closed: boolean
    }
  }

  get open(): number {
    return this.#inside._allConnections.length
  }

  get busy(): number {
    return this.open - this.#inside._freeConnections.length
  }

  get closed(): boolean {
    return this.#inside._closed
  }

  get living(): number {
    return this.#living.size
  }
}

/** Creates the table of the suite and the harness; `close` stops its proxy. */
export async function mysqlHarness<Handle>(
  database: MysqlDatabase,
  subject: MysqlSubject<Handle>,
  config: PoolOptions = {},
): Promise<AdapterHarness<Handle> & { readonly wire: WireProxy; close(): Promise<void> }> {
  const { rows } = database.witness
  await rows('create table items (id int primary key, n int not null default 0)')
  // MariaDB has a snapshot isolation that is one; elsewhere the last writer wins, and there is no conflict.
  const [snapshots] = await rows("show variables like 'innodb_snapshot_isolation'")
  const wire = await startProxy(database.url)
  let probes: MysqlPoolProbe[] = []
  const { capabilities, query, define, ...operations } = subject
  return {
    ...operations,
    wire,
    close: () => wire.close(),
    capabilities: { ...mysqlCapabilities, ...capabilities },
    define({ connections = 10, ...options } = {}) {
      const pool = (host?: string) => {
        const made = createPool({ uri: wire.url, connectionLimit: connections, ...config })
        if (snapshots) {
          made.pool.on('connection', (connection) => connection.query('set innodb_snapshot_isolation = on', () => {}))
        }
        probes.push(new MysqlPoolProbe(host, made))
        return made
      }
      return define(pool, options)
    },
    async reset() {
      probes = []
      await rows('truncate items')
    },
    engines: () => probes,
    insert: (handle, id) => query(handle, 'insert into items (id) values (?)', [id]),
    ids: async (handle) => {
      const result = await query(handle, 'select id from items order by id')
      return (result.rows as { id: number }[]).map(({ id }) => id)
    },
    fail: (handle) => query(handle, 'select * from missing'),
    witness: async () => (await rows<{ id: number }>('select id from items order by id')).map(({ id }) => id),
    async spoilCommit(handle) {
      // Nothing makes COMMIT fail that does not fail before, so its text is spoilt on the way, and the server refuses it.
      const marker = wire.at(/spoil/, ({ bytes }) => bytes)
      await query(handle, "select 'spoil'")
      const { connection } = await marker.caught
      const isCommit = (message: { label: string; connection: number }) =>
        message.connection === connection && /^> Query commit$/i.test(message.label)
      wire.at(isCommit, ({ bytes }) => Buffer.from(bytes.toString('latin1').replace(/commit/i, 'COMMIX'), 'latin1'))
    },
    endBehindTheBack: (handle) => query(handle, 'create table if not exists other (id int)'),
    ...(snapshots && {
      change: (handle: Handle, id: number) => query(handle, 'update items set n = n + 1 where id = ?', [id]),
      changeElsewhere: (id: number) => rows('update items set n = n + 1 where id = ?', [id]),
    }),
    async gate() {
      const { sql, open, waiting } = await mysqlGate(database)
      return {
        pass: (handle) => query(handle, sql),
        reached: () => until(waiting, 'a statement at the gate'),
        left: () => until(async () => !(await waiting()), 'the gate to be left'),
        open,
      }
    },
    async kill() {
      for (const { id } of await database.backends()) await database.kill(id)
      await until(() => probes.every(({ living }) => living === 0), 'the connections to notice')
    },
    loseCommit: () => wire.at('< OK COMMIT', 'reset'),
    cutAtBegin: (times) => wire.at(/^> Query (?:BEGIN|START)/i, 'reset', { times }),
  }
}
