import { EventEmitter } from 'node:events'
import type { Readable } from 'node:stream'
import { Connection, createPool, PoolConnection, type Query, type ResultSetHeader } from 'mysql2'
import type { Pool } from 'mysql2/promise'
import { type Adapter, callFactory, type NativeBlock, type Statements, type TransactionSettings } from '../adapter.ts'
import { bindEmitter } from '../context.ts'
import { AmbientError } from '../errors.ts'
import { LeasedTransaction } from '../leased.ts'
import {
  controlRefused,
  parseTransactionControl,
  type TransactionControl,
  transactionModes,
  withoutLeading,
} from '../sql.ts'
import { mysqlErrorTraits } from '../traits.ts'

/**
 * The adapter for `mysql2`, on MySQL and MariaDB. The handle is a promise pool of which every query runs in the session, so
 * whatever is built on a pool can be built on it, also on the callback pool in its `pool`; a connection from its
 * `getConnection()` shares the session too, and its transaction is a savepoint. Rows are streamed by `db.pool.query(sql).stream()`.
 *
 * A failed statement does not abort the transaction, a deadlock ends it, and DDL commits it: the session notices the last two.
 *
 * @param factory makes the pool of `mysql2/promise` at first use; gets the host if one is configured.
 * @example
 * ```ts
 * import { defineDatabase, newContext } from 'ambient-db'
 * import { mysql2Adapter } from 'ambient-db/mysql2'
 * import { createPool } from 'mysql2/promise'
 *
 * const main = defineDatabase({
 *   name: 'main',
 *   adapter: mysql2Adapter(() => createPool({ uri: process.env.DATABASE_URL ?? 'mysql://localhost/app' })),
 * })
 * await newContext(() => main.db.execute('insert into visits (path) values (?)', ['/']))
 * ```
 */
export function mysql2Adapter<Engine extends Pool>(
  factory: (host: string) => Engine | Promise<Engine>,
): Adapter<Pool, Engine, PoolConnection> {
  let latest: Engine | undefined
  let ambient: CallbackPool | undefined
  const watches = new WeakMap<PoolConnection, Watch>()
  const watchOf = (connection: PoolConnection) => watches.get(connection) as Watch // acquire has set it
  const control = (connection: PoolConnection, text: string) => {
    const watch = watchOf(connection)
    watch.unclean ||= watch.transaction === 'ended' // it may hold table locks, say
    watch.transaction = 'none'
    return send(connection, text)
  }
  return {
    capabilities: () => ({
      savepoints: true,
      streaming: true,
      cancelling: true,
      failedStatementAborts: false,
      transactionStatus: true,
      pipelining: false,
      lossDetection: true,
      singleConnection: false,
      commitLookup: false,
    }),
    async createEngine(host) {
      const pool = await callFactory(factory, host)
      latest = pool
      if (ambient) forwardEvents(pool.pool, ambient)
      return pool
    },
    closeEngine: (pool) => pool.end(),
    acquire(pool, onLost) {
      return new Promise((resolve, reject) => {
        pool.pool.getConnection((error, connection) => {
          if (error) return reject(error)
          const watch = watches.get(connection) ?? watchConnection(connection)
          watches.set(connection, watch)
          watch.onLost = onLost
          resolve(connection)
        })
      })
    },
    release(_pool, connection, broken) {
      const watch = watchOf(connection)
      watch.onLost = undefined // an idle connection pins no session
      const unclean = watch.unclean || isOpen(watch) // COMMIT may have begun another one: completion_type = CHAIN
      if (!broken && !unclean) return connection.release()
      destroy(connection)
      const error = broken ?? new Error('The connection was left in an unknown state.')
      for (const callback of [...watch.waiting]) callback(error) // mysql2 forgets them
    },
    async begin(connection, { isolationLevel, readOnly, deferrable }) {
      if (deferrable !== undefined) throw unsupported('`deferrable` is not known to MySQL.')
      const modes = transactionModes({ ...(isolationLevel && { isolationLevel }) })
      if (modes) await send(connection, `SET TRANSACTION${modes}`) // of the next one; a ROLLBACK takes it back
      await send(connection, readOnly === undefined ? 'BEGIN' : `START TRANSACTION${transactionModes({ readOnly })}`)
      watchOf(connection).transaction = 'open'
    },
    async commit(connection) {
      await control(connection, 'COMMIT')
      return 'committed'
    },
    async rollback(connection) {
      watchOf(connection).leftovers = await leftoversOf(connection, await control(connection, 'ROLLBACK'))
    },
    async savepoint(connection, name) {
      await send(connection, `SAVEPOINT ${name}`)
    },
    async rollbackTo(connection, name) {
      const answer = await send(connection, `ROLLBACK TO SAVEPOINT ${name}`)
      watchOf(connection).leftovers = await leftoversOf(connection, answer)
    },
    async releaseSavepoint(connection, name) {
      await send(connection, `RELEASE SAVEPOINT ${name}`)
    },
    transactionStatus(connection) {
      const watch = watchOf(connection)
      return isOpen(watch) && watch.transaction !== 'ended' ? 'open' : 'none'
    },
    async probeTransaction(connection, error) {
      const watch = watchOf(connection)
      const hidden = watch.transaction === 'ended'
      watch.unclean ||= readOnlyServer.includes((error as { errno: number }).errno) // only errors of the server are asked about
      await send(connection, 'DO 0') // an error comes without the status, this answer with it
      if (hidden) return 'ended'
      if (isOpen(watch)) return 'open'
      if (!mysqlErrorTraits(error).retryable) return 'ended'
      watch.transaction = 'none'
      return 'none'
    },
    leftovers: (connection) => watchOf(connection).leftovers,
    cancel: (pool, connection) => killQuery(pool, connection),
    traits: mysqlErrorTraits,
    createHandle(statements) {
      const pool = ambientPool(statements, () => latest)
      ambient ??= pool
      return pool.promise()
    },
  }
}

