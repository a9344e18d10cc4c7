import type { Sequelize, TransactionOptions } from 'sequelize'
import { type Adapter, callFactory, type NativeBlock, type Statements, type TransactionSettings } from '../adapter.ts'
import { detach } from '../context.ts'
import { AmbientError, isAmbientError } from '../errors.ts'
import { controlRefused, parseTransactionControl } from '../sql.ts'
import { notFromServer } from '../traits.ts'

/**
 * The adapter for Sequelize 6, with its dialects `postgres` (on `pg`) and `mysql` (on `mysql2`). The handle is a Sequelize for models
 * to be defined on, of which every query finds the session when it runs; `db.transaction()`, with a callback or without, is a
 * savepoint of the session.
 *
 * @param factory makes the Sequelize whose pool the sessions take their connections from; gets the host if one is configured. It is
 *   called when the first model is defined, connects to nothing then, and defines no models itself.
 * @example
 * ```ts
 * import { defineDatabase, newContext } from 'ambient-db'
 * import { sequelizeAdapter } from 'ambient-db/sequelize'
 * import { DataTypes, Sequelize } from 'sequelize'
 *
 * const main = defineDatabase({
 *   name: 'main',
 *   adapter: sequelizeAdapter(() => new Sequelize(process.env.DATABASE_URL ?? 'postgres://localhost/app', { logging: false })),
 * })
 * const Visit = main.db.define('visit', { path: DataTypes.TEXT })
 * await newContext(() => Visit.create({ path: '/' }))
 * ```
 */
export function sequelizeAdapter<Engine extends Sequelize>(
  factory: (host: string) => Engine,
): Adapter<Engine, Engine, object> {
  const byHost = new Map<string | undefined, Engine>()
  const engines = new WeakSet<Engine>()
  const servers = new WeakMap<object, Server>()
  const parts = new WeakMap<object, Part>()
  let latest: Server | undefined
  let defined = false
  const engineFor = (host: string | undefined) => {
    const known = byHost.get(host)
    if (known) return known
    const made = detach(() => callFactory(factory, host))
    if (inside(made).modelManager.models.length > 0) {
      throw unsupported(
        'The factory defined models, which would bypass the session: define them on `db` of the database.',
      )
    }
    byHost.set(host, made)
    return made
  }
  const serverOf = (engine: Engine) => servers.get(engine) as Server // createEngine has set it
  const of = (connection: object) => (servers.get(connection) as Server).driver // acquire has set it
  return {
    capabilities: (engine) => ({ ...serverOf(engine).driver.capabilities(serverOf(engine).pool), streaming: false }),
    async createEngine(host) {
      // One that is an engine already is about to be closed (a host that was left), or of another database.
      if (engines.has(engineFor(host))) byHost.delete(host)
      const engine = engineFor(host)
      engines.add(engine)
      latest = await makeServer(inside(engine))
      servers.set(engine, latest)
      return engine
    },
    async closeEngine(engine) {
      for (const [host, each] of byHost) if (each === engine) byHost.delete(host)
      await engine.close()
    },
    async acquire(engine, onLost) {
      const server = serverOf(engine)
      const connection = await server.driver.acquire(server.pool, onLost)
      servers.set(connection, server)
      return connection
    },
    release: (engine, connection, broken) => of(connection).release(serverOf(engine).pool, connection, broken),
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
    identifyTransaction: async (connection) => of(connection).identifyTransaction?.(connection),
    lookUpTransaction: async (engine, id, signal) =>
      serverOf(engine).driver.lookUpTransaction?.(serverOf(engine).pool, id, signal) ?? 'unknown',
    cancel: async (engine, connection) => of(connection).cancel?.(serverOf(engine).pool, connection),
    traits: (error) => (latest?.driver.traits ?? notFromServer)(parentOf(error) ?? error), // `retry` asks about wrapped ones
    createHandle(statements) {
      const models = defined ? 'none' : 'its own' // after the first one, each is of a session
      defined = true
      const engine = () => engineFor(statements.host())
      const manager = () => inside(engine()).connectionManager
      return lazy(() => ambientSequelize(engine(), manager, statements, parts, models))
    },
  }
}

