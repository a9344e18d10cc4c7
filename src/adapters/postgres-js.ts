import { connect, type Socket } from 'node:net'
import postgres, { type Sql } from 'postgres'
import { type Adapter, callFactory, type ErrorTraits } from '../adapter.ts'
import { bounded } from '../clock.ts'
import { isAmbientError } from '../errors.ts'
import { sendCancelRequest } from '../postgres-cancel.ts'
import { identifyTransaction, lookUpTransaction } from '../postgres-lookup.ts'
import { checkDeferredOnPostgres, transactionModes } from '../sql.ts'
import { drained, nextTurn } from '../time.ts'
import { postgresErrorTraits } from '../traits.ts'
import { type Answer, createHandle, type Native, type NativeQuery, OwnTypes } from './postgres-js-queries.ts'

/**
 * The adapter for postgres.js. The handle is a `sql` of which every query runs in the session, when it is awaited; fragments,
 * helpers, cursors and `sql.unsafe` are those of postgres.js. `sql.begin()` is a savepoint of the session, and so is BEGIN … COMMIT
 * on what `sql.reserve()` gives. What is not of a session (`listen`, `subscribe`, `end`) is done with `connect()`.
 *
 * @param factory makes the real `sql` at first use; gets the host if one is configured.
 * @example
 * ```ts
 * import { defineDatabase, newContext } from 'ambient-db'
 * import { postgresJsAdapter } from 'ambient-db/postgres-js'
 * import postgres from 'postgres'
 *
 * const main = defineDatabase({
 *   name: 'main',
 *   adapter: postgresJsAdapter(() => postgres(process.env.DATABASE_URL ?? 'postgres://localhost/app')),
 * })
 * const sql = main.db
 * await newContext(() => sql`insert into visits (path) values (${'/'})`)
 * ```
 */
export function postgresJsAdapter<Types extends Record<string, unknown>>(
  factory: (host: string) => Sql<Types> | Promise<Sql<Types>>,
): Adapter<Sql<Types>, Sql<Types>, PostgresJsConnection> {
  const desks = new WeakMap<Sql<Types>, Desk>()
  const deskOf = (engine: Sql<Types>) => desks.get(engine) as Desk // createEngine has set it
  const types = new OwnTypes()
  return {
    capabilities: () => ({
      savepoints: true,
      streaming: true,
      cancelling: true,
      failedStatementAborts: true,
      transactionStatus: true,
      pipelining: false,
      lossDetection: true,
      commitLookup: true,
      singleConnection: false,
    }),
    async createEngine(host) {
      const engine = await callFactory(factory, host)
      desks.set(engine, new Desk(engine as unknown as Native)) // see there
      types.engine = engine as unknown as Sql // of its types nothing is asked
      return engine
    },
    async closeEngine(engine) {
      await deskOf(engine).quiet()
      await engine.end({ timeout: patience / 1000 }) // without it, it waits for ever where a connection was lost under a query
    },
    async acquire(engine, onLost) {
      const connection = await deskOf(engine).acquire()
      connection.watch(onLost)
      return connection
    },
    release: (engine, connection, broken) => deskOf(engine).release(connection, broken),
    begin: (connection, settings) => connection.begin(transactionModes(settings)),
    async commit(connection) {
      const { command } = await connection.end('COMMIT')
      if (command === 'COMMIT') return 'committed'
      if (command === 'ROLLBACK') return 'rolled-back'
      throw new Error(`COMMIT was answered with ${command}: the connection is out of step.`) // so it is no answer
    },
    rollback: (connection) => connection.end('ROLLBACK'),
    savepoint: (connection, name) => connection.control(`SAVEPOINT ${name}`),
    rollbackTo: (connection, name) => connection.control(`ROLLBACK TO SAVEPOINT ${name}`),
    releaseSavepoint: (connection, name) => connection.control(`RELEASE SAVEPOINT ${name}`),
    checkDeferred: (connection) => connection.control(checkDeferredOnPostgres),
    transactionStatus: (connection) => connection.status,
    cancel: (_engine, connection) => connection.cancel(),
    identifyTransaction: (connection) => identifyTransaction((text) => connection.texts(text)),
    lookUpTransaction: async (engine, id, signal) => {
      const sockets: Socket[] = []
      const socket = async () => {
        signal.throwIfAborted()
        const made = await socketTo(engine.options, sockets.length)
        sockets.push(made)
        return made
      }
      const only = { max: 1, fetch_types: false, onclose: undefined, transform: postgres({ max: 1 }).options.transform }
      const sql = postgres({ ...engine.options, ...only, socket } as object) // parsed already, which postgres.js sees
      const end = async () => {
        await sql.end({ timeout: 0 }) // which leaves open what does not answer
        for (const each of sockets) each.destroy()
      }
      signal.addEventListener('abort', end, { once: true })
      try {
        return await lookUpTransaction(async (text, values) => ({ rows: await sql.unsafe(text, values) }), id)
      } finally {
        signal.removeEventListener('abort', end)
        await end()
      }
    },
    traits: errorTraits,
    createHandle: (statements) => createHandle(statements, types) as unknown as Sql<Types>, // it has the members of one
  }
}

