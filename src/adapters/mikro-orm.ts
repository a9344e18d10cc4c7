import {
  Cascade,
  EntityManager,
  helper,
  Reference,
  TransactionContext,
  type TransactionOptions,
  TransactionPropagation,
  Utils,
} from '@mikro-orm/core'
import {
  type Adapter,
  callFactory,
  type NativeBlock,
  type Statements,
  type TransactionSettings,
  type UnitOfWork,
} from '../adapter.ts'
import { detach, isThenable } from '../context.ts'
import { byDriver, type ChosenDriver } from '../driver-choice.ts'
import { AmbientError } from '../errors.ts'
import { iterate } from '../iterate.ts'
import { controlRefused, parseTransactionControl } from '../sql.ts'
import { sqliteControl } from '../sqlite-control.ts'

/** What is used of a `MikroORM`. */
interface Orm {
  readonly em: EntityManager
  close(force?: boolean): Promise<unknown>
}

/**
 * The adapter for MikroORM, with its drivers for PostgreSQL and SQLite. The handle is an `EntityManager` that stands for the one of
 * the session: each session has an identity map of its own, what is pending is flushed before COMMIT and forgotten by a rollback.
 * `em.transactional()` and `em.begin()` are savepoints of the session; forks, repositories, query builders and `em.getKysely()` work
 * in it.
 *
 * @param factory makes the `MikroORM` at first use; gets the host if one is configured. With one that is made at once (`new MikroORM`)
 *   the handle works from the start; with `MikroORM.init`, what is not asynchronous (`create`, `persist`) needs `await connect()`
 *   before, at the start of the application.
 * @example
 * ```ts
 * import { defineDatabase, newContext } from 'ambient-db'
 * import { mikroOrmAdapter } from 'ambient-db/mikro-orm'
 * import { defineEntity, MikroORM, p } from '@mikro-orm/postgresql'
 *
 * const User = defineEntity({ name: 'User', properties: { id: p.integer().primary(), name: p.string() } })
 * const main = defineDatabase({
 *   name: 'main',
 *   adapter: mikroOrmAdapter(() => new MikroORM({ entities: [User], clientUrl: process.env.DATABASE_URL ?? '' })),
 * })
 * await newContext(() => main.db.create(User, { name: 'Ada' })) // flushed and committed at the end
 * ```
 */
export function mikroOrmAdapter<Engine extends Orm>(
  factory: (host: string) => Engine | Promise<Engine>,
): Adapter<Engine['em'], Engine, object> {
  const byHost = new Map<string | undefined, Made<Engine>>()
  const servers = new WeakMap<object, Server>()
  const wrap = (connection: object) => (servers.get(connection) as Server).wrap(connection) // acquire has set it
  const madeFor = (host: string | undefined): Made<Engine> => {
    const known = byHost.get(host)
    if (known) return known
    const orm = detach(() => callFactory(factory, host))
    const made: Made<Engine> = { server: undefined, making: Promise.resolve(orm), taken: false }
    const serve = (ready: Engine) => {
      made.server = new Server(ready)
      return ready
    }
    if (isThenable<Engine>(orm)) made.making = Promise.resolve(orm).then(serve)
    else serve(orm)
    made.making.catch(() => {
      if (byHost.get(host) === made) byHost.delete(host)
    })
    byHost.set(host, made)
    return made
  }
  const engines = new WeakMap<Engine, Server>()
  const serverOf = (engine: Engine) => engines.get(engine) as Server // createEngine has set it
  const driver = byDriver((engine: Engine) => serverOf(engine).chosen as ChosenDriver) // `open` has set it
  return {
    ...driver,
    async createEngine(host) {
      // One that is an engine already is about to be closed (a host that was left), or of another database.
      if (madeFor(host).taken) byHost.delete(host)
      const made = madeFor(host)
      made.taken = true
      const engine = await made.making
      const server = made.server as Server // `making` has set it
      await server.open()
      engines.set(engine, server)
      return engine
    },
    async closeEngine(engine) {
      for (const [host, { server }] of byHost) if (server === engines.get(engine)) byHost.delete(host)
      await engine.close()
      await serverOf(engine).close()
    },
    async acquire(engine, onLost) {
      const connection = await driver.acquire(engine, onLost)
      const server = serverOf(engine)
      servers.set(connection, server)
      try {
        await server.prepare(connection)
      } catch (error) {
        await driver.release(engine, connection, error as Error)
        throw error
      }
      return connection
    },
    createHandle: (statements) => createHandle(statements, wrap, () => madeFor(statements.host())) as Engine['em'], // of its methods each is one of the engine's own
  }
}

