import {
  CompiledQuery,
  type ConnectionProvider,
  type DatabaseConnection,
  DefaultQueryExecutor,
  type Dialect,
  type DialectAdapter,
  type Driver,
  isAbortedTransactionError,
  Kysely,
  type KyselyPlugin,
  type TransactionSettings as KyselySettings,
  type LogConfig,
  MysqlAdapter,
  PostgresAdapter,
  type QueryCompiler,
  type QueryResult,
  SqliteAdapter,
} from 'kysely'
import {
  type Adapter,
  type Capabilities,
  callFactory,
  type NativeBlock,
  overDriver,
  type Statements,
  type TransactionSettings,
} from '../adapter.ts'
import { detach } from '../context.ts'
import { type AmbientDatabase, handleOver } from '../database.ts'
import { AmbientError } from '../errors.ts'
import { iterate } from '../iterate.ts'
import { checkDeferredOnPostgres, controlRefused, parseTransactionControl } from '../sql.ts'
import { checkForeignKeys, isWithoutTransaction, probeByBegin, readOnlySwitch } from '../sqlite-control.ts'
import { mysqlErrorTraits, notFromServer, postgresErrorTraits, sqliteErrorTraits } from '../traits.ts'

/** Options of a Kysely handle. */
export interface KyselyOptions {
  /** Plugins of the handle, as in `new Kysely({ plugins })`. Default is none. */
  readonly plugins?: readonly KyselyPlugin[] | undefined
  /** Logging, as in `new Kysely({ log })`. Default is none. */
  readonly log?: LogConfig | undefined
}

// biome-ignore lint/suspicious/noExplicitAny: TypeScript can't infer the driver's pool beside an explicit `Tables`
type DialectOverPool = (pool: any) => Dialect

/**
 * The adapter for Kysely, over a driver adapter or over any dialect at all. Its native transactions are savepoints of the session.
 *
 * Over a driver (`pgAdapter`), whatever else is built on its pool shares the session and the transaction. Over a bare dialect
 * the pool is hidden: no error listener can be attached to its connections, so a connection that is cut while nothing runs on
 * it may be an uncaught exception, and a stream that runs on it then waits for ever unless its context has a `timeout`;
 * statements cannot be cancelled. There `connect()` gives a plain Kysely.
 *
 * @param driver a driver adapter, or a function that makes the dialect and gets the host if one is configured.
 * @param dialect makes the dialect over the pool of the driver.
 * @example
 * ```ts
 * import { defineDatabase } from 'ambient-db'
 * import { kyselyAdapter } from 'ambient-db/kysely'
 * import { pgAdapter } from 'ambient-db/pg'
 * import { PostgresDialect } from 'kysely'
 * import { Pool } from 'pg'
 *
 * interface Tables {
 *   users: { name: string }
 * }
 * export const main = defineDatabase({
 *   name: 'main',
 *   adapter: kyselyAdapter<Tables>(
 *     pgAdapter(() => new Pool({ connectionString: process.env.DATABASE_URL })),
 *     (pool) => new PostgresDialect({ pool }),
 *   ),
 * })
 * ```
 */
export function kyselyAdapter<Tables, Engine = unknown>(
  driver: Adapter<unknown, Engine, unknown>,
  dialect: DialectOverPool,
  options?: KyselyOptions,
): Adapter<Kysely<Tables>, Engine, unknown>
export function kyselyAdapter<Tables>(
  dialect: (host: string) => Dialect,
  options?: KyselyOptions,
): Adapter<Kysely<Tables>, Kysely<Tables>, DatabaseConnection>
export function kyselyAdapter<Tables>(
  first: Adapter<unknown, unknown, unknown> | ((host: string) => Dialect),
  second?: DialectOverPool | KyselyOptions,
  third?: KyselyOptions,
): unknown {
  if (typeof first === 'function') return overDialect<Tables>(first, second as KyselyOptions) // the overloads pair them
  const dialect = second as DialectOverPool // likewise
  return overDriver(first, (statements, pool) => handleOverPool<Tables>(statements, pool, dialect, third))
}

/**
 * One more handle over a driver database, in the same session and transaction.
 *
 * @example
 * ```ts
 * import { defineDatabase } from 'ambient-db'
 * import { kyselyHandle } from 'ambient-db/kysely'
 * import { pgAdapter } from 'ambient-db/pg'
 * import { PostgresDialect } from 'kysely'
 * import { Pool } from 'pg'
 *
 * const main = defineDatabase({ name: 'main', adapter: pgAdapter(() => new Pool()) })
 * export const db = kyselyHandle<{ users: { name: string } }>(main, (pool) => new PostgresDialect({ pool }))
 * ```
 */
