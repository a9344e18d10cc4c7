// Serves one framework after the other, on behalf of the process that began it: uncaught exceptions are counted here.
import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import express from 'express'
import { Pool } from 'pg'
import { pgAdapter } from '../../../src/adapters/pg.ts'
import type { ContextEvent } from '../../../src/events.ts'
import { type AmbientDatabase, defineDatabase, isAmbientError, newContext } from '../../../src/index.ts'
import { TappedSocket } from '../tapped-socket.ts'
import { settlesWithin, sleep } from '../waiting.ts'
import { faults } from './faults.ts'
import { type App, type Framework, frameworks, onExpress, type Served } from './frameworks.ts'
import { databaseNames, keyOf, type Plan, unitIn, unitOf } from './plan.ts'
import { type Answer, bodyFailure, type DatabaseName, type Part, type StyleName, styleOf } from './styles.ts'

export interface Start {
  readonly framework: string
  /** The name of a fault that is planted. */
  readonly fault: string | undefined
  /** Connection strings, by database. */
  readonly urls: Readonly<Record<DatabaseName, string>>
  readonly applicationName: string
  /** Milliseconds for what must come to an end. */
  readonly patience: number
}

/** What a promise in a handler said about a part. */
export interface Said {
  readonly key: string
  readonly verdict: 'there' | 'gone' | 'unknown'
  readonly by: string
}

/** A COMMIT that was written to a socket. */
export interface SentCommit {
  /** What its transaction had written. */
  readonly keys: readonly string[]
  answered: boolean
}

/** What is known inside when all requests are over. */
export interface Account {
  readonly said: readonly Said[]
  readonly commits: readonly SentCommit[]
  /** Connections of the pools that could not be used. */
  readonly lostSlots: readonly string[]
}

/** How it came to its end. */
export interface End {
  /** What did not close. */
  readonly leftOpen: readonly string[]
  readonly uncaught: readonly string[]
}

/** What a handler is asked for, in the body of its request. */
export type Order = Pick<Plan, 'rows' | 'spoils'>

const poolSizes: Record<DatabaseName, number> = { main: 10, other: 6 }
class Run implements App {
  readonly #databases: Record<DatabaseName, AmbientDatabase<Pool, Pool>>
  readonly #served: Promise<Served>
  readonly #patience: number
  readonly #said: Said[] = []
  readonly #commits: SentCommit[] = []
  readonly #uncaught: string[] = []
  /** Errors that were noted as the outcome of a part, so that they say nothing of the others. */
  readonly #told = new WeakSet<object>()
  /** Contexts that have not ended. */
  readonly #contexts = new Set<number>()

  readonly options: App['options'] = {
    skip: ({ url = '' }) => url.includes('without'),
    transaction: ({ url = '' }) => (url.includes('serializable') ? { isolationLevel: 'serializable' } : undefined),
  }

