import type { Readable, Transform } from 'node:stream'
import knex, { type Knex } from 'knex'
import { type Adapter, callFactory, type NativeBlock, type Statements, type TransactionSettings } from '../adapter.ts'
import { detach, isThenable } from '../context.ts'
import { byDriver, type ChosenDriver } from '../driver-choice.ts'
import { AmbientError, isAmbientError } from '../errors.ts'
import { controlRefused, parseTransactionControl } from '../sql.ts'
import { sqliteControl } from '../sqlite-control.ts'

/**
 * The adapter for Knex, with its clients `pg`, `mysql2` and `better-sqlite3`. The handle is a Knex of which every query finds the
 * session when it runs; `db.transaction()`, with a callback or without, is a savepoint of the session. Objection works over it:
 * `Model.knex(db)`.
 *
 * @param factory makes the Knex whose pool the sessions take their connections from; gets the host if one is configured.
 * @example
 * ```ts
 * import { defineDatabase, newContext } from 'ambient-db'
 * import { knexAdapter } from 'ambient-db/knex'
 * import knex from 'knex'
 *
 * const main = defineDatabase({
 *   name: 'main',
 *   adapter: knexAdapter(() => knex({ client: 'pg', connection: process.env.DATABASE_URL ?? 'postgres://localhost/app' })),
 * })
 * await newContext(() => main.db('visits').insert({ path: '/' }))
 * ```
 */
export function knexAdapter<Engine extends Knex>(factory: (host: string) => Engine): Adapter<Engine, Engine, object> {
  const byHost = new Map<string | undefined, Engine>()
  const engines = new WeakSet<Engine>()
  const servers = new WeakMap<object, Server>()
  const engineFor = (host: string | undefined) => {
    const known = byHost.get(host)
    if (known) return known
    const made = detach(() => callFactory(factory, host))
    byHost.set(host, made)
    return made
  }
  const serverOf = (engine: Engine) => served.get(engine.client) as Server // createEngine has set it
  const driver = byDriver(serverOf)
  return {
    ...driver,
    async createEngine(host) {
      // One that is an engine already is about to be closed (a host that was left), or of another database.
      if (engines.has(engineFor(host))) byHost.delete(host)
      const engine = engineFor(host)
      engines.add(engine)
      await serve(engine.client)
      return engine
    },
    async closeEngine(engine) {
      for (const [host, each] of byHost) if (each === engine) byHost.delete(host)
      await engine.destroy()
    },
    async acquire(engine, onLost) {
      const connection = await driver.acquire(engine, onLost)
      servers.set(connection, serverOf(engine))
      return connection
    },
    createHandle: (statements) =>
      createKnex(
        statements,
        () => engineFor(statements.host()),
        (connection) => servers.get(connection),
      ) as Engine, // whose methods it has; what else the user gave it is his own
  }
}

/** The engine as the adapter of its driver sees it. */
interface Server extends ChosenDriver {
  readonly client: KnexClient
  /** What Knex streams rows from. */
  streaming(statements: Statements<object>): object | undefined
}

const serving = new WeakMap<KnexClient, Promise<Server>>()
/** What has come of `serving`. */
const served = new WeakMap<KnexClient, Server>()

function serve(client: KnexClient): Promise<Server> {
  const known = serving.get(client)
  if (known) return known
  const making = makeServer(client).then((server) => {
    served.set(client, server)
    return server
  })
  serving.set(client, making)
  return making
}

