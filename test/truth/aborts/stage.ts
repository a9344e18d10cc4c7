import type { AsyncLocalStorage } from 'node:async_hooks'
import type { AtomicOptions } from '../../../src/atomic.ts'
import type { ContextOptions } from '../../../src/context.ts'
import {
  type AmbientDatabase,
  type AmbientSession,
  type ContextEvent,
  isAmbientError,
  type NewSessionOptions,
  newContext,
} from '../../../src/index.ts'
import { type DatabaseName, describe, poolSize, Stage, type StageOptions } from '../cuts/stage.ts'
import type { Course, Place } from './course.ts'
import type { Exchange, Front } from './front.ts'
import { Piece } from './piece.ts'
import type { Wire } from './wire.ts'

export const ways = [
  'signal',
  'timeout',
  'block signal',
  'block timeout',
  'session signal',
  'session timeout',
  'node-http',
  'express',
] as const

/** What is aborted, and by what; with a framework, the client of a request goes away. */
export type Way = (typeof ways)[number]

/** The kind of piece that `way` aborts. */
export function kindOf(way: Way): Piece['kind'] {
  if (way.startsWith('block')) return 'block'
  return way.startsWith('session') ? 'session' : 'context'
}

export interface Finding {
  readonly kind:
    | AbortStage['violations'][number]['kind']
    | 'commit after the abort'
    | 'unfounded rollback'
    | 'still running'
    | 'kept lock'
    | 'late cancel'
    | 'out of step'
  readonly text: string
}

/** What all code of a run carries along. */
export interface Run {
  readonly course: Course
  readonly uncaught: string[]
  /** Hears what the library publishes of a context; `piece` is what opened it. */
  heard(event: ContextEvent, piece: Piece | undefined): void
}

export type Places = AsyncLocalStorage<Place<Run, Piece>>

/** The time for those who wait for a deadline: it comes when the harness says so. */
export interface Deadlines {
  /** The `timeout` that stands for it. */
  readonly timeout: number
  /** It comes for all who wait; `each` hears of the piece whose it was before that. */
  reach(each: (piece: Piece | undefined) => void): void
}

export interface AbortStageOptions extends StageOptions {
  readonly way: Way
  readonly at: Run
  readonly places: Places
  readonly wire: Wire
  readonly deadlines: Deadlines
  readonly front: Front | undefined
  /** SQL that waits until the abort, or for a moment if there is none. */
  readonly wait: () => Promise<string>
  /** A planted fault: the promise alone is aborted. */
  readonly onlyRejects: boolean
}

type Labels = Parameters<Stage['unit']>[0]

/** By which the next borrowers of the connections are known to the witness: how they begin, and a lock that they hold. */
export const borrowing = { transaction: { isolationLevel: 'repeatable read' }, lock: 4711 } as const
const borrowed = `select pg_advisory_xact_lock_shared(${borrowing.lock}, 0), pg_sleep(0.05)`

/** A stage on which contexts, blocks or sessions can be aborted at any moment. */
export class AbortStage extends Stage {
  readonly findings: Finding[] = []
  readonly #options: AbortStageOptions
  readonly #controller = new AbortController()
  readonly #live = new Set<Piece>()
  readonly #byContext = new Map<number, Piece>()
  readonly #exchanges = new Set<Exchange>()
  readonly #judged = new Set<unknown>()
  /** COMMITs that were called for and not written yet. */
  #due = 0
  #others = 0
  #wrapped: AmbientDatabase<unknown, unknown> | undefined
  #marked = false
  #aborted = () => {}
  /** Resolves when what is aborted has been told so. */
  readonly gone: Promise<void> = new Promise((resolve) => {
    this.#aborted = resolve
  })

  constructor(options: AbortStageOptions) {
    const committing = (database: DatabaseName) => this.#committing(database)
    super({
      ...options,
      mutate: (adapter, database) => {
        const made = options.mutate(adapter, database)
        return {
          ...made,
          commit: (connection) => {
            committing(database)
            return made.commit(connection)
          },
        }
      },
    })
    this.#options = options
  }

  // What units do

  /** Its blocks and sessions can be aborted. */
  override get main(): AmbientDatabase<unknown, unknown> {
    this.#wrapped ??= this.#abortable(super.main)
    return this.#wrapped
  }