/** An ORM that was made for a host: at first use of the handle, or of the engine. */
interface Made<Engine> {
  /** There once the ORM is. */
  server: Server | undefined
  /** It is an engine of the database. */
  taken: boolean
  making: Promise<Engine>
}

type Driver = ChosenDriver['driver']

/** What is used of the Kysely that MikroORM runs on: a copy of its own. */
interface Kysely {
  getExecutor(): {
    readonly adapter: object
    compileQuery(node: never, queryId: never): Query
    provideConnection<Result>(consumer: (connection: QueryConnection) => Promise<Result>): Promise<Result>
  }
}

interface Query {
  readonly sql: string
}

interface QueryConnection {
  executeQuery(query: Query): Promise<{ readonly rows: unknown[] }>
  streamQuery(query: Query, chunkSize: number): AsyncIterableIterator<unknown>
}

/** What is used of a connection of MikroORM's, which is a pool. */
interface SqlConnection {
  connected: boolean
  connect(options: { skipOnConnect: true }): Promise<unknown>
  getClient(): Kysely
  getNativeClient(): Promise<unknown>
  createKyselyDialect(options: object): Dialect
}

interface Dialect {
  createDriver(): {
    init(options: object): Promise<void>
    acquireConnection(options?: object): Promise<QueryConnection>
  }
}

/** An engine as the adapter of its driver sees it. */
class Server {
  readonly em: EntityManager
  readonly client: Kysely
  /** The class of the managers of sessions. */
  readonly Manager: ManagerClass
  readonly #connection: SqlConnection
  readonly #wrapped = new WeakMap<object, QueryConnection>()
  /** Errors that are what they are to be: refusals of the session, what a hook has thrown. */
  readonly settled = new WeakSet<object>()
  /** Its driver and pool, once it is open. */
  chosen: ChosenDriver | undefined
  #wrap: (connection: object) => Promise<QueryConnection> = async (connection) => connection as QueryConnection

  constructor({ em }: Orm) {
    this.em = em
    this.#connection = em.getConnection() as unknown as SqlConnection // of the drivers for SQL
    this.client = this.#connection.getClient()
    // Statements of sessions connect to nothing by themselves, nor when their host was left and its engine closed.
    Object.defineProperty(this.#connection, 'connected', { get: () => true, set() {} })
    this.Manager = managerClass(em.constructor as typeof EntityManager)
    keepErrors(em.getDriver() as unknown as ErrorConverter, this.settled)
  }

  /** An error of the database is MikroORM's own from the start, so that it is the same for whoever sees it. */
  readonly rethrow = (error: Error): never => {
    if (error instanceof TypeError || error instanceof RangeError) throw error // nothing was sent
    throw (this.em.getDriver() as unknown as ErrorConverter).convertException(error)
  }

  async open(): Promise<void> {
    await this.#connection.connect({ skipOnConnect: true })
    const native = (await this.#connection.getNativeClient()) as object
    if ('totalCount' in native) await this.#servePostgres(native)
    else if ('pragma' in native) this.#serveSqlite()
    else throw new AmbientError('AMBIENT_UNSUPPORTED', 'MikroORM is supported with PostgreSQL and better-sqlite3.')
  }

  async #servePostgres(pool: object): Promise<void> {
    const { pgAdapter } = await import('./pg.ts')
    this.chosen = { driver: pgAdapter(neverMade) as Driver, pool } // it takes of a pool what this one has
    // One more dialect of the same settings, whose pool never connects: it is lent the clients of sessions.
    const Connection = this.#connection.constructor as new (config: unknown) => SqlConnection
    const spare = new Connection(this.em.config)
    const driver = spare.createKyselyDialect({}).createDriver()
    spare.connected = true
    const lender = (await spare.getNativeClient()) as { connect(): Promise<object> }
    await driver.init({})
    this.#wrap = (client) => {
      lender.connect = async () => client
      return driver.acquireConnection() // which connects at once
    }
  }