/** How the adapters of the drivers get along with connections that Knex makes. */
async function makeServer(client: KnexClient): Promise<Server> {
  const take = async (): Promise<object> => pooled(client, await client.acquireConnection())
  const never = () => {
    throw new Error('The pool is that of Knex.')
  }
  if (client.driverName === 'pg') {
    const { pgAdapter } = await import('./pg.ts')
    const pool = {
      connect: (done: Done) => take().then((connection) => done(undefined, connection), done),
      get options() {
        return client.connectionSettings
      },
      get Client() {
        return client.driver.Client
      },
    }
    const driver = pgAdapter(never) as Adapter<unknown, unknown, object> // it takes of a pool what this one has
    return { client, driver, pool, streaming: (statements) => driver.createHandle(statements) as object }
  }
  if (client.driverName === 'mysql2') {
    const { mysql2Adapter } = await import('./mysql2.ts')
    let connectionConfig: unknown
    const getConnection = (done: Done) =>
      take().then((connection) => {
        connectionConfig = (connection as { config?: unknown }).config
        done(null, connection)
      }, done)
    const pool = {
      pool: {
        getConnection,
        get config() {
          return { connectionConfig }
        },
      },
    }
    const driver = mysql2Adapter(never) as Adapter<unknown, unknown, object> // likewise
    const streaming = (statements: Statements<object>) => (driver.createHandle(statements) as { pool: object }).pool
    return { client, driver, pool, streaming }
  }
  if (client.driverName === 'better-sqlite3') {
    return { client, driver: sqliteDriver(client), pool: client, streaming: () => undefined }
  }
  const what = `The Knex client '${client.driverName}' is not supported: 'pg', 'mysql2' and 'better-sqlite3' are.`
  throw new AmbientError('AMBIENT_UNSUPPORTED', what)
}

type Done = (error: unknown, connection?: object) => void

/** Gives a connection of Knex the ends that connections of the driver's own pool have. */
function pooled(client: KnexClient, connection: object): object {
  if ('release' in connection) return connection
  const { end, destroy } = connection as { end(): unknown; destroy?(): void }
  const giveBack = (error?: unknown) => {
    if (error) Object.assign(connection, { __knex__disposed: error }) // so Knex uses it no more
    void client.releaseConnection(connection)
  }
  return Object.assign(connection, {
    release(broken?: Error) {
      if (broken) void end.call(connection)
      giveBack(broken)
    },
    ...(destroy && {
      destroy() {
        destroy.call(connection)
        giveBack(new Error('The connection was destroyed.'))
      },
    }),
  })
}

/** SQLite, by text through Knex. */
function sqliteDriver(client: KnexClient): Adapter<unknown, unknown, object> {
  const never = () => {
    throw new Error('Knex makes the engine and the handle.')
  }
  const ask = async (connection: object, sql: string) => {
    const { response } = (await client._query(connection, { sql, bindings: [] })) as { response: unknown[] }
    return response
  }
  return {
    ...sqliteControl(ask, { streaming: false }),
    createEngine: never,
    closeEngine: never,
    createHandle: never,
    acquire: () => client.acquireConnection(),
    release: (_, connection) => client.releaseConnection(connection),
  }
}

/** What a query is before and after it ran. */
interface Query {
  sql: string
  bindings?: unknown[]
  timeout?: number
  cancelOnTimeout?: boolean
}

/** What is used of a Knex client; the types of Knex leave much of it open. */
interface KnexClient {
  readonly driverName: string
  readonly driver: { readonly Client: unknown }
  readonly connectionSettings: object
  readonly version?: unknown
  readonly isMariaDB?: unknown
  acquireConnection(): Promise<object>
  releaseConnection(connection: object): Promise<void>
  runner(builder: unknown): { connection?: object }
  transaction(container: Container, config: TransactionConfig, outer?: KnexTransaction): unknown
  query(connection: object, query: Query | string): Promise<unknown>
  _query(connection: object, query: Query): Promise<unknown>
  _stream(connection: object, query: Query, stream: Transform, options: unknown): Promise<unknown>
  cancelQuery(connection: object): Promise<unknown>
  initializePool(): void
  destroy(): Promise<void>
  on(event: string, listener: (...args: unknown[]) => void): unknown
  emit(event: string, ...args: unknown[]): unknown
  /** What the queries of a transaction run on. */
  lease?: Lease
}

type Container = (transactor: Transactor) => unknown

interface TransactionConfig {
  connection?: unknown
  isolationLevel?: string
  readOnly?: boolean
  doNotRejectOnRollback?: boolean
}

