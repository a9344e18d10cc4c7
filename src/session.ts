import type { NativeBlock, OpenStream, Statements, TransactionOptions, TransactionSettings } from './adapter.ts'
import { type AtomicOptions, atomic, Block } from './atomic.ts'
import { type Context, currentScope, enclosingScopes, insideHook, nextNumber, runAfterHooks } from './context.ts'
import type { DatabaseCore } from './database.ts'
import { AmbientError, isAmbientError } from './errors.ts'
import { type SessionEvent, sessionChannel } from './events.ts'
import { Holder } from './holder.ts'
import {
  type AfterHook,
  afterHook,
  byRegistration,
  copyHooks,
  dropHooks,
  type Hook,
  type Hooks,
  moveHooks,
} from './hooks.ts'
import { type Bound, Lane, type LaneHost, type Occupant } from './lane.ts'
import { hasEnded, Level } from './level.ts'
import { NativeTransaction } from './native.ts'
import type { Participant } from './settle.ts'
import { drained } from './time.ts'
import { callerStack, happened } from './trace.ts'
import { Transaction, type TransactionHost } from './transaction.ts'

/** One conversation with one database: idle until its first statement, open until a commit or rollback, and so on until closed. */
export interface AmbientSession<Handle> {
  /** The native handle bound to this session, wherever it is used. */
  readonly db: Handle
  /** Whether a transaction is open, and with it a connection held. */
  readonly inTransaction: boolean
  readonly closed: boolean
  /** Opens a transaction now rather than with the first statement. Options must agree with one that is open. */
  begin(options?: TransactionSettings): Promise<void>
  /**
   * Commits what is open, in turn behind the statements issued before; the next statement opens a new transaction.
   * Resolves only if the server said COMMIT.
   *
   * @throws the server's own error, or `AMBIENT_TRANSACTION_ABORTED`, `AMBIENT_COMMIT_UNKNOWN`, `AMBIENT_STREAM_OPEN`,
   *   `AMBIENT_ATOMIC_NESTING` inside a block.
   */
  commit(): Promise<void>
  /** Rolls back what is open; afterwards nothing of it can be committed any more. Same refusals as `commit`. */
  rollback(): Promise<void>
  /**
   * Ends the session: statements already issued finish, later ones are refused. An open transaction needs `outcome`.
   *
   * @throws `AMBIENT_TRANSACTION_OPEN` if a transaction is open and `outcome` was not given; the session stays.
   */
  close(outcome?: 'commit' | 'rollback'): Promise<void>
  /** Runs `work` in a savepoint; with nothing open, in a transaction that is committed at the end. */
  savepoint<Result>(work: () => Result | Promise<Result>): Promise<Result>
  /** Runs before COMMIT, inside the transaction; a throw vetoes it. */
  beforeCommit(hook: Hook): void
  /** Runs after COMMIT was answered, in a context of its own; a failure is reported and changes nothing. */
  afterCommit(hook: Hook): void
  /** Runs after the transaction was rolled back, in a context of its own. */
  afterRollback(hook: Hook): void
  /** Rolls back what is open and closes. */
  [Symbol.asyncDispose](): Promise<void>
}

/** Options of a session beside the context's. */
export interface SessionSettings {
  readonly transaction: TransactionOptions
  /** Keeps one connection from the first statement to the end of the session, then destroys it. */
  readonly hold: boolean
}

