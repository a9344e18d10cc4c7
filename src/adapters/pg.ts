import { EventEmitter } from 'node:events'
import { connect as connectSocket } from 'node:net'
import { Client, Pool, type PoolClient, types } from 'pg'
import { type Adapter, callFactory, type NativeBlock, type Statements } from '../adapter.ts'
import { bindCallback, bindEmitter } from '../context.ts'
import { AmbientError } from '../errors.ts'
import { LeasedTransaction } from '../leased.ts'
import { sendCancelRequest } from '../postgres-cancel.ts'
import { identifyTransaction, lookUpTransaction } from '../postgres-lookup.ts'
import {
  checkDeferredOnPostgres,
  controlRefused,
  parseTransactionControl,
  type TransactionControl,
  transactionModes,
} from '../sql.ts'
import { postgresErrorTraits } from '../traits.ts'

/**
 * The adapter for `pg`. The handle is a `pg.Pool` of which every query runs in the session, so whatever is built on a pool can
 * be built on it; a client from its `connect()` shares the session too, and its BEGIN … COMMIT is a savepoint. Cursors and
 * `pg-query-stream` work, but not on a pool with `pipeline: true`, which lets BEGIN travel with the first statement.
 *
 * @param factory makes the pool at first use; gets the host if one is configured.
 * @example
 * ```ts
 * import { defineDatabase, newContext } from 'ambient-db'
 * import { pgAdapter } from 'ambient-db/pg'
 * import { Pool } from 'pg'
 *
 * const main = defineDatabase({
 *   name: 'main',
 *   adapter: pgAdapter(() => new Pool({ connectionString: process.env.DATABASE_URL })),
 * })
 * await newContext(() => main.db.query('insert into visits (path) values ($1)', ['/']))
 * ```
 */
export function pgAdapter<Engine extends Pool>(
  factory: (host: string) => Engine | Promise<Engine>,
): Adapter<Pool, Engine, PoolClient> {
  let latest: Engine | undefined
  let ambient: AmbientPool | undefined
  const watches = new WeakMap<PoolClient, Watch>()
  const watchOf = (client: PoolClient) => watches.get(client) as Watch // acquire has set it
  const control = (client: PoolClient, text: string) => {
    const watch = watchOf(client)
    const over = () => {
      watch.own = false
    }
    watch.own = true
    const answer = client.query(text)
    answer.then(over, over)
    return answer
  }
  const end = (client: PoolClient, text: 'COMMIT' | 'ROLLBACK') => {
    const watch = watchOf(client)
    watch.begun = false
    watch.ended = false
    return control(client, text)
  }
  return {
    capabilities: (pool) => ({
      savepoints: true,
      streaming: pool.options.pipeline !== true,
      cancelling: true,
      failedStatementAborts: true,
      transactionStatus: true,
      pipelining: pool.options.pipeline === true,
      lossDetection: true,
      commitLookup: true,
      singleConnection: false,
    }),
    async createEngine(host) {
      const pool = await callFactory(factory, host)
      latest = pool
      ambient?.forward(pool)
      return pool
    },
    closeEngine: (pool) => pool.end(),
    acquire(pool, onLost) {
      return new Promise((resolve, reject) => {
        pool.connect((error, client) => {
          if (!client) return reject(error)
          const known = watches.get(client)
          const watch = known ?? watchClient(client) // at once: its own bytes may hold a FATAL right behind the greeting
          if (!known) watches.set(client, watch)
          watch.onLost = onLost
          resolve(client)
        })
      })
    },
    release(_pool, client, broken) {
      client.release(broken)
      if (broken && client.pipeline) socketOf(client).destroy() // pg itself waits for all answers of a pipeline, perhaps for ever
      watchOf(client).onLost = undefined // an idle client pins no session
    },
    begin(client, settings) {
      const watch = watchOf(client)
      watch.begun = true
      watch.savepoint = false
      return client.query(`BEGIN${transactionModes(settings)}`)
    },
    async commit(client) {
      const { command } = await end(client, 'COMMIT')
      if (command === 'COMMIT') return 'committed'
      if (command === 'ROLLBACK') return 'rolled-back'
      throw new Error(`COMMIT was answered with ${command}: the connection is out of step.`) // so it is no answer
    },
    rollback: (client) => end(client, 'ROLLBACK'),
    savepoint: (client, name) => control(client, `SAVEPOINT ${name}`),
    rollbackTo: (client, name) => control(client, `ROLLBACK TO SAVEPOINT ${name}`),
    releaseSavepoint: (client, name) => control(client, `RELEASE SAVEPOINT ${name}`),
    checkDeferred: (client) => control(client, checkDeferredOnPostgres),
    transactionStatus(client) {
      const status = client.getTransactionStatus()
      if (status === 'T' && watchOf(client).ended) return 'none' // another one has begun since
      return status === 'T' ? 'open' : status === 'E' ? 'aborted' : status === 'I' ? 'none' : undefined
    },
    afterError: (client) => ready(client),
    mayPipelineBegin: (client) => client.pipeline === true,
    cancel: (_pool, client) => requestCancel(client),
    identifyTransaction: (client) => identifyTransaction((sql) => client.query(sql)),
    lookUpTransaction: (pool, id, signal) =>
      withClient(pool, signal, (client) => lookUpTransaction((sql, values) => client.query(sql, values), id)),
    traits: postgresErrorTraits,
    createHandle(statements) {
      const pool = new AmbientPool(statements, () => latest)
      ambient ??= pool
      return pool
    },
  }
}