/** The Knex of a transaction. */
interface Transactor {
  readonly client: KnexClient
  readonly context: KnexContext
  isCompleted(): boolean
}

interface KnexContext {
  client: KnexClient
  userParams: object
  transaction(container?: unknown, config?: TransactionConfig): unknown
  withUserParams(params: object): unknown
}

/** A transaction of Knex, by which its callback and its Knex are driven. */
interface KnexTransaction {
  readonly txid: string
  readonly doNotRejectOnRollback?: boolean
  isCompleted(): boolean
  _completed: boolean
  _resolver(value?: unknown): void
  _rejecter(error: unknown): void
  begin(): Promise<unknown>
  savepoint(): Promise<unknown>
  commit(connection: object, value: unknown): Promise<unknown>
  release(connection: object, value: unknown): Promise<unknown>
  rollback(connection: object, error: unknown): Promise<unknown>
  rollbackTo(connection: object, error: unknown): Promise<unknown>
}

/** What Knex takes for a connection: the session, or a transaction in it. */
class Lease {
  /** The transaction that is open on it. */
  block: NativeBlock | undefined
  /** Whether the transaction has no callback, by which what belongs to it could be told. */
  unscoped = false
  /** Its queries that have no answer yet. */
  readonly pending: Set<Pending> = new Set()
}

interface Pending {
  /** When it is to be cancelled, if at all. */
  readonly due: number
  /** The connection that it runs on. */
  raw?: object
  withdrawn?: boolean
}

const events = ['start', 'query', 'query-error', 'query-response']

/** A real Knex, whose clients (one per host) take the session for their pool. */
function createKnex(
  statements: Statements<object>,
  engine: () => Knex,
  serverOf: (connection: object) => Server | undefined,
): Knex {
  const handle = knex({ client: knex.Client })
  const context = (handle as unknown as { context: KnexContext }).context // not in the types of Knex
  const clients = new WeakMap<Knex, KnexClient>()
  Object.defineProperty(context, 'client', {
    get() {
      const own = engine()
      const known = clients.get(own)
      if (known) return known
      const made = ambientClient(own.client, statements, serverOf)
      for (const event of events) {
        made.on(event, (...args) => {
          own.client.emit(event, ...args)
          handle.emit(event, ...args)
        })
      }
      clients.set(own, made)
      return made
    },
  })
  markUnscoped(context)
  context.withUserParams = (params) => {
    const copy = createKnex(statements, engine, serverOf)
    for (const event of events) for (const listener of handle.listeners(event)) copy.on(event, listener as () => void)
    return Object.assign(copy, { userParams: params })
  }
  return handle
}

/** Whether the transaction that begins now has no callback. */
let unscoped = false

/** Lets the client know which transactions have no callback: it is given one by Knex for each. */
function markUnscoped(context: KnexContext): void {
  const transaction = context.transaction.bind(context)
  context.transaction = (container, config) => {
    unscoped = typeof container !== 'function'
    try {
      return transaction(container, config)
    } finally {
      unscoped = false
    }
  }
}

/** A refusal of the session while it is in the hands of Knex, which puts the query and its values before the message of errors. */
class Refusal extends Error {}

function reveal(error: unknown): never {
  throw error instanceof Refusal ? error.cause : error
}

