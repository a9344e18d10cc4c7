import type { Adapter } from '../../../src/adapter.ts'
import { type AmbientDatabase, defineDatabase, isAmbientError, newContext } from '../../../src/index.ts'
import { startProxy, type WireProxy } from '../../support/proxy.ts'
import type { Library } from '../libraries.ts'
import { sleep } from '../waiting.ts'
import type { Place, ServerConnection } from './place.ts'
import type { Random } from './random.ts'

export interface Violation {
  readonly kind:
    | 'wrong outcome' // the rows are not what was said
    | 'too early' // somebody was told of a commit before anybody else could see it
    | 'hang' // something did not settle at all
    | 'late' // it settled, but after its bound
    | 'wrong error' // another error than promised, or another text
    | 'not served' // a unit of work was refused that had to be served
    | 'shutdown' // work was under way when `shutdown()` had ended
    | 'lost slot' // the pool was not full again
    | 'open transaction'
    | 'leaked connection'
    | 'uncaught'
  readonly text: string
}

export interface Timeouts {
  readonly acquireTimeout: number
  readonly settleTimeout: number
}

type AnyAdapter = Adapter<unknown, unknown, unknown>
type AnyDatabase = AmbientDatabase<unknown, unknown>

/** What is made worse, to see whether it is noticed. */
export interface Sabotage {
  readonly timeouts?: Partial<Timeouts>
  mutate?(adapter: AnyAdapter): AnyAdapter
  shutdown?(database: AnyDatabase): Promise<void>
}

interface StageOptions {
  readonly library: Library
  readonly place: Place
  readonly run: string
  readonly random: Random
  /** Makes the pool of the driver. */
  makePool(options: { url: string; run: string; size: number }): unknown
  readonly size: number
  readonly timeouts: Timeouts
  /** Whether there is a wire to put a proxy in. */
  readonly wire: boolean
  readonly sabotage: Sabotage
  /** In which the pool must be full again, and the server must have forgotten what was closed, in ms. */
  readonly recovery: number
}

/** How a unit of work ended. */
export interface End {
  readonly label: string
  /** What it failed with. */
  readonly error?: unknown
  readonly ms: number
}

/** Where several units of work wait for each other. */
export interface Meeting {
  come(): Promise<void>
  /** Lets all go, now and later. */
  dissolve(): void
  readonly dissolved: boolean
}

/** What clean-up and a busy machine may add to a bound, in ms. */
const tolerance = 3000

/** One database, its pool and its proxies; and a record of what the library says about marker rows. */
export class Stage {
  readonly random: Random
  readonly size: number
  readonly timeouts: Timeouts
  readonly proxies: readonly WireProxy[]
  readonly database: AnyDatabase
  readonly violations: Violation[] = []
  readonly place: Place
  readonly #options: StageOptions
  readonly #said = new Map<string, { readonly verdict: 'there' | 'gone' | 'unknown'; readonly by: string }>()
  readonly #underWay = new Set<string>()
  readonly #running = new Set<Promise<unknown>>()
  #units = 0
  #giveUp: (error: Error) => void = () => {}
  readonly #givenUp: Promise<never>

  static async open(options: StageOptions): Promise<Stage> {
    const start = () => startProxy(options.place.url, { record: false })
    return new Stage(options, options.wire ? await Promise.all([start(), start()]) : [])
  }