export function kyselyHandle<Tables>(
  database: AmbientDatabase<unknown, unknown>,
  dialect: DialectOverPool,
  options?: KyselyOptions,
): Kysely<Tables> {
  return handleOver(database, (statements, pool) => handleOverPool(statements, pool, dialect, options))
}

/** A dialect and what Kysely makes of it. */
interface Parts {
  readonly dialect: Dialect
  readonly driver: Driver
  readonly adapter: DialectAdapter
  readonly compiler: QueryCompiler
  /** A plain Kysely over the same driver: it initialises the driver once, logs, and guards an only connection. */
  readonly kysely: Kysely<unknown>
}

function takeApart(dialect: Dialect, log: LogConfig | undefined, adapter = dialect.createAdapter()): Parts {
  const driver = dialect.createDriver()
  const compiler = dialect.createQueryCompiler()
  const shared: Dialect = {
    createDriver: () => driver,
    createAdapter: () => adapter,
    createQueryCompiler: () => compiler,
    createIntrospector: (db) => dialect.createIntrospector(db),
  }
  return { dialect, driver, adapter, compiler, kysely: new Kysely({ dialect: shared, ...(log && { log }) }) }
}

/** Takes a connection out of a plain Kysely until `release` is called. */
function takeConnection(kysely: Kysely<unknown>): Promise<{ connection: DatabaseConnection; release: () => void }> {
  return new Promise((resolve, reject) => {
    kysely
      .getExecutor()
      .provideConnection((connection) => new Promise<void>((release) => resolve({ connection, release })))
      .catch(reject)
  })
}

/** Sessions always have a connection each as far as Kysely knows; the session itself makes them wait. */
function withManyConnections(adapter: () => DialectAdapter): DialectAdapter {
  return new Proxy({} as DialectAdapter, {
    get: (_, key) => (key === 'supportsMultipleConnections' ? true : Reflect.get(adapter(), key)),
  })
}

/** A handle whose connections are those of a driver adapter, each wrapped once by the dialect. */
function handleOverPool<Tables>(
  statements: Statements<unknown>,
  pool: unknown,
  dialect: DialectOverPool,
  options: KyselyOptions = {},
): Kysely<Tables> {
  const wrapped = new WeakMap<object, DatabaseConnection>()
  let lent: unknown
  let wrapping: Promise<unknown> = Promise.resolve()
  let made: Parts | undefined
  const parts = () => {
    if (made) return made
    // Whichever way a dialect takes a connection from its pool (pg, mysql2), it gets the one that is lent.
    const ways: Record<PropertyKey, unknown> = {
      connect: async () => lent,
      getConnection: (callback: (error: null, connection: unknown) => void) => callback(null, lent),
    }
    const lending = new Proxy(pool as object, { get: (target, key) => ways[key] ?? Reflect.get(target, key) })
    ways.pool = lending // of a promise pool: the pool with callbacks
    const own = dialect(lending)
    const adapter = own.createAdapter()
    made = takeApart(
      own,
      options.log,
      withManyConnections(() => adapter),
    )
    return made
  }
  const wrap = (connection: object): DatabaseConnection | Promise<DatabaseConnection> => {
    const known = wrapped.get(connection)
    if (known) return known
    const wrapper = wrapping.then(async () => {
      lent = connection
      const { connection: own } = await detach(() => takeConnection(parts().kysely)) // never released: the session does that
      wrapped.set(connection, own)
      return own
    })
    wrapping = wrapper.catch(() => {})
    return wrapper
  }
  return createKysely(statements, parts, (connection) => wrap(connection as object), options)
}

