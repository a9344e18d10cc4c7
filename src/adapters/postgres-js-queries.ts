import { readFile } from 'node:fs/promises'
import postgres, { type Sql, type TransactionSql } from 'postgres'
import type { Statements } from '../adapter.ts'
import { bindCallback } from '../context.ts'
import { AmbientError } from '../errors.ts'
import { LeasedTransaction, startsAtOnce } from '../leased.ts'
import { controlRefused, parseTransactionControl, withoutLeading } from '../sql.ts'
import type { PostgresJsConnection } from './postgres-js.ts'

/** A result of postgres.js: rows, with the tag of the command. */
export type Answer = unknown[] & { readonly command?: string }

/** A query of postgres.js. What the types of postgres.js do not have: who sends it, and how it is told its failure. */
export interface NativeQuery extends Promise<Answer> {
  handler(query: NativeQuery): void
  reject(error: unknown): void
  readonly state: { readonly pid: number; readonly secret: number } | null
  readonly options: { readonly simple?: boolean }
  forEach(callback: (row: unknown, result: unknown) => void): NativeQuery
  cursor(rows: number, callback: (rows: Answer) => Promise<unknown>): NativeQuery
}

/** An `Sql` as whatever is recorded here is played back to it. */
export interface Native {
  (first: unknown, ...rest: unknown[]): unknown
  unsafe(text: string, args?: unknown, options?: unknown): NativeQuery
  readonly options: Sql['options']
  readonly CLOSE: object
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
export class OwnTypes {
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

export function createHandle(statements: Statements<PostgresJsConnection>, types: OwnTypes): object {
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