  #serveSqlite(): void {
    this.chosen = { driver: sqliteDriver(this.client), pool: this.client }
  }

  /** Ends what MikroORM takes for never used, because its own Kysely was not. */
  async close(): Promise<void> {
    const pool = this.chosen?.pool as { ending?: boolean; end?(): Promise<void> } // that of pg, or a Kysely
    if (pool.ending === false) await pool.end?.()
  }

  async prepare(connection: object): Promise<void> {
    this.#wrapped.set(connection, await this.#wrap(connection))
  }

  wrap(connection: object): QueryConnection {
    return this.#wrapped.get(connection) as QueryConnection // prepare has set it
  }
}

function neverMade(): never {
  throw new Error('MikroORM makes the engine and the handle.')
}

/** SQLite, by text through the Kysely of MikroORM, whose only connection is taken out of it. */
function sqliteDriver(client: Kysely): Driver {
  const ask = async (connection: object, sql: string) =>
    (await (connection as QueryConnection).executeQuery(rawQuery(sql))).rows
  const releases = new WeakMap<object, () => void>()
  return {
    ...sqliteControl(ask, { streaming: true }),
    createEngine: neverMade,
    closeEngine: neverMade,
    createHandle: neverMade,
    acquire: () =>
      new Promise<object>((resolve, reject) => {
        client
          .getExecutor()
          .provideConnection(
            (connection) =>
              new Promise<void>((release) => {
                releases.set(connection, release)
                resolve(connection)
              }),
          )
          .catch(reject)
      }),
    release: (_, connection) => releases.get(connection)?.(),
  }
}

function rawQuery(sql: string): Query {
  return { sql, query: { kind: 'RawNode', sqlFragments: [sql], parameters: [] }, parameters: [] } as Query
}

interface ErrorConverter {
  convertException(error: Error): Error
}

/** MikroORM makes a copy of whatever a statement fails with: not of what is `settled`, and others name their original. */
function keepErrors(driver: ErrorConverter, settled: WeakSet<object>): void {
  const convert = driver.convertException.bind(driver)
  driver.convertException = (error) => {
    if (settled.has(error)) return error
    const converted = convert(error)
    if (converted !== error && !converted.cause) {
      Object.defineProperty(converted, 'cause', { value: error, configurable: true, writable: true })
    }
    return converted
  }
}

/** What MikroORM takes for an open transaction: a Kysely of its own kind, of which only the way to a connection is ours. */
interface Transaction {
  savepoint(name: string): Command<Transaction>
  releaseSavepoint(name: string): Command<void>
  rollbackToSavepoint(name: string): Command<void>
}

interface Command<Result> {
  execute(): Promise<Result>
}

function command<Result>(execute: () => Promise<Result>): Command<Result> {
  return { execute }
}

type Wrap = (connection: object) => QueryConnection

/** The way of a session, or of a transaction in it, to the database. */
interface Way {
  readonly statements: Statements<object>
  readonly server: Server
  readonly wrap: Wrap
  readonly block?: NativeBlock
}