/** What is known of a connection beyond what its client tells: of its loss, and of its transaction. */
interface Watch {
  /** Who holds it, and wants to hear that it is lost. */
  onLost: ((error: Error) => void) | undefined
  /** A transaction of ours was begun, and is not to end yet. */
  begun: boolean
  /** What is under way is control of ours. */
  own: boolean
  /** SQL of the user's has made a savepoint, so a ROLLBACK of his may be one to it. */
  savepoint: boolean
  /** SQL of the user's has ended our transaction, though there is one again (`COMMIT; BEGIN`, `COMMIT AND CHAIN`). */
  ended: boolean
}

/** Listens for the loss of `client`, and reads the tags of the statements that complete on it. */
function watchClient(client: PoolClient): Watch {
  const watch: Watch = { onLost: undefined, begun: false, own: false, savepoint: false, ended: false }
  client.on('error', (error) => watch.onLost?.(error))
  const { connection } = client as PoolClient & { connection: EventEmitter } // not in the types of pg
  connection.on('commandComplete', ({ text }: { text: string }) => {
    if (watch.own || !watch.begun) return
    if (text === 'SAVEPOINT') watch.savepoint = true
    else if (text === 'COMMIT' || (text === 'ROLLBACK' && !watch.savepoint)) watch.ended = true
  })
  return watch
}

/** The socket of a client; pg-pool destroys it in the same way. */
function socketOf(client: Client | PoolClient): { destroy(): void } {
  return (client as typeof client & { connection: { stream: { destroy(): void } } }).connection.stream // not in the types of pg
}

/** An error arrives before the ReadyForQuery behind it, which tells the status of the transaction. */
function ready(client: PoolClient): Promise<void> {
  const { readyForQuery } = client as PoolClient & { readyForQuery?: boolean } // not in the types of pg
  if (readyForQuery !== false) return Promise.resolve()
  return new Promise((resolve) => {
    const done = () => {
      client.off('drain', done).off('end', done)
      resolve()
    }
    client.on('drain', done).on('end', done)
  })
}

/** Runs `work` on a client that connects as those of the pool do, and is none of them; the end of `signal` is its end. */
async function withClient<Result>(
  pool: Pool,
  signal: AbortSignal,
  work: (client: Client) => Promise<Result>,
): Promise<Result> {
  const { Client: Made } = pool as Pool & { Client: typeof Client } // not in the types of pg
  const client = new Made(pool.options) // not a copy: what is secret in them is not enumerable
  const destroy = () => socketOf(client).destroy()
  client.on('error', () => {}) // whoever waits for an answer gets it
  signal.addEventListener('abort', destroy, { once: true })
  try {
    signal.throwIfAborted()
    await client.connect()
    return await work(client)
  } finally {
    await client.end()
    signal.removeEventListener('abort', destroy)
  }
}

