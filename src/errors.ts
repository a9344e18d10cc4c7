/** What the database is known to have done when an error was thrown. */
export type Outcome = 'rolled-back' | 'unknown' | 'partial'

/** What is found out about a COMMIT whose answer never came. */
export type CommitOutcome = 'committed' | 'rolled-back' | 'unknown'

/** Options of {@link AmbientError.resolve}. */
export interface ResolveOptions {
  /** Milliseconds to keep asking while the server is away or has not decided yet. Default is `30_000`. */
  readonly timeout?: number | undefined
}

/** How {@link AmbientError.resolve} finds out. */
export type Resolve = (options?: ResolveOptions) => Promise<CommitOutcome>

/**
 * Every code, with what to do about it. The text of an error is: what happened (from the place that throws), then this.
 * Each code has a section in `docs/errors.md` and a test that provokes it.
 */
export const catalogue = {
  AMBIENT_ABORTED: 'The signal that was given fired: what was not committed before is rolled back.',
  AMBIENT_ACQUIRE_TIMEOUT:
    'Release connections earlier (`commit()` or `closeSession()` before long work), enlarge the pool, make `beforeSession` and `afterBegin` shorter, or raise `acquireTimeout`.',
  AMBIENT_ATOMIC_NESTING:
    'An inner block must not break the promise of the outer one: use `current: "savepoint"` or `"join"`, or end the transaction outside the block.',
  AMBIENT_BEFORE_SESSION:
    '`beforeSession` runs before the session it prepares can exist: use another database, or the engine from `connect()`.',
  AMBIENT_BLOCK_ENDED: 'Await everything that a block starts before it returns.',
  AMBIENT_COMMIT_UNKNOWN:
    'COMMIT was sent and its answer never came: the work is either committed or not. Find out before doing it again, by `resolve()` of this error or by what was written; it is never retried for you.',
  AMBIENT_CONTEXT_ENDED:
    'Await all work before the context ends, or give late work a context of its own with `newContext(work)`.',
  AMBIENT_HOST_MISSING:
    'The engine factory takes a host: set `host` in `defineDatabase`, or call `changeHost(host)` in `beforeSession`.',
  AMBIENT_INVALID_ARGUMENT: 'Correct the argument; its type and meaning are in the documentation of the function.',
  AMBIENT_NO_CONTEXT:
    'Run the code inside `newContext(work)` or behind a middleware; for the bare engine use `await connect()`.',
  AMBIENT_PARTIAL_COMMIT:
    'Several databases cannot commit as one. Repair what did not commit by hand, or make the work repeatable.',
  AMBIENT_PROTOCOL_MISMATCH:
    'All copies of the package in one process must speak the same protocol: align their versions (`npm ls ambient-db`).',
  AMBIENT_RESPONSE_BYPASSED:
    'Answer through the response, which waits for the commit; for a route that speaks on its connection itself, `skip` the context.',
  AMBIENT_RESPONSE_IN_BLOCK:
    'The answer may leave only after the work is committed: send it after the block, or use `end`, which waits for the block.',
  AMBIENT_SANDBOX:
    'A sandbox is opened before a test and rolled back after it, once at a time for each database; what it cannot show needs a test with real commits.',
  AMBIENT_SANDBOX_ENDED:
    'In a sandbox nothing may end its transaction: leave COMMIT, and DDL on MySQL, to tests with real commits, and clean up what this one may have left.',
  AMBIENT_SELF_DEADLOCK:
    'The engine has one connection, and the code that waits for it runs inside the unit that holds it: commit first, or use the same session.',
  AMBIENT_SESSION_BUSY:
    'Code that waits for itself never ends: use the session of the block, or start the other work after the block.',
  AMBIENT_SESSION_CLOSED: 'Take a new session with `session()`, or close it later.',
  AMBIENT_SESSION_LEFT_OPEN:
    'Await all work before the end of a test, and settle every context that is opened; with `trace: true` it says where each began.',
  AMBIENT_SETTLE_TIMEOUT:
    'Await work before the end, make it shorter, or raise `settleTimeout`; what was not committed before is rolled back.',
  AMBIENT_SHUT_DOWN: 'No new work is taken after `shutdown()`.',
  AMBIENT_STREAM_OPEN: 'Read the stream or cursor to its end, or close it, before anything else on this session.',
  AMBIENT_TIMEOUT: 'Make the work shorter or raise its `timeout`; what was not committed before is rolled back.',
  AMBIENT_TRANSACTION_ABORTED:
    'A transaction that the database gave up cannot be committed: roll back, or wrap statements that may fail in `atomic`.',
  AMBIENT_TRANSACTION_CONTROL:
    'The session begins and ends its own transactions: use `commit()`, `rollback()` and `atomic(work)`, or the transactions of your library.',
  AMBIENT_TRANSACTION_OPEN: 'Commit or roll it back first, or say what shall happen to it.',
  AMBIENT_TRANSACTION_OPTIONS:
    'Options of a transaction that is already open cannot change: give them to the outermost call.',
  AMBIENT_UNAWAITED_WORK: 'Await every query and block before the work returns.',
  AMBIENT_UNSUPPORTED: 'Use what the documentation of the adapter names instead.',
} as const