/** How long the end of an engine waits for what is still asked of it, in ms, before it ends that too. */
const patience = 2000

/** What postgres.js says by itself, of a query that it did not send. */
const refusals = ['UNDEFINED_VALUE', 'MAX_PARAMETERS_EXCEEDED', 'NOT_TAGGED_CALL', '57014']

function errorTraits(error: unknown): ErrorTraits {
  const { code, severity } = (error ?? {}) as { code?: unknown; severity?: unknown }
  const refused = isAmbientError(error) || (severity === undefined && refusals.includes(code as string))
  if (refused) return { reply: 'unsent', retryable: false }
  return postgresErrorTraits(error)
}

/** A connection of postgres.js, as its own `sql.begin()` handles it: not in its types. */
interface Wire {
  execute(query: NativeQuery): unknown
  terminate(): void
  /** What is called when everything is answered, in place of a return to the pool; `release` marks one that outlives transactions. */
  reserved: ((() => void) & { release: true }) | null
  /** The queue of the pool that it stands in. */
  queue: { remove(wire: Wire): unknown }
  /** Called once, when it is closed; from then on the pool may open it again for others. */
  onclose: ((error: Error) => void) | null
}

/**
 * Takes connections from an engine. `sql.reserve()` loses some where connecting fails, and waits for ever with
 * `fetch_types: false`, so a connection is taken from under a query without text, as `sql.begin()` takes it from under its BEGIN.
 */
class Desk {
  readonly #sql: Native
  readonly #waiting: { resolve(connection: PostgresJsConnection): void; reject(error: unknown): void }[] = []
  /** How many queries without text are on their way to a connection. */
  #asked = 0
  readonly #queries = new Set<Promise<unknown>>()
  /** Given back just now. */
  readonly #spare = new Set<PostgresJsConnection>()

  constructor(sql: Native) {
    this.#sql = sql
  }

