import type { AbortOptions } from './abortion.ts'
import type {
  Adapter,
  HandleBuilder,
  NativeBlock,
  Statements,
  TransactionOptions,
  TransactionSettings,
} from './adapter.ts'
import type { AtomicOptions } from './atomic.ts'
import {
  Context,
  currentScope,
  currentTestPlace,
  enclosingScopes,
  liveScope,
  nextNumber,
  runInScope,
  runUnit,
} from './context.ts'
import { Engines } from './engine.ts'
import { AmbientError } from './errors.ts'
import { sessionChannel } from './events.ts'
import type { Hook } from './hooks.ts'
import type { NativeTransaction } from './native.ts'
import { type AmbientSession, Session } from './session.ts'
import { longestTimeout } from './time.ts'
import { happened } from './trace.ts'

/** Hooks of a database: they apply to the transactions of all its sessions. */
export interface DatabaseHooks<Handle> {
  /**
   * Inside every transaction, right after BEGIN: `SET LOCAL` for row-level security goes here. A throw rolls back, and so does one
   * that takes longer than `acquireTimeout` (`AMBIENT_ACQUIRE_TIMEOUT`).
   */
  readonly afterBegin?: (session: AmbientSession<Handle>) => unknown
  /** Inside every transaction, before COMMIT and before the hooks of the session. A throw vetoes; see {@link AmbientSession.beforeCommit}. */
  readonly beforeCommit?: (session: AmbientSession<Handle>) => unknown
  /** After every COMMIT that was answered. */
  readonly afterCommit?: Hook
  /** After every rollback of a transaction. */
  readonly afterRollback?: Hook
}

/** What {@link defineDatabase} takes. */
export interface DatabaseOptions<Handle, Engine, Connection> {
  /** Stands in every error message and event. */
  readonly name: string
  /** How its library works: `pgAdapter(…)`, `kyselyAdapter(…)`. */
  readonly adapter: Adapter<Handle, Engine, Connection>
  /** Given to the engine factory. Default is none. */
  readonly host?: string | undefined
  /**
   * Runs before each session's first connection, outside any context; may call `changeHost`. Concurrent sessions share a run, which
   * may take `acquireTimeout` (`AMBIENT_ACQUIRE_TIMEOUT`); the next session tries again.
   */
  readonly beforeSession?: ((database: AmbientDatabase<Handle, Engine>) => unknown) | undefined
  readonly hooks?: DatabaseHooks<Handle> | undefined
  /** How transactions begin unless their context or block says otherwise. Default is the server's. */
  readonly transaction?: TransactionOptions | undefined
  /** Takes what an `afterCommit` or `afterRollback` hook throws, or that it takes too long. Default is a process warning. */
  readonly onHookError?: ((error: unknown) => void) | undefined
  /** Milliseconds for `beforeSession`, for a connection, for the first answer on it, and for `afterBegin`. Default is `30_000`. */
  readonly acquireTimeout?: number | undefined
  /** Milliseconds without a statement after which a block's waiters are refused. Default is `10_000`. */
  readonly blockTimeout?: number | undefined
  /**
   * Milliseconds for what is under way at the end, for the answer to COMMIT or ROLLBACK, and for each hook before or after it.
   * Default is `30_000`.
   */
  readonly settleTimeout?: number | undefined
  /**
   * Lets `resolve()` of an `AMBIENT_COMMIT_UNKNOWN` find out what became of the work, where the engine can tell (PostgreSQL 13 and
   * newer, by `pgAdapter`). Costs one more round trip before each COMMIT, or on a pool with `pipeline: true` a query that travels
   * with the statements; transactions that begin `readOnly` cost nothing. Default is `false`.
   */
  readonly resolvable?: boolean | undefined
  /** Captures stacks, so that errors can say where an earlier act happened. Default is whether `AMBIENT_DB_TRACE=1` is set. */
  readonly trace?: boolean | undefined
}

/** Options of {@link AmbientDatabase.newSession}. */
export interface NewSessionOptions extends AbortOptions {
  /** Pins one connection for the whole session and destroys it at the end, so that session state (`SET`, locks) can be used. */
  readonly hold?: boolean | undefined
  readonly transaction?: TransactionOptions | undefined
}