function requestCancel(client: PoolClient): Promise<void> {
  const { processID, secretKey } = client as PoolClient & { processID: number; secretKey: number } // not in the types of pg
  const { host, port } = client
  const socket = host.startsWith('/') ? connectSocket(`${host}/.s.PGSQL.${port}`) : connectSocket(port, host)
  return sendCancelRequest(socket, processID, secretKey)
}

/** What pg's own classes for queries, cursors and streams have in common. */
interface Submittable extends EventEmitter {
  submit(connection: unknown): void
  handleError(error: Error, connection?: unknown): void
  handleRowDescription?(message: { readonly fields: unknown }): void
  callback?: QueryCallback | undefined
  text?: unknown
  /** The cursor behind a `pg-query-stream`. */
  cursor?: Cursor
  read?: unknown
  close?: unknown
  pipe?: unknown
  destroyed?: boolean
  destroy?(error?: Error): unknown
}

type CursorCallback = (error?: Error, rows?: unknown[]) => void

interface Cursor {
  text?: unknown
  readonly state: string
  /** What rows are read with: not in the types of pg. */
  readonly _result?: { addFields(fields: unknown): void }
  read(rows: number, callback?: CursorCallback): unknown
  close(callback?: CursorCallback): unknown
}

type QueryCallback = (error: Error | undefined, result?: unknown) => void

/** Runs whatever `pg` accepts as a query in the session; `block` is the transaction of a leased client. */
function query(
  statements: Statements<PoolClient>,
  args: unknown[],
  block?: NativeBlock,
  client?: AmbientClient,
): unknown {
  const [config, values, callback] = args
  const done = [values, callback].find((each) => typeof each === 'function') as QueryCallback | undefined
  if (isSubmittable(config)) return submit(statements, config, done, block)
  const text = typeof config === 'string' ? config : (config as { text?: unknown } | undefined)?.text
  const control = controlIn(text)
  const plain = typeof values === 'function' ? undefined : values
  const answer = control
    ? (client?.control(control) ?? Promise.reject(controlRefused(statements.name)))
    : statements.run((connection) => {
        client?.listenTo(connection)
        return connection.query(config as string, plain as unknown[]) // whatever pg accepts, it gets
      }, block)
  if (!done) return answer
  answer.then(
    (result) => process.nextTick(done, undefined, result),
    (error) => process.nextTick(done, error),
  )
  return undefined
}

function controlIn(text: unknown): TransactionControl | undefined {
  return typeof text === 'string' ? parseTransactionControl(text) : undefined
}

function isSubmittable(config: unknown): config is Submittable {
  return typeof (config as { submit?: unknown } | null)?.submit === 'function'
}

/** A cursor, stream or `pg.Query`: returned at once, submitted in its turn, over when the client is ready for more. */
function submit(
  statements: Statements<PoolClient>,
  subject: Submittable,
  done: QueryCallback | undefined,
  block?: NativeBlock,
): Submittable {
  bindEmitter(subject)
  const callback = subject.callback ?? done
  if (callback) subject.callback = bindCallback(callback)
  const running: Running = { failure: undefined, synced: false, onClosing: () => {}, onUnsent: () => {} }
  const { handleError } = subject
  subject.handleError = (error, connection) => {
    running.failure ??= error
    running.onClosing()
    if (!running.synced) handleError.call(subject, error, connection)
    if (postgresErrorTraits(error).lost) running.onUnsent()
  }
  const turn = subject.read
    ? stream(statements, subject, running, block)
    : statement(statements, subject, running, block)
  turn.catch((error) => {
    if (error !== running.failure) subject.handleError(error)
  })
  return subject
}

/** What is known of a submitted query while it runs. */
interface Running {
  failure: Error | undefined
  /** It was closed with a Sync: another one would put the connection out of step with its answers. */
  synced: boolean
  onClosing: () => void
  /** The client was gone already, and says no more. */
  onUnsent: () => void
}

/** Submits `subject`; resolves when the client is ready for more, or gone. */
function over(connection: PoolClient, subject: Submittable, running: Running): Promise<void> {
  return new Promise<void>((resolve) => {
    const free = () => {
      connection.off('drain', free).off('end', free)
      resolve()
    }
    running.onUnsent = free
    connection.query(subject as never) // it has all that pg looks for
    connection.once('drain', free).once('end', free)
  })
}