  /** Without abortable blocks and sessions. */
  get plain(): AmbientDatabase<unknown, unknown> {
    return super.main
  }

  override unit = <Result>(labels: Labels, work: () => Promise<Result>, options: ContextOptions = {}) => {
    const piece = this.#piece('context')
    if (this.#options.front) return this.#request(this.#options.front, piece, labels, work, options)
    const run = () => newContext(work, { ...options, ...this.abortBy('context') })
    const context = this.#perform(piece, this.#options.onlyRejects ? () => this.#rejecting(work) : run)
    return this.report('newContext', labels, context)
  }

  /** Runs a piece that is made without the stage. */
  perform = <Result>(kind: Piece['kind'], work: () => Promise<Result>): Promise<Result> =>
    this.#perform(this.#piece(kind), work)

  /** A context that is none of the unit's. */
  others = async <Result>(work: () => Promise<Result>): Promise<Result> => {
    this.#others++
    try {
      return await this.#options.places.run({ run: this.#options.at }, () => newContext(work))
    } finally {
      this.#others--
    }
  }

  executeIn = (session: AmbientSession<unknown>, sql: string): Promise<unknown> =>
    this.#options.library.execute(session.db, sql, [])

  wait = async (): Promise<unknown> => this.execute(await this.#options.wait())

  /** The option that ends a piece of this kind. */
  abortBy(kind: Piece['kind']): { signal?: AbortSignal; timeout?: number } {
    const { way, deadlines } = this.#options
    if (kindOf(way) !== kind || this.#options.front) return {}
    return way.endsWith('timeout') ? { timeout: deadlines.timeout } : { signal: this.#controller.signal }
  }

  #abortable(main: AmbientDatabase<unknown, unknown>): AmbientDatabase<unknown, unknown> {
    const atomic = <Result>(work: () => Result | Promise<Result>, options?: AtomicOptions) => {
      const piece = this.#piece('block')
      const entering = () => {
        piece.entered = true
        return work()
      }
      return this.#perform(piece, () => main.atomic(entering, { ...options, ...this.abortBy('block') }))
    }
    const newSession = <Result>(
      work: (session: AmbientSession<unknown>) => Result | Promise<Result>,
      options?: NewSessionOptions,
    ) => {
      const piece = this.#piece('session')
      return this.#perform(piece, () => main.newSession(work, { ...options, ...this.abortBy('session') }))
    }
    return Object.create(main, { atomic: { value: atomic }, newSession: { value: newSession } })
  }

  // The pieces of the unit

  #piece(kind: Piece['kind']): Piece {
    const piece = new Piece(kind, this.#options.places.getStore()?.piece)
    piece.aborted = this.#controller.signal.aborted && this.#matches(piece)
    return piece
  }

  #matches({ kind }: Piece): boolean {
    return kind === kindOf(this.#options.way)
  }

  async #perform<Result>(piece: Piece, work: () => Promise<Result>): Promise<Result> {
    this.#begin(piece)
    try {
      return await this.#options.places.run({ run: this.#options.at, piece }, work)
    } catch (error) {
      this.#judgeOutcome(piece, error)
      throw error
    } finally {
      this.#end(piece)
    }
  }

  #mark(piece: Piece): void {
    piece.aborted = true
    this.#marked = true
  }

  #begin(piece: Piece): void {
    this.#live.add(piece)
    if (this.#matches(piece)) this.#options.at.course.begun()
  }

  #end(piece: Piece): void {
    this.#live.delete(piece)
    if (this.#matches(piece)) this.#options.at.course.ended()
  }

  /** Who says that all was rolled back must have heard it from the server. */
  #judgeOutcome(piece: Piece, error: unknown): void {
    if (this.#judged.has(error)) return // whoever passes it on speaks of himself only
    this.#judged.add(error)
    const open = this.#options.wire.open(piece.whole)
    if (isAmbientError(error) && error.outcome === 'rolled-back' && open > 0) {
      this.find('unfounded rollback', `${describe(error)}, but ${open} transactions were not answered`)
    }
  }

  /** A context that is left alone by the abort. */
  #rejecting<Result>(work: () => Promise<Result>): Promise<Result> {
    const { signal } = this.#controller
    const aborted = new Promise<never>((_, reject) => signal.addEventListener('abort', () => reject(signal.reason)))
    return Promise.race([newContext(work), aborted])
  }