/** A database: where to connect and how, and the way to its sessions. All methods are bound, so they can be taken off it. */
export interface AmbientDatabase<Handle, Engine> {
  readonly name: string
  /** The host in force. */
  readonly host: string | undefined
  /** The ambient native handle: each statement finds the session of the async context it is issued in. One object for ever. */
  readonly db: Handle
  /**
   * The session of the context. Synchronous and free: no I/O, no hook.
   *
   * @throws `AMBIENT_NO_CONTEXT`, `AMBIENT_CONTEXT_ENDED`.
   */
  session(): AmbientSession<Handle>
  /** {@link AmbientSession.begin} of the context's session. */
  begin(options?: TransactionSettings): Promise<void>
  /**
   * Runs `work` in a transaction of its own on the context's session: durable when it returns, undone when it throws.
   *
   * @throws what `work` throws; `AMBIENT_TRANSACTION_OPEN`, `AMBIENT_ATOMIC_NESTING`, `AMBIENT_TRANSACTION_OPTIONS`,
   *   `AMBIENT_SESSION_BUSY`, `AMBIENT_ABORTED`, `AMBIENT_TIMEOUT`, and what `commit` throws.
   */
  atomic<Result>(work: () => Result | Promise<Result>, options?: AtomicOptions): Promise<Result>
  /** {@link AmbientSession.commit} of the context's session. */
  commit(): Promise<void>
  /** {@link AmbientSession.rollback} of the context's session. */
  rollback(): Promise<void>
  /** {@link AmbientSession.close} of the context's session; the next statement opens a new session. */
  closeSession(outcome?: 'commit' | 'rollback'): Promise<void>
  /**
   * Runs `work` with a session beside the context's, with a connection of its own; needs no context. Commits when it
   * returns, rolls back when it throws; manual control inside.
   */
  newSession<Result>(
    work: (session: AmbientSession<Handle>) => Result | Promise<Result>,
    options?: NewSessionOptions,
  ): Promise<Result>
  /** {@link AmbientSession.beforeCommit} of the context's session. */
  beforeCommit(hook: Hook): void
  /** {@link AmbientSession.afterCommit} of the context's session. */
  afterCommit(hook: Hook): void
  /** {@link AmbientSession.afterRollback} of the context's session. */
  afterRollback(hook: Hook): void
  /** The native engine, for migrations, health checks, LISTEN: nothing on it is part of a session. */
  connect(): Promise<Engine>
  /**
   * Sends new transactions to `host`; those under way finish on the old one, whose engine is then closed. The same host does
   * nothing. If the new engine cannot be made, the old one stays and the error is thrown.
   */
  changeHost(host: string): Promise<void>
  /**
   * Refuses new work (`AMBIENT_SHUT_DOWN`), waits at most `settleTimeout` for what is under way and aborts what is left, then closes
   * the engine, for which it waits at most `settleTimeout` again. Idempotent. Its failure is a process warning as well, and no
   * unhandled rejection: `process.once('SIGTERM', main.shutdown)` works.
   *
   * @throws `AMBIENT_SHUT_DOWN`, which says what still holds the engine open; what closing the engine failed with.
   */
  shutdown(): Promise<void>
}

/** What sessions see of their database. */
export interface DatabaseCore<Connection> {
  readonly name: string
  readonly order: number
  readonly host: string | undefined
  readonly adapter: Adapter<unknown, unknown, Connection>
  readonly hooks: DatabaseHooks<unknown>
  readonly acquireTimeout: number
  readonly blockTimeout: number
  readonly settleTimeout: number
  readonly resolvable: boolean
  readonly trace: boolean
  readonly engines: Engines<Connection>
  /** Sessions that are not closed. */
  readonly sessions: Set<Session<Connection>>
  readonly reportHookError: (error: unknown) => void
  /** Runs `beforeSession`, if there is one. */
  prepare(): Promise<unknown> | undefined
  contextEnded(owner: Context): AmbientError
}

const statementsKey = Symbol.for('ambient-db.statements')

const testingKey = Symbol.for('ambient-db.testing')

/** What the testing tools need of a database. */
export interface TestingAccess<Connection> {
  readonly adapter: Adapter<unknown, unknown, Connection>
  readonly engines: Engines<Connection>
  /** Sessions that are not closed. */
  readonly sessions: ReadonlySet<Session<Connection>>
  /** Takes the place of a context for code that has none. */
  standIn: Context | undefined
}

/** The inside of a database, for the testing tools. */
export function accessForTesting(database: AmbientDatabase<unknown, unknown>): TestingAccess<unknown> {
  return (database as unknown as { [testingKey]: TestingAccess<unknown> })[testingKey] // each has it
}

/** One more handle over a driver database, in the same session and transaction. */
export function handleOver<Client, Handle>(
  database: AmbientDatabase<Client, unknown>,
  build: HandleBuilder<Client, unknown, Handle>,
): Handle {
  const { [statementsKey]: statements } = database as Database<Client, unknown, unknown> // each has them
  return build(statements, database.db)
}