/** A client like `own`, but its connections are leases of the session. */
function ambientClient(
  own: KnexClient,
  statements: Statements<object>,
  serverOf: (connection: object) => Server | undefined,
): KnexClient {
  const Dialect = own.constructor as new () => KnexClient
  class AmbientClient extends Dialect {
    /** With its lease from the start, so that it queries at once: what was started before `commit()` is part of it. */
    override runner(builder: unknown) {
      return Object.assign(super.runner(builder), { connection: this.lease ?? new Lease() })
    }

    override async acquireConnection(): Promise<object> {
      return this.lease ?? new Lease()
    }

    override async releaseConnection(): Promise<void> {}

    override query(connection: object, query: Query | string): Promise<unknown> {
      return super.query(connection, query).catch(reveal)
    }

    override async _query(connection: object, query: Query): Promise<unknown> {
      const lease = leaseOf(connection)
      if (!query.sql) throw new Error('The query is empty')
      const due = query.cancelOnTimeout && query.timeout ? performance.now() + query.timeout : Number.POSITIVE_INFINITY
      const pending: Pending = { due }
      lease.pending.add(pending)
      try {
        if (parseTransactionControl(query.sql)) throw controlRefused(statements.name)
        return await statements.run((raw) => {
          if (pending.withdrawn) throw new Error('The query was cancelled before its turn.')
          pending.raw = raw
          return super._query(raw, query)
        }, lease.block)
      } catch (error) {
        throw isAmbientError(error) ? new Refusal(undefined, { cause: error }) : error
      } finally {
        lease.pending.delete(pending)
      }
    }

    override async _stream(connection: object, query: Query, stream: Transform, options: unknown): Promise<unknown> {
      const lease = leaseOf(connection)
      const server = served.get(own) ?? (await serve(own))
      const facade = server.streaming(untilRead(statements, stream, lease.block)) ?? lease
      return super._stream(facade, query, stream, options)
    }

    override transaction(container: Container, config: TransactionConfig, outer?: KnexTransaction): unknown {
      const start: Start = (work, settings) => super.transaction(work, settings, outer) as KnexTransaction
      try {
        if (outer?.isCompleted()) throw transactionEnded(statements)
        return transact(statements, this.lease, start, container, config)
      } catch (error) {
        return Promise.reject(error)
      }
    }

    override async cancelQuery(connection: object): Promise<unknown> {
      const [first] = [...leaseOf(connection).pending].sort((one, other) => one.due - other.due)
      if (first?.raw) return serverOf(first.raw)?.client.cancelQuery(first.raw)
      if (first) first.withdrawn = true
      return undefined
    }

    override initializePool(): void {
      throw unsupported('The ambient Knex has no pool of its own.')
    }

    override async destroy(): Promise<void> {
      throw unsupported('The ambient Knex cannot be destroyed; `shutdown()` closes the real one.')
    }
  }
  const client: KnexClient = Object.create(AmbientClient.prototype)
  Object.assign(client, own, { _events: undefined, _eventsCount: 0 }) // all but the listeners
  // What Knex learns when it connects.
  for (const key of ['version', 'isMariaDB', 'connectionSettings'] as const) {
    Object.defineProperty(client, key, { get: () => own[key] })
  }
  return client
}

/** Lets what streams to `stream` keep the session until that was read or left, however much of it is buffered. */
function untilRead(statements: Statements<object>, stream: Transform, block?: NativeBlock): Statements<object> {
  let rows: Readable | undefined
  stream.once('pipe', (source: Readable) => {
    rows = source
  })
  return {
    ...statements,
    run: (statement) => statements.run(statement, block),
    async openStream(destroyRows) {
      let ended = false
      let finish: (() => void) | undefined
      const end = (error: Error) => {
        ended = true
        destroyRows(error)
        if (stream.writableEnded) {
          if (stream.listenerCount('error') === 0) stream.on('error', () => {}) // whoever reads on gets it; it ends no process
          stream.destroy(error)
        }
        finish?.()
      }
      const open = await statements.openStream(end, block)
      const { destroy } = stream
      let left = stream.destroyed
      stream.destroy = (error) => {
        left = true
        open.closing() // now, and not when Knex hears of it: until then others would be refused
        rows?.destroy()
        return destroy.call(stream, error)
      }
      const close = (error?: unknown) => {
        if (ended || error || left) return open.close(error)
        finish = () => open.close()
        stream.once('close', finish)
      }
      // The rows may be all in the buffer, and are closed then.
      return { ...open, close, closing: () => left && open.closing() }
    },
  }
}

type Start = (container: Container, config: TransactionConfig) => KnexTransaction