/** The pool with callbacks that a promise pool wraps. */
type CallbackPool = Pool['pool']

/** What a connection has beside its types. */
interface Internals {
  readonly stream: { destroy(): void }
  handlePacket(packet?: { isEOF(): boolean; eofStatusFlags(): number }): void
}

function internals(connection: Connection): Internals {
  return connection as unknown as Internals
}

type Callback = (error: Error | null, ...answer: unknown[]) => void

/** A query before anybody asked for its rows. */
type Command = Query & EventEmitter

/** What the answers on a connection say about its transaction. */
interface Watch {
  /** The status behind the last answer. */
  flags: number
  /** Whether the transaction that `begin` opened is still that one; `'none'` while there is none of ours. */
  transaction: 'none' | 'open' | 'ended'
  /** It is not to be pooled: SQL of the user's has ended a transaction, and may have left anything behind, or the server is no use. */
  unclean: boolean
  /** What the last ROLLBACK could not undo. */
  leftovers: string | undefined
  /** Callbacks that have no answer yet. */
  readonly waiting: Set<Callback>
  onLost: ((error: Error) => void) | undefined
}

/** The server has become a replica, say: connections to it are of no use any more, and mysql2 pools none of them either. */
const readOnlyServer = [1290, 1836]

const inTransaction = 1 // SERVER_STATUS_IN_TRANS

function isOpen({ flags }: Watch): boolean {
  return (flags & inTransaction) !== 0
}

/** Reads the status that the server sends with each answer, and notices the loss of the connection. */
function watchConnection(connection: PoolConnection): Watch {
  const watch: Watch = {
    flags: 0,
    transaction: 'none',
    unclean: false,
    leftovers: undefined,
    waiting: new Set(),
    onLost: undefined,
  }
  const note = (flags: number) => {
    watch.flags = flags
    if (watch.transaction === 'open' && !isOpen(watch)) watch.transaction = 'ended'
  }
  const watched = internals(connection)
  const { handlePacket } = watched
  watched.handlePacket = (packet) => {
    if (packet?.isEOF()) note(packet.eofStatusFlags()) // behind rows
    handlePacket.call(watched, packet)
  }
  const query = connection.query as (...args: unknown[]) => Command
  const guard = (text: string, callback: Callback) => query.call(connection, text, callback)
  for (const method of ['query', 'execute'] as const) {
    const act = connection[method] as (...args: unknown[]) => Command
    const watching = (...args: unknown[]) => {
      const callback = callbackOf(args)
      const settle = (...answer: Parameters<Callback>) => {
        if (watch.waiting.delete(settle)) callback?.(...answer)
      }
      const guarded = callback && watch.transaction === 'open' && mayHideControl(textOf(args[0]))
      if (callback) args.splice(-1, 1, guarded ? guardTransaction(watch, guard, settle) : settle)
      let ok = false
      let command: Command
      try {
        if (callback) watch.waiting.add(settle)
        command = act.apply(connection, args)
      } catch (error) {
        watch.waiting.delete(settle)
        throw error
      }
      if (!callback) command.on('error', () => {}) // a stream that its reader has left does not listen any more
      command.on('fields', (fields: unknown) => {
        ok = fields === undefined // rows have some
      })
      command.on('result', (result: ResultSetHeader) => {
        if (ok) note(result.serverStatus)
      })
      return command
    }
    Object.assign(connection, { [method]: watching })
  }
  connection.on('error', (error: Error) => watch.onLost?.(error)) // for ever: an error that nobody listens to ends the process
  connection.on('end', () => watch.onLost?.(new Error('The server closed the connection.')))
  return watch
}