  private constructor(options: StageOptions, proxies: readonly WireProxy[]) {
    const { library, place, run, size, sabotage, random, makePool } = options
    this.#options = options
    this.place = place
    this.random = random
    this.size = size
    this.proxies = proxies
    this.timeouts = { ...options.timeouts, ...sabotage.timeouts }
    this.#givenUp = new Promise((_, reject) => {
      this.#giveUp = reject
    })
    this.#givenUp.catch(() => {})
    const host = proxies[0]?.url ?? place.url
    const adapter = library.adapter((url = host) => makePool({ url, run, size }) as never) // each library gets a pool of its driver
    this.database = defineDatabase({
      ...{ name: 'main', host, adapter: sabotage.mutate?.(adapter) ?? adapter },
      ...this.timeouts,
    })
  }

  /** The proxy that connections go through until the host is changed. */
  get proxy(): WireProxy {
    return this.proxies[0] as WireProxy // where there is a wire
  }

  /** The timeouts that are promised, whatever is planted. */
  get promised(): Timeouts {
    return this.#options.timeouts
  }

  /** How many units of work there were. */
  get units(): number {
    return this.#units
  }

  /** In which a unit must have ended that waits for a connection once, and for BEGIN, and works for `work` ms besides. */
  bound(work = 0): number {
    return 2 * this.promised.acquireTimeout + work + tolerance
  }

  violate(kind: Violation['kind'], text: string): void {
    this.violations.push({ kind, text })
  }

  /** Writes a marker row in the session of the context. */
  write(label: string): Promise<unknown> {
    return this.execute(`insert into markers values ('${this.#options.run}', '${label}')`)
  }

  execute(sql: string): Promise<unknown> {
    return this.#options.library.execute(this.database.db, sql, [])
  }

  /**
   * Runs a unit of work in a context of its own; never rejects. What its end says about the row of its label is noted, and what
   * is said to be there is looked for at once.
   */
  unit(work: (label: string) => Promise<unknown>, bound = this.bound()): Promise<End> {
    const label = `unit${++this.#units}`
    return this.#track(this.#run(label, work, bound))
  }

  async #run(label: string, work: (label: string) => Promise<unknown>, bound: number): Promise<End> {
    const { place } = this
    const startedAt = performance.now()
    this.#underWay.add(label)
    const ended = () => {
      this.#underWay.delete(label)
      const ms = Math.round(performance.now() - startedAt)
      if (ms > bound) this.violate('late', `${label} ended after ${ms} ms, its bound is ${Math.round(bound)} ms`)
      return ms
    }
    try {
      await newContext(() => work(label))
      const ms = ended()
      this.#said.set(label, { verdict: 'there', by: 'it resolved' })
      if (!(await place.sees(label))) this.violate('too early', `${label} resolved, and nobody else saw its row`)
      return { label, ms }
    } catch (error) {
      const unknown = isAmbientError(error, 'AMBIENT_COMMIT_UNKNOWN')
      this.#said.set(label, { verdict: unknown ? 'unknown' : 'gone', by: describe(error) })
      return { label, error, ms: ended() }
    }
  }

  #track<Result>(promise: Promise<Result>): Promise<Result> {
    this.#running.add(promise)
    const over = () => void this.#running.delete(promise)
    promise.then(over, over)
    return promise
  }

  /** Who comes waits until so many have come, or somebody can't. */
  meeting(members: number): Meeting {
    const { passed, open } = this.gate()
    let come = 0
    const dissolve = () => {
      come = Number.NaN
      open()
    }
    return {
      get dissolved() {
        return Number.isNaN(come)
      },
      come() {
        if (++come === members) open()
        return passed
      },
      dissolve,
    }
  }

  /** A point that units wait at; it is left also when the case is given up. */
  gate(): { readonly passed: Promise<void>; open(): void } {
    let open = () => {}
    const opened = new Promise<void>((resolve) => {
      open = resolve
    })
    const passed = Promise.race([opened, this.#givenUp])
    passed.catch(() => {})
    return { passed, open }
  }

  /** The unit had to be served. */
  served(ends: readonly End[]): void {
    for (const { label, error } of ends) if (error) this.violate('not served', `${label}: ${describe(error)}`)
  }

  /** The error must have one of these codes, of the library or of the driver; a pattern is for texts. */
  expectError(by: string, error: unknown, ...expected: (string | RegExp)[]): void {
    const own = told(error)
    const driver = told(own.cause) // a library may wrap what its driver throws, but nothing of ours
    const fits = expected.some((each) => {
      if (typeof each !== 'string') return each.test(`${own.message} ${driver.message}`)
      return own.code === each || (driver.code === each && !each.startsWith('AMBIENT_'))
    })
    if (!fits) this.violate('wrong error', `${by}: ${error ? describe(error) : 'no error'}, but expected ${expected}`)
  }

  /** Uses all connections of the pool at the same time; when one unit gets none, the others go. */
  async occupy(): Promise<readonly End[]> {
    const all = this.meeting(this.size)
    const ends = Array.from({ length: this.size }, async () => {
      const end = await this.unit(async (label) => {
        await this.write(label)
        await all.come()
      })
      if (end.error) all.dissolve()
      return end
    })
    return Promise.all(ends)
  }

  shutdown(): Promise<void> {
    return this.#track(this.#options.sabotage.shutdown?.(this.database) ?? this.database.shutdown())
  }

  /** To be asked when `shutdown()` has ended. */
  nothingUnderWay(): void {
    if (this.#underWay.size > 0) this.violate('shutdown', `it has ended, and under way are ${[...this.#underWay]}`)
  }

  async expectNoConnection(): Promise<void> {
    await this.#expectNone('leaked connection', () => true)
  }

  async expectNoTransaction(): Promise<void> {
    await this.#expectNone('open transaction', ({ inTransaction }) => inTransaction)
  }

  /** The server may take a moment to forget what was closed. */
  async #expectNone(kind: Violation['kind'], counts: (each: ServerConnection) => boolean): Promise<void> {
    const { recovery } = this.#options
    const since = performance.now()
    for (;;) {
      const found = (await this.place.connections()).filter(counts)
      if (found.length === 0) return
      if (performance.now() - since > recovery) return this.violate(kind, found.map(({ text }) => text).join('; '))
      await sleep(10)
    }
  }

  /** A slot is lost if it is not there after a while, however often it is asked for. */
  async expectFullPool(): Promise<void> {
    const { recovery } = this.#options
    const since = performance.now()
    for (;;) {
      const failed = (await this.occupy()).find(({ error }) => error)
      if (!failed) break
      if (performance.now() - since < recovery) continue
      return this.violate('lost slot', `the pool of ${this.size} is not full: ${describe(failed.error)}`)
    }
    const { length } = await this.place.connections()
    if (length > this.size) this.violate('leaked connection', `${length} connections, of a pool of ${this.size}`)
  }

  /** Everything that was started has settled. */
  async settled(): Promise<void> {
    while (this.#running.size > 0) await Promise.allSettled([...this.#running])
  }

  /** Lets go of everything that waits at a gate. */
  giveUp(): void {
    this.#giveUp(new Error('The case was given up.'))
  }

  /** Compares what was said with the rows that are there; resolves with how many units had been acknowledged. */
  async judge(): Promise<number> {
    const rows = await this.place.rows()
    for (const [label, { verdict, by }] of this.#said) {
      if (verdict === 'there' && !rows.has(label)) this.violate('wrong outcome', `${label} is not there: ${by}`)
      if (verdict === 'gone' && rows.has(label)) this.violate('wrong outcome', `${label} is there: ${by}`)
    }
    for (const label of rows) if (!this.#said.has(label)) this.violate('wrong outcome', `nobody was told of ${label}`)
    return [...this.#said.values()].filter(({ verdict }) => verdict === 'there').length
  }
}

export function describe(error: unknown): string {
  if (!(error instanceof Error)) return String(error)
  const { code } = error as { code?: string }
  return `${code ?? error.name} ${error.message.split('\n')[0]?.slice(0, 140)}`
}

function told(error: unknown): { readonly code?: string; readonly message?: string; readonly cause?: unknown } {
  return (error ?? {}) as ReturnType<typeof told>
}
