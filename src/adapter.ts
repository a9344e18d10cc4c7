import { AmbientError } from './errors.ts'

/** How a transaction begins. An absent member means the server's default. */
export interface TransactionSettings {
  readonly isolationLevel?: 'read uncommitted' | 'read committed' | 'repeatable read' | 'serializable'
  /** `true` begins a read-only transaction, `false` a read-write one. */
  readonly readOnly?: boolean
  /** PostgreSQL: with serializable and read-only, wait for a snapshot that can never fail. */
  readonly deferrable?: boolean
}

/** How transactions begin, or `'autocommit'` for none: each statement on its own; `atomic` still opens one. */
export type TransactionOptions = TransactionSettings | 'autocommit'

/**
 * What an engine can do, as data. An adapter for an unknown dialect declares the conservative value of each. A flag that links to a
 * member of the adapter must agree with what that member does.
 */
export interface Capabilities {
  /** Savepoints work, so blocks can nest. */
  readonly savepoints: boolean
  /** The handle can stream rows or open cursors. */
  readonly streaming: boolean
  /** A running statement can be cancelled on the server ({@link Adapter.cancel}). */
  readonly cancelling: boolean
  /** A failed statement aborts the whole transaction (PostgreSQL), so nothing but a rollback can follow. */
  readonly failedStatementAborts: boolean
  /** The driver can tell the state of the transaction ({@link Adapter.transactionStatus}). */
  readonly transactionStatus: boolean
  /** BEGIN may travel together with the first statement ({@link Adapter.mayPipelineBegin}). */
  readonly pipelining: boolean
  /** The loss of a checked-out connection is noticed while it is idle (an error listener is attached). */
  readonly lossDetection: boolean
  /**
   * What became of a transaction whose COMMIT got no answer can be looked up ({@link Adapter.identifyTransaction},
   * {@link Adapter.lookUpTransaction}).
   */
  readonly commitLookup: boolean
  /**
   * The engine has one connection, hence one transaction at a time: sessions wait for each other in JavaScript. Its connection may be
   * the engine itself.
   */
  readonly singleConnection: boolean
}

/** What an error of the driver means. */
export interface ErrorTraits {
  /**
   * `'answered'`: the server said this. `'unsent'`: the statement never left (bad arguments). `'unanswered'`: anything else (a cut
   * socket, a client-side timeout), so what the server did is not known.
   */
  readonly reply: 'answered' | 'unsent' | 'unanswered'
  /** A serialization failure or deadlock: running the whole transaction again may succeed, which is what `retry` does. */
  readonly retryable: boolean
  /** The driver knew that the connection was gone, and sent nothing. */
  readonly lost?: boolean
  /**
   * The engine was locked by somebody else and the same call may succeed in a moment (SQLite BUSY). The session repeats such a BEGIN
   * or COMMIT until `acquireTimeout`, never a statement.
   */
  readonly busy?: boolean
}

/** What a server says of a transaction that was to be committed; `'pending'`: not yet, ask again. */
export type CommitStatus = 'committed' | 'rolled-back' | 'pending' | 'unknown'

/**
 * How one library's connections, transactions and handle work. An adapter is naive: it does what it is told, once, on the
 * connection it is given; the order of calls, waiting, fences and clean-up belong to the session.
 * It is a plain object whose functions do not use `this`, so that a library's adapter can be a driver's with another handle.
 * Each call is made outside any async context unless said otherwise. `ambient-db/conformance` holds the suite to pass.
 *
 * What adapters share: {@link callFactory}, {@link overDriver}, `traits.ts` (what errors of the engines mean), `sql.ts` (transaction control as text).
 */
export interface Adapter<Handle, Engine, Connection> {
  /** What `engine` can do. Called once per engine. */
  capabilities(engine: Engine): Capabilities

  /** Makes the engine (pool) for a host; called at first use, once per host. Must not connect if the library is lazy. */
  createEngine(host: string | undefined): Engine | Promise<Engine>

  /** Closes the engine; called once, after every connection was released. */
  closeEngine(engine: Engine): Promise<void>

  /**
   * Takes a connection from the engine. The returned connection has an error listener that calls `onLost`, so that a cut
   * socket is never an uncaught exception, where a connection can be lost at all. Waiting is bounded by the session, which releases
   * a connection that comes too late.
   */
  acquire(engine: Engine, onLost: (error: Error) => void): Promise<Connection>

  /** Gives the connection back; with `broken`, destroys it instead (single-connection engines keep it). */
  release(engine: Engine, connection: Connection, broken?: Error): void | Promise<void>

  /**
   * Sends BEGIN with all its settings, and resolves when the server answered it. An engine that would take its write lock late, when
   * waiting is no use any more (SQLite), takes it here, unless the transaction is read-only.
   */
  begin(connection: Connection, settings: TransactionSettings): Promise<unknown>