/** An object that is made when it is first looked into: the factory is not to be called when the database is defined. */
function lazy<Made extends object>(make: () => Made): Made {
  let known: Made | undefined
  const made = () => {
    known ??= make()
    return known
  }
  return new Proxy({} as Made, {
    get: (_, key) => (key === 'then' ? undefined : Reflect.get(made(), key)), // it may be awaited before there is a host
    set: (_, key, value) => Reflect.set(made(), key, value),
    has: (_, key) => Reflect.has(made(), key),
    getPrototypeOf: () => Reflect.getPrototypeOf(made()),
  })
}

/** The engine as the adapter of its driver sees it. */
interface Server {
  readonly driver: Adapter<unknown, unknown, object>
  /** What the driver takes for its pool. */
  readonly pool: unknown
}

/** How the adapters of the drivers get along with connections that Sequelize makes. */
async function makeServer({ connectionManager: manager, options }: Inside): Promise<Server> {
  const never = () => {
    throw new Error('The pool is that of Sequelize.')
  }
  let last: RawConnection | undefined
  const take = (done: (error: unknown, connection?: object) => void) =>
    manager.getConnection({}).then(
      (connection) => {
        last = pooled(manager, connection)
        done(null, connection)
      },
      (error) => done(error),
    )
  if (options.dialect === 'postgres' && !options.native) {
    const { pgAdapter } = await import('./pg.ts')
    const pool = {
      connect: take,
      get options() {
        return last?.connectionParameters ?? {}
      },
      Client: manager.lib.Client,
    }
    return { driver: pgAdapter(never) as Adapter<unknown, unknown, object>, pool } // it takes of a pool what this one has
  }
  if (options.dialect === 'mysql') {
    const { mysql2Adapter } = await import('./mysql2.ts')
    const pool = {
      pool: {
        getConnection: take,
        get config() {
          return { connectionConfig: last?.config }
        },
      },
    }
    return { driver: mysql2Adapter(never) as Adapter<unknown, unknown, object>, pool } // likewise
  }
  const what = options.native ? 'pg-native' : `The dialect '${options.dialect}' of Sequelize`
  throw unsupported(`${what} is not supported: 'postgres' and 'mysql' are, on pg and mysql2.`)
}

/** Gives a connection of Sequelize the ends that connections of the driver's own pool have. */
function pooled(manager: ConnectionManager, connection: RawConnection): RawConnection {
  if (connection.release) return connection
  const { destroy } = connection
  const discard = () => {
    manager.destroyConnection(connection).catch(() => {}) // it is gone either way
    const socket = connection.stream ?? connection.connection?.stream
    socket?.destroy() // a farewell could wait for ever
  }
  return Object.assign(connection, {
    release: (broken?: Error) => (broken ? discard() : manager.releaseConnection(connection)),
    ...(destroy && {
      destroy() {
        destroy.call(connection)
        discard()
      },
    }),
  })
}

/** What is used of a connection: one of pg's or of mysql2's. */
interface RawConnection {
  release?(broken?: Error): void
  destroy?(): void
  readonly stream?: { destroy(): void }
  readonly connection?: { readonly stream?: { destroy(): void } }
  readonly connectionParameters?: object
  readonly config?: object
}

interface ConnectionManager {
  readonly lib: { readonly Client: unknown }
  getConnection(options: object): Promise<RawConnection>
  releaseConnection(connection: object): void
  destroyConnection(connection: object): Promise<void>
  _refreshDynamicOIDs?(connection?: unknown): Promise<void>
}