function transactionOn(way: Way): Transaction {
  const { client } = way.server
  const executor = client.getExecutor()
  const adapter = new Proxy(executor.adapter, {
    get: (target, key) => (key === 'supportsMultipleConnections' ? true : Reflect.get(target, key)), // the session makes them wait
  })
  const dialect = {
    createDriver: () => sessionDriver(way),
    createAdapter: () => adapter,
    createQueryCompiler: () => ({
      compileQuery: (node: never, queryId: never) => executor.compileQuery(node, queryId),
    }),
    createIntrospector: () => {
      throw unsupported('Tables are introspected by the engine, `await connect()`.')
    },
  }
  const Made = client.constructor as new (config: object) => object
  const { block } = way
  return Object.assign(new Made({ dialect }), {
    // Only in a transaction that was begun without a callback: others are blocks of their own.
    savepoint: (name: string) =>
      command(async () => {
        await block?.savepoint(name)
        return Object.assign(transactionOn(way), {
          releaseSavepoint: () => command(async () => block?.releaseSavepoint(name)),
          rollbackToSavepoint: () =>
            command(async () => {
              await block?.rollbackTo(name)
              await block?.releaseSavepoint(name)
            }),
        })
      }),
    releaseSavepoint: () => command(async () => block?.commit()),
    rollbackToSavepoint: () => command(async () => block?.rollback()),
  })
}

/** Connections as Kysely sees them: each query finds its turn in the session, and a transaction of Kysely's is a block of it. */
function sessionDriver({ statements, server, wrap, block }: Way) {
  class SessionConnection {
    own: NativeBlock | undefined
    get block(): NativeBlock | undefined {
      return this.own ?? block
    }

    async executeQuery(query: Query) {
      if (parseTransactionControl(query.sql)) throw controlRefused(statements.name)
      const answer = statements.run(
        (connection) => wrap(connection).executeQuery(query).catch(server.rethrow),
        this.block,
      )
      return answer.catch((error) => {
        server.settled.add(error)
        throw error
      })
    }

    streamQuery(query: Query, chunkSize: number): AsyncIterableIterator<unknown> {
      return iterate(statements, async (connection) => wrap(connection).streamQuery(query, chunkSize), this.block)
    }
  }
  return {
    init: async () => {},
    acquireConnection: async () => new SessionConnection(),
    async beginTransaction(connection: SessionConnection, settings: TransactionOptions) {
      const own = statements.createBlock()
      await own.begin(settingsOf(settings))
      connection.own = own
    },
    commitTransaction: async (connection: SessionConnection) => connection.own?.commit(),
    rollbackTransaction: async (connection: SessionConnection) => connection.own?.rollback(),
    releaseConnection: async (connection: SessionConnection) => connection.own?.release(),
    destroy: async () => {
      throw unsupported('The ambient Kysely cannot be destroyed; `shutdown()` closes the engine.')
    },
  }
}

const refusedPropagations: readonly unknown[] = [
  TransactionPropagation.REQUIRES_NEW,
  TransactionPropagation.NOT_SUPPORTED,
]