/**
 * SQL that may end the transaction and begin another, which the status does not show: procedures, dynamic SQL, compound
 * statements, comments that are executed.
 */
function mayHideControl(text: string): boolean {
  return /^(?:call|execute|begin|set\s+statement)\b|;\s*\S|\/\*M?!/i.test(withoutLeading(text))
}

/** Puts a savepoint around what is asked next, which only the same transaction can release. Returns the callback to ask with. */
function guardTransaction(
  watch: Watch,
  send: (text: string, callback: Callback) => unknown,
  callback: Callback,
): Callback {
  const noSuchSavepoint = 1305
  send('SAVEPOINT ambient_guard', () => {})
  return (...answer) => {
    send('RELEASE SAVEPOINT ambient_guard', (error) => {
      if ((error as { errno?: number } | null)?.errno === noSuchSavepoint) watch.transaction = 'ended'
      callback(...answer)
    })
  }
}

function callbackOf(args: unknown[]): Callback | undefined {
  const last = args.at(-1)
  return typeof last === 'function' ? (last as Callback) : undefined
}

function textOf(sql: unknown): string {
  return String(typeof sql === 'object' ? (sql as { sql?: unknown } | null)?.sql : sql)
}

async function send(connection: PoolConnection, text: string): Promise<ResultSetHeader> {
  const [header] = await ask(connection, 'query', [text])
  return header as ResultSetHeader // of statements without rows
}

/** Asks the server; a bad argument is thrown at once, so that it counts as unsent. */
function ask(connection: PoolConnection, method: 'query' | 'execute', args: unknown[]): Promise<unknown[]> {
  let settle: Callback = () => {}
  const answer = new Promise<unknown[]>((resolve, reject) => {
    settle = (error, ...results) => (error ? reject(error) : resolve(results))
  })
  ;(connection[method] as (...all: unknown[]) => unknown)(...args, settle) // whatever mysql2 accepts, it gets
  return answer
}

/** What the server says that a ROLLBACK could not undo: changes of tables without transactions (MyISAM, MEMORY, Aria). */
async function leftoversOf(
  connection: PoolConnection,
  { warningStatus }: ResultSetHeader,
): Promise<string | undefined> {
  if (warningStatus === 0) return undefined
  const [warnings] = await ask(connection, 'query', ['SHOW WARNINGS'])
  const notUndone = 1196
  return (warnings as { Code: number; Message: string }[]).find(({ Code }) => Code === notUndone)?.Message
}

/** Cancels what runs on `connection` over a connection beside the pool, which takes no longer than connecting may. */
function killQuery(pool: Pool, { threadId }: PoolConnection): Promise<void> {
  const { connectionConfig: config } = pool.pool.config as { connectionConfig?: { connectTimeout?: number } } // not in the types of mysql2
  const killer = new (Connection as unknown as new (options: { config: unknown }) => Connection)({ config })
  return new Promise<void>((resolve, reject) => {
    killer.on('error', reject)
    const kill = { sql: `KILL QUERY ${threadId}`, ...(config?.connectTimeout && { timeout: config.connectTimeout }) }
    killer.query(kill, (error) => (error ? reject(error) : resolve()))
  }).finally(() => destroy(killer))
}

/** Ends the connection now; mysql2 itself waits for the server to end it. */
function destroy(connection: Connection): void {
  connection.destroy()
  internals(connection).stream.destroy()
}

/** Where the queries of a pool or connection go. */
interface Target {
  readonly statements: Statements<PoolConnection>
  /** The transaction of a leased connection. */
  readonly block?: NativeBlock
  control(control: TransactionControl): Promise<void>
  /** `SET TRANSACTION`, which is about the next transaction. */
  next?(settings: TransactionSettings): void
  /** Streams of a leased connection that are not closed. */
  readonly streams?: Set<Readable>
}