/**
 * Defines a database; nothing is created or connected before its first use.
 *
 * @throws `AMBIENT_INVALID_ARGUMENT` for a missing name or adapter, or a timeout that is no positive number.
 * @example
 * ```ts
 * import { defineDatabase } from 'ambient-db'
 * import { pgAdapter } from 'ambient-db/pg'
 * import { Pool } from 'pg'
 *
 * export const main = defineDatabase({
 *   name: 'main',
 *   adapter: pgAdapter(() => new Pool({ connectionString: process.env.DATABASE_URL })),
 * })
 * ```
 */
export function defineDatabase<Handle, Engine, Connection>(
  options: DatabaseOptions<Handle, Engine, Connection>,
): AmbientDatabase<Handle, Engine> {
  validate(options)
  return new Database(options)
}

class Database<Handle, Engine, Connection> implements AmbientDatabase<Handle, Engine>, DatabaseCore<Connection> {
  readonly name: string
  readonly order: number = nextNumber()
  readonly adapter: Adapter<Handle, Engine, Connection>
  readonly hooks: DatabaseHooks<unknown>
  readonly acquireTimeout: number
  readonly blockTimeout: number
  readonly settleTimeout: number
  readonly resolvable: boolean
  readonly trace: boolean
  readonly engines: Engines<Connection>
  readonly sessions = new Set<Session<Connection>>()
  readonly db: Handle
  readonly [statementsKey]: Statements<Connection>
  readonly [testingKey]: TestingAccess<Connection>
  readonly #options: DatabaseOptions<Handle, Engine, Connection>
  readonly #transaction: TransactionOptions
  #preparing: Promise<unknown> | undefined

  constructor(options: DatabaseOptions<Handle, Engine, Connection>) {
    this.#options = options
    this.name = options.name
    this.adapter = options.adapter
    this.hooks = (options.hooks ?? {}) as DatabaseHooks<unknown> // called with this database's own sessions only
    this.acquireTimeout = options.acquireTimeout ?? 30_000
    this.blockTimeout = options.blockTimeout ?? 10_000
    this.settleTimeout = options.settleTimeout ?? 30_000
    this.resolvable = options.resolvable ?? false
    this.trace = options.trace ?? process.env.AMBIENT_DB_TRACE === '1'
    this.#transaction = options.transaction ?? {}
    const adapter = options.adapter as Adapter<unknown, unknown, Connection> // used with its own engines only
    this.engines = new Engines(adapter, this, options.host)
    this[statementsKey] = this.#ambientStatements()
    this[testingKey] = { adapter, engines: this.engines, sessions: this.sessions, standIn: undefined }
    this.db = options.adapter.createHandle(this[statementsKey])
  }

  get host(): string | undefined {
    return this.engines.host
  }

  session = (): AmbientSession<Handle> => this.#session() as AmbientSession<unknown> as AmbientSession<Handle> // its handle comes from this adapter

  begin = (options?: TransactionSettings): Promise<void> => this.#with((session) => session.begin(options))

  commit = (): Promise<void> => this.#with((session) => session.commit())

  rollback = (): Promise<void> => this.#with((session) => session.rollback())

  closeSession = (outcome?: 'commit' | 'rollback'): Promise<void> => this.#with((session) => session.close(outcome))

  atomic = <Result>(work: () => Result | Promise<Result>, options?: AtomicOptions): Promise<Result> =>
    this.#with((session) => session.atomic(work, options))

  beforeCommit = (hook: Hook): void => this.#session().beforeCommit(hook)

  afterCommit = (hook: Hook): void => this.#session().afterCommit(hook)

  afterRollback = (hook: Hook): void => this.#session().afterRollback(hook)

  newSession = async <Result>(
    work: (session: AmbientSession<Handle>) => Result | Promise<Result>,
    options: NewSessionOptions = {},
  ): Promise<Result> => {
    const { hold = false, transaction = this.#transaction, ...abort } = options
    let session: Session<Connection> | undefined
    const unit = new Context({ streams: 'destroy', ...abort }, (owner) => {
      session = owner.session(this, () => new Session(this, owner, { transaction, hold }))
      const surrounding = currentScope()
      return { parent: liveScope(surrounding), context: surrounding?.context, beside: { session } } // one that has ended refuses
    })
    return runUnit(unit, () => work(session as AmbientSession<unknown> as AmbientSession<Handle>)) // its handle comes from this adapter
  }

  connect = async (): Promise<Engine> => (await this.engines.engine()) as Engine // made by this adapter

  changeHost = (host: string): Promise<void> => this.engines.changeHost(host)

  shutdown = (): Promise<void> => {
    return this.engines.shutdown(async (refusal) => {
      const used = [...this.sessions].filter((session) => session.touched)
      await Promise.all(used.map((session) => session.abort(refusal()))) // each its own, which says what became of its work
    })
  }

  /** The session of the running code's context, made if there is none. */
  #session(): Session<Connection> {
    const context = currentScope()?.context ?? currentTestPlace(this.engines)?.standIn ?? this[testingKey].standIn
    if (!context) {
      this.#assertNotPreparing()
      throw new AmbientError('AMBIENT_NO_CONTEXT', 'A session was asked for outside any context.', {
        database: this.name,
      })
    }
    const known = context.peek(this) as Session<Connection> | undefined // only this database puts one under its key
    if (known) return known
    if (context.refuses) {
      const error = this.contextEnded(context)
      if (sessionChannel.hasSubscribers) {
        sessionChannel.publish({ type: 'refused', contextId: context.id, database: this.name, error })
      }
      throw error
    }
    const transaction = context.options.transaction ?? this.#transaction
    return context.session(this, () => new Session(this, context, { transaction, hold: false }))
  }

