import type { ContextOptions } from '../../../src/context.ts'
import {
  type AmbientDatabase,
  type AmbientSession,
  type DatabaseOptions,
  defineDatabase,
  isAmbientError,
  newContext,
} from '../../../src/index.ts'
import type { WireProxy } from '../../support/proxy.ts'
import type { Library } from '../libraries.ts'
import type { Mutate } from './mutants.ts'
import type { Place, Server } from './server.ts'
import type { WireLog } from './wire-log.ts'

export type DatabaseName = 'main' | 'other'

/** What the library has let its user know about marker rows. */
type Verdict = 'there' | 'gone' | 'unknown' | 'unsaid'

interface Claim {
  readonly database: DatabaseName
  readonly labels: readonly string[]
  readonly verdict: Verdict
  /** Who said so. */
  readonly by: string
  /** What was thrown, if it says that nothing is known. */
  readonly error?: unknown
}

export interface Violation {
  readonly kind:
    | 'wrong outcome'
    | 'unjustified unknown'
    | 'unresolved'
    | 'missed unknown'
    | 'uncaught'
    | 'lost slot'
    | 'open transaction'
    | 'leaked socket'
    | 'hang'
    | 'unreached'
  readonly text: string
}

type Labels = readonly string[] | Partial<Record<DatabaseName, readonly string[]>>

/** Short, so that a stall can be longer, and also shorter. */
const shortTimeouts = { acquireTimeout: 500, settleTimeout: 300, blockTimeout: 2000 }
export const poolSize = 2

/** What units may ask for their database. */
export type StageDatabase = Partial<Omit<DatabaseOptions<unknown, unknown, unknown>, 'name' | 'adapter'>>

export interface StageOptions {
  readonly library: Library
  readonly server: Server
  readonly place: Place
  readonly run: string
  /** What the pools connect to. */
  readonly proxy: Pick<WireProxy, 'url'>
  readonly log: Pick<WireLog, 'socketFor' | 'tap' | 'unanswered'>
  /** What the unit asks of its pools. */
  readonly pool: object
  /** Of each database; its timeouts are short unless it says otherwise. */
  readonly database?: StageDatabase
  readonly mutate: (...given: [...Parameters<Mutate>, database: DatabaseName]) => ReturnType<Mutate>
  /** Whether the connection is stalled rather than cut: then an answer and a time-out can cross. */
  readonly lenience: number
}

/** Where a unit of work plays: databases behind the proxy, and a record of what the library says about marker rows. */
export class Stage {
  readonly #options: StageOptions
  readonly #defined = new Map<DatabaseName, AmbientDatabase<unknown, unknown>>()
  readonly #claims: Claim[] = []
  readonly #reported = new Set<unknown>()
  readonly #unknowns = new Set<unknown>()
  readonly #reports = new Set<Promise<unknown>>()
  readonly violations: Violation[] = []
  /** Outcomes that were unknown and were found out. */
  resolved = 0

  constructor(options: StageOptions) {
    this.#options = options
  }

  // What units do

  get main(): AmbientDatabase<unknown, unknown> {
    return this.#database('main')
  }

  get other(): AmbientDatabase<unknown, unknown> {
    return this.#database('other')
  }