/** Runs what `mysql2` accepts as a query in the session. */
function run(target: Target, method: 'query' | 'execute', args: unknown[]): Command | undefined {
  const callback = callbackOf(args)
  if (!callback) return stream(target, method, args)
  answer(target, method, args.slice(0, -1)).then(
    (results) => process.nextTick(callback, null, ...results),
    (error) => process.nextTick(callback, error),
  )
  return undefined
}

async function answer(target: Target, method: 'query' | 'execute', args: unknown[]): Promise<unknown[]> {
  const text = textOf(args[0])
  const settings = settingsOfNext(text)
  const control = parseTransactionControl(text)
  if (settings && target.next) target.next(settings)
  else if (control) await target.control(control)
  else return target.statements.run((connection) => ask(connection, method, args), target.block)
  return [{ fieldCount: 0, affectedRows: 0, insertId: 0, info: '', serverStatus: 0, warningStatus: 0, changedRows: 0 }]
}

/** The settings that `SET TRANSACTION` gives the next transaction. */
function settingsOfNext(text: string): TransactionSettings | undefined {
  const modes = /^\s*set\s+transaction\s+(.*)$/is.exec(text)?.[1]
  const begin = modes === undefined ? undefined : parseTransactionControl(`begin ${modes}`)
  return begin?.kind === 'begin' ? begin.settings : undefined
}

/** A query without a callback: returned at once, sent in its turn, and in possession of the session until all rows have come. */
function stream({ statements, block, streams }: Target, method: 'query' | 'execute', args: unknown[]): Command {
  const create = Connection.createQuery as unknown as (...all: unknown[]) => Command // its fourth parameter is not in the types
  const command = bindEmitter(create(args[0], args[1], undefined, {}))
  let readable: Readable | undefined
  let left = false
  let leave = () => {
    left = true
  }
  const makeStream = command.stream
  command.stream = (options) => {
    const made = makeStream.call(command, options)
    readable = made
    streams?.add(made)
    made.once('close', () => streams?.delete(made))
    const { destroy } = made
    made.destroy = (error) => {
      leave()
      return destroy.call(made, error)
    }
    return made
  }
  const end = (error: Error) => {
    const subject = readable ?? command
    if (subject.listenerCount('error') === 0) subject.on('error', () => {}) // whoever reads on gets it; it ends no process
    if (readable) readable.destroy(error)
    else command.emit('error', error)
  }
  let failure: unknown
  const turn = async () => {
    if (method === 'execute') throw unsupported('Rows of `execute` cannot be streamed; those of `query` can.')
    if (parseTransactionControl(textOf(args[0]))) throw controlRefused(statements.name)
    const open = await statements.openStream(end, block)
    try {
      if (left) return
      leave = open.closing
      await rowsOf(command, open.connection, open.lost)
    } catch (error) {
      failure = error
      throw error
    } finally {
      open.close(failure)
    }
  }
  turn().catch((error) => {
    if (error !== failure || !readable?.destroyed) end(error)
  })
  return command
}

/** Sends `command`; settles when all of its answer has come, or the connection is lost, which mysql2 does not tell it. */
function rowsOf(command: Command, connection: PoolConnection, lost: Promise<never>): Promise<void> {
  return new Promise<void>((resolve, reject) => {
    command.once('error', reject)
    command.once('end', resolve)
    lost.catch(reject)
    const { _queryOptions: options } = command as Command & { _queryOptions: { rowsAsArray?: boolean } } // not in the types of mysql2
    options.rowsAsArray ??= connection.config.rowsAsArray ?? false // it was made before there was a connection
    connection.query(command as never) // the types do not have what its own pool does as well
  })
}

const poolEvents = ['acquire', 'connection', 'enqueue', 'release'] as const

/** Events of the real pool are events of the ambient one. */
function forwardEvents(pool: CallbackPool, ambient: CallbackPool): void {
  for (const event of poolEvents) pool.on(event, (...args: unknown[]) => ambient.emit(event, ...args))
}

