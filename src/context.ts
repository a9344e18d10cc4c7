import { AsyncLocalStorage } from 'node:async_hooks'
import type { EventEmitter } from 'node:events'
import { Abortion, type AbortOptions, assertTimeout } from './abortion.ts'
import type { TransactionOptions } from './adapter.ts'
import { bounded } from './clock.ts'
import { AmbientError, isAmbientError } from './errors.ts'
import { contextChannel } from './events.ts'
import { type AfterHook, byRegistration } from './hooks.ts'
import { closeAll, commitAll, type Participant, rollbackAll, type Unit } from './settle.ts'

/** Grows when copies of the package can no longer share contexts. */
const protocol = 1

/**
 * Where code runs: the innermost block and context, and through `parent` all that surround them. A new one for every context, block
 * and session beside the context. It lives as long as anything that was started in it, so what has ended leaves it.
 */
export interface Scope {
  readonly parent: Scope | undefined
  readonly context: Context | undefined
  /** The block that this scope was made for; once it has ended, what is left of it to refuse its late code. */
  block?: ScopeBlock | undefined
  /** The session beside the context that this scope was made for, until it is closed. */
  readonly beside?: { session: Participant | undefined }
  /** The database whose `beforeSession` runs here. */
  readonly preparing?: object
}

/** What the chain of scopes needs to know of a block. */
export interface ScopeBlock {
  /** Absent when the block has ended. */
  readonly session?: Participant
  readonly database: object
  readonly owner: object
  readonly label: string
  readonly place: string | undefined
  /** It takes part: the native ones only from their BEGIN on. */
  readonly begun: boolean
  /** It takes statements: begun and not ended. */
  readonly live: boolean
  readonly hook: boolean
}

interface Shared {
  readonly protocol: number
  readonly storage: AsyncLocalStorage<Scope | undefined>
  /** The last number that was given out. */
  count: number
}

const shared = share()
const { storage } = shared

/** One storage per process, whatever the number of copies of the package (C7). */
function share(): Shared {
  const key = Symbol.for('ambient-db')
  const global = globalThis as { [key]?: Shared }
  global[key] ??= { protocol, storage: new AsyncLocalStorage(), count: 0 }
  const shared = global[key]
  if (shared.protocol === protocol) return shared
  throw new AmbientError(
    'AMBIENT_PROTOCOL_MISMATCH',
    `Two copies of ambient-db are loaded; one speaks protocol ${shared.protocol}, the other ${protocol}.`,
  )
}

/** A number greater than all before, also those of other copies of the package: an identity, and an order of creation. */
export function nextNumber(): number {
  return ++shared.count
}

/** The scope of the running code. */
export function currentScope(): Scope | undefined {
  return storage.getStore()
}

/** Runs `work` in `scope`. */
export function runInScope<Result>(scope: Scope | undefined, work: () => Result): Result {
  return storage.run(scope, work)
}

/** Like {@link runInScope}, and what `work` returns begins there as well: a query that is sent when it is awaited (Drizzle, Knex). */
export function startInScope<Result>(
  scope: Scope | undefined,
  work: () => Result | Promise<Result>,
): Result | Promise<Result> {
  return storage.run(scope, () => {
    const result = work()
    if (result instanceof Promise || !isThenable<Result>(result)) return result
    return new Promise<Result>((resolve, reject) => result.then(resolve, reject))
  })
}

export function isThenable<Result>(value: unknown): value is PromiseLike<Result> {
  return typeof (value as { then?: unknown } | null | undefined)?.then === 'function'
}

/**
 * Lets every event of `emitter` run in `scope`, or else in the async context of this call with everything that others keep
 * in it, in whichever context it is emitted (S12, H6).
 */
export function bindEmitter<Emitter extends EventEmitter>(emitter: Emitter, scope?: Scope): Emitter {
  const inside: (work: () => boolean) => boolean = scope
    ? (work) => storage.run(scope, work)
    : AsyncLocalStorage.snapshot()
  const emit = emitter.emit
  emitter.emit = function (this: Emitter, ...args) {
    return inside(() => emit.apply(this, args))
  }
  return emitter
}

/** Makes a callback that runs in the current async context, whoever calls it (S12). */
export function bindCallback<Args extends unknown[], Result>(
  callback: (...args: Args) => Result,
): (...args: Args) => Result {
  const inside = AsyncLocalStorage.snapshot()
  return (...args) => inside(callback, ...args)
}