/** What is used of a Sequelize; most of it is not in its types. */
interface Inside {
  readonly options: { readonly dialect: string; readonly native: boolean }
  readonly connectionManager: ConnectionManager
  readonly dialect: object
  readonly queryInterface: object
  readonly modelManager: { readonly models: readonly unknown[]; readonly constructor: unknown }
  readonly constructor: unknown
  query(sql: unknown, options?: QueryOptions): Promise<unknown>
  hasHook(name: string): boolean
}

interface QueryOptions {
  readonly transaction?: object | null | undefined
}

/** What is used of its class. */
interface SequelizeClass {
  readonly Transaction: new (sequelize: object, options?: object) => NativeTransaction
  readonly _cls?: { get(key: string): object | undefined; set(key: string, value: unknown): void }
  _clsRun<Result>(work: () => Promise<Result>): Promise<Result>
}

/** What is used of its transactions. */
interface NativeTransaction {
  readonly id: string
  readonly name: string
  readonly options: TransactionOptions
  readonly parent?: object
  finished?: string
  setDeferrable(): Promise<unknown>
  _clearCls(): void
}

function inside(sequelize: object): Inside {
  return sequelize as Inside
}

/** What a transaction of Sequelize is in its session. */
interface Part {
  readonly statements: Statements<object>
  /** None where it only takes part in what is open. */
  readonly block: NativeBlock | undefined
  /** It has no callback, by which what belongs to it could be told. */
  readonly unscoped: boolean
}

type Act = (connection: Sender) => Promise<unknown>
type Sender = Record<'query' | 'execute', (...args: unknown[]) => unknown>

/** What Sequelize takes for a connection: the turn of one query in the session. */
class Turn {
  readonly uuid: string | undefined
  readonly #statements: Statements<object>
  readonly #block: NativeBlock | undefined
  #reserved: Promise<unknown> | undefined
  /** What is sent in the turn that was taken, if anything. */
  #arrive: (act?: Act) => void = () => {}

  constructor(statements: Statements<object>, part: Part | undefined, uuid?: string) {
    this.#statements = part?.statements ?? statements
    this.#block = part?.block
    this.uuid = uuid
  }

  /** Takes the turn now, for what Sequelize sends a moment later: what was started before `commit()` is part of it. */
  reserve(): void {
    const arrived = new Promise<Act | undefined>((resolve) => {
      this.#arrive = resolve
    })
    this.#reserved = this.#run(async (connection) => (await arrived)?.(connection))
    this.#reserved.catch(() => {}) // whoever sends gets it
  }

  /** Gives the turn back if nothing was sent in it. */
  leave(): void {
    this.#arrive()
  }

  query(...args: unknown[]): unknown {
    return this.#send('query', args)
  }

  execute(...args: unknown[]): unknown {
    return this.#send('execute', args)
  }

  #send(method: keyof Sender, args: unknown[]): unknown {
    const callback = args.pop() as (error: unknown, answer?: unknown) => void // Sequelize gives one
    const text = String((args[0] as { sql?: unknown }).sql ?? args[0])
    let unsent: { error: unknown } | undefined
    const act: Act = async (connection) => {
      let settle: (error: unknown, answer?: unknown) => void = () => {}
      const answer = new Promise<unknown>((resolve, reject) => {
        settle = (error, result) => (error ? reject(error) : resolve(result))
      })
      try {
        connection[method](...args, settle)
      } catch (error) {
        unsent = { error } // bad arguments, of which the server heard nothing
        return undefined
      }
      return answer
    }
    const refuse = (error: unknown) =>
      callback(isAmbientError(error) ? new Refusal(undefined, { cause: error }) : error)
    const answer = parseTransactionControl(text)
      ? Promise.reject(controlRefused(this.#statements.name))
      : this.#act(act)
    answer.then((result) => (unsent ? callback(unsent.error) : callback(null, result)), refuse)
    return { setMaxListeners() {} } // of the command of mysql2
  }

  #act(act: Act): Promise<unknown> {
    const reserved = this.#reserved
    this.#reserved = undefined
    this.#arrive(act)
    return reserved ?? this.#run(act)
  }