/** The managers of sessions are of the class of the user's, of which the transactions are ours. Their forks are of the same class. */
function managerClass(Base: typeof EntityManager) {
  return class SessionManager extends Base {
    home: Home | undefined
    /** Of the one that stands for those of all sessions. */
    currentHome: (() => Home) | undefined
    /** The transaction of `begin`. */
    begun: NativeBlock | undefined
    /** What the transaction that is about to begin is to be. */
    offered: Offer | undefined

    // biome-ignore lint/suspicious/noExplicitAny: declared as `this`, of which it is not always the same
    override getContext(validate?: boolean): any {
      if (this.home || !this.currentHome) return this.home ? this : super.getContext(validate)
      const home = this.currentHome()
      const inner = TransactionContext.getEntityManager(this.name)
      return inner instanceof SessionManager && inner.home === home ? inner : home.em
    }

    /** The manager that is meant, if it is not this one. */
    get other(): SessionManager | undefined {
      const meant = this.getContext(false)
      return meant === this ? undefined : (meant as SessionManager) // `getContext` finds no others
    }

    override fork(options: Parameters<EntityManager['fork']>[0] = {}): this {
      const other = this.other
      if (other) return other.fork(options) as this
      const fork = super.fork({ ...options, useContext: false })
      fork.home = this.home
      if (!fork.getTransactionContext()) fork.arm()
      return fork
    }

    /** Makes the session its transaction. */
    arm(): void {
      if (this.home) super.setTransactionContext(this.home.transaction)
    }

    override getTransactionContext<Context>(): Context | undefined {
      return (this.offered as Context | undefined) ?? super.getTransactionContext<Context>()
    }

    override resetTransactionContext(): void {
      super.resetTransactionContext()
      ;(this.other ?? this).arm()
    }

    override persist<Entity extends object>(entity: Entity | Entity[]): this {
      this.home?.assertLive()
      return super.persist(entity as Entity)
    }

    override remove<Entity extends object>(entity: Entity | Entity[]): this {
      this.home?.assertLive()
      return super.remove(entity as Entity)
    }

    /** All of it or nothing, as it is without a session. */
    override async flush(): Promise<void> {
      const other = this.other
      if (other) return other.flush()
      const { home } = this
      if (!home || home.flushing || super.getTransactionContext() !== home.transaction) return super.flush()
      return home.inBlock({}, () => super.flush())
    }

    override async transactional<Result>(
      work: (em: this) => Result | Promise<Result>,
      options: TransactionOptions = {},
    ): Promise<Result> {
      const other = this.other
      if (other) return other.transactional(work as (em: SessionManager) => Promise<Result>, options)
      const { home } = this
      const { propagation = TransactionPropagation.NESTED } = options
      if (refusedPropagations.includes(propagation)) {
        throw unsupported(
          `A transaction with propagation '${propagation}' would leave the session: use \`newContext\`.`,
        )
      }
      if (!home || this.begun || propagation !== TransactionPropagation.NESTED)
        return super.transactional(work, options)
      if (home.pending) await this.flush() // it is outside of the transaction
      return home.inBlock(settingsOf(options), (block) => {
        this.offered = { savepoint: () => command(async () => home.transactionOn(block)) }
        try {
          return super.transactional(work, { ...options })
        } finally {
          this.offered = undefined // it was taken at once
        }
      })
    }

    override async begin(options: Omit<TransactionOptions, 'ignoreNestedTransactions'> = {}): Promise<void> {
      const other = this.other
      if (other) return other.begin(options)
      const { home } = this
      if (!home) return super.begin(options)
      if (this.begun)
        throw new AmbientError('AMBIENT_TRANSACTION_OPEN', '`begin` was called in a transaction of `begin`.')
      const block = home.way.statements.createBlock()
      if (home.pending) await this.flush()
      await block.begin(settingsOf(options))
      this.begun = block
      const ctx: Offer = { savepoint: () => command(async () => home.transactionOn(block)) }
      await super.begin({ ...options, ctx: ctx as NonNullable<TransactionOptions['ctx']> })
    }

    override async commit(): Promise<void> {
      const other = this.other
      if (other) return other.commit()
      this.assertBegun('commit')
      await super.commit()
      this.endBegun()
    }

    override async rollback(): Promise<void> {
      const other = this.other
      if (other) return other.rollback()
      this.assertBegun('rollback')
      try {
        await super.rollback()
      } finally {
        this.endBegun()
      }
    }

    assertBegun(what: string): void {
      if (this.begun || !this.home) return
      const { name } = this.home.way.statements
      const text = `\`em.${what}()\` ends what \`em.begin()\` has begun, and nothing was; the session ends by \`${what}()\` of the database.`
      throw new AmbientError('AMBIENT_TRANSACTION_CONTROL', text, { database: name })
    }

    endBegun(): void {
      this.begun?.release()
      this.begun = undefined
      this.arm()
    }
  }
}

type ManagerClass = ReturnType<typeof managerClass>
type SessionManager = InstanceType<ManagerClass>

/** What stands for a transaction until MikroORM begins one in it. */
type Offer = Pick<Transaction, 'savepoint'>