/** What a test has put in place of a database's engine, by the engines of the database (`ambient-db/testing`). */
const tests = new AsyncLocalStorage<Test>()

/** A test, by its sandboxes. */
export type Test = ReadonlyMap<object, TestPlace>

/** One sandbox of those that are open at once. */
export interface TestPlace {
  /** What its sessions take their connections from. */
  readonly slot: object
  /** Takes the place of a context for code that has none. */
  readonly standIn: Context
}

/** The sandbox of the running test for the database with these engines. */
export function currentTestPlace(engines: object): TestPlace | undefined {
  return tests.getStore()?.get(engines)
}

/** The running test, if there is one, with one sandbox more. */
export function testWith(engines: object, place: TestPlace): Test {
  return new Map([...(tests.getStore() ?? []), [engines, place]])
}

/** Runs `work` in `test`. */
export function runInTest<Result>(test: Test, work: () => Result): Result {
  return tests.run(test, work)
}

/** The header by which a request over a socket names its test. */
export const testHeader = 'x-ambient-test'

/** The tests that are found by what a request says, because it comes over a socket. */
export const testsByHeader: Map<string, Test> = new Map()

/** Runs `work` in no async context, neither ours nor anybody's: for what serves many units of work. */
export const outside: <Result>(work: () => Result) => Result = AsyncLocalStorage.snapshot()

/** Options of a context. */
export interface ContextOptions extends AbortOptions {
  /** How transactions of this context begin. Default is what each database says. */
  readonly transaction?: TransactionOptions | undefined
  /** `'join'` (the default) awaits work that nobody awaited; `'error'` makes it an error by itself. */
  readonly unawaited?: 'join' | 'error' | undefined
}

/** What only the package's own middlewares and testing tools may say. */
export interface InternalContextOptions extends ContextOptions {
  readonly settleTimeout?: number | undefined
  /** Opened by the testing tools: middlewares use it instead of opening their own (C3). */
  readonly adoptable?: boolean
  /** What a stream that is open at the end does. */
  readonly streams?: Unit['streams']
}

/** `'open'` until it is settled; `'failed'` when it could not commit what it should have. */
export type ContextState = 'open' | 'settling' | 'committed' | 'rolled-back' | 'failed'

/** A context in the hand: what a middleware for any framework is built from. */
export interface AmbientContext {
  readonly state: ContextState
  /** Aborts when the context is aborted (its `signal`, its `timeout`). */
  readonly signal: AbortSignal
  /** Runs `work` inside the context; may be called several times. Does not settle. */
  run<Result>(work: () => Result): Result
  /** Lets every event of `emitter` run inside the context, and returns it. */
  bind<Emitter extends EventEmitter>(emitter: Emitter): Emitter
  /**
   * Ends the context: joins work under way, then commits or rolls back every session and closes it. The first call decides,
   * and further calls wait for it. A commit rejects if anything did not commit, also when a rollback or an abort came before
   * it; a rollback that comes first always resolves.
   *
   * @param reason what the rollback is for: an error of clean-up is attached to it.
   * @throws the driver's error, or `AMBIENT_TRANSACTION_ABORTED`, `AMBIENT_COMMIT_UNKNOWN`, `AMBIENT_PARTIAL_COMMIT`,
   *   `AMBIENT_STREAM_OPEN`, `AMBIENT_UNAWAITED_WORK`, `AMBIENT_SETTLE_TIMEOUT`, `AMBIENT_ABORTED`, `AMBIENT_TIMEOUT`.
   */
  settle(outcome: 'commit' | 'rollback', reason?: unknown): Promise<void>
}

/** What one request, job or test owns: at most one session per database (C1). It ends once. */
export class Context implements AmbientContext, Unit {
  readonly id: number = nextNumber()
  options: InternalContextOptions
  readonly scope: Scope
  /** By their databases; so few that looking is cheaper than a map. */
  #sessions: { readonly key: object; readonly session: Participant }[] = []
  readonly #openedAt = contextChannel.hasSubscribers ? performance.now() : 0
  #state: ContextState = 'open'
  #fenced = false
  #sealed = false
  #settlement: Promise<void> | undefined
  #outcome: 'commit' | 'rollback' | undefined
  /** Something of it is committed, or may be: statements on their own, a commit by hand, a rollback without an answer. */
  committed = false
  /** Where it was ended, while tracing. */
  endedAt: string | undefined
  #controller: AbortController | undefined
  #abortion: Abortion | undefined
  #afterHooks: AfterHook[] = []

