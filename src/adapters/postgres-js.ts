import { readFile } from 'node:fs/promises'
import { connect, type Socket } from 'node:net'
import postgres, { type Sql, type TransactionSql } from 'postgres'
import { type Adapter, callFactory, type ErrorTraits, type Statements } from '../adapter.ts'
import { bounded } from '../clock.ts'
import { bindCallback } from '../context.ts'
import { AmbientError, isAmbientError } from '../errors.ts'
import { LeasedTransaction, startsAtOnce } from '../leased.ts'
import { sendCancelRequest } from '../postgres-cancel.ts'
import { identifyTransaction, lookUpTransaction } from '../postgres-lookup.ts'
import {
  checkDeferredOnPostgres,
  controlRefused,
  parseTransactionControl,
  transactionModes,
  withoutLeading,
} from '../sql.ts'
import { drained, nextTurn } from '../time.ts'
import { postgresErrorTraits } from '../traits.ts'

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
        const made = await socketTo(engine.options, sockets.length)
        sockets.push(made)
        return made
      }
      const only = { max: 1, fetch_types: false, onclose: undefined, transform: postgres({ max: 1 }).options.transform }
      const sql = postgres({ ...engine.options, ...only, socket } as object) // parsed already, which postgres.js sees
      const end = async () => {
        const ended = sql.end({ timeout: 0 }) // which leaves open what does not answer
        for (const each of sockets) each.destroy()
        await ended
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

/** A result of postgres.js: rows, with the tag of the command. */
type Answer = unknown[] & { readonly command?: string }

/** A query of postgres.js. What the types of postgres.js do not have: who sends it, and how it is told its failure. */
interface NativeQuery extends Promise<Answer> {
  handler(query: NativeQuery): void
  reject(error: unknown): void
  readonly state: { readonly pid: number; readonly secret: number } | null
  readonly options: { readonly simple?: boolean }
  forEach(callback: (row: unknown, result: unknown) => void): NativeQuery
  cursor(rows: number, callback: (rows: Answer) => Promise<unknown>): NativeQuery
}

/** An `Sql` as whatever is recorded here is played back to it. */
interface Native {
  (first: unknown, ...rest: unknown[]): unknown
  unsafe(text: string, args?: unknown, options?: unknown): NativeQuery
  readonly options: Sql['options']
  readonly CLOSE: object
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

/** Something that is made by a real `sql` when its turn has come: a query, which may be a fragment, or a helper. */
class Recorded {
  readonly make: (sql: Native) => unknown
  /** As SQL, as far as it shows. */
  readonly text: () => string

  constructor(make: (sql: Native) => unknown, text = () => '$') {
    this.make = make
    this.text = text
  }
}

/** Makes what is recorded in `value`, a value or list of values; also in the rows of a helper. */
function replay(sql: Native, value: unknown, where: 'value' | 'rows' = 'value'): unknown {
  if (value instanceof Recorded) return value.make(sql)
  const deep = where === 'rows'
  if (Array.isArray(value))
    return value.some((each) => holds(each, deep)) ? value.map((each) => replay(sql, each, where)) : value
  if (!deep || !holds(value, deep)) return value
  return Object.fromEntries(Object.entries(value as object).map(([key, each]) => [key, replay(sql, each)]))
}

function holds(value: unknown, deep: boolean): boolean {
  if (value instanceof Recorded) return true
  if (Array.isArray(value)) return value.some((each) => holds(each, deep))
  const plain = deep && typeof value === 'object' && value !== null && !ArrayBuffer.isView(value)
  return plain && Object.values(value).some((each) => each instanceof Recorded)
}

function textOf(value: unknown): string {
  if (Array.isArray(value)) return value.map(textOf).join(' ')
  return value instanceof Recorded ? value.text() : '$'
}

/** What closes a cursor of the ambient `sql`. */
const close = {}

/** What is answered by a stream, of which postgres.js does not say when it is over, or that it failed. */
const copies = /^copy\b[^;]*\b(?:stdin|stdout)\b/i

function noCopy(): AmbientError {
  return new AmbientError('AMBIENT_UNSUPPORTED', 'COPY is done on the `sql` of the engine, which `connect()` gives.')
}

type Modifier = 'simple' | 'values' | 'raw' | 'describe'

/** A query as postgres.js has it: it runs when it is awaited or executed, or is part of another one. */
class AmbientQuery extends Recorded implements PromiseLike<Answer> {
  readonly #statements: Statements<PostgresJsConnection>
  readonly #lease: LeasedTransaction<PostgresJsConnection> | undefined
  /** Where its text comes from, if that has to be read first. */
  readonly #load: (() => Promise<Recorded>) | undefined
  readonly #modifiers: Modifier[] = []
  #forEach: ((row: unknown, result: unknown) => void) | undefined
  #cursor: { readonly rows: number; readonly callback: (rows: Answer) => unknown } | undefined
  #answer: Promise<Answer> | undefined
  #running: PostgresJsConnection | undefined
  #cancelled: Promise<void> | undefined

  constructor({ statements, lease }: Place, { make, text }: Recorded, load?: () => Promise<Recorded>) {
    super(make, text)
    this.#statements = statements
    this.#lease = lease
    this.#load = load
  }

  get [Symbol.toStringTag](): string {
    return 'Query'
  }

  simple = (): this => this.#modify('simple')
  values = (): this => this.#modify('values')
  raw = (): this => this.#modify('raw')
  describe = (): this => this.#modify('describe')

  readable = (): Promise<never> => Promise.reject(noCopy())
  writable = (): Promise<never> => Promise.reject(noCopy())

  #modify(modifier: Modifier): this {
    this.#modifiers.push(modifier)
    return this
  }

  forEach(callback: (row: unknown, result: unknown) => void): this {
    this.#forEach = bindCallback(callback)
    return this.execute()
  }

  cursor(rows: unknown = 1, callback?: (rows: Answer) => unknown): unknown {
    if (typeof rows === 'function') return this.cursor(1, rows as typeof callback)
    if (!callback) return { [Symbol.asyncIterator]: () => batches((each) => this.#read(rows as number, each)) }
    this.#cursor = { rows: rows as number, callback }
    return this
  }

  execute(): this {
    void this.#start()
    return this
  }

  /** Cancels it on the server, or unsent where it waits for its turn. */
  cancel(): Promise<void> {
    this.#cancelled = this.#running ? this.#running.cancel() : Promise.resolve()
    return this.#cancelled
  }

  // biome-ignore lint/suspicious/noThenProperty: it is a promise for whoever awaits it, as that of postgres.js
  then<One = Answer, Other = never>(
    resolved?: ((answer: Answer) => One | PromiseLike<One>) | null,
    rejected?: ((error: unknown) => Other | PromiseLike<Other>) | null,
  ): Promise<One | Other> {
    return this.#start().then(resolved, rejected)
  }

  catch<Other>(rejected?: ((error: unknown) => Other | PromiseLike<Other>) | null): Promise<Answer | Other> {
    return this.#start().catch(rejected)
  }

  finally(act?: (() => void) | null): Promise<Answer> {
    return this.#start().finally(act)
  }

  #start(): Promise<Answer> {
    this.#answer ??= this.#cursor ? this.#read(this.#cursor.rows, this.#cursor.callback) : this.#run()
    return this.#answer
  }

  async #run(): Promise<Answer> {
    const control = parseTransactionControl(this.text())
    if (!control) return this.#statements.run((connection) => this.#runOn(connection), this.#lease?.block)
    if (!this.#lease) throw controlRefused(this.#statements.name)
    await this.#lease.control(control)
    return Object.assign([], { count: null, command: control.kind.toUpperCase() })
  }

  async #runOn(connection: PostgresJsConnection, modify?: (query: NativeQuery) => unknown): Promise<Answer> {
    const { make, text } = this.#load ? await this.#load() : this
    const sql = text()
    if (parseTransactionControl(sql)) throw controlRefused(this.#statements.name)
    if (copies.test(withoutLeading(sql))) throw noCopy()
    if (this.#cancelled) {
      const what = '57014: canceling statement due to user request'
      throw Object.assign(new Error(what), { code: '57014' }) // as postgres.js says it
    }
    this.#running = connection
    try {
      return await connection.statement(sql, make as (sql: Native) => NativeQuery, (query) => {
        for (const modifier of this.#modifiers) (query as NativeQuery & Record<Modifier, () => void>)[modifier]()
        if (this.#forEach) void query.forEach(this.#forEach)
        modify?.(query)
      })
    } finally {
      this.#running = undefined
      await (this.#cancelled as Promise<void> | undefined)?.catch(() => {}) // set meanwhile; it must not reach the next statement
    }
  }

  /** Reads by a cursor: it occupies the session until `callback` is done with the last rows, or has asked for the end. */
  async #read(rows: number, callback: (rows: Answer) => unknown): Promise<Answer> {
    if (parseTransactionControl(this.text())) throw controlRefused(this.#statements.name)
    const bound = bindCallback(async (batch: Answer) => callback(batch))
    let refusal: unknown
    let stop = () => {}
    const stopped = new Promise<unknown>((resolve) => {
      stop = () => resolve(close)
    })
    const end = (error: unknown) => {
      refusal ??= error
      stop()
      return close
    }
    const { connection, closing, close: leave } = await this.#statements.openStream(end, this.#lease?.block)
    let last: Promise<unknown> | undefined
    const running = this.#runOn(connection, (query) =>
      query.cursor(rows, async (batch) => {
        last = Promise.race([stopped, bound(batch)]).catch(end)
        const ends = (await last) === close
        if (ends) closing()
        if (connection.lost) return new Promise(() => {}) // nothing can be sent any more
        return ends ? connection.close : undefined
      }),
    )
    try {
      const answer = await running
      await last
      if (refusal) throw refusal
      return answer
    } finally {
      await running.then(() => leave(), leave)
    }
  }
}

/** What a cursor reads, for whoever asks for it; whoever leaves early closes it. */
async function* batches(read: (callback: (rows: Answer) => unknown) => Promise<Answer>): AsyncGenerator<Answer> {
  let batch: Answer | undefined
  let over = false
  let left = true
  let proceed: (value?: unknown) => void = () => {}
  let wake = () => {}
  const reading = read((rows) => {
    batch = rows
    wake()
    return new Promise((resolve) => {
      proceed = resolve
    })
  })
  const end = () => {
    over = true
    wake()
  }
  reading.then(end, end)
  try {
    for (;;) {
      if (!batch && !over) {
        await new Promise<void>((resolve) => {
          wake = resolve
        })
      }
      if (!batch) break
      const rows = batch
      batch = undefined
      yield rows
      proceed()
    }
    left = false
  } finally {
    proceed(close)
    if (left) await reading.catch(() => {}) // the session knows
  }
  await reading
}

/** What Drizzle sets in the options of its client before there is an engine, for each engine to come. */
class OwnTypes {
  readonly options: object
  #engine: Sql | undefined
  readonly #own = { parsers: {} as Record<string, unknown>, serializers: {} as Record<string, unknown> }

  constructor() {
    const kind = (name: 'parsers' | 'serializers') =>
      new Proxy(this.#own[name], {
        get: (own, type) => Reflect.get(this.#engine?.options[name] ?? own, type),
        set: (own, type, convert) => {
          if (this.#engine) Reflect.set(this.#engine.options[name], type, convert)
          return Reflect.set(own, type, convert)
        },
      })
    const types = { parsers: kind('parsers'), serializers: kind('serializers') }
    this.options = new Proxy(types, {
      get: (own, name) => Reflect.get(name in own ? own : (this.#engine?.options ?? own), name),
    })
  }

  set engine(engine: Sql) {
    this.#engine = engine
    Object.assign(engine.options.parsers, this.#own.parsers)
    Object.assign(engine.options.serializers, this.#own.serializers)
  }

  get parameters(): object {
    return this.#engine?.parameters ?? {}
  }
}

/** Where queries of a handle go. */
interface Place {
  readonly statements: Statements<PostgresJsConnection>
  readonly lease?: LeasedTransaction<PostgresJsConnection>
}

/** What every `sql` of postgres.js has, in the session, or in the transaction of a lease. */
function queriesIn(place: Place): (first: unknown, ...rest: unknown[]) => unknown {
  const sql = (first: unknown, ...rest: unknown[]) => {
    const { raw } = (first ?? {}) as { raw?: unknown }
    if (Array.isArray(raw)) return new AmbientQuery(place, template(first as TemplateStringsArray, rest))
    const text = typeof first === 'string' ? `"${first}"` : '$'
    return new Recorded(
      (native) => native(replay(native, first, 'rows'), ...rest),
      () => text,
    )
  }
  const unsafe = (text: string, ...rest: unknown[]) =>
    new Recorded(
      (native) => native.unsafe(text, ...rest.map((each) => replay(native, each))),
      () => text,
    )
  const helper =
    (name: 'array' | 'json' | 'typed', type?: string) =>
    (...args: unknown[]) =>
      new Recorded((native) => {
        const helpers = native as unknown as Record<string, (...args: unknown[]) => unknown> &
          Record<'typed', Record<string, never>>
        const make = type === undefined ? helpers[name] : (helpers.typed[type] as unknown as typeof helpers.array)
        return (make as typeof helpers.array)?.(...args.map((each) => replay(native, each)))
      })
  const typed = new Proxy(helper('typed'), { get: (_, type) => helper('typed', String(type)) })
  return Object.assign(sql, {
    typed,
    types: typed,
    array: helper('array'),
    json: helper('json'),
    unsafe(text: string, ...rest: unknown[]) {
      const query = new AmbientQuery(place, unsafe(text, ...rest))
      return startsAtOnce() ? query.execute() : query
    },
    file(path: string, ...rest: unknown[]) {
      const load = async () => unsafe(await readFile(path, 'utf8'), ...rest)
      return new AmbientQuery(place, new Recorded(() => {}), load)
    },
    notify: (channel: string, payload: unknown) =>
      new AmbientQuery(place, unsafe('select pg_notify($1, $2)', [channel, `${payload}`])).execute(),
  })
}

/** Where each template first stood, for the stacks of its errors, as postgres.js has it. */
const origins = new WeakMap<TemplateStringsArray, Error>()

function template(strings: TemplateStringsArray, args: unknown[]): Recorded {
  if (!origins.has(strings)) {
    const { stackTraceLimit } = Error
    Error.stackTraceLimit = 4
    origins.set(strings, new Error())
    Error.stackTraceLimit = stackTraceLimit
  }
  const make = (native: Native) => {
    const query = native(strings, ...args.map((each) => replay(native, each)))
    return Object.defineProperty(query as object, 'origin', { get: () => origins.get(strings)?.stack ?? '' })
  }
  return new Recorded(make, () => strings.reduce((text, part, index) => text + textOf(args[index - 1]) + part))
}

/** What is not of a session: it goes by the engine, `await connect()`. */
const unsupported = ['listen', 'subscribe', 'largeObject', 'end', 'close']

function refusing(names: string[], instead: string): object {
  const refuse = (name: string) => async () => {
    throw new AmbientError('AMBIENT_UNSUPPORTED', `The ambient sql has no ${name}(); ${instead}.`)
  }
  return Object.fromEntries(names.map((name) => [name, refuse(name)]))
}

function createHandle(statements: Statements<PostgresJsConnection>, types: OwnTypes): object {
  const handle = Object.assign(queriesIn({ statements }), {
    ...refusing(unsupported, 'that of the engine is reached by `connect()`'),
    CLOSE: close,
    END: close,
    PostgresError: postgres.PostgresError,
    options: types.options,
    async begin(...args: unknown[]) {
      const control = parseTransactionControl(`begin ${args.length > 1 ? args[0] : ''}`)
      if (control?.kind !== 'begin') throw controlRefused(statements.name)
      return transact(statements, args.at(-1) as Work, control.settings)
    },
    async reserve() {
      const lease = new LeasedTransaction(statements)
      return Object.assign(queriesIn({ statements, lease }), { release: () => lease.release() })
    },
  })
  return Object.defineProperty(handle, 'parameters', { get: () => types.parameters })
}

type Work = (sql: TransactionSql) => unknown

/** A transaction as of postgres.js: a savepoint of the session. */
function transact(
  statements: Statements<PostgresJsConnection>,
  work: Work,
  settings: Parameters<LeasedTransaction<PostgresJsConnection>['run']>[0] = {},
): Promise<unknown> {
  const lease = new LeasedTransaction(statements)
  const sql = Object.assign(queriesIn({ statements, lease }), {
    ...refusing(['prepare'], 'a session cannot leave its transaction to others'),
    savepoint: (...args: unknown[]) => lease.block.enter(() => transact(statements, args.at(-1) as Work)),
  })
  return lease.run(settings, async () => {
    const result = work(sql as unknown as TransactionSql) // it has the members of one
    return Array.isArray(result) ? Promise.all(result) : result
  })
}