  async acquire(): Promise<PostgresJsConnection> {
    for (const spare of this.#spare) {
      this.#spare.delete(spare)
      if (!spare.lost) return spare
    }
    return new Promise((resolve, reject) => {
      this.#waiting.push({ resolve, reject })
      if (this.#asked < this.#waiting.length) this.#ask()
    })
  }

  #ask(): void {
    let asking = true
    const over = () => {
      if (!asking) return undefined
      asking = false
      this.#asked--
      return this.#waiting.shift()
    }
    this.#asked++
    const onexecute = (wire: Wire) => {
      const waiter = over()
      waiter?.resolve(new PostgresJsConnection(this.#sql, wire, query.state))
      return !waiter // the pool may go on with it
    }
    const query = this.#sql.unsafe('', [], { onexecute })
    const done = query.then(
      () => {
        const waiter = over() // a connection with much to send takes a query without calling
        if (!waiter) return
        this.#waiting.unshift(waiter)
        this.#ask()
      },
      (error) => over()?.reject(error),
    )
    this.#queries.add(done)
    void done.then(() => this.#queries.delete(done))
  }

  /** Waits for the queries whose connections others were given: the pool would connect for them behind its own end. */
  async quiet(): Promise<void> {
    await bounded(Promise.all(this.#queries), patience, () => undefined).catch(() => {})
  }

  release(connection: PostgresJsConnection, broken: Error | undefined): Promise<void> | undefined {
    connection.watch(undefined)
    if (broken || connection.lost) return connection.destroy()
    // Now and then it goes the way of the pool, where others may wait.
    const waiter = connection.turns++ % 100 < 99 ? this.#waiting.shift() : undefined
    if (waiter) {
      waiter.resolve(connection)
    } else {
      this.#spare.add(connection)
      // Not by setImmediate, which writes would then wait for as well: a connection that is cut between a write of postgres.js
      // and the end of its turn of the event loop spoils its place in the pool.
      void drained().then(() => {
        if (this.#spare.delete(connection)) connection.giveBack()
      })
    }
    return undefined
  }
}

/** SQL of several statements, one of which may end or begin a transaction. */
const severalWithControl = /;\s*\S/
const controlWord = /\b(?:commit|end|rollback|abort|prepare|begin|start)\b/i
const guard = 'ambient_guard'
/** What the end or the beginning of a transaction is answered with. */
const tags: Record<string, 'open' | 'none'> = {
  BEGIN: 'open',
  'START TRANSACTION': 'open',
  COMMIT: 'none',
  ROLLBACK: 'none',
  'PREPARE TRANSACTION': 'none',
}

/** A connection that a session holds. It sends one statement at a time: one that cannot be sent would be answered by its neighbour's. */
export class PostgresJsConnection {
  status: 'open' | 'aborted' | 'none' = 'none'
  lost: Error | undefined
  turns = 0
  /** What the callback of a cursor returns to close it. */
  readonly close: object
  readonly #sql: Native
  readonly #wire: Wire
  readonly #backend: NativeQuery['state']
  #closed = false
  #onLost: ((error: Error) => void) | undefined
  /** Resolves when everything is answered. */
  #quiet: Promise<void> | undefined
  #onQuiet: () => void = () => {}

  constructor(sql: Native, wire: Wire, backend: NativeQuery['state']) {
    this.#sql = sql
    this.#wire = wire
    this.#backend = backend
    this.close = sql.CLOSE
    this.#busy() // with the query that it was taken by
    const free = () => {
      this.#quiet = undefined
      this.#onQuiet()
    }
    wire.queue.remove(wire)
    wire.queue = { remove() {} } // of nobody, until the pool moves it
    wire.reserved = Object.assign(free, { release: true as const })
    wire.onclose = (error) => {
      this.#closed = true
      this.#lose(error)
      free()
    }
  }

  watch(onLost: ((error: Error) => void) | undefined): void {
    this.#onLost = onLost
    if (this.lost) onLost?.(this.lost)
  }

  #lose(error: Error): void {
    this.lost ??= error
    this.#onLost?.(error)
  }

  #busy(): void {
    this.#quiet ??= new Promise((resolve) => {
      this.#onQuiet = resolve
    })
  }

  /** Sends `query`, whose modifiers are applied by `modify`. */
  async #send(query: NativeQuery, modify: (query: NativeQuery) => unknown = () => {}): Promise<Answer> {
    query.handler = () => {
      if (this.lost) return query.reject(new Error('The connection is not queryable', { cause: this.lost }))
      this.#busy()
      this.#wire.execute(query)
    }
    try {
      modify(query)
      return await query
    } catch (error) {
      const { reply } = errorTraits(error)
      if (reply === 'unanswered') this.#lose(error instanceof Error ? error : new Error(String(error)))
      else if (reply === 'answered' && this.status === 'open') this.status = 'aborted'
      throw error
    }
  }

  async begin(modes: string): Promise<void> {
    await this.#send(this.#sql.unsafe(`BEGIN${modes}`)) // BEGIN can always be sent, so it need not wait
    this.status = 'open'
  }

  async end(text: 'COMMIT' | 'ROLLBACK'): Promise<Answer> {
    try {
      return await this.control(text)
    } finally {
      this.status = 'none'
    }
  }

  /** A statement of ours. */
  async control(text: string): Promise<Answer> {
    await this.#quiet
    const answer = await this.#send(this.#sql.unsafe(text))
    if (text.startsWith('ROLLBACK TO')) this.status = 'open'
    return answer
  }

  /** The rows of a query of ours, whatever names and values are turned into for others. */
  async texts(text: string): Promise<{ rows: unknown[] }> {
    await this.#quiet
    const query = this.#sql.unsafe(`select to_jsonb(row)::text from (${text}) row`) as NativeQuery & { raw(): unknown }
    const rows = await this.#send(query, (each) => (each as typeof query).raw())
    return { rows: rows.map((row) => JSON.parse(String((row as unknown[])[0]))) }
  }

  /** A statement of the user's. */
  async statement(
    text: string,
    make: (sql: Native) => NativeQuery,
    modify: (query: NativeQuery) => unknown,
  ): Promise<Answer> {
    await this.#quiet
    const query = make(this.#sql)
    if (severalWithControl.test(text) && controlWord.test(text)) return this.#guarded(query, modify)
    const answer = await this.#send(query, modify)
    this.status = tags[answer?.command ?? ''] ?? this.status
    return answer
  }

  /** Where statements may end the transaction and begin another, a savepoint shows whether it is the same one still. */
  async #guarded(query: NativeQuery, modify: (query: NativeQuery) => unknown): Promise<Answer> {
    const inside = this.status !== 'none'
    if (inside) await this.control(`SAVEPOINT ${guard}`)
    let last = inside ? 'ROLLBACK TO SAVEPOINT' : 'SAVEPOINT'
    try {
      const answer = await this.#send(query, modify)
      if (inside) last = 'RELEASE SAVEPOINT'
      return answer
    } finally {
      const refused = (error: unknown) =>
        !inside && (error as { code?: unknown } | null)?.code === '25P02' ? 'aborted' : 'none'
      this.status = await this.control(`${last} ${guard}`).then(() => 'open', refused)
    }
  }

  /** The protocol's cancel request. Which of several hosts it is does not show: the others know nothing of it. */
  async cancel(): Promise<void> {
    const { pid, secret } = this.#backend ?? { pid: 0, secret: 0 }
    const { options } = this.#sql
    const hosts = options.path || socketOf(options) ? [0] : options.host.keys()
    await Promise.all(
      Array.from(hosts, async (index) => sendCancelRequest(await socketTo(options, index), pid, secret)),
    )
  }

  /** To the pool, which has it when what is sent here is answered. */
  giveBack(): void {
    if (this.#closed) return
    this.#wire.reserved = null
    this.#wire.onclose = null
    const query = this.#sql.unsafe('')
    query.handler = () => this.#wire.execute(query)
    query.catch(() => {})
  }

  async destroy(): Promise<void> {
    await nextTurn() // what waits to be written would be left over for the next connection in its place
    if (this.#closed) return
    this.#wire.reserved = null // or the end of the engine would wait for it
    this.#wire.terminate()
  }
}

/** The option of postgres.js that makes sockets: not in its types. */
function socketOf(options: object): ((options: object) => Socket | Promise<Socket>) | undefined {
  return (options as { socket?: (options: object) => Socket | Promise<Socket> }).socket
}

/** A socket to the host with that number, beyond the last one from the first again. */
async function socketTo(options: Sql['options'], index: number): Promise<Socket> {
  const own = socketOf(options)
  if (own) return own(options)
  if (options.path) return connect(options.path)
  const host = options.host[index % options.host.length] as string // there is at least one
  return Object.assign(connect(options.port[index % options.port.length] as number, host), { host }) // which TLS asks for
}