  /** `makeScope` gives a session beside the context a scope in which the surrounding context stays the current one. */
  constructor(options: InternalContextOptions, makeScope?: (context: Context) => Scope) {
    assertTimeout(options.timeout) // before anything is there to be ended
    assertTimeout(options.settleTimeout, 'settleTimeout')
    this.options = options
    this.scope = makeScope ? makeScope(this) : { parent: liveScope(currentScope()), context: this }
    if (contextChannel.hasSubscribers) contextChannel.publish({ type: 'opened', contextId: this.id })
    if (options.signal !== undefined || options.timeout !== undefined) {
      this.#abortion = new Abortion(options, (error) => this.abort(error))
    }
  }

  get state(): ContextState {
    return this.#state
  }

  /** No new statement is let in, except for hooks at the end. */
  get fenced(): boolean {
    return this.#fenced
  }

  /** Ended, or ending: the running code gets nothing from it any more, unless it is a hook of its sessions. */
  get refuses(): boolean {
    return this.#fenced && (this.#sealed || !insideHook(this))
  }

  get streams(): Unit['streams'] {
    return this.options.streams ?? 'refuse'
  }

  get unawaited(): 'join' | 'error' {
    return this.options.unawaited ?? 'join'
  }

  get settleTimeout(): number | undefined {
    return this.options.settleTimeout
  }

  get abortion(): AmbientError | undefined {
    return this.#abortion?.error
  }

  /** A signal or deadline watches it. */
  get abortable(): boolean {
    return this.#abortion !== undefined
  }

  get aborted(): Promise<never> {
    this.#abortion ??= new Abortion({})
    return this.#abortion.promise
  }

  get signal(): AbortSignal {
    this.#controller ??= new AbortController()
    if (this.abortion) this.#controller.abort(this.abortion)
    return this.#controller.signal
  }

  run<Result>(work: () => Result): Result {
    return storage.run(this.scope, work)
  }

  bind<Emitter extends EventEmitter>(emitter: Emitter): Emitter {
    return bindEmitter(emitter, this.scope)
  }

  /** The session for `key`, made by `open` if there is none (or only a closed one). */
  session<Session extends Participant>(key: object, open: () => Session): Session {
    const known = this.peek(key)
    if (known) return known as Session // only the database of `key` puts one here
    const session = open()
    this.#sessions.push({ key, session })
    return session
  }