  #run(act: Act): Promise<unknown> {
    return this.#statements.run((connection) => act(connection as Sender), this.#block)
  }
}

/** A refusal of the session while it is in the hands of Sequelize, which notes the query and its values on errors and wraps them. */
class Refusal extends Error {}

/** What Sequelize has wrapped. */
function parentOf(error: unknown): unknown {
  return (error as { parent?: unknown } | null | undefined)?.parent
}

function reveal(error: unknown): never {
  const parent = parentOf(error)
  throw parent instanceof Refusal ? parent.cause : error
}

/** The turn that the query which is being called has taken. */
let taken: Turn | undefined

/** A Sequelize like `engine`, but what it takes for connections are turns in the session. */
function ambientSequelize<Engine extends Sequelize>(
  engine: Engine,
  manager: () => ConnectionManager,
  statements: Statements<object>,
  parts: WeakMap<object, Part>,
  models: 'its own' | 'none',
): Engine {
  const own = inside(engine)
  const Class = own.constructor as SequelizeClass
  const handle: Engine = Object.create(engine)
  const connectionManager = Object.assign(Object.create(own.connectionManager), {
    sequelize: handle,
    getConnection: async () => take(),
    releaseConnection() {},
    async destroyConnection() {},
    _refreshDynamicOIDs: () => manager()._refreshDynamicOIDs?.(handle), // its parsers are those of the connections
  })
  const queryInterface = Object.assign(Object.create(own.queryInterface), { sequelize: handle })
  const dialect = Object.assign(Object.create(own.dialect), { sequelize: handle, connectionManager, queryInterface })

  function take(part?: Part, uuid?: string): Turn {
    const turn = taken ?? new Turn(statements, part, uuid)
    taken = undefined
    return turn
  }

  function partOf(transaction: object | null | undefined): Part | undefined {
    if (!transaction) return undefined
    const part = parts.get(transaction)
    if (!part) throw unsupported('A transaction from elsewhere cannot be used through the ambient Sequelize.')
    if ((transaction as NativeTransaction).finished) throw transactionEnded(statements)
    return part
  }

  /** A transaction that is a block of the session. */
  class AmbientTransaction extends Class.Transaction {
    readonly #part: Part
    /** The savepoint that it is in the block of an unscoped one. */
    readonly #savepoint: string | undefined
    #ending: 'commit' | 'rollback' | undefined
    #failed = false

    constructor(options: object, part: Part, nested: boolean) {
      super(handle, options)
      this.#part = part
      this.#savepoint = nested ? this.name : undefined
      parts.set(this, part)
    }

    get connection(): Turn {
      return take(this.#part, this.id)
    }

    async prepareEnvironment(scoped: boolean): Promise<void> {
      const { block } = this.#part
      if (this.#savepoint) await block?.savepoint(this.#savepoint)
      else await block?.begin(settingsOf(this.options))
      try {
        await this.setDeferrable()
      } catch (error) {
        await this.rollback()
        throw error
      }
      if (scoped) Class._cls?.set('transaction', this)
    }

    async commit(): Promise<void> {
      const { block, unscoped } = this.#part
      this.#end('commit')
      if (unscoped) this.finished = 'commit' // else what is joined may still name it
      try {
        await (this.#savepoint ? block?.releaseSavepoint(this.#savepoint) : block?.commit())
      } catch (error) {
        this.#failed = true
        throw error
      } finally {
        this.#over('commit')
      }
    }

    async rollback(): Promise<void> {
      if (this.#failed) return // its COMMIT has, and told why
      const { block } = this.#part
      this.#end('rollback')
      this.finished = 'rollback'
      try {
        if (!this.#savepoint) return await block?.rollback()
        await block?.rollbackTo(this.#savepoint)
        await block?.releaseSavepoint(this.#savepoint)
      } finally {
        this.#over('rollback')
      }
    }

    afterCommit(work: (transaction: this) => unknown): void {
      partOf(this)
      this.#part.statements.afterCommit(() => work.call(this, this), this.#part.block)
    }

    #end(way: 'commit' | 'rollback'): void {
      if (this.#ending) throw transactionEnded(statements)
      this.#ending = way
    }

    #over(way: string): void {
      this.finished = way
      if (!this.#savepoint) this.#part.block?.release()
      this._clearCls()
    }
  }

  async function transact(
    options: QueryOptions,
    work?: (transaction: AmbientTransaction) => unknown,
  ): Promise<unknown> {
    const around = partOf(options.transaction)
    // Model.findOrCreate begins one that it never ends, or only on the way out: it takes part in what is open.
    const joins = 'where' in options
    const nested = !joins && around?.unscoped === true
    const block = joins || nested ? around?.block : (around?.statements ?? statements).createBlock()
    const part = { statements: around?.statements ?? statements, block, unscoped: !joins && (nested || !work) }
    const begin = async () => {
      const transaction = new AmbientTransaction(options, part, nested)
      await transaction.prepareEnvironment(work !== undefined)
      if (!work) return transaction
      let result: unknown
      try {
        result = await work(transaction)
      } catch (error) {
        await transaction.rollback().catch(() => {}) // it has ended by hand
        throw error
      }
      await transaction.commit()
      return result
    }
    const scoped = () => Class._clsRun(begin)
    const inside = () => (!work ? begin() : nested ? scoped() : (block as NativeBlock).enter(scoped))
    return around?.block && !around.unscoped && !joins ? around.block.enter(inside) : inside()
  }

  Object.assign(handle, {
    connectionManager,
    dialect,
    queryInterface,
    async query(sql: unknown, options?: QueryOptions) {
      const { transaction = Class._cls?.get('transaction') } = options ?? {}
      const turn = new Turn(statements, partOf(transaction), (transaction as NativeTransaction | undefined)?.id)
      if (!own.hasHook('beforeQuery')) turn.reserve() // else it would wait for itself: hooks may query
      taken = turn
      try {
        const answer = own.query.call(handle, sql, { ...options, transaction })
        taken = undefined
        return await answer.catch(reveal)
      } finally {
        turn.leave()
      }
    },
    transaction: (options: unknown, work: never) =>
      typeof options === 'function' ? transact({}, options as never) : transact({ ...(options as object) }, work),
    async close() {
      throw unsupported('The ambient Sequelize cannot be closed; `shutdown()` closes the real one.')
    },
  })
  const noModels = () => {
    const what = 'Models find the session of the context. In another one, give them a transaction of its `db`.'
    throw unsupported(what)
  }
  if (models === 'none') {
    Object.defineProperties(handle, { models: { get: noModels }, modelManager: { get: noModels } })
  } else {
    const Manager = own.modelManager.constructor as new (sequelize: object) => object
    Object.assign(handle, { models: {}, modelManager: new Manager(handle) })
  }
  return handle
}

const levels = ['read uncommitted', 'read committed', 'repeatable read', 'serializable'] as const

function settingsOf({ isolationLevel: level, readOnly }: TransactionOptions): TransactionSettings {
  const isolationLevel = levels.find((each) => each === level?.toLowerCase())
  return { ...(isolationLevel && { isolationLevel }), ...(readOnly && { readOnly }) }
}

function transactionEnded({ name }: Statements<object>): AmbientError {
  const what = 'A transaction of Sequelize was used after it had ended.'
  return new AmbientError('AMBIENT_BLOCK_ENDED', what, { database: name })
}

function unsupported(what: string): AmbientError {
  return new AmbientError('AMBIENT_UNSUPPORTED', what)
}