/** A query that ends by itself. */
function statement(
  statements: Statements<PoolClient>,
  subject: Submittable,
  running: Running,
  block?: NativeBlock,
): Promise<void> {
  if (controlIn(subject.text)) return Promise.reject(controlRefused(statements.name))
  return statements.run(async (connection) => {
    await over(connection, subject, running)
    if (running.failure) throw running.failure
  }, block)
}

/** A cursor or stream: it occupies the session until it is closed. */
function stream(
  statements: Statements<PoolClient>,
  subject: Submittable,
  running: Running,
  block?: NativeBlock,
): Promise<void> {
  let closed = false
  running.onClosing = () => {
    closed = true
  }
  const cursor = subject.cursor ?? (subject.pipe ? undefined : (subject as unknown as Cursor)) // what reads, closes, and is no stream
  const { destroy } = subject
  if (destroy) {
    subject.destroy = (error) => {
      running.onClosing()
      return destroy.call(subject, error)
    }
  }
  const end = (error: Error) => {
    reads?.refuse(error)
    if (subject.listenerCount('error') === 0) subject.on('error', () => {}) // whoever reads on gets it; it ends no process
    if (subject.destroy) subject.destroy(error)
    else cursor?.close(() => {})
  }
  const turn = async () => {
    if (controlIn(subject.text ?? subject.cursor?.text)) throw controlRefused(statements.name)
    const open = await statements.openStream(end, block)
    try {
      if (closed) return
      if (open.connection.pipeline) {
        const what = 'Cursors and streams do not work on a pool with `pipeline: true`.'
        throw new AmbientError('AMBIENT_UNSUPPORTED', what)
      }
      running.onClosing = open.closing
      const ended = over(open.connection, subject, running)
      reads?.start()
      await ended
    } finally {
      open.close(running.failure)
    }
  }
  const ended = turn()
  const reads = cursor && holdReads(cursor, running, ended)
  const { handleRowDescription } = subject
  subject.handleRowDescription = (message) => {
    // A cursor that was closed before its description came takes it for a beginning, and syncs again at its end; rows that
    // were asked for before may still come.
    if (running.synced) cursor?._result?.addFields(message.fields)
    else handleRowDescription?.call(subject, message)
  }
  ended.then(
    () => reads?.start(),
    (error) => reads?.refuse(error),
  )
  return ended
}

/** Keeps what is asked of a cursor until its turn, and answers all of it, whatever becomes of the cursor. */
function holdReads(cursor: Cursor, running: Running, ended: Promise<void>) {
  const { read, close } = cursor
  let waiting: [rows: number, callback: CursorCallback][] | undefined = []
  let refusal: Error | undefined
  let closed = false
  const unanswered = new Set<CursorCallback>()
  const readNow = (rows: number, callback: CursorCallback) => {
    if (refusal) process.nextTick(callback, refusal)
    else if (closed) process.nextTick(callback, null, [])
    else {
      unanswered.add(callback)
      read.call(cursor, rows, (...answer) => {
        if (unanswered.delete(callback)) callback(...answer)
      })
    }
  }
  // A closed cursor forgets the read that it was closed in, if that fails.
  const answerRest = () => {
    for (const callback of unanswered) callback(refusal ?? running.failure, [])
    unanswered.clear()
  }
  const afterLastRows = () => setImmediate(answerRest)
  ended.then(afterLastRows, afterLastRows)
  cursor.read = orPromise((callback, rows: number) => {
    if (waiting && !refusal) waiting.push([rows, callback])
    else readNow(rows, callback)
  })
  cursor.close = orPromise((callback) => {
    closed = true
    running.onClosing()
    if (!running.synced) {
      running.synced = ['submitted', 'idle', 'busy'].includes(cursor.state)
      close.call(cursor, () => {})
    }
    const done = () => callback() // pg itself waits for an answer that a lost connection never gives
    ended.then(done, done)
  })
  const flush = () => {
    for (const [rows, callback] of waiting?.splice(0) ?? []) readNow(rows, callback)
    waiting = undefined
  }
  return {
    /** Its turn has come, or is over. */
    start: flush,
    /** It will have no rows any more. */
    refuse(error: Error) {
      refusal ??= error
      flush()
    },
  }
}