export class Session<Connection>
  implements AmbientSession<unknown>, Participant, Statements<Connection>, LaneHost, TransactionHost<Connection>
{
  readonly id: number = nextNumber()
  readonly lane: Lane
  readonly holder: Holder<Connection>
  transaction: Transaction<Connection>
  readonly #database: DatabaseCore<Connection>
  readonly #owner: Context
  readonly #settings: SessionSettings
  #handle: unknown
  #closed: (() => AmbientError) | undefined
  /** Where it was closed by hand, while tracing. */
  #closedAt: string | undefined
  #prepared = false
  /** The COMMIT that is under way. */
  #ending: Promise<void> | undefined
  /** Something of it is committed already, so its end cannot say that everything was rolled back. */
  #committed = false
  #deferred: AfterHook[] = []
  #destroyStream: ((error: Error) => void) | undefined
  #streamEnd: AmbientError | undefined

  constructor(database: DatabaseCore<Connection>, owner: Context, settings: SessionSettings) {
    this.#database = database
    this.#owner = owner
    this.#settings = settings
    this.lane = new Lane(this)
    this.holder = new Holder(this, database, settings.hold)
    this.transaction = new Transaction(this, settings.transaction)
    database.sessions.add(this)
    this.publish('opened')
  }

  // What others need to know of it

  get name(): string {
    return this.#database.name
  }

  get order(): number {
    return this.#database.order
  }

  get owner(): Context {
    return this.#owner
  }

  get contextId(): number {
    return this.#owner.id
  }

  get database(): object {
    return this.#database
  }

  get acquireTimeout(): number {
    return this.#database.acquireTimeout
  }

  get blockTimeout(): number {
    return this.#database.blockTimeout
  }

  get settleTimeout(): number {
    return this.#owner.settleTimeout ?? this.#database.settleTimeout
  }

  get closed(): boolean {
    return this.#closed !== undefined
  }

  get busy(): boolean {
    return this.lane.busy
  }

  get inTransaction(): boolean {
    return this.transaction.opened
  }

  get atDatabase(): boolean {
    return this.transaction.atDatabase
  }

  get lastActivity(): number {
    return this.transaction.lastActivity
  }

  get touched(): boolean {
    return this.busy || this.inTransaction || this.holder.holding || hasHooks(this.transaction.root.hooks)
  }

  get db(): unknown {
    this.#handle ??= this.#database.adapter.createHandle(this)
    return this.#handle
  }

  host(): string | undefined {
    return this.#database.host
  }

  /** Where the caller is, for errors that speak of it later; only while tracing (O2). */
  place(): string | undefined {
    return this.#database.trace ? callerStack() : undefined
  }

  // Statements

  run<Result>(statement: (connection: Connection) => Promise<Result>, native?: NativeBlock): Promise<Result> {
    const block = this.#blockFor(native)
    const refusal = this.#refusal()
    if (refusal) return Promise.reject(refusal)
    const lane = block?.inner ?? this.lane
    const occupant: Occupant = { label: 'a statement', place: this.place() }
    const sent = sessionChannel.hasSubscribers ? this.#published(statement) : statement
    return lane.run(occupant, () => this.transaction.run(block?.level ?? this.transaction.root, sent))
  }

  /** The same statement, published when it is answered. */
  #published<Result>(statement: (connection: Connection) => Promise<Result>): typeof statement {
    return (connection) => {
      const startedAt = performance.now()
      const answer = statement(connection)
      const publish = (error?: unknown) => this.publish('statement', { duration: performance.now() - startedAt, error })
      answer.then(() => publish(), publish)
      return answer
    }
  }

  async openStream(destroy: (error: Error) => void, native?: NativeBlock): Promise<OpenStream<Connection>> {
    const block = this.#blockFor(native)
    this.assertAccepts()
    const lane = block?.inner ?? this.lane
    const occupant: Occupant = { label: 'a stream', place: this.place(), exclusive: 'stream' }
    return new Promise<OpenStream<Connection>>((resolve, reject) => {
      const turn = async () => {
        let end: (failure: unknown) => void = () => {}
        const ended = new Promise<unknown>((resolveEnd) => {
          end = resolveEnd
        })
        const closing = () => {
          occupant.exclusive = undefined
        }
        const close = (failure?: unknown) => {
          closing()
          end(failure)
        }
        const level = block?.level ?? this.transaction.root
        const { connection, lost, settle } = await this.transaction.openStream(level, ended)
        this.#destroyStream = destroy
        resolve({ connection, lost, closing, close })
        if (this.#streamEnd) await drained().then(() => this.#streamEnd && destroy(this.#streamEnd)) // it is in its owner's hands now
        const startedAt = performance.now()
        const failure = await ended
        this.publish('statement', { duration: performance.now() - startedAt, error: failure })
        await settle(failure)
        this.#destroyStream = undefined
        this.#streamEnd = undefined
      }
      lane.run(occupant, turn).catch(reject)
    })
  }

  createBlock(): NativeTransaction<Connection> {
    return new NativeTransaction(this)
  }

  // What a user does by hand

  begin = (options: TransactionSettings = {}): Promise<void> => {
    return this.#act('begin()', this.enclosingBlock(), async (level) => {
      const { transaction } = this
      transaction.assertUsable(level)
      const letGo = transaction.claim(options)
      try {
        await transaction.begin(level)
      } finally {
        letGo()
      }
    })
  }

  commit = (): Promise<void> => {
    return this.#actOutside('commit()', async () => {
      if (this.inTransaction) await this.commitNow()
    })
  }

  rollback = (): Promise<void> => {
    return this.#actOutside('rollback()', async () => {
      if (this.inTransaction) await this.rollbackNow()
    })
  }

  close = (outcome?: 'commit' | 'rollback'): Promise<void> => {
    if (this.closed) return Promise.resolve()
    const closedAt = this.place()
    return this.#actOutside('close()', async () => {
      if (this.inTransaction && outcome === undefined) {
        const what = `The session was to be closed with a transaction open.${this.transaction.whereBegun}`
        throw new AmbientError('AMBIENT_TRANSACTION_OPEN', what, { database: this.name })
      }
      this.#closedAt = closedAt
      if (outcome === 'rollback') await this.rollbackNow()
      else await this.commitNow()
      await this.#die()
    })
  }

  atomic = <Result>(work: () => Result | Promise<Result>, options?: AtomicOptions): Promise<Result> => {
    return atomic(this, work, options)
  }

  savepoint = <Result>(work: () => Result | Promise<Result>): Promise<Result> => {
    return atomic(this, work, { current: 'savepoint' })
  }

  beforeCommit = (hook: Hook): void => {
    this.#hooks().beforeCommit.push(hook)
  }

  afterCommit = (hook: Hook): void => {
    this.#hooks().afterCommit.push(afterHook(hook, this.#hookFailed))
  }

  afterRollback = (hook: Hook): void => {
    this.#hooks().afterRollback.push(afterHook(hook, this.#hookFailed))
  }

  #hookFailed = (error: unknown): void => {
    this.publish('hook-failed', { error })
    this.#database.reportHookError(error)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close('rollback')
  }

  /** The hooks of the block or transaction that the running code belongs to. */
  #hooks(): Hooks {
    this.assertAccepts()
    const block = this.enclosingBlock()
    const level = block?.level ?? this.transaction.root
    if (block && (!block.live || hasEnded(level))) throw this.blockEnded(block)
    return level.hooks
  }

  #act(label: string, block: Block<Connection> | undefined, work: (level: Level) => Promise<void>): Promise<void> {
    const refusal = this.#refusal()
    if (refusal) return Promise.reject(refusal)
    const occupant: Occupant = { label, place: this.place(), owns: true }
    const lane = block?.inner ?? this.lane
    return lane.track(
      occupant,
      this.inTurn(lane, occupant, () => work(block?.level ?? this.transaction.root)),
    )
  }

  #actOutside(label: string, work: () => Promise<void>): Promise<void> {
    const block = this.enclosingBlock()
    if (!block) return this.#act(label, undefined, work)
    if (!block.live) return Promise.reject(this.blockEnded(block))
    return Promise.reject(
      new AmbientError('AMBIENT_ATOMIC_NESTING', `${label} was called inside ${block.label}.`, { database: this.name }),
    )
  }

  // What blocks and contexts do

  /** Runs `work` in its turn, then the hooks that came due, once the session is free again (K2). */
  async inTurn<Result>(lane: Lane, occupant: Occupant, work: () => Promise<Result>): Promise<Result> {
    let hooks: AfterHook[] = []
    try {
      return await lane.run(occupant, async () => {
        try {
          return await work()
        } finally {
          hooks = this.#deferred.splice(0).sort(byRegistration)
        }
      })
    } finally {
      if (hooks.length > 0) await runAfterHooks(hooks)
    }
  }

  /** The innermost block of this session around the running code, live or ended. */
  enclosingBlock(): Block<Connection> | undefined {
    for (let scope = currentScope(); scope; scope = scope.parent) {
      const block = scope.block
      if (block?.session === this && (block as Block<Connection>).begun) return block as Block<Connection> // its own
    }
    return undefined
  }

  /** The block that a statement belongs to: the one around it, unless it names another that is not around it. */
  #blockFor(native: NativeBlock | undefined): Block<Connection> | undefined {
    const enclosing = this.enclosingBlock()
    const named = (native as NativeTransaction<Connection> | undefined)?.block // made by createBlock
    if (!named?.begun || named === enclosing) return enclosing
    for (const { block } of enclosingScopes()) if (block === named) return enclosing
    return named.live ? named : enclosing // after its transaction a leased client is like the pool
  }

  /** Throws if the session or its context has ended. */
  assertAccepts(): void {
    const refusal = this.#refusal()
    if (refusal) throw refusal
  }

  #refusal(): AmbientError | undefined {
    const refusal = this.#closed ?? (this.#owner.fenced && !insideHook(this.#owner) ? this.#contextEnded : undefined)
    return refusal && this.#refused(refusal())
  }

  #refused(error: AmbientError): AmbientError {
    this.publish('refused', { error })
    return error
  }

  #transactionEnded = (): AmbientError =>
    new AmbientError('AMBIENT_BLOCK_ENDED', 'The transaction has ended.', { database: this.name })

  #contextEnded = (): AmbientError => this.#database.contextEnded(this.#owner)

  blockEnded(block: Block<Connection>): AmbientError {
    const what = `${capital(block.label)} has ended.${happened(`${block.label} was started`, block.place)}`
    return this.#refused(new AmbientError('AMBIENT_BLOCK_ENDED', what, { database: this.name }))
  }

  refuseBehind(holder: Occupant, waiter: Occupant): AmbientError {
    const details = { database: this.name }
    const places = [holder, waiter].map(({ label, place }) => happened(`${label} was started`, place)).join('')
    if (holder.exclusive === 'stream') {
      const what = `A stream is open, so ${waiter.label} was refused.${places}`
      return this.#refused(new AmbientError('AMBIENT_STREAM_OPEN', what, details))
    }
    const why = holder.exclusive
      ? 'is open and cannot be told from other work'
      : `has had nothing at the database for ${this.blockTimeout} ms`
    const what = `${capital(waiter.label)} was refused: ${holder.label} ${why}.${places}`
    return this.#refused(new AmbientError('AMBIENT_SESSION_BUSY', what, details))
  }

  isRetryable(error: unknown): boolean {
    for (let each = error; each instanceof Error; each = each.cause) {
      if (isAmbientError(each) && (each.outcome === 'unknown' || each.outcome === 'partial')) return false
      if (this.#database.adapter.traits(each).retryable) return true
    }
    return false
  }

  /** Runs `work` with a savepoint of `outer`; with nothing open, in a transaction that is committed at its end (A7). */
  async withSavepoint<Result>(outer: Level, work: (level: Level) => Promise<Result>): Promise<Result> {
    const { transaction } = this
    const level = new Level(outer)
    const refusal = () => new AmbientError('AMBIENT_BLOCK_ENDED', 'The savepoint has ended.', { database: this.name })
    try {
      const result = await work(level)
      await transaction.releaseLevel(level)
      return result
    } catch (error) {
      level.refusal ??= refusal
      await transaction.rollbackLevel(level)
      throw error
    } finally {
      level.refusal ??= refusal
    }
  }

  /** Hooks, then COMMIT. A transaction that cannot commit stays for a rollback; a veto rolls back. */
  async commitNow(): Promise<void> {
    const { transaction } = this
    transaction.assertUsable(transaction.root)
    try {
      while (await this.prepare());
    } catch (error) {
      await this.rollbackNow(error)
      throw error
    }
    await this.#commit()
  }

  async rollbackNow(error?: unknown): Promise<boolean> {
    const { transaction } = this
    const { opened, root } = transaction
    root.refusal ??= this.#transactionEnded
    const said = await transaction.rollback(error)
    const unknown = root.failure?.outcome === 'unknown'
    if (transaction === this.transaction) this.#renew(unknown ? undefined : 'afterRollback', opened)
    return said
  }

  /** Returns what brings back the hooks of this moment, without those of an attempt that failed (A5). */
  rememberHooks(): () => void {
    const { root } = this.transaction
    const before = copyHooks(root.hooks)
    const deferred = this.#deferred.length
    return () => {
      for (const dropped of this.#deferred.splice(deferred)) dropped.leave?.()
      moveHooks(before, this.transaction.root.hooks)
    }
  }

  /** Runs the beforeCommit hooks that are due, each in a block of its own (K1). */
  prepare(): Promise<true> | undefined {
    const { transaction } = this
    const { root } = transaction
    transaction.assertUsable(root)
    const due = root.hooks.beforeCommit.splice(0)
    const ownHook = this.#database.hooks.beforeCommit
    if (transaction.opened && !transaction.prepared) {
      transaction.prepared = true
      if (ownHook) due.unshift(() => ownHook(this))
    }
    return due.length > 0 ? this.#runBeforeCommit(due) : undefined
  }

  async #runBeforeCommit(hooks: Hook[]): Promise<true> {
    const { transaction } = this
    for (const hook of hooks) await this.#runHook('beforeCommit hook', hook)
    transaction.assertUsable(transaction.root)
    return true
  }

  get afterBegin(): (() => Promise<void>) | undefined {
    const hook = this.#database.hooks.afterBegin
    return hook && (() => this.#runHook('afterBegin hook', () => hook(this)))
  }

  async #runHook(label: string, hook: Hook): Promise<void> {
    const block = new Block<Connection>(this, label, this.transaction.root, this.#owner.scope, true)
    await block.run(hook)
  }

  async #commit(): Promise<void> {
    const ending = this.#commitTransaction()
    this.#ending = ending
    try {
      await ending
    } finally {
      this.#ending = undefined
    }
  }

  async #commitTransaction(): Promise<void> {
    const { transaction } = this
    const opened = transaction.opened
    try {
      await transaction.commit()
      if (opened) this.#committed = true
      this.#renew('afterCommit', opened)
    } catch (error) {
      if (transaction.holdsConnection) await transaction.rollback(error) // COMMIT was never sent
      this.#renew(isAmbientError(error, 'AMBIENT_COMMIT_UNKNOWN') ? undefined : 'afterRollback', opened)
      throw error
    }
  }

  /** A transaction has ended: the next statement opens a new one. */
  #renew(when: 'afterCommit' | 'afterRollback' | undefined, opened: boolean): void {
    const { root } = this.transaction
    root.refusal ??= this.#transactionEnded
    this.transaction = new Transaction(this, this.#settings.transaction)
    const hooks = copyHooks(root.hooks)
    dropHooks(root.hooks) // whoever still points at the block pins none of them
    if (!when) return
    const own = opened ? this.#database.hooks[when] : undefined
    const due = hooks[when]
    if (own) due.unshift({ order: this.order, run: () => own(), onError: this.#hookFailed })
    for (const hook of due) this.#deferred.push({ ...hook, leave: this.#database.engines.hooks.enter() })
  }

  // Participant: how its context ends it

  quiet(bound: Bound): Promise<void> {
    return this.lane.quiet(bound)
  }

  endStream(way: 'destroy' | 'refuse'): void {
    const stream = this.lane.stream
    if (!stream) return
    const error = this.refuseBehind(stream, { label: 'the end of the context' })
    if (way === 'refuse') throw error
    this.#endStreamWith(error)
  }

  /** Ends a stream that is open in a block that ends. */
  endStreamIn(lane: Lane): void {
    const stream = lane.stream
    if (stream) this.#endStreamWith(this.refuseBehind(stream, { label: 'the end of its block' }))
  }

  #endStreamWith(error: AmbientError): void {
    this.#streamEnd = error // for one that has not had its turn yet
    this.#destroyStream?.(error)
  }

  fence(): void {
    if (!this.lane.busy) return
    this.lane.answerFor()
    this.lane.close(() => this.#refused(this.#contextEnded()))
  }

  async stop(cancel: boolean): Promise<void> {
    await this.#ending?.catch(() => {}) // a COMMIT that was sent is awaited, whoever asked for it (C8)
    await this.transaction.stop(cancel)
  }

  /** Ends the unit that owns it now. */
  async abort(error: AmbientError): Promise<void> {
    this.#owner.abort(error)
    await this.#owner.settle('rollback', error).catch(() => {}) // whoever settles it gets the error
  }

  async commitAtEnd(): Promise<void> {
    try {
      await this.#commit()
    } finally {
      this.#owner.defer(this.#deferred.splice(0))
    }
  }

  async rollbackAtEnd(error: unknown): Promise<boolean> {
    const said = await this.rollbackNow(error)
    this.#owner.defer(this.#deferred.splice(0))
    return said && !this.#committed
  }

  closeAtEnd(): Promise<void> {
    return this.#die()
  }

  // The connection

  get holdsConnection(): boolean {
    return this.transaction.holdsConnection || this.holder.holding
  }

  async #die(): Promise<void> {
    if (this.#closed) return
    this.#closed = this.#owner.fenced
      ? this.#contextEnded
      : () => {
          const what = `The session was closed.${happened('It was closed', this.#closedAt)}`
          return new AmbientError('AMBIENT_SESSION_CLOSED', what, { database: this.name })
        }
    this.#owner.forget(this.#database, this)
    this.lane.close(this.#closed)
    this.#handle = undefined
    this.#database.sessions.delete(this)
    await this.holder.end()
    this.publish('closed')
  }

  publish(type: SessionEvent['type'], more: Partial<SessionEvent> = {}): void {
    if (!sessionChannel.hasSubscribers) return
    sessionChannel.publish({ type, sessionId: this.id, contextId: this.contextId, database: this.name, ...more })
  }
}

function hasHooks({ beforeCommit, afterCommit, afterRollback }: Hooks): boolean {
  return beforeCommit.length + afterCommit.length + afterRollback.length > 0
}

function capital(text: string): string {
  return text.charAt(0).toUpperCase() + text.slice(1)
}