/** A pool that opens nothing of its own. */
function ambientPool(statements: Statements<PoolConnection>, engine: () => Pool | undefined): CallbackPool {
  const pool = createPool({})
  const own = pool.config
  const config = () => engine()?.pool.config ?? own
  Object.defineProperty(pool, 'config', { get: config })
  const connectionConfig = () => (config() as { connectionConfig?: object }).connectionConfig // not in the types of mysql2
  const target: Target = {
    statements,
    control: async () => {
      throw controlRefused(statements.name)
    },
  }
  return Object.assign(pool, {
    query: (...args: unknown[]) => run(target, 'query', args),
    execute: (...args: unknown[]) => run(target, 'execute', args),
    getConnection: (callback: Callback) => {
      const lease = async () => new AmbientConnection(statements, connectionConfig)
      lease().then(
        (connection) => process.nextTick(callback, null, connection),
        (error) => process.nextTick(callback, error),
      )
    },
    releaseConnection: (connection: PoolConnection) => connection.release(),
    end: (callback?: Callback) =>
      refuse('The ambient pool cannot be ended; `shutdown()` closes the real one.', callback),
  }) as CallbackPool
}

/** A connection of the session: it holds none of its own, and its transactions are savepoints. */
class AmbientConnection extends EventEmitter {
  readonly #target: Target
  readonly #transaction: LeasedTransaction<PoolConnection>
  readonly #config: () => object | undefined
  /** What `SET TRANSACTION` has said. */
  #next: TransactionSettings = {}
  readonly #streams = new Set<Readable>()
  readonly authorized = true
  readonly state = 'authenticated'

  constructor(statements: Statements<PoolConnection>, config: () => object | undefined) {
    super()
    const transaction = new LeasedTransaction(statements)
    this.#transaction = transaction
    this.#config = config
    this.#target = {
      statements,
      block: transaction.block,
      control: async (control) => {
        const begins = control.kind === 'begin'
        await transaction.control(
          begins ? { kind: 'begin', settings: { ...this.#next, ...control.settings } } : control,
        )
        if (begins) this.#next = {}
      },
      next: (settings) => {
        this.#next = settings
      },
      streams: this.#streams,
    }
  }

  get config(): object | undefined {
    return this.#config()
  }

  get connection(): this {
    return this
  }

  query(...args: unknown[]): Command | undefined {
    return run(this.#target, 'query', args)
  }

  execute(...args: unknown[]): Command | undefined {
    return run(this.#target, 'execute', args)
  }

  beginTransaction(callback: Callback = () => {}): void {
    this.query('START TRANSACTION', callback)
  }

  commit(callback: Callback = () => {}): void {
    this.query('COMMIT', callback)
  }

  rollback(callback: Callback = () => {}): void {
    this.query('ROLLBACK', callback)
  }

  ping(callback: Callback = () => {}): void {
    this.query('DO 0', callback)
  }

  connect(callback?: Callback): void {
    if (callback) process.nextTick(callback, null)
  }

  /** Ends the lease; a transaction that is still open on it is rolled back. */
  release(): void {
    this.#transaction.release()
  }

  /** Like `release`, and nobody reads its streams any more. */
  destroy(): void {
    for (const each of this.#streams) each.destroy()
    this.release()
  }

  end(callback?: Callback): void {
    this.destroy()
    if (callback) process.nextTick(callback, null)
  }

  [Symbol.dispose](): void {
    this.release()
  }

  reset(callback?: Callback): void {
    refuse('`reset` would end the transaction of the session.', callback)
  }

  changeUser(_options: unknown, callback?: Callback): void {
    refuse('`changeUser` would end the transaction of the session.', callback)
  }

  prepare(_sql: unknown, callback?: Callback): void {
    refuse('A prepared statement is bound to one connection: `execute` prepares, and remembers it.', callback)
  }

  /** For methods of mysql2 that act on the socket (`pause`, `resume`). */
  get stream(): never {
    throw unsupported('A connection of the session has no socket of its own.')
  }

  /** For those that act on prepared statements (`unprepare`). */
  get _statements(): never {
    throw unsupported('A connection of the session has no prepared statements of its own.')
  }
}

// It is one of mysql2's, with all that they have, but without their constructor, which opens a socket.
Object.setPrototypeOf(AmbientConnection.prototype, PoolConnection.prototype)

function refuse(what: string, callback: Callback | undefined): void {
  if (!callback) throw unsupported(what)
  process.nextTick(callback, unsupported(what))
}

function unsupported(what: string): AmbientError {
  return new AmbientError('AMBIENT_UNSUPPORTED', what)
}