  /** The session for `key`, if there is one. */
  peek(key: object): Participant | undefined {
    for (const each of this.#sessions) if (each.key === key) return each.session
    return undefined
  }

  /** Forgets a session that was closed by hand. */
  forget(key: object, session: Participant): void {
    this.#sessions = this.#sessions.filter((each) => each.key !== key || each.session !== session)
  }

  participants(): Participant[] {
    const sessions = this.#sessions.map(({ session }) => session)
    return sessions.length > 1 ? sessions.sort((one, other) => one.order - other.order) : sessions
  }

  /** Takes hooks that run after everything has settled. */
  defer(hooks: AfterHook[]): void {
    this.#afterHooks.push(...hooks)
  }

  fence(): void {
    this.#fenced = true
    for (const { session } of this.#sessions) session.fence()
  }

  seal(): void {
    this.#sealed = true
    this.fence()
  }

  settle(outcome: 'commit' | 'rollback', reason?: unknown): Promise<void> {
    try {
      assertOutcome(outcome)
    } catch (error) {
      return Promise.reject(error)
    }
    if (this.#settlement && insideHook(this)) return Promise.reject(settledInHook())
    this.#outcome ??= outcome
    this.#settlement ??= this.#settle(outcome, reason)
    if (outcome === this.#outcome || outcome === 'rollback') return this.#settlement
    return this.#settlement.then(() => {
      throw (
        this.abortion ?? new AmbientError('AMBIENT_CONTEXT_ENDED', 'The context was rolled back, so it cannot commit.')
      )
    })
  }

  /** No session was asked for. */
  get empty(): boolean {
    return this.#sessions.length === 0
  }

  /** Ends the context at once if no session has anything to settle; tells whether it did. */
  settleUntouched(outcome: 'commit' | 'rollback'): boolean {
    if (this.#settlement) return false
    for (const { session } of this.#sessions) if (session.touched) return false
    this.fence()
    for (const { session } of this.#sessions) void session.closeAtEnd()
    this.#outcome = outcome
    this.#settlement = Promise.resolve()
    this.#end(outcome === 'commit' ? 'committed' : 'rolled-back')
    return true
  }

  /** Ends the context now with `error`, whatever its work is doing; a COMMIT that was sent is awaited (C8). */
  abort(error: AmbientError): void {
    if (this.#state !== 'open' && this.#state !== 'settling') return
    this.#abortion ??= new Abortion({})
    this.#abortion.abort(error)
    this.#controller?.abort(error)
    if (this.#settlement === undefined) void this.settle('rollback', error)
  }

  async #settle(outcome: 'commit' | 'rollback', reason: unknown): Promise<void> {
    this.#state = 'settling'
    this.endedAt = this.participants()[0]?.place()
    const error = outcome === 'commit' ? undefined : (reason ?? contextRolledBack())
    let state: ContextState = 'failed'
    let failure: unknown
    try {
      if (outcome === 'commit') await commitAll(this)
      else await rollbackAll(this, error)
      state = outcome === 'commit' ? 'committed' : 'rolled-back'
    } catch (thrown) {
      failure = thrown
    }
    const closing = closeAll(this, failure ?? error)
    if (closing) await closing
    const hooks = this.#end(state, failure ?? (outcome === 'rollback' ? reason : undefined))
    if (hooks.length > 0) await runAfterHooks(hooks)
    if (state === 'failed') throw failure
  }

  /** Empties the container, so that whatever still points at the context pins nothing (C4). */
  #end(state: ContextState, error?: unknown): AfterHook[] {
    this.#abortion?.stop()
    this.#sessions = []
    this.options = {}
    this.#state = state
    const hooks = this.#afterHooks.sort(byRegistration)
    this.#afterHooks = []
    if (contextChannel.hasSubscribers) {
      const type = state === 'committed' || state === 'rolled-back' ? state : 'failed'
      const duration = this.#openedAt === 0 ? undefined : performance.now() - this.#openedAt
      contextChannel.publish({ type, contextId: this.id, duration, error })
    }
    return hooks
  }
}

/** Throws `AMBIENT_INVALID_ARGUMENT` for anything else, such as a promise: work must not be lost, and a success told, over a slip. */
export function assertOutcome(outcome: 'commit' | 'rollback'): void {
  if (outcome === 'commit' || outcome === 'rollback') return
  throw new AmbientError('AMBIENT_INVALID_ARGUMENT', "An outcome must be 'commit' or 'rollback'.")
}

function settledInHook(): AmbientError {
  return new AmbientError(
    'AMBIENT_ATOMIC_NESTING',
    'A hook of the end of a context called its `settle`, which waits for it.',
  )
}

function contextRolledBack(): AmbientError {
  return new AmbientError('AMBIENT_CONTEXT_ENDED', 'The context was rolled back.')
}

/** The nearest scope that still matters: chains of finished contexts must not keep each other alive. */
export function liveScope(scope: Scope | undefined): Scope | undefined {
  let nearest = scope
  while (nearest && isOver(nearest)) nearest = nearest.parent
  return nearest
}

function isOver({ block, beside, context, preparing }: Scope): boolean {
  if (preparing) return false
  if (block) return hasSettled(block.owner as Context) // its late code is refused until then
  if (beside) return !beside.session
  return hasSettled(context)
}

function hasSettled(context: Context | undefined): boolean {
  return context === undefined || (context.state !== 'open' && context.state !== 'settling')
}

/** The scopes from the running code outward. */
export function* enclosingScopes(scope: Scope | undefined = currentScope()): Generator<Scope> {
  for (let each = scope; each; each = each.parent) yield each
}

/** Hooks may use the sessions of their own context when everybody else is refused already. */
function insideHook(owner: Context): boolean {
  for (let scope = currentScope(); scope; scope = scope.parent) {
    if (scope.block?.hook && scope.block.live && scope.block.owner === owner) return true
  }
  return false
}

/** The context that the running code belongs to, live or ended. */
export function currentContext(): Context | undefined {
  return storage.getStore()?.context
}

/**
 * Runs `work` in a new context, inside another one or not, with sessions, connections and an outcome of its own: commits all
 * when it returns, rolls back all when it throws. For jobs, scripts, concurrent queries, and work after the answer.
 *
 * @returns what `work` returns, once everything is committed.
 * @throws what `work` throws, once everything is rolled back; otherwise what {@link AmbientContext.settle} throws.
 * @example
 * ```ts
 * import { newContext } from 'ambient-db'
 *
 * declare function importOrders(): Promise<number>
 * const imported = await newContext(importOrders, { timeout: 60_000 })
 * ```
 */
export async function newContext<Result>(
  work: () => Result | Promise<Result>,
  options: ContextOptions = {},
): Promise<Result> {
  return runUnit(new Context({ streams: 'destroy', ...options }), work)
}

/** Runs `work` in `context` and settles it by the result; the one way in which a unit of work with a callback ends. */
export async function runUnit<Result>(
  context: Context,
  work: () => Result | Promise<Result>,
  aborted: Promise<never> | undefined = context.abortable ? context.aborted : undefined,
): Promise<Result> {
  let result: Result
  try {
    if (context.abortion) throw context.abortion // before anything of `work` happens
    result = aborted
      ? await Promise.race([(async () => startInScope(context.scope, work))(), aborted])
      : await startInScope(context.scope, work)
  } catch (error) {
    await context.settle('rollback', error)
    throw error
  }
  if (!context.empty || !context.settleUntouched('commit')) await context.settle('commit')
  return result
}

/**
 * Opens a context that somebody else drives: run work in it, then settle it. Every context that is opened must be settled.
 *
 * @example
 * ```ts
 * import { openContext } from 'ambient-db'
 *
 * declare function handle(request: Request): Promise<Response>
 * async function middleware(request: Request): Promise<Response> {
 *   const context = openContext()
 *   try {
 *     const response = await context.run(() => handle(request))
 *     await context.settle(response.status < 400 ? 'commit' : 'rollback')
 *     return response
 *   } catch (error) {
 *     await context.settle('rollback', error)
 *     throw error
 *   }
 * }
 * ```
 */
export function openContext(options: ContextOptions = {}): AmbientContext {
  return new Context(options)
}

/** Whether the running code belongs to a context that takes work. */
export function hasContext(): boolean {
  const context = currentContext()
  return context !== undefined && !context.refuses
}

/**
 * The signal of the context that the running code belongs to, for whatever else works on its behalf. It fires when the context is
 * aborted: the client of the request went away, its `timeout` passed, or the `signal` that it was given fired. Its reason is the
 * `AMBIENT_ABORTED` or `AMBIENT_TIMEOUT` that the context ends with. A context that has ended well fires no more, so behind the
 * head of an answer nobody hears of a client that goes amid the body. Outside of any context it is one that never fires.
 *
 * It says nothing of the `signal` and `timeout` of a block or a session.
 *
 * @example
 * ```ts
 * import { contextSignal } from 'ambient-db'
 *
 * async function exchangeRates(): Promise<unknown> {
 *   const response = await fetch('https://rates.example/eur', { signal: contextSignal() })
 *   return response.json()
 * }
 * ```
 */
export function contextSignal(): AbortSignal {
  return currentContext()?.signal ?? new AbortController().signal
}

/** Runs `work` outside any context, for background work that must not use the request's session. */
export function detach<Result>(work: () => Result): Result {
  return storage.run(undefined, work)
}

/** Runs hooks one after the other, each in a context of its own; a failure is reported and changes nothing (K2). */
export async function runAfterHooks(hooks: AfterHook[]): Promise<void> {
  for (const hook of hooks) {
    await detach(() => runAfterHook(hook))
    hook.leave?.()
  }
}

/**
 * Its context is aborted if it takes too long. Then it has the same time once more to heed that. What becomes of a COMMIT that it
 * has sent elsewhere is told of, however late.
 */
async function runAfterHook({ run, timeout, late, onError }: AfterHook): Promise<void> {
  const context = new Context({ streams: 'destroy' })
  let ended: Promise<unknown> = Promise.resolve()
  const work = () => {
    ended = (async () => run())()
    return ended
  }
  const running = runUnit(context, work, context.aborted)
  bounded(running, timeout, () => context.abort(late())).catch(() => {})
  try {
    await running
  } catch (error) {
    onError(error)
    if (error !== context.abortion) return
    ended.catch((second) => {
      if (isAmbientError(second) && (second.outcome === 'unknown' || second.outcome === 'partial')) onError(second)
    })
    await bounded(ended, timeout, () => undefined).catch(() => {})
  }
}