  /** The context of a request. What is said of it is its status, and what the library publishes of its end. */
  async #request<Result>(
    front: Front,
    piece: Piece,
    labels: Labels,
    work: () => Promise<Result>,
    { transaction }: ContextOptions,
  ): Promise<Result> {
    let result: Result | undefined
    const exchange = front.send({
      transaction,
      inside: (serve) => this.#options.places.run({ run: this.#options.at, piece }, serve),
      work: async () => {
        result = await work()
      },
      left: () => this.#mark(piece),
    })
    this.#exchanges.add(exchange)
    this.#begin(piece)
    const status = await exchange.answered
    const served = await exchange.over
    this.#exchanges.delete(exchange)
    const end = served ? await piece.end : undefined
    this.#end(piece)
    if (status !== undefined) (status < 400 ? this.committed : this.rolledBack)(`status ${status}`, labels)
    if (end) {
      this.#judgeOutcome(piece, end.error)
      const said = end.type === 'committed' ? Promise.resolve() : Promise.reject(end.error)
      await this.report(`the context ${end.type}`, labels, said).catch(() => {})
    }
    if (status === 200) return result as Result // it was answered when the work had returned
    throw end?.error ?? new Error('The request was not answered.')
  }

  /** Hears what the library publishes of a context. */
  heard(event: ContextEvent, piece: Piece | undefined): void {
    if (event.type === 'opened') {
      if (!piece || piece.opened) return // contexts of hooks
      piece.opened = true
      this.#byContext.set(event.contextId, piece)
    } else {
      this.#byContext.get(event.contextId)?.ended(event)
    }
  }

  /** COMMIT is called for on a database. */
  #committing(database: DatabaseName): void {
    const piece = this.#options.places.getStore()?.piece
    if (!piece) return
    const { whole } = piece
    // The others follow the first one that was committed (C6).
    if (!piece.mayCommit && !(database === 'other' && whole.committing)) {
      this.find('commit after the abort', `COMMIT was called for on ${database}`)
    }
    if (piece.mayCommit) whole.committing = true
    this.#due++
  }

  /** COMMIT is written. */
  written(): void {
    const piece = this.#options.places.getStore()?.piece
    if (!piece) return
    if (this.#due > 0) this.#due--
    else if (!piece.mayCommit) this.find('commit after the abort', 'COMMIT was sent')
  }

  // What the harness does

  /** Ends all that the way ends. */
  abort(): void {
    const { way, deadlines, front, wire } = this.#options
    if (front) {
      const left = Promise.all([...this.#exchanges].map((exchange) => exchange.leave())).then(this.#aborted)
      wire.hold(left)
      return
    }
    if (way.endsWith('timeout')) {
      deadlines.reach((piece) => piece && this.#mark(piece))
    } else {
      for (const piece of this.#live) if (this.#matches(piece)) this.#mark(piece)
      this.#controller.abort(new Error('no longer wanted'))
    }
    this.#aborted()
  }

  /** Something of the unit will not go on. */
  get aborted(): boolean {
    return this.#marked || this.#controller.signal.aborted
  }

  /** Whether nothing is under way any more but what was aborted. */
  get quiet(): boolean {
    return this.#others === 0 && [...this.#live].every((piece) => piece.whole.aborted || piece.aborted)
  }

  /** Waits in line for every connection, and uses it: whoever comes next must not be hit by anything. */
  async borrow(): Promise<void> {
    const contexts = this.databases.flatMap((name) =>
      Array.from({ length: poolSize }, () =>
        newContext(() => this.#options.library.execute((name === 'main' ? this.plain : this.other).db, borrowed, []), {
          transaction: borrowing.transaction,
        }),
      ),
    )
    for (const end of await Promise.allSettled(contexts)) {
      if (end.status === 'fulfilled') continue
      const { code, cause } = (end.reason ?? {}) as { code?: unknown; cause?: { code?: unknown } }
      const kind = [code, cause?.code].includes('57014') ? 'late cancel' : 'lost slot' // a library may wrap it
      this.find(kind, `the next borrower: ${describe(end.reason)}`)
    }
  }

  find(kind: Finding['kind'], text: string): void {
    this.findings.push({ kind, text })
  }
}