  constructor({ framework: name, fault: faultName, urls, applicationName, patience }: Start) {
    this.#patience = patience
    const timeouts = { acquireTimeout: patience, settleTimeout: patience, blockTimeout: patience }
    const fault = faultName === undefined ? undefined : faults[faultName]
    const define = (database: DatabaseName) => {
      const config = {
        connectionString: urls[database],
        application_name: applicationName,
        max: poolSizes[database],
        stream: () => this.#tap(database),
      }
      const adapter = pgAdapter(() => new Pool(config))
      const mutated = fault?.mutate?.(adapter) ?? adapter
      return defineDatabase({ name: database, adapter: mutated, ...timeouts, onHookError: () => {} })
    }
    this.#databases = { main: define('main'), other: define('other') }
    const framework = fault?.middleware
      ? onExpress(name, express, fault.middleware)
      : (frameworks.find((each) => each.name === name) as Framework) // the process that asks knows them
    process.on('uncaughtException', this.#onUncaught)
    process.on('unhandledRejection', this.#onUncaught)
    subscribe('ambient-db:context', this.#onContext)
    this.#served = framework.serve(this)
  }

  async port(): Promise<number> {
    return (await this.#served).port
  }

  async handle(url: string, body: unknown): Promise<Answer> {
    const [, styleName = '', number = ''] = decodeURIComponent(url.split('?')[0] ?? '').split('/')
    const request = Number(number)
    const { parts, handle } = styleOf(styleName as StyleName) // the client knows them
    const { main } = this.#databases
    const partOf = (name: string) => parts.find((part) => part.name === name) as Part
    return handle({
      request,
      main,
      write: (part, db) => this.#write(partOf(part), request, body as Order, db),
      fail: () => main.db.query('select * from missing'),
      tell: (part, promise) => this.#tell(keyOf(partOf(part), request), promise),
    })
  }

  explain(error: unknown): Answer {
    const { statusCode = 500, message, code } = error as { statusCode?: number; message?: string; code?: string }
    if (!isAmbientError(error) || this.#told.has(error)) return { status: statusCode, body: { message, code } }
    const { outcome, database, databases } = error
    return { status: statusCode, body: { message, code, outcome, database, databases } }
  }

  async #write({ name, database }: Part, request: number, { rows, spoils }: Order, given?: Pool): Promise<void> {
    const db = given ?? this.#databases[database].db
    for (let n = 1; n <= rows; n++) await db.query('insert into entries values ($1, $2)', [unitOf(request, name), n])
    for (const spoil of spoils[name] ?? []) {
      if (spoil === 'doomed') await db.query('insert into doomed values (1)')
      if (spoil === 'slow') await db.query('insert into slow values (0.02)')
      if (spoil !== 'contended') continue
      await db.query('select sum(n) from counters')
      await db.query('update counters set n = n + 1 where id = $1', [request % 16])
    }
  }

  async #tell<Result>(key: string, promise: Promise<Result>): Promise<Result> {
    try {
      const result = await promise
      this.#said.push({ key, verdict: 'there', by: 'a promise that resolved' })
      return result
    } catch (error) {
      const verdict = isAmbientError(error) && error.outcome === 'unknown' ? 'unknown' : 'gone'
      this.#said.push({ key, verdict, by: describe(error) })
      this.#told.add(Object(error))
      throw error
    }
  }

  /** A socket that notes which COMMIT was sent for which rows, and whether it was answered. */
  #tap(database: DatabaseName): TappedSocket {
    let keys = new Set<string>()
    return new TappedSocket({
      bound: (parameters) => {
        const unit = unitIn(parameters)
        if (unit) keys.add(`${database} ${unit}`)
      },
      asked: (sql) => {
        if (/^BEGIN/i.test(sql)) keys = new Set()
        if (!/^COMMIT/i.test(sql)) return () => {}
        const commit: SentCommit = { keys: [...keys], answered: false }
        this.#commits.push(commit)
        return () => {
          commit.answered = true
        }
      },
    })
  }

  /** Waits until all contexts have ended; resolves with what has not. */
  async rest(): Promise<string[]> {
    for (const until = Date.now() + this.#patience; this.#contexts.size > 0 && Date.now() < until; ) await sleep(10)
    return this.#contexts.size > 0 ? [`${this.#contexts.size} contexts have not ended`] : []
  }

  /** Uses all connections of all pools at the same time, and tells what is known. */
  async account(): Promise<Account> {
    const occupations = databaseNames.map((name) =>
      this.#occupy(name).then(
        () => [],
        (error) => [`'${name}': ${describe(error)}`],
      ),
    )
    const lostSlots = (await Promise.all(occupations)).flat()
    return { said: this.#said, commits: this.#commits, lostSlots }
  }

  async #occupy(name: DatabaseName): Promise<void> {
    let resolve = () => {}
    let reject: (error: unknown) => void = () => {}
    const all = new Promise<void>((...settle) => {
      ;[resolve, reject] = settle
    })
    all.catch(() => {}) // whoever waits for it says so
    let arrived = 0
    const occupant = async () => {
      await this.#databases[name].db.query('select 1')
      if (++arrived === poolSizes[name]) resolve()
      await all
    }
    const ends = Array.from({ length: poolSizes[name] }, () =>
      newContext(occupant, { timeout: this.#patience }).catch((error) => {
        reject(error)
        throw error
      }),
    )
    await Promise.all(ends)
  }

  /** Closes the server, then the databases; resolves with what did not close, and what was uncaught. */
  async close(): Promise<End> {
    const leftOpen: string[] = []
    const { close } = await this.#served
    if (!(await settlesWithin(close(), this.#patience))) leftOpen.push('the server did not close')
    const shutdowns = databaseNames.map((name) =>
      this.#databases[name].shutdown().catch((error) => leftOpen.push(`'${name}': ${describe(error)}`)),
    )
    if (!(await settlesWithin(Promise.all(shutdowns), 3 * this.#patience)))
      leftOpen.push('the databases did not shut down')
    await sleep(20) // what the last connections have to say
    process.off('uncaughtException', this.#onUncaught)
    process.off('unhandledRejection', this.#onUncaught)
    unsubscribe('ambient-db:context', this.#onContext)
    return { leftOpen, uncaught: this.#uncaught }
  }

  #onUncaught = (error: unknown): void => void this.#uncaught.push(describe(error))

  #onContext = (message: unknown): void => {
    const { type, contextId = 0 } = message as ContextEvent // what this channel carries
    if (type === 'opened') this.#contexts.add(contextId)
    else this.#contexts.delete(contextId)
  }
}

function describe(error: unknown): string {
  if (!(error instanceof Error)) return String(error)
  const { code = error.name, outcome } = error as { code?: string; outcome?: string }
  return `${code}${outcome ? ` [${outcome}]` : ''} ${error.message.slice(0, 160)}`
}

/** What the other process may ask. */
export interface Calls {
  start(start: Start): Promise<number>
  rest(): Promise<string[]>
  account(): Promise<Account>
  close(): Promise<End>
}

let run: Run | undefined
const calls: Calls = {
  start(start) {
    run = new Run(start)
    return run.port()
  },
  rest: () => (run as Run).rest(), // it was started
  account: () => (run as Run).account(),
  close: () => (run as Run).close(),
}

process.on('message', async ({ name, argument }: { name: keyof Calls; argument: Start }) => {
  const [status, value] = await calls[name](argument).then(
    (result) => ['done', result],
    (error) => ['failed', describe(error)],
  )
  process.send?.({ status, value })
})

// The server of Hono prints what a body fails with, which is what some of them are for.
const print = console.error
console.error = (...args) => {
  if (args[0]?.message !== bodyFailure) print(...args)
}

process.once('disconnect', () => setTimeout(() => process.exit(1), 60_000).unref()) // nobody is left to see it hang