  /**
   * Sends COMMIT. Resolves with `'committed'` only if the server said so, with `'rolled-back'` where it answered that the
   * transaction was rolled back instead; rejects with the driver's error otherwise.
   */
  commit(connection: Connection): Promise<'committed' | 'rolled-back'>

  /** Sends ROLLBACK, and resolves when the server answered it. Without a transaction (its BEGIN failed, say) it does no harm. */
  rollback(connection: Connection): Promise<unknown>

  /**
   * What the server said that the last ROLLBACK, or ROLLBACK TO SAVEPOINT, could not undo, if anything: tables without
   * transactions (MySQL).
   */
  leftovers?(connection: Connection): string | undefined

  /** Sends SAVEPOINT. `name` is a plain identifier, unique in the transaction. */
  savepoint(connection: Connection, name: string): Promise<unknown>

  /** Sends ROLLBACK TO SAVEPOINT. */
  rollbackTo(connection: Connection, name: string): Promise<unknown>

  /** Sends RELEASE SAVEPOINT. */
  releaseSavepoint(connection: Connection, name: string): Promise<unknown>

  /**
   * Checks at once what COMMIT would check, constraints that are deferred, and leaves later ones as they were. Rejects with the
   * error of the server. For tests, whose transactions never commit; absent where the engine has nothing deferred.
   */
  checkDeferred?(connection: Connection): Promise<unknown>

  /**
   * What the driver knows of the transaction after an answer: `'none'` means that the user's SQL or the engine ended it.
   * Absent, or `undefined` as the answer, where the driver cannot tell.
   */
  transactionStatus?(connection: Connection): 'open' | 'aborted' | 'none' | undefined

  /** Resolves when `transactionStatus` is true again after an error, where the error arrives before the status it leaves behind. */
  afterError?(connection: Connection): Promise<void>

  /**
   * Asks the engine itself whether the transaction is still open, after a statement that failed with `error`. Needed where a
   * failed statement does not abort the transaction, but some end it, and `transactionStatus` cannot tell. `'none'` means that
   * the engine rolled the transaction back (SQLite, a deadlock of MySQL), `'ended'` that the statement may have committed it
   * (MySQL's DDL, also where it fails).
   */
  probeTransaction?(connection: Connection, error: unknown): Promise<'open' | 'none' | 'ended'>

  /** Whether BEGIN without settings, and a statement, may be sent without waiting for the answer. Default is no. */
  mayPipelineBegin?(connection: Connection): boolean

  /**
   * Asks the server, inside the transaction, for what {@link Adapter.lookUpTransaction} finds it by; `undefined` where it has none,
   * because nothing was written yet. A transaction that only reads must not come to write by it. What it resolves with stands in no
   * error and no log, and must hold no secret all the same.
   */
  identifyTransaction?(connection: Connection): Promise<string | undefined>

  /**
   * Asks once what became of a transaction, by a connection of its own to the server that `engine` connects to: outside the limits
   * of the engine, and also after it was closed. Nothing of the connection is left when it settles, which it does soon after
   * `signal` has fired. Rejects where the server does not answer.
   *
   * `'committed'` and `'rolled-back'` are final, and said only of this very transaction: where the server cannot show that `id` has
   * not come to mean another one, or has forgotten it, the answer is `'unknown'`. While the transaction may still commit, or the
   * server is about to become another, it is `'pending'`.
   */
  lookUpTransaction?(engine: Engine, id: string, signal: AbortSignal): Promise<CommitStatus>

  /** Asks the server to cancel the statement that runs on `connection`, over another connection. Must not wait for the statement. */
  cancel?(engine: Engine, connection: Connection): Promise<void>

  /** Reads an error of the driver. */
  traits(error: unknown): ErrorTraits

  /**
   * Makes the native handle over `statements`. Called once at definition for the ambient handle, and once for each session
   * that is asked for its own: it must connect to nothing, and have no `then`.
   *
   * SQL that begins or ends a transaction is refused with `AMBIENT_TRANSACTION_CONTROL` where the handle sees it
   * (`parseTransactionControl`). The library's own transactions become {@link NativeBlock}s.
   */
  createHandle(statements: Statements<Connection>): Handle
}

/**
 * The way from a handle to the session: where its statements go. For the ambient handle each call finds the session of the
 * async context; for a session's handle it is always that session.
 */
export interface Statements<Connection> {
  /** The name of the database, for error messages. */
  readonly name: string

  /** The host in force, for libraries that compile queries before any session exists. */
  host(): string | undefined

  /**
   * Runs `statement` when its turn has come, with BEGIN and savepoints before it where they are due. It counts as issued from
   * this call on, and is called in the caller's async context. Rejects unsent where the session refuses.
   *
   * A `statement` that throws before it returns a promise counts as unsent. Over a synchronous driver it must be an `async` function.
   */
  run<Result>(statement: (connection: Connection) => Promise<Result>, block?: NativeBlock): Promise<Result>