/** An adapter that begins and ends through the driver of a dialect. */
function overDialect<Tables>(
  factory: (host: string) => Dialect,
  options: KyselyOptions = {},
): Adapter<Kysely<Tables>, Kysely<Tables>, DatabaseConnection> {
  const byHost = new Map<string | undefined, Parts>()
  const byEngine = new WeakMap<Kysely<Tables>, Parts>()
  const byConnection = new WeakMap<DatabaseConnection, Parts & { release: () => void }>()
  const partsFor = (host: string | undefined) => {
    const known = byHost.get(host)
    if (known) return known
    const made = takeApart(callFactory(factory, host), options.log)
    byHost.set(host, made)
    return made
  }
  const partsOf = (connection: DatabaseConnection) => byConnection.get(connection) as Parts & { release: () => void } // set by acquire
  const setReadOnly = readOnlySwitch(ask)
  const compile = ({ compiler }: Parts): QueryCompiler['compileQuery'] => compiler.compileQuery.bind(compiler)
  let latest: Parts | undefined
  const traitsOf = (parts: Parts | undefined) =>
    parts?.adapter instanceof SqliteAdapter
      ? sqliteErrorTraits
      : parts?.adapter instanceof PostgresAdapter
        ? postgresErrorTraits
        : parts?.adapter instanceof MysqlAdapter
          ? mysqlErrorTraits
          : notFromServer

  return {
    capabilities: (engine) => capabilitiesOf(byEngine.get(engine) as Parts), // set by createEngine
    createEngine(host) {
      // Parts that are an engine already are about to be closed (a host that was left), or of another database.
      if (byEngine.has(partsFor(host).kysely as unknown as Kysely<Tables>)) byHost.delete(host)
      const parts = partsFor(host)
      latest = parts
      const engine = parts.kysely as unknown as Kysely<Tables> // the same object; only the user knows its tables
      byEngine.set(engine, parts)
      return engine
    },
    async closeEngine(engine) {
      for (const [host, parts] of byHost) if (parts === byEngine.get(engine)) byHost.delete(host)
      await engine.destroy()
    },
    async acquire(engine) {
      const { connection, release } = await takeConnection(engine as unknown as Kysely<unknown>) // tables play no part here
      byConnection.set(connection, { ...(byEngine.get(engine) as Parts), release }) // set by createEngine
      return connection
    },
    async release(engine, connection, broken) {
      const { adapter, driver, release } = partsOf(connection)
      if (!broken) return release()
      if (adapter instanceof MysqlAdapter && connection.killSession) {
        const control: ControlConnectionProvider = (consumer) => engine.getExecutor().provideConnection(consumer)
        void connection
          .killSession(control)
          .catch(() => {})
          .finally(release) // its driver discards nothing by itself
        return
      }
      // A driver discards a connection on which ROLLBACK fails, so it is shown a failure; one that does not discard it gets
      // it back when ROLLBACK is answered, which a statement that still runs may hold up for long.
      const discard = async () => {
        await driver.rollbackTransaction(failing(connection, broken)).catch(() => {})
        await driver.rollbackTransaction(connection).catch(() => {})
        release()
      }
      void discard()
    },
    async begin(connection, settings) {
      const { driver, adapter } = partsOf(connection)
      if (settings.deferrable !== undefined) throw unsupported('`deferrable` is not known to Kysely dialects.')
      if (adapter instanceof SqliteAdapter) {
        await ask(connection, settings.readOnly ? 'begin' : 'begin immediate')
        if (settings.readOnly) await setReadOnly(connection, true)
      } else {
        await driver.beginTransaction(connection, toKysely(settings))
      }
    },
    async commit(connection) {
      await setReadOnly(connection, false)
      try {
        await partsOf(connection).driver.commitTransaction(connection)
        return 'committed'
      } catch (error) {
        if (isAbortedTransactionError(error)) return 'rolled-back'
        throw error
      }
    },
    async rollback(connection) {
      const { driver, adapter } = partsOf(connection)
      await setReadOnly(connection, false)
      try {
        await driver.rollbackTransaction(connection)
      } catch (error) {
        if (!(adapter instanceof SqliteAdapter && isWithoutTransaction(error))) throw error
      }
    },
    async savepoint(connection, name) {
      const parts = partsOf(connection)
      await parts.driver.savepoint?.(connection, name, compile(parts))
    },
    async rollbackTo(connection, name) {
      const parts = partsOf(connection)
      await parts.driver.rollbackToSavepoint?.(connection, name, compile(parts))
    },
    async releaseSavepoint(connection, name) {
      const parts = partsOf(connection)
      await parts.driver.releaseSavepoint?.(connection, name, compile(parts))
    },
    async checkDeferred(connection) {
      const { adapter } = partsOf(connection)
      if (adapter instanceof PostgresAdapter) await ask(connection, checkDeferredOnPostgres)
      else if (adapter instanceof SqliteAdapter) await checkForeignKeys((sql) => ask(connection, sql))
    },
    async probeTransaction(connection, error) {
      if (partsOf(connection).adapter instanceof MysqlAdapter) return probeMysql(connection, error)
      return probeByBegin((sql) => ask(connection, sql))
    },
    traits: (error) => traitsOf(latest)(error),
    createHandle: (statements) =>
      createKysely<Tables, DatabaseConnection>(
        statements,
        () => partsFor(statements.host()),
        (connection) => connection,
        options,
      ),
  }
}