/** The stable codes; test `error.code`, never a message. */
export type AmbientErrorCode = keyof typeof catalogue

/** What every database of a context did, for `AMBIENT_PARTIAL_COMMIT`. */
export interface DatabaseOutcomes {
  /** Names of the databases whose server answered COMMIT. */
  readonly committed: readonly string[]
  /** Names of the databases that were rolled back. */
  readonly rolledBack: readonly string[]
  /** Names of the databases whose COMMIT got no answer. */
  readonly unknown: readonly string[]
}

interface ErrorDetails {
  readonly database?: string | undefined
  readonly outcome?: Outcome | undefined
  readonly statusCode?: number | undefined
  readonly databases?: DatabaseOutcomes | undefined
  readonly cause?: unknown
  readonly resolve?: Resolve | undefined
}

const brand = Symbol.for('ambient-db.error')

/**
 * The one error class of the package. Errors of the driver pass through untouched or stand as `cause`.
 * Recognise it with {@link isAmbientError}, which also works across copies of the package.
 */
export class AmbientError extends Error {
  override readonly name = 'AmbientError'
  /** The stable code, `AMBIENT_…`. */
  readonly code: AmbientErrorCode
  /** The name of the database that it concerns, if one. */
  readonly database: string | undefined
  /** What the database did, where that is known to be one of these. */
  readonly outcome: Outcome | undefined
  /** An HTTP status for it where one is fitting: 503 for a full pool or a shut-down database. */
  readonly statusCode: number | undefined
  /** With `AMBIENT_PARTIAL_COMMIT`: which databases committed and which did not. */
  readonly databases: DatabaseOutcomes | undefined
  /**
   * With `AMBIENT_COMMIT_UNKNOWN`: asks the server, once it is back, what became of the transaction. (`AMBIENT_PARTIAL_COMMIT` has
   * that error as its `cause` if the outcome of a database is unknown.)
   *
   * `'committed'`: all of it is there. `'rolled-back'`: nothing of it is there, and never will be. `'unknown'`: that cannot be found
   * out, because the database is not `resolvable` (an option of `defineDatabase`), the engine has no such question, the
   * transaction had written nothing, the server does not answer or decide within `timeout`, or it has crashed or was replaced, so
   * that its answer could be about another transaction.
   *
   * It asks by a connection of its own, to the host where COMMIT was sent, also after `changeHost` and `shutdown`. It changes
   * nothing: the session goes on as before, no hook runs, and nothing is sent again. May be called several times.
   *
   * @throws `AMBIENT_INVALID_ARGUMENT` for a `timeout` that is no number of milliseconds; never because of the server.
   */
  declare readonly resolve?: Resolve | undefined

  constructor(code: AmbientErrorCode, what: string, details: ErrorDetails = {}) {
    const subject = details.database === undefined ? '' : `Database '${details.database}': `
    super(`${subject}${what} ${catalogue[code]}`, 'cause' in details ? { cause: details.cause } : undefined)
    Object.defineProperty(this, brand, { value: true })
    this.code = code
    this.database = details.database
    this.outcome = details.outcome
    this.statusCode = details.statusCode
    this.databases = details.databases
    if (details.resolve) {
      Object.defineProperty(this, 'resolve', { value: details.resolve })
      // It is kept for later, and until a stack is read it keeps the objects of its calls alive: sessions, connections.
      for (const each of [this, details.cause]) if (each instanceof Error) void each.stack
    }
  }
}

/**
 * Whether `error` is an {@link AmbientError} of any copy of the package, with `code` if one is given.
 *
 * @example
 * ```ts
 * import { isAmbientError, newContext } from 'ambient-db'
 *
 * declare function transfer(): Promise<void>
 * await newContext(transfer).catch((error: unknown) => {
 *   if (isAmbientError(error, 'AMBIENT_COMMIT_UNKNOWN')) console.error('look it up before trying again')
 *   throw error
 * })
 * ```
 */
export function isAmbientError(error: unknown, code?: AmbientErrorCode): error is AmbientError {
  if (typeof error !== 'object' || error === null || !(brand in error)) return false
  return code === undefined || (error as { code?: unknown }).code === code
}

/**
 * Notes on `error` that clean-up failed as well, as a non-enumerable `cleanupErrors` array.
 * The error that is thrown keeps its identity; a second failure never takes its place.
 */
export function attachCleanupError(error: unknown, second: unknown): void {
  if (error === second || !Object.isExtensible(error)) return // nor is anything that is no object
  const known = (error as { cleanupErrors?: unknown[] }).cleanupErrors
  if (Array.isArray(known)) known.push(second)
  else Object.defineProperty(error as object, 'cleanupErrors', { value: [second], configurable: true })
}

const spoken = new WeakSet<AmbientError>()

/**
 * Says on an error of ours whether all of a unit's work was rolled back. The unit that threw it knows; those around it, which the
 * error passes later, have only their own work to speak of.
 */
export function stateOutcome(error: unknown, rolledBack: boolean): void {
  if (!isAmbientError(error) || spoken.has(error)) return
  spoken.add(error)
  if (rolledBack && error.outcome === undefined) Reflect.set(error, 'outcome', 'rolled-back') // a frozen one stays as it is
}
