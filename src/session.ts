import type {
  NativeBlock,
  OpenStream,
  Statements,
  TransactionOptions,
  TransactionSettings,
  UnitOfWork,
} from './adapter.ts'
import { type AtomicOptions, atomic, Block } from './atomic.ts'
import {
  assertOutcome,
  type Context,
  currentScope,
  currentTestPlace,
  enclosingScopes,
  nextNumber,
  runAfterHooks,
} from './context.ts'
import type { DatabaseCore } from './database.ts'
import { Ending } from './ending.ts'
import { AmbientError } from './errors.ts'
import { type SessionEvent, sessionChannel } from './events.ts'
import { Holder } from './holder.ts'
import { type AfterHook, afterHook, type Hook, type Hooks } from './hooks.ts'
import { type Bound, Lane, type LaneHost, type Occupant } from './lane.ts'
import { hasEnded, type Level } from './level.ts'
import { NativeTransaction } from './native.ts'
import type { Participant } from './settle.ts'
import { Streams } from './stream.ts'
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
  /**
   * Runs before COMMIT, inside the transaction; a throw vetoes it, and so does a hook that takes longer than `settleTimeout`
   * (`AMBIENT_SETTLE_TIMEOUT`): its statement is cancelled, and later ones of it are refused.
   */
  beforeCommit(hook: Hook): void
  /**
   * Runs after COMMIT was answered, in a context of its own; a failure is reported to `onHookError` and changes nothing. A hook that
   * takes longer than `settleTimeout` is one (`AMBIENT_SETTLE_TIMEOUT`): its context is aborted, and the next hook runs, once this
   * one has ended or the same time has passed again.
   */
  afterCommit(hook: Hook): void
  /** Runs after the transaction was rolled back, in a context of its own, like `afterCommit`. */
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
  readonly database: DatabaseCore<Connection>
  readonly owner: Context
  readonly lane: Lane
  readonly holder: Holder<Connection>
  readonly sandbox: object | undefined
  readonly streams: Streams<Connection> = new Streams(this)
  readonly ending: Ending<Connection> = new Ending(this)
  /** Those that have not ended. */
  blocks: Set<Block<Connection>> | undefined
  transaction: Transaction<Connection>
  /** What its library keeps back, if it does such a thing. */
  unit: UnitOfWork | undefined
  readonly #settings: SessionSettings
  #handle: unknown
  #closed: (() => AmbientError) | undefined
  /** Where it was closed by hand, while tracing. */
  #closedAt: string | undefined

  constructor(database: DatabaseCore<Connection>, owner: Context, settings: SessionSettings) {
    this.database = database
    this.owner = owner
    this.#settings = settings
    this.sandbox = currentTestPlace(database.engines)?.slot
    this.lane = new Lane(this)
    this.holder = new Holder(this, database, settings.hold)
    this.transaction = new Transaction(this, settings.transaction)
    database.sessions.add(this)
    this.publish('opened')
  }

  // What others need to know of it

  get name(): string {
    return this.database.name
  }

  get order(): number {
    return this.database.order
  }

  get contextId(): number {
    return this.owner.id
  }

  get acquireTimeout(): number {
    return this.database.acquireTimeout
  }

  get blockTimeout(): number {
    return this.database.blockTimeout
  }

  get settleTimeout(): number {
    return this.owner.settleTimeout ?? this.database.settleTimeout
  }

  get resolvable(): boolean {
    return this.database.resolvable
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

  /** Something would be lost if nobody committed: a transaction is open, or changes wait to be sent. */
  get dirty(): boolean {
    return this.inTransaction || this.unit?.pending === true
  }

  get atDatabase(): boolean {
    return this.transaction.atDatabase
  }

  get lastActivity(): number {
    return this.transaction.lastActivity
  }

  get touched(): boolean {
    return this.busy || this.dirty || this.holder.holding || hasHooks(this.transaction.root.hooks)
  }

  get holdsConnection(): boolean {
    return this.transaction.holdsConnection || this.holder.holding
  }

  get db(): unknown {
    this.#handle ??= this.database.adapter.createHandle(this)
    return this.#handle
  }

  host(): string | undefined {
    return this.database.host
  }

  /** Where the caller is, for errors that speak of it later; only while tracing (O2). */
  place(): string | undefined {
    return this.database.trace ? callerStack() : undefined
  }

  // Statements

  run<Result>(statement: (connection: Connection) => Promise<Result>, native?: NativeBlock): Promise<Result> {
    const block = this.#blockFor(native)
    const refusal = this.#refusal(native)
    if (refusal) return Promise.reject(refusal)
    const lane = block?.inner ?? this.lane
    const occupant: Occupant = { label: 'a statement', place: this.place() }
    const sent = sessionChannel.hasSubscribers ? this.#published(statement) : statement
    return lane.run(occupant, () => this.transaction.run(block?.level ?? this.transaction.root, sent, lane))
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
    this.assertAccepts(native)
    return this.streams.open(block?.inner ?? this.lane, () => block?.level ?? this.transaction.root, destroy)
  }

  enclose<Result>(work: () => Promise<Result>): Promise<Result> {
    const refusal = this.#refusal()
    if (refusal) return Promise.reject(refusal)
    const outer = this.enclosingBlock()
    const call: Occupant & { inner?: Lane } = { label: 'a call', place: this.place(), owns: true }
    return (outer?.inner ?? this.lane).run(call, () => {
      const level = outer?.level ?? this.transaction.root
      const block = new Block(this, call.label, level, currentScope(), false, call.place)
      block.call = true
      call.inner = block.inner
      return block.run(work)
    })
  }

  createBlock(): NativeTransaction<Connection> {
    return new NativeTransaction(this)
  }

  /** Whether a statement that is issued now, of `native`, runs in a transaction, which may still be to begin. */
  runsInTransaction(native: NativeBlock): boolean {
    const block = this.#blockFor(native)
    if (block && (!block.call || this.enclosingBlock(false))) return true
    if (this.ending.apart) return this.#settings.transaction !== 'autocommit'
    return !this.transaction.autocommit || this.transaction.opened
  }

  unitOfWork<Unit extends UnitOfWork>(make: (statements: Statements<Connection>) => Unit): Unit {
    this.assertAccepts()
    this.unit ??= make(this)
    return this.unit as Unit // the handles of one adapter all make the same
  }

  /** What its library knows of the database is true no more. */
  forget(): void {
    this.unit?.clear()
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
      if (this.dirty) await this.ending.commit(this.transaction)
    })
  }

  rollback = (): Promise<void> => {
    return this.#actOutside('rollback()', async () => {
      if (this.dirty) await this.#rollBack()
    })
  }

  close = (outcome?: 'commit' | 'rollback'): Promise<void> => {
    if (this.closed) return Promise.resolve()
    const closedAt = this.place()
    return this.#actOutside('close()', async () => {
      if (outcome !== undefined) assertOutcome(outcome)
      if (this.dirty && outcome === undefined) {
        const what = `The session was to be closed with a transaction open.${this.transaction.whereBegun}`
        throw new AmbientError('AMBIENT_TRANSACTION_OPEN', what, { database: this.name })
      }
      this.#closedAt = closedAt
      if (outcome !== 'rollback') {
        await this.ending.commit(this.transaction)
        return this.closeAtEnd()
      }
      try {
        await this.#rollBack()
      } finally {
        await this.closeAtEnd() // also where it is told that the work may be committed
      }
    })
  }

  /** Throws if something of it may be committed all the same, and nobody knows yet (S10). */
  async #rollBack(): Promise<void> {
    const { transaction } = this
    await this.ending.rollback(transaction)
    if (transaction.untold) throw transaction.untold
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

  afterCommit = (hook: Hook, native?: NativeBlock): void => {
    this.#hooks(native).afterCommit.push(afterHook(hook, this.ending.limitsOf('afterCommit', hook)))
  }

  afterRollback = (hook: Hook): void => {
    this.#hooks().afterRollback.push(afterHook(hook, this.ending.limitsOf('afterRollback', hook)))
  }

  readonly hookFailed = (error: unknown): void => {
    this.publish('hook-failed', { error })
    this.database.reportHookError(error)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close('rollback')
  }

  /** The hooks of the block or transaction that the running code belongs to, or of the block that it names. */
  #hooks(native?: NativeBlock): Hooks {
    this.assertAccepts(native)
    const block = this.#blockFor(native)
    if (!block) return this.ending.hooks
    if (!block.live || hasEnded(block.level)) throw this.blockEnded(block)
    return block.level.hooks
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
    const refusal = this.#refusal()
    if (refusal) return Promise.reject(refusal) // where all has ended, that tells more than the end of a block
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
          if (lane === this.lane) hooks = this.ending.takeDue() // a turn inside of a block leaves the session to the block
        }
      })
    } finally {
      if (hooks.length > 0) await runAfterHooks(hooks)
    }
  }

  /**
   * The innermost block around the running code, live or ended, also of a session that was closed and that this one follows.
   *
   * @param calls whether calls of a library count, which add no level.
   */
  enclosingBlock(calls = true): Block<Connection> | undefined {
    for (let scope = currentScope(); scope; scope = scope.parent) {
      const { block } = scope
      if (block?.database !== this.database || block.owner !== this.owner || !block.begun) continue
      if (!calls && (block as Block<Connection>).call) continue // of this database, so it is one of ours
      return block.session ? (block as Block<Connection>) : Block.ended(this, block) // of this database, so it is one of ours
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

  /** Throws if the session or its context has ended, or the client that asks was given back. */
  assertAccepts(native?: NativeBlock): void {
    const refusal = this.#refusal(native)
    if (refusal) throw refusal
  }

  #refusal(native?: NativeBlock): AmbientError | undefined {
    const refusal = this.#closed ?? (this.owner.refuses ? this.#contextEnded : undefined)
    if (refusal) return this.#refused(refusal())
    const { released } = (native ?? {}) as Partial<NativeTransaction<Connection>> // made by createBlock
    return released ? this.#refused(this.#clientReleased()) : undefined
  }

  #clientReleased(): AmbientError {
    const what = 'A client, or a transaction on it, was used after it had been released.'
    return new AmbientError('AMBIENT_BLOCK_ENDED', what, { database: this.name })
  }

  #refused(error: AmbientError): AmbientError {
    this.publish('refused', { error })
    return error
  }

  #contextEnded = (): AmbientError => this.database.contextEnded(this.owner)

  blockEnded(block: Occupant): AmbientError {
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

  // Its transaction

  /** The transaction has ended: the next statement opens a new one. */
  renew(): void {
    this.transaction = new Transaction(this, this.#settings.transaction)
  }

  mayHaveCommitted(): void {
    this.owner.committed = true
  }

  get afterBegin(): (() => Promise<void>) | undefined {
    return this.ending.afterBegin
  }

  // Participant: how its context ends it

  prepare(): Promise<true> | undefined {
    return this.ending.prepare()
  }

  quiet(bound: Bound): Promise<void> {
    return this.lane.quiet(bound)
  }

  endStream(way: 'destroy' | 'refuse'): void {
    this.streams.endIn(this.lane, 'the end of the context', way)
  }

  fence(): void {
    if (!this.lane.busy) return
    this.lane.answerFor()
    this.lane.close(() => this.#refused(this.#contextEnded()))
  }

  /** Awaits what is at the database; with `cancel`, ends it. */
  async stop(cancel: boolean): Promise<void> {
    await this.ending.underWay?.catch(() => {}) // a COMMIT that was sent is awaited, whoever asked for it (C8)
    await this.transaction.stop(cancel)
  }

  /** Ends the unit that owns it now. */
  async abort(error: AmbientError): Promise<void> {
    this.owner.abort(error)
    await this.owner.settle('rollback', error).catch(() => {}) // whoever settles it gets the error
  }

  commitAtEnd(aborted: () => boolean): Promise<void> {
    const committing = this.ending.sendCommit(this.transaction, aborted)
    const over = () => this.owner.defer(this.ending.takeDue())
    committing.then(over, over)
    return committing
  }

  async rollbackAtEnd(error: unknown, cancel: boolean): Promise<boolean> {
    this.ending.reunite()
    this.transaction.root.refusal ??= () => this.#refused(this.#contextEnded())
    const said = await this.ending.rollback(this.transaction, error, cancel)
    this.owner.defer(this.ending.takeDue())
    return said
  }

  closeAtEnd(): Promise<void> | undefined {
    if (this.#closed) return undefined
    this.#closed = this.owner.fenced
      ? this.#contextEnded
      : () => {
          const what = `The session was closed.${happened('It was closed', this.#closedAt)}`
          return new AmbientError('AMBIENT_SESSION_CLOSED', what, { database: this.name })
        }
    this.owner.forget(this.database, this)
    this.lane.close(this.#closed)
    this.#handle = undefined
    this.unit = undefined
    this.database.sessions.delete(this)
    if (this.blocks) for (const block of this.blocks) block.leave() // such as never end
    if (this.owner.scope.beside) this.owner.scope.beside.session = undefined
    const ending = this.holder.end()
    if (ending) return ending.then(() => this.publish('closed'))
    this.publish('closed')
    return undefined
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