  /** Hands out the session's own promise: a join sees to the failure of one that nobody awaited. */
  #with<Result>(act: (session: Session<Connection>) => Promise<Result>): Promise<Result> {
    try {
      return act(this.#session())
    } catch (error) {
      return Promise.reject(error)
    }
  }

  #ambientStatements(): Statements<Connection> {
    const of = (block?: NativeBlock) => (block as NativeTransaction<Connection> | undefined)?.session ?? this.#session() // blocks come from createBlock below
    return {
      name: this.name,
      host: () => this.host,
      run: (statement, block) => {
        try {
          return of(block).run(statement, block)
        } catch (error) {
          return Promise.reject(error)
        }
      },
      openStream: async (destroy, block) => of(block).openStream(destroy, block),
      enclose: (work) => this.#with((session) => session.enclose(work)),
      createBlock: () => this.#session().createBlock(),
      afterCommit: (hook, block) => of(block).afterCommit(hook, block),
      unitOfWork: (make) => this.#session().unitOfWork(make),
    }
  }

  // What sessions need

  reportHookError = (error: unknown): void => {
    const report = this.#options.onHookError ?? this.#warn
    const reported = async () => report(error) // which may be async as well
    reported().catch(this.#warn)
  }

  #warn = (error: unknown): void => {
    const text = error instanceof Error ? (error.stack ?? error.message) : String(error)
    process.emitWarning(`A hook of database '${this.name}' failed: ${text}`, 'AmbientHookWarning')
  }

  /** Concurrent sessions share one run of `beforeSession` (D2). */
  prepare(): Promise<unknown> | undefined {
    const { beforeSession } = this.#options
    this.engines.assertOpen()
    if (!beforeSession) return undefined
    this.#assertNotPreparing()
    this.#preparing ??= this.#prepare(beforeSession).finally(() => {
      this.#preparing = undefined // also if it is still running: the next session tries again
    })
    return this.#preparing
  }

  #prepare(beforeSession: (database: this) => unknown): Promise<unknown> {
    const scope = { parent: undefined, context: undefined, preparing: this }
    return this.engines.within(
      runInScope(scope, async () => beforeSession(this)),
      () => {
        const what = `Its \`beforeSession\` did not end within ${this.acquireTimeout} ms.`
        return new AmbientError('AMBIENT_ACQUIRE_TIMEOUT', what, { database: this.name, statusCode: 503 })
      },
    )
  }

  #assertNotPreparing(): void {
    for (const scope of enclosingScopes()) {
      if (scope.preparing !== this) continue
      const what = 'It was used inside its own `beforeSession`.'
      throw new AmbientError('AMBIENT_BEFORE_SESSION', what, { database: this.name })
    }
  }

  contextEnded(owner: Context): AmbientError {
    const where = happened('It was ended', owner.endedAt)
    const details = { database: this.name, ...(owner.abortion && { cause: owner.abortion }) }
    if (owner.scope.beside) return new AmbientError('AMBIENT_SESSION_CLOSED', `Its work has ended.${where}`, details)
    return new AmbientError('AMBIENT_CONTEXT_ENDED', `The context has ended.${where}`, details)
  }
}

function validate<Handle, Engine, Connection>(options: DatabaseOptions<Handle, Engine, Connection>): void {
  const refuse = (what: string) => {
    throw new AmbientError('AMBIENT_INVALID_ARGUMENT', `defineDatabase: ${what}.`)
  }
  if (typeof options?.name !== 'string' || options.name === '') refuse('`name` must be a non-empty string')
  if (typeof options.adapter?.createHandle !== 'function') refuse('`adapter` must be an adapter, such as pgAdapter(…)')
  for (const key of ['acquireTimeout', 'blockTimeout', 'settleTimeout'] as const) {
    const value = options[key]
    if (value !== undefined && !(typeof value === 'number' && value > 0 && value <= longestTimeout)) {
      refuse(`\`${key}\` must be a positive number of milliseconds, at most ${longestTimeout}`)
    }
  }
}