  #database(name: DatabaseName): AmbientDatabase<unknown, unknown> {
    const known = this.#defined.get(name)
    if (known) return known
    const { library, place, proxy, log, pool, mutate, run, database: asked } = this.#options
    const url = new URL(proxy.url)
    if (name === 'other') url.pathname += '_other'
    const { resolvable } = library
    const options = { url: url.href, run, database: name, size: poolSize, log, more: pool }
    const made = library.adapter(() => place.makePool(options) as never) // each library gets a pool of its driver
    const adapter = mutate(made, name)
    const database = defineDatabase({ name, adapter, resolvable, ...shortTimeouts, onHookError: () => {}, ...asked })
    this.#defined.set(name, database)
    return database
  }

  /** The SQL of this server. */
  get sql(): Server {
    return this.#options.server
  }

  execute = (sql: string, parameters: unknown[] = []): Promise<unknown> =>
    this.#options.library.execute(this.main.db, sql, parameters)

  /** Writes a marker row in the session of the context. */
  write = (label: string, database: DatabaseName = 'main'): Promise<unknown> =>
    this.#options.library.execute(this.#database(database).db, this.sql.insert, [this.#options.run, label])

  writeIn = (session: AmbientSession<unknown>, label: string): Promise<unknown> =>
    this.#options.library.execute(session.db, this.sql.insert, [this.#options.run, label])

  read = (database: DatabaseName = 'main'): Promise<unknown> =>
    this.#options.library.execute(this.#database(database).db, 'select count(*) from numbers', [])

  fail = (): Promise<unknown> => this.execute('select * from missing')

  stream = (): AsyncIterable<unknown> => this.#options.library.stream(this.main.db)

  /** A transaction of the library's own, which writes markers. */
  transaction = (labels: readonly string[]): Promise<unknown> =>
    this.#options.library.transaction(this.main.db, async (execute) => {
      for (const label of labels) await execute(this.sql.insert, [this.#options.run, label])
    })

  /** A context whose outcome is the outcome of `labels`. */
  unit = <Result>(labels: Labels, work: () => Promise<Result>, options?: ContextOptions): Promise<Result> =>
    this.report('newContext', labels, newContext(work, options))

  /** Notes what `promise` says about `labels`: durable if it resolves, otherwise what the error says. */
  report = <Result>(by: string, labels: Labels | (() => Labels), promise: Promise<Result>): Promise<Result> => {
    const report = this.#report(by, labels, promise)
    this.#reports.add(report)
    const done = () => this.#reports.delete(report)
    report.then(done, done)
    return report
  }

  /** Resolves when all that was to be reported is: some of it may settle after the unit has. */
  async reported(): Promise<void> {
    while (this.#reports.size > 0) await Promise.allSettled(this.#reports)
  }

  async #report<Result>(by: string, labels: Labels | (() => Labels), promise: Promise<Result>): Promise<Result> {
    const named = () => (typeof labels === 'function' ? labels() : labels)
    try {
      const result = await promise
      this.#claim(named(), () => 'there', by)
      return result
    } catch (error) {
      const mine = named()
      const first = !this.#reported.has(error)
      this.#reported.add(error)
      const verdict = (database: DatabaseName) => (first ? this.#verdict(error, database) : 'gone')
      this.#claim(mine, verdict, `${by}: ${describe(error)}`, error)
      throw error
    }
  }

  /** Statements without a transaction: an error of the driver says nothing of what the server did. */
  statement = async (label: string, promise: Promise<unknown>): Promise<void> => {
    try {
      await promise
      this.#claim([label], () => 'there', 'a statement')
    } catch (error) {
      this.#claim([label], () => (isAmbientError(error) ? 'gone' : 'unsaid'), `a statement: ${describe(error)}`)
      throw error
    }
  }

  committed = (by: string, labels: Labels): void => this.#claim(labels, () => 'there', by)

  rolledBack = (by: string, labels: Labels): void => this.#claim(labels, () => 'gone', by)

  unsaid = (by: string, labels: Labels): void => this.#claim(labels, () => 'unsaid', by)

  #claim(labels: Labels, verdict: (database: DatabaseName) => Verdict, by: string, error?: unknown): void {
    const byDatabase = (Array.isArray(labels) ? { main: labels } : labels) as Record<string, readonly string[]>
    for (const [database, list] of Object.entries(byDatabase) as [DatabaseName, readonly string[]][]) {
      this.#claims.push({ database, labels: list, verdict: verdict(database), by, error })
    }
  }

  #verdict(error: unknown, database: DatabaseName): Verdict {
    if (!isAmbientError(error)) return 'gone'
    if (error.code === 'AMBIENT_PARTIAL_COMMIT') {
      if (error.databases?.unknown.length) this.#unknown(error.cause)
      if (error.databases?.committed.includes(database)) return 'there'
      if (error.databases?.unknown.includes(database)) return 'unknown'
      if (error.databases?.rolledBack.includes(database)) return 'gone'
      this.#violate('wrong outcome', `AMBIENT_PARTIAL_COMMIT does not say what became of '${database}'`)
      return 'unsaid'
    }
    if (error.outcome === 'unknown') this.#unknown(error)
    return error.outcome === 'unknown' && error.database === database ? 'unknown' : 'gone'
  }

  /** Whoever says that nothing is known must have sent a COMMIT that nobody answered. */
  #unknown(error: unknown): void {
    const { log, lenience } = this.#options
    if (this.#unknowns.has(error)) return
    this.#unknowns.add(error)
    const { database, code } = error as { database?: DatabaseName; code?: string }
    const open = log.unanswered(database ?? 'main', lenience)
    if (code === 'AMBIENT_COMMIT_UNKNOWN' ? open.commits === 0 : open.begins === 0) {
      this.#violate('unjustified unknown', describe(error))
    }
  }

  #violate(kind: Violation['kind'], text: string): void {
    this.violations.push({ kind, text })
  }

  // What the harness does

  get databases(): DatabaseName[] {
    return [...this.#defined.keys()]
  }

  get unknowns(): number {
    return this.#unknowns.size
  }

  /** The unit has ended: each COMMIT without an answer must have been told of. */
  settled(): void {
    const { log } = this.#options
    const open = (['main', 'other'] as const).reduce((sum, name) => sum + log.unanswered(name, 0).commits, 0)
    if (open > this.#unknowns.size) {
      this.#violate('missed unknown', `${open} COMMITs without an answer, ${this.#unknowns.size} were told of`)
    }
  }

  /** Has every unknown outcome of work found out; what is said then is a claim like any other. */
  async resolve(): Promise<void> {
    const open = this.#claims.filter(({ verdict, labels }) => verdict === 'unknown' && labels.length > 0)
    await Promise.all(open.map((claim) => this.#resolve(claim)))
  }

  async #resolve({ database, labels, error, by }: Claim): Promise<void> {
    const unknown = isAmbientError(error, 'AMBIENT_PARTIAL_COMMIT') ? error.cause : error
    if (!this.#options.library.resolvable || !isAmbientError(unknown, 'AMBIENT_COMMIT_UNKNOWN')) return
    const outcome = (await unknown.resolve?.({ timeout: 5000 })) ?? 'unknown'
    if (outcome === 'unknown') return this.#violate('unresolved', `resolve() could not find out: ${by}`)
    this.resolved++
    const verdict = outcome === 'committed' ? 'there' : 'gone'
    this.#claims.push({ database, labels, verdict, by: `resolve() of ${by}` })
  }

  /** Uses all connections of all pools at the same time. */
  async occupy(): Promise<void> {
    await Promise.all(this.databases.map((name) => this.#occupy(name)))
  }

  async #occupy(name: DatabaseName): Promise<void> {
    let arrived = 0
    let open = () => {}
    let giveUp: (error: unknown) => void = () => {}
    const all = new Promise<void>((resolve, reject) => {
      open = resolve
      giveUp = reject
    })
    all.catch(() => {})
    const one = async () => {
      await this.read(name)
      if (++arrived === poolSize) open()
      await all
    }
    const ends = Array.from({ length: poolSize }, async () => {
      try {
        await newContext(one)
      } catch (error) {
        giveUp(error)
        throw error
      }
    })
    const failed = (await Promise.allSettled(ends)).find(({ status }) => status === 'rejected')
    if (failed) throw (failed as PromiseRejectedResult).reason
  }

  async shutdown(): Promise<void> {
    await Promise.all([...this.#defined.values()].map((database) => database.shutdown()))
  }

  /** Compares what was said with the rows that are there: `main:label`, `other:label`. */
  judge(rows: ReadonlySet<string>): void {
    const spoken = new Set<string>()
    for (const { database, labels, verdict, by } of this.#claims) {
      const keys = labels.map((label) => `${database}:${label}`)
      for (const key of keys) spoken.add(key)
      const present = keys.filter((key) => rows.has(key))
      const absent = keys.filter((key) => !rows.has(key))
      if (verdict === 'there' && absent.length > 0)
        this.#violate('wrong outcome', `${by} said committed: ${absent} not there`)
      if (verdict === 'gone' && present.length > 0)
        this.#violate('wrong outcome', `${by} said not committed: ${present} there`)
      if (verdict === 'unknown' && present.length > 0 && absent.length > 0) {
        this.#violate('wrong outcome', `${by}: half of one transaction is there, ${present} but not ${absent}`)
      }
      const hooks = this.#claims.filter(
        (each) => each.by.startsWith('after') && each.labels.some((label) => labels.includes(label)),
      )
      if (verdict === 'unknown' && hooks.length > 0) {
        this.#violate('wrong outcome', `${hooks.map((each) => each.by)} ran though the outcome is unknown`)
      }
    }
    const unspoken = [...rows].filter((key) => !spoken.has(key))
    if (unspoken.length > 0) this.#violate('wrong outcome', `nobody was told of ${unspoken}`)
  }

  /** How the unit came out, in one line. */
  summary(): string {
    return this.#claims.map(({ labels, verdict, by }) => `${labels.join('+')} ${verdict} (${by})`).join('; ')
  }
}

export function describe(error: unknown): string {
  if (!(error instanceof Error)) return String(error)
  const { code, outcome } = error as { code?: string; outcome?: string }
  return `${code ?? error.name}${outcome ? ` [${outcome}]` : ''} ${error.message.split('\n')[0]?.slice(0, 120)}`
}