/** What MikroORM knows in a session: its manager, with an identity map of its own. */
class Home implements UnitOfWork {
  readonly way: Way
  readonly em: SessionManager
  readonly transaction: Transaction
  /** The session flushes, and sees to it that all of it is kept or nothing. */
  flushing = false
  /** What rollbacks have detached, and how it was then. */
  readonly #detached = new Map<object, object>()

  constructor(way: Way) {
    this.way = way
    this.transaction = transactionOn(way)
    this.em = managerOf(way.server)
    this.em.home = this
    this.em.arm()
  }

  transactionOn(block: NativeBlock): Transaction {
    return transactionOn({ ...this.way, block })
  }

  assertLive(): void {
    this.way.statements.unitOfWork(() => this)
  }

  async inBlock<Result>(settings: TransactionSettings, work: (block: NativeBlock) => Promise<Result>): Promise<Result> {
    const block = this.way.statements.createBlock()
    return block.enter(async () => {
      try {
        await block.begin(settings)
        const result = await work(block)
        await block.commit() // unless MikroORM has done so
        return result
      } catch (error) {
        await block.rollback()
        throw error
      } finally {
        block.release()
      }
    })
  }

  get pending(): boolean {
    const uow = this.em.getUnitOfWork(false)
    if (uow.getPersistStack().size + uow.getRemoveStack().size + uow.getOrphanRemoveStack().size > 0) return true
    const known = new Set<unknown>(uow.getIdentityMap())
    return [...uow.getIdentityMap()].some((entity) => this.#isChanged(entity, known)) || this.#lost !== undefined
  }

  #isChanged(entity: object, known: ReadonlySet<unknown>): boolean {
    const { __meta: meta, __originalEntityData: original, __initialized: initialized } = helper(entity)
    if (original && Object.keys(this.#diff(entity, original)).length > 0) return true
    if (!initialized) return false
    return meta.relations.some(({ name, cascade }) => {
      const value = (entity as Record<string, object | undefined>)[name]
      if (Utils.isCollection(value)) return value.isDirty() || value.getItems(false).some((item) => !known.has(item))
      const other = value && Reference.unwrapReference(value)
      const cascades = cascade?.includes(Cascade.PERSIST) || cascade?.includes(Cascade.ALL)
      return cascades && Utils.isEntity(other) && !known.has(other)
    })
  }

  #diff(entity: object, original: object): object {
    const comparator = this.em.getComparator()
    return comparator.diffEntities(helper(entity).__meta.class, original, comparator.prepareEntity(entity))
  }

  /** What was changed after a rollback had detached it, so that nobody would store it. */
  get #lost(): object | undefined {
    const uow = this.em.getUnitOfWork(false)
    for (const [entity, before] of this.#detached) {
      if (Object.keys(this.#diff(entity, before)).length === 0) continue
      if (![...uow.getIdentityMap()].includes(entity)) return entity
    }
    return undefined
  }

  async flush(): Promise<void> {
    this.flushing = true
    try {
      await this.em.flush()
    } finally {
      this.flushing = false
    }
    const lost = this.#lost
    if (lost) {
      const what = `A ${helper(lost).__meta.className} was changed after a rollback had detached it, so the change cannot be stored.`
      throw new AmbientError('AMBIENT_TRANSACTION_ABORTED', what, { database: this.way.statements.name })
    }
    const uow = this.em.getUnitOfWork(false)
    const known = new Set<unknown>(uow.getIdentityMap())
    for (const entity of uow.getIdentityMap()) {
      if (this.#isChanged(entity, known)) this.#settle(entity)
    }
  }

  /** What the flush has seen and found nothing to send for is pending no more. */
  #settle(entity: object): void {
    const wrapped = helper(entity)
    wrapped.__originalEntityData = this.em.getComparator().prepareEntity(entity)
    for (const { name } of wrapped.__meta.relations) {
      const value = (entity as Record<string, object | undefined>)[name]
      if (Utils.isCollection(value)) value.setDirty(false)
    }
  }

  clear(): void {
    const comparator = this.em.getComparator()
    const uow = this.em.getUnitOfWork(false)
    for (const entity of uow.getIdentityMap()) {
      const wrapped = helper(entity)
      this.#detached.set(entity, comparator.prepareEntity(entity))
      wrapped.__managed = false
      delete wrapped.__originalEntityData // who persists it again is not to believe that its row is there
    }
    uow.clear()
  }
}

function managerOf({ em, Manager }: Server): SessionManager {
  const fork = em.fork({ disableContextResolution: true })
  return Object.setPrototypeOf(fork, Manager.prototype) // what its constructor makes is that of its base
}

/** What the handle has that is done at once: of the rest each is asynchronous. */
const immediate = ['createQueryBuilder', 'qb', 'getKysely']

function createHandle(statements: Statements<object>, wrap: Wrap, made: () => Made<unknown>): EntityManager {
  const roots = new WeakMap<Server, SessionManager>()
  const rootOf = (server: Server) => {
    const known = roots.get(server)
    if (known) return known
    const root = managerOf(server)
    const currentHome = () => statements.unitOfWork((own) => new Home({ statements: own, server, wrap }))
    root.currentHome = currentHome
    // At its call each counts as issued.
    for (const key of asyncMembers(root)) {
      const call = (...args: unknown[]) =>
        statements.enclose(async () => {
          const meant = root.getContext(false)
          return meant[key](...args)
        })
      Object.defineProperty(root, key, { value: call })
    }
    roots.set(server, root)
    return root
  }
  const memberOf = (server: Server, key: PropertyKey) => {
    const root = rootOf(server)
    const value: unknown = Reflect.get(root, key)
    return typeof value === 'function' && key !== 'constructor' ? value.bind(root) : value
  }
  let latest: Server | undefined
  return new Proxy(Object.create(EntityManager.prototype), {
    getPrototypeOf: () => latest?.Manager.prototype ?? EntityManager.prototype,
    get(_, key) {
      if (typeof key === 'symbol' || key === 'then') return undefined
      const { server, making } = made()
      latest = server
      if (server) return memberOf(server, key)
      const own: unknown = Reflect.get(EntityManager.prototype, key)
      if (immediate.includes(key) || (own !== undefined && !isAsync(own))) throw notReady(statements.name, key)
      const once = async (...args: unknown[]) => {
        await making
        return memberOf(made().server as Server, key)(...args) // `making` has set it
      }
      if (transactional.includes(key)) return once
      return (...args: unknown[]) => statements.enclose(() => once(...args))
    },
  })
}

/** Those come to their own transactions at once. */
const transactional = ['begin', 'commit', 'rollback', 'transactional', 'flush']

/** The names of asynchronous methods. */
function asyncMembers(manager: object): Set<string> {
  const names = new Set<string>()
  for (let each = Object.getPrototypeOf(manager); each; each = Object.getPrototypeOf(each)) {
    for (const name of Object.getOwnPropertyNames(each)) {
      if (!transactional.includes(name) && isAsync(Reflect.get(each, name, manager))) names.add(name)
    }
  }
  return names
}

function isAsync(value: unknown): boolean {
  return typeof value === 'function' && value.constructor.name === 'AsyncFunction'
}

function notReady(database: string, member: string): AmbientError {
  const what = `\`${member}\` of its handle was used before MikroORM was there: \`await connect()\` at the start, or make it by \`new MikroORM\`.`
  return new AmbientError('AMBIENT_UNSUPPORTED', what, { database })
}

const levels = ['read uncommitted', 'read committed', 'repeatable read', 'serializable'] as const

function settingsOf({ isolationLevel: level, readOnly }: TransactionOptions): TransactionSettings {
  const isolationLevel = levels.find((each) => each === level)
  if (level && !isolationLevel) throw unsupported(`Isolation level '${level}' is not supported.`)
  return { ...(isolationLevel && { isolationLevel }), ...(readOnly !== undefined && { readOnly }) }
}

function unsupported(what: string): AmbientError {
  return new AmbientError('AMBIENT_UNSUPPORTED', what)
}