/** Runs a text; resolves with its rows. */
async function ask(connection: DatabaseConnection, sql: string): Promise<readonly unknown[]> {
  return (await connection.executeQuery(CompiledQuery.raw(sql))).rows
}

/** MySQL keeps a savepoint only inside a transaction. */
async function probeMysql(connection: DatabaseConnection, error: unknown): Promise<'open' | 'none' | 'ended'> {
  await ask(connection, 'savepoint ambient_probe')
  try {
    await ask(connection, 'release savepoint ambient_probe')
    return 'open'
  } catch {
    return mysqlErrorTraits(error).retryable ? 'none' : 'ended'
  }
}

/** The connection as it looks when it is broken. */
function failing(connection: DatabaseConnection, error: Error): DatabaseConnection {
  return new Proxy(connection, {
    get(target, key) {
      if (key === 'executeQuery') return () => Promise.reject(error)
      const value: unknown = Reflect.get(target, key)
      return typeof value === 'function' ? value.bind(target) : value
    },
  })
}

/** What is known of a dialect; of an unknown one the conservative set. */
function capabilitiesOf({ adapter, driver }: Parts): Capabilities {
  const goesOn = adapter instanceof SqliteAdapter || adapter instanceof MysqlAdapter
  return {
    savepoints: driver.savepoint !== undefined && driver.rollbackToSavepoint !== undefined,
    streaming: goesOn || adapter instanceof PostgresAdapter,
    cancelling: false,
    failedStatementAborts: !goesOn,
    transactionStatus: false,
    pipelining: false,
    lossDetection: false,
    commitLookup: false,
    singleConnection: adapter.supportsMultipleConnections === false,
  }
}

function toKysely({ isolationLevel, readOnly }: TransactionSettings): KyselySettings {
  return {
    ...(isolationLevel && { isolationLevel }),
    ...(readOnly !== undefined && { accessMode: readOnly ? 'read only' : 'read write' }),
  }
}

function fromKysely({ isolationLevel, accessMode }: KyselySettings): TransactionSettings {
  if (isolationLevel === 'snapshot') throw unsupported("Isolation level 'snapshot' is not supported.")
  return { ...(isolationLevel && { isolationLevel }), ...(accessMode && { readOnly: accessMode === 'read only' }) }
}

function unsupported(what: string): AmbientError {
  return new AmbientError('AMBIENT_UNSUPPORTED', what)
}

/** A real Kysely, of which only the way to a connection and the transaction calls are ours. */
function createKysely<Tables, Connection>(
  statements: Statements<Connection>,
  parts: () => Parts,
  wrap: (connection: Connection) => DatabaseConnection | Promise<DatabaseConnection>,
  { plugins = [] }: KyselyOptions,
): Kysely<Tables> {
  const adapter = withManyConnections(() => parts().adapter)
  const compiler: QueryCompiler = { compileQuery: (node, id) => parts().compiler.compileQuery(node, id) }
  const provider: ConnectionProvider = {
    provideConnection: async (consumer) => new AmbientConnection(statements, wrap).lend(consumer),
  }
  const dialect: Dialect = {
    createDriver: () => ambientDriver,
    createAdapter: () => adapter,
    createQueryCompiler: () => compiler,
    createIntrospector: (db) => parts().dialect.createIntrospector(db),
  }
  const executor = new AmbientExecutor(compiler, adapter, provider, plugins)
  return new Kysely<Tables>({ config: { dialect }, dialect, driver: ambientDriver, executor })
}

/** Lends a connection that it got from elsewhere as a new one, so that each transaction on it has an async scope of its own. */
class AmbientExecutor extends DefaultQueryExecutor {
  readonly #compiler: QueryCompiler
  readonly #provider: ConnectionProvider

  constructor(
    compiler: QueryCompiler,
    adapter: DialectAdapter,
    provider: ConnectionProvider,
    plugins: readonly KyselyPlugin[],
  ) {
    super(compiler, adapter, provider, [...plugins])
    this.#compiler = compiler
    this.#provider = provider
  }

  override withConnectionProvider(provider: ConnectionProvider): AmbientExecutor {
    const lending: ConnectionProvider = {
      provideConnection: (consumer, options) =>
        provider.provideConnection((connection) => ambient(connection).inner().lend(consumer), options),
    }
    return this.#with(this.plugins, lending)
  }

  override withPlugin(plugin: KyselyPlugin): AmbientExecutor {
    return this.#with([...this.plugins, plugin])
  }

  override withPlugins(plugins: readonly KyselyPlugin[]): AmbientExecutor {
    return this.#with([...this.plugins, ...plugins])
  }