/** Starts a transaction of Knex as a block of the session; `around` is what the transaction around it runs on. */
function transact(
  statements: Statements<object>,
  around: Lease | undefined,
  start: Start,
  container: Container,
  config: TransactionConfig,
): unknown {
  const free = unscoped
  unscoped = false
  const lease = config.connection === undefined ? new Lease() : leaseOf(config.connection)
  // What has no callback cannot be entered, so what is nested in it is a savepoint by name.
  const outer = around?.unscoped ? around.block : undefined
  const block = outer ?? statements.createBlock()
  const before = { block: lease.block, unscoped: lease.unscoped }
  Object.assign(lease, { block, unscoped: free || outer !== undefined })
  let ended = false
  const over = () => {
    ended = true
    Object.assign(lease, before)
    if (!outer) block.release()
  }
  const work: Container = (transactor) => {
    const { client } = transactor
    const query = client.query.bind(client)
    client.query = async (...args) => {
      if (transactor.isCompleted()) throw transactionEnded(statements)
      return query(...args)
    }
    client.lease = lease
    markUnscoped(transactor.context)
    const result = container(transactor)
    if (!isThenable(result) && !outer && !transactor.isCompleted()) block.leaveOpen() // it ends by hand: Objection's `transaction.start`
    return result
  }
  const begin = () => {
    const settings = settingsOf(config)
    const trx = start(work, { ...config, connection: lease })
    const begun = outer ? undefined : block.begin(settings) // at once, so that it counts as issued
    begun?.catch(() => {}) // whoever waits for the transaction gets it
    trx.begin = trx.savepoint = async () => {
      try {
        await (begun ?? block.savepoint(trx.txid))
      } catch (error) {
        trx._completed = true
        over()
        throw error
      }
    }
    trx.commit = trx.release = async (_, value) => {
      trx._completed = true
      try {
        await (outer ? outer.releaseSavepoint(trx.txid) : block.commit())
      } catch (error) {
        trx._rejecter(error)
        throw error // Knex itself keeps it from whoever commits
      } finally {
        over()
      }
      trx._resolver(value)
    }
    trx.rollback = trx.rollbackTo = async (_, error) => {
      trx._completed = true
      if (ended) return // its end has failed, and told why
      try {
        await (outer ? undo(outer, trx.txid) : block.rollback())
      } catch (failure) {
        trx._rejecter(error ?? failure)
        if (free) throw failure // of a callback nobody would take it
        return
      } finally {
        over()
      }
      if (error === undefined && trx.doNotRejectOnRollback) trx._resolver()
      else trx._rejecter(error ?? new Error('Transaction rejected with non-error: undefined')) // as Knex says
    }
    return trx
  }
  const inside = () => (outer || free ? begin() : block.enter(begin))
  return around?.block && !outer ? around.block.enter(inside) : inside()
}

function transactionEnded({ name }: Statements<object>): AmbientError {
  return new AmbientError('AMBIENT_BLOCK_ENDED', 'A transaction of Knex was used after it had ended.', {
    database: name,
  })
}

async function undo(block: NativeBlock, savepoint: string): Promise<void> {
  await block.rollbackTo(savepoint)
  await block.releaseSavepoint(savepoint)
}

function leaseOf(connection: unknown): Lease {
  if (connection instanceof Lease) return connection
  throw unsupported('A connection from elsewhere cannot be used through the ambient Knex.')
}

const levels = ['read uncommitted', 'read committed', 'repeatable read', 'serializable'] as const

function settingsOf({ isolationLevel: level, readOnly }: TransactionConfig): TransactionSettings {
  const isolationLevel = levels.find((each) => each === level)
  if (level && !isolationLevel) throw unsupported(`Isolation level '${level}' is not supported.`)
  return { ...(isolationLevel && { isolationLevel }), ...(readOnly && { readOnly }) }
}

function unsupported(what: string): AmbientError {
  return new AmbientError('AMBIENT_UNSUPPORTED', what)
}