  /**
   * Like {@link Statements.run} for a cursor or stream: resolves with the connection when the turn has come, and occupies the
   * session until `close` is called. `destroy` is called if the session must end it, perhaps just before the promise resolves: whoever
   * reads the stream gets its error, and `close` is still due.
   */
  openStream(destroy: (error: Error) => void, block?: NativeBlock): Promise<OpenStream<Connection>>

  /**
   * Runs `work` as one thing of the session: it counts as issued from this call on, takes one turn, and its statements take theirs
   * inside of it. For a library whose calls come to their statements only later. Rejects unsent where the session refuses.
   */
  enclose<Result>(work: () => Promise<Result>): Promise<Result>

  /** A block for a transaction that the library's own code begins and ends; transparent until `begin`. */
  createBlock(): NativeBlock

  /**
   * Registers `hook` for after the COMMIT of the session's transaction, as `afterCommit` of the session does: of the block that names
   * it or that surrounds the caller, so it is dropped if that is rolled back. For a library whose transactions have such hooks.
   */
  afterCommit(hook: () => unknown, block?: NativeBlock): void

  /**
   * The unit of work of the session, for a library that keeps changes back: the one that it has, or what `make` makes of the session's
   * own statements. Throws where there is no session, or where it has ended.
   */
  unitOfWork<Unit extends UnitOfWork>(make: (statements: Statements<Connection>) => Unit): Unit
}

/**
 * Changes that a library keeps back until it is told to send them. What is pending is part of the session: it counts as an open
 * transaction, is sent before COMMIT and forgotten by a rollback. One of each session, and gone with it.
 */
export interface UnitOfWork {
  /** Whether `flush` has anything to send. Asked often, and must change nothing. */
  readonly pending: boolean
  /** Sends what is pending, by statements of the session. Nothing of it is pending any more when it resolves. */
  flush(): Promise<unknown>
  /** Forgets what is pending, and all that it knows of the database: the transaction, or a savepoint in it, was rolled back. */
  clear(): void
}

/** A stream that occupies its session. */
export interface OpenStream<Connection> {
  readonly connection: Connection
  /** Rejects if the connection is lost and that is noticed: what the stream waits for may never come. */
  readonly lost: Promise<never>
  /** It is being closed: from now on others wait for its end rather than being refused. */
  closing(): void
  /** Frees the session for the next statement; harmless when called again. `error` is what the stream failed with. */
  close(error?: unknown): void
}

/**
 * A native transaction inside a session: a savepoint of it. Statements belong to it when they run inside {@link NativeBlock.enter}
 * or name it; begun from outside of `enter` it cannot be told from others' work, so while it is open those are refused.
 *
 * A transaction method with a callback enters the block and there begins, calls back, and commits, or rolls back if one of these failed.
 */
export interface NativeBlock {
  /**
   * Whether what belongs to it runs in a transaction, which may still be to begin: always, but for statements of an autocommit
   * session outside of a block. For libraries that ask before they begin one themselves.
   */
  readonly inTransaction: boolean
  /** Runs `work` in the async scope of the block. */
  enter<Result>(work: () => Result): Result
  /** Waits for its turn and owns the session from then on. Settings must agree with a transaction that is open. */
  begin(settings?: TransactionSettings): Promise<void>
  /** The work that was entered is over, and the transaction is not: from now on others are refused, as where nothing was entered. */
  leaveOpen(): void
  /** Joins what runs in it, then keeps its work as part of the session's transaction. */
  commit(): Promise<void>
  /** Undoes its work; the outer work stays. Harmless after the end. */
  rollback(): Promise<void>
  /** A named savepoint inside the block. */
  savepoint(name: string): Promise<void>
  /** Back to a named savepoint, which stays. */
  rollbackTo(name: string): Promise<void>
  /** Forgets a named savepoint, keeping its work. */
  releaseSavepoint(name: string): Promise<void>
  /** Whoever had it has given it back: what still names it is refused. */
  release(): void
}

/**
 * Calls a user's engine factory with the host, for {@link Adapter.createEngine}.
 *
 * @throws `AMBIENT_HOST_MISSING` if the factory takes a host and none is configured.
 */
export function callFactory<Result>(factory: (host: string) => Result, host: string | undefined): Result {
  if (host === undefined && factory.length > 0) {
    throw new AmbientError('AMBIENT_HOST_MISSING', 'No host is configured.')
  }
  return factory(host as string)
}

/** The adapter of a library that is built on a driver's client: the driver's, with a handle of the library's over its handle. */
export function overDriver<Client, Engine, Connection, Handle>(
  driver: Adapter<Client, Engine, Connection>,
  build: HandleBuilder<Client, Connection, Handle>,
): Adapter<Handle, Engine, Connection> {
  return { ...driver, createHandle: (statements) => build(statements, driver.createHandle(statements)) }
}

/** Makes a library's handle over `client`, which is a driver's handle over `statements`. */
export type HandleBuilder<Client, Connection, Handle> = (statements: Statements<Connection>, client: Client) => Handle