  override withPluginAtFront(plugin: KyselyPlugin): AmbientExecutor {
    return this.#with([plugin, ...this.plugins])
  }

  override withoutPlugins(): AmbientExecutor {
    return this.#with([])
  }

  #with(plugins: readonly KyselyPlugin[], provider = this.#provider): AmbientExecutor {
    return new AmbientExecutor(this.#compiler, this.adapter, provider, plugins)
  }
}

type ControlConnectionProvider = Parameters<NonNullable<DatabaseConnection['cancelQuery']>>[0]

/** A connection as Kysely sees it: each query finds its turn in the session, and a transaction is a block of it. */
class AmbientConnection<Connection> implements DatabaseConnection {
  readonly #statements: Statements<Connection>
  readonly #wrap: (connection: Connection) => DatabaseConnection | Promise<DatabaseConnection>
  readonly #outer: AmbientConnection<Connection> | undefined
  readonly #block: NativeBlock
  #begun = false
  #cancellable = false
  #running: DatabaseConnection | undefined

  constructor(
    statements: Statements<Connection>,
    wrap: (connection: Connection) => DatabaseConnection | Promise<DatabaseConnection>,
    outer?: AmbientConnection<Connection>,
  ) {
    this.#statements = statements
    this.#wrap = wrap
    this.#outer = outer
    this.#block = statements.createBlock()
  }

  /** The transaction that is open on it, or on the connection that it was lent from. */
  get block(): NativeBlock {
    return this.#begun || !this.#outer ? this.#block : this.#outer.block
  }

  async begin(settings: TransactionSettings): Promise<void> {
    await this.#block.begin(settings)
    this.#begun = true
  }

  /** The same connection for a consumer of its own. */
  inner(): AmbientConnection<Connection> {
    return new AmbientConnection(this.#statements, this.#wrap, this)
  }

  lend<Result>(consumer: (connection: DatabaseConnection) => Promise<Result>): Promise<Result> {
    return this.#block.enter(() => consumer(this))
  }

  async collectSessionInfo(): Promise<void> {
    this.#cancellable = true // which connection it is about, only the turn of the query shows
  }

  async cancelQuery(provider: ControlConnectionProvider): Promise<void> {
    await this.#running?.cancelQuery?.(provider)
  }

  async killSession(provider: ControlConnectionProvider): Promise<void> {
    await this.#running?.killSession?.(provider)
  }

  executeQuery<Row>(query: CompiledQuery): Promise<QueryResult<Row>> {
    if (parseTransactionControl(query.sql)) return Promise.reject(controlRefused(this.#statements.name))
    return this.#statements.run((connection) => {
      const wrapped = this.#wrap(connection)
      if (wrapped instanceof Promise) return wrapped.then((ready) => this.#execute<Row>(ready, query))
      return this.#execute<Row>(wrapped, query)
    }, this.block)
  }

  #execute<Row>(connection: DatabaseConnection, query: CompiledQuery): Promise<QueryResult<Row>> {
    if (!this.#cancellable) return connection.executeQuery<Row>(query)
    this.#running = connection
    const collected = connection.collectSessionInfo?.() ?? Promise.resolve()
    return collected.then(() => connection.executeQuery<Row>(query))
  }

  streamQuery<Row>(query: CompiledQuery, chunkSize: number): AsyncIterableIterator<QueryResult<Row>> {
    const start = async (connection: Connection) => (await this.#wrap(connection)).streamQuery<Row>(query, chunkSize)
    return iterate(this.#statements, start, this.block)
  }
}

/** Turns Kysely's transaction calls into those of the session's blocks. */
const ambientDriver: Driver = {
  init: async () => {},
  acquireConnection: async () => {
    throw unsupported('Connections come from the session.')
  },
  beginTransaction: async (connection, settings) => ambient(connection).begin(fromKysely(settings)),
  commitTransaction: (connection) => ambient(connection).block.commit(),
  rollbackTransaction: (connection) => ambient(connection).block.rollback(),
  savepoint: (connection, name) => ambient(connection).block.savepoint(name),
  rollbackToSavepoint: (connection, name) => ambient(connection).block.rollbackTo(name),
  releaseSavepoint: (connection, name) => ambient(connection).block.releaseSavepoint(name),
  releaseConnection: async () => {},
  destroy: async () => {
    throw unsupported('The ambient handle cannot be destroyed; `shutdown()` of the database closes the engine.')
  },
}

function ambient(connection: DatabaseConnection): AmbientConnection<unknown> {
  return connection as AmbientConnection<unknown> // the only connections that the executor provides
}