/** A method of cursors: takes a callback last, which runs in its caller's context, or returns a promise. */
function orPromise<Args extends unknown[]>(act: (callback: CursorCallback, ...args: Args) => void) {
  return (...args: unknown[]): unknown => {
    const callback = args.at(-1)
    const rest = (typeof callback === 'function' ? args.slice(0, -1) : args) as Args // the signature of the method
    if (typeof callback === 'function') return act(bindCallback(callback as CursorCallback), ...rest)
    return new Promise((resolve, reject) => {
      act((error, rows) => (error ? reject(error) : resolve(rows)), ...rest)
    })
  }
}

type LeaseCallback = (
  error: Error | undefined,
  client: PoolClient | undefined,
  done: (release?: unknown) => void,
) => void

const poolEvents = ['connect', 'acquire', 'remove', 'release', 'error'] as const

/** A `pg.Pool` that opens nothing of its own. */
class AmbientPool extends Pool {
  readonly #statements: Statements<PoolClient>
  readonly #engine: () => Pool | undefined

  constructor(statements: Statements<PoolClient>, engine: () => Pool | undefined) {
    super()
    this.#statements = statements
    this.#engine = engine
    for (const key of ['options', 'totalCount', 'idleCount', 'waitingCount', 'expiredCount'] as const) {
      const own = key === 'options' ? this.options : 0
      Object.defineProperty(this, key, { get: () => this.#engine()?.[key] ?? own })
    }
  }

  /** Events of the real pool are events of this one; an idle client that breaks is no uncaught exception. */
  forward(pool: Pool): void {
    for (const event of poolEvents) {
      pool.on(event, (...args: unknown[]) => {
        if (event !== 'error' || this.listenerCount('error') > 0) this.emit(event, ...args)
      })
    }
  }

  override query(...args: unknown[]): never {
    return query(this.#statements, args) as never // the overloads of pg.Pool stand for it
  }

  override connect(): Promise<PoolClient>
  override connect(callback: LeaseCallback): undefined
  override connect(callback?: LeaseCallback): Promise<PoolClient> | undefined {
    const lease = async () => new AmbientClient(this.#statements) as unknown as PoolClient // it has the members of one that sessions allow
    if (!callback) return lease()
    lease().then(
      (client) => process.nextTick(callback, undefined, client, client.release),
      (error) => process.nextTick(callback, error, undefined, () => {}),
    )
    return undefined
  }

  override async end(): Promise<void> {
    throw new AmbientError('AMBIENT_UNSUPPORTED', 'The ambient pool cannot be ended; `shutdown()` closes the real one.')
  }
}

/** A client of the session: it holds no connection of its own, and its transactions are savepoints. */
class AmbientClient extends EventEmitter {
  readonly #statements: Statements<PoolClient>
  readonly #transaction: LeasedTransaction<PoolClient>
  readonly escapeIdentifier = Client.prototype.escapeIdentifier
  readonly escapeLiteral = Client.prototype.escapeLiteral
  readonly getTypeParser = types.getTypeParser
  readonly setTypeParser = types.setTypeParser

  constructor(statements: Statements<PoolClient>) {
    super()
    this.#statements = statements
    this.#transaction = new LeasedTransaction(statements)
    bindEmitter(this)
  }

  query(...args: unknown[]): unknown {
    return query(this.#statements, args, this.#transaction.block, this)
  }

  /** What transaction control does on a leased client. */
  async control(control: TransactionControl): Promise<unknown> {
    await this.#transaction.control(control)
    return { command: control.kind.toUpperCase(), rowCount: null, oid: null, fields: [], rows: [] }
  }

  /** Notices of the connection are events of the client whose statement they belong to. */
  listenTo(connection: PoolClient): void {
    if (this.listenerCount('notice') === 0) return
    const notice = (message: unknown) => this.emit('notice', message)
    connection.on('notice', notice)
    connection.once('drain', () => connection.off('notice', notice))
  }

  release = (): void => this.#transaction.release()

  getTransactionStatus(): 'T' | 'I' {
    return this.#transaction.open ? 'T' : 'I'
  }

  async end(): Promise<void> {
    throw new AmbientError('AMBIENT_UNSUPPORTED', 'A client of the session cannot be ended; `release()` gives it back.')
  }
}
