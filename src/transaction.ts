import type { TransactionOptions, TransactionSettings } from './adapter.ts'
import { bounded } from './clock.ts'
import type { Lease } from './engine.ts'
import { AmbientError, attachCleanupError } from './errors.ts'
import { type TransactionEvent, transactionChannel } from './events.ts'
import { connectionLost, type Failure, failByError, failByLeftovers, failByStatus, notIdentified } from './failure.ts'
import type { Holder } from './holder.ts'
import { dropHooks, moveHooks } from './hooks.ts'
import { Identity } from './identity.ts'
import type { Lane } from './lane.ts'
import { assertLive, hasEnded, Level } from './level.ts'
import { resolver } from './resolution.ts'
import { happened } from './trace.ts'
import { Wire } from './wire.ts'

/** What a transaction needs of its session. */
export interface TransactionHost<Connection> {
  readonly id: number
  readonly contextId: number
  readonly name: string
  readonly acquireTimeout: number
  readonly settleTimeout: number
  /** What becomes of a lost COMMIT is to be found out. */
  readonly resolvable: boolean
  readonly holder: Holder<Connection>
  /** Something is committed, or may be, that a rollback of this transaction does not undo. */
  mayHaveCommitted(): void
  /** What is known of the database is true no more: a savepoint was rolled back. */
  forget(): void
  /** Where the caller is, while tracing. */
  place(): string | undefined
  /** Runs the database's `afterBegin` hook, if there is one. */
  readonly afterBegin: (() => Promise<void>) | undefined
}

/** One transaction of a session, from before BEGIN to its end, on one connection. Calls come one at a time. */
export class Transaction<Connection> {
  readonly root: Level = new Level()
  settings: TransactionSettings
  /** Statements run on their own, without a transaction, until a block or `begin` opens one. */
  autocommit: boolean
  /** A block of the user's said how it begins, so nested options must agree though nothing is open yet. */
  claimed = false
  /** The database's own `beforeCommit` hook has run. */
  prepared = false
  readonly #host: TransactionHost<Connection>
  readonly #wire: Wire
  #lease: Lease<Connection> | undefined
  #begun: Promise<unknown> | undefined
  /** The ROLLBACK that is under way or was; resolves with whether the server said so. */
  #cleaning: Promise<boolean> | undefined
  /** The connection that BEGIN was sent on. */
  #beginning: Lease<Connection> | undefined
  #savepoints = 0
  /** Absent where it is not asked for. */
  readonly #identity: Identity<Connection> | undefined
  #startedAt = 0
  /** Somebody was refused because of its failure. */
  #told = false
  /** Where its first statement was issued, while tracing. */
  #place: string | undefined

  constructor(host: TransactionHost<Connection>, options: TransactionOptions) {
    this.#host = host
    this.#wire = new Wire(host)
    this.autocommit = options === 'autocommit'
    this.settings = options === 'autocommit' ? {} : options
    this.#identity = host.resolvable ? new Identity() : undefined
  }

  get opened(): boolean {
    return this.root.opened
  }

  /** For errors that speak of a transaction that is open; empty unless tracing (O2). */
  get whereBegun(): string {
    return happened('It was begun', this.#place)
  }

  get atDatabase(): boolean {
    return this.#wire.busy
  }

  get lastActivity(): number {
    return this.#wire.lastActivity
  }

  get holdsConnection(): boolean {
    return this.#lease !== undefined
  }

  /** Set once something of it may be committed without a COMMIT of ours. */
  get #doubt(): AmbientError | undefined {
    const { failure } = this.root
    return failure?.outcome === 'unknown' ? this.#aborted(failure) : undefined
  }

  /** The same, unless it was said already. */
  get untold(): AmbientError | undefined {
    return this.#told ? undefined : this.#doubt
  }

  /** The savepoint levels and the root must still be able to commit; throws `AMBIENT_TRANSACTION_ABORTED` if not. */
  assertUsable(level: Level): void {
    if (this.#lease?.lost) this.root.failure ??= connectionLost(this.#lease.lost)
    for (let each: Level | undefined = level; each; each = each.parent) {
      assertLive(each)
      if (!each.failure) continue
      this.#told = true
      throw this.#aborted(each.failure)
    }
  }

  /** Checks options against a transaction that is open, or adopts them for one that is not (A7). */
  agree(settings: TransactionSettings): void {
    if (!this.opened && !this.claimed) {
      this.settings = { ...this.settings, ...settings }
      return
    }
    const open = this.settings
    const differs =
      (settings.isolationLevel !== undefined && settings.isolationLevel !== open.isolationLevel) ||
      (settings.readOnly !== undefined && settings.readOnly !== (open.readOnly ?? false)) ||
      (settings.deferrable !== undefined && settings.deferrable !== (open.deferrable ?? false))
    if (differs) {
      throw new AmbientError(
        'AMBIENT_TRANSACTION_OPTIONS',
        `A transaction with ${JSON.stringify(open)} is open, and ${JSON.stringify(settings)} was asked for.`,
        { database: this.#host.name },
      )
    }
  }

  /**
   * Like {@link Transaction.agree}, for a block that may open nothing; what is inside must agree with it as well.
   *
   * @returns lets go of the options again if nothing was opened.
   */
  claim(settings: TransactionSettings): () => void {
    const { settings: before, claimed, autocommit } = this
    this.agree(settings)
    this.claimed = true
    this.autocommit = false
    return () => {
      if (!this.opened) Object.assign(this, { settings: before, claimed, autocommit })
    }
  }

  /** Opens `level` and what surrounds it, then runs `statement`, unless `lane` was cut off meanwhile. */
  async run<Result>(level: Level, statement: (connection: Connection) => Promise<Result>, lane: Lane): Promise<Result> {
    this.assertUsable(level)
    if (this.autocommit && !this.opened) return this.#alone(level, statement)
    if (!level.opened) {
      await this.open(level)
      this.assertUsable(level) // its block may have ended in between
      lane.assertMaySend()
    }
    const lease = this.#lease as Lease<Connection> // an open level has one
    let unsent = true
    try {
      const running = statement(lease.connection)
      unsent = false
      const result = await this.#wire.answer(this.#identityOn(lease)?.follow(running, lease) ?? running)
      if (this.#begun) await this.#checkBegin('unknown')
      failByStatus(level, lease)
      return result
    } catch (error) {
      if (!unsent) await this.#failBy(level, lease, error)
      throw error
    }
  }

  /** Takes the connection for a stream, which is over when `ended` resolves; then the caller says what it failed with, if anything. */
  async openStream(
    level: Level,
    ended: Promise<unknown>,
    lane: Lane,
  ): Promise<{ connection: Connection; lost: Promise<never>; settle(failure: unknown): Promise<void> }> {
    this.assertUsable(level)
    const alone = this.autocommit && !this.opened
    if (!alone && !level.opened) {
      await this.open(level)
      this.assertUsable(level)
      lane.assertMaySend()
    }
    if (this.#begun) await this.#checkBegin()
    const taken = alone ? await this.#acquire() : undefined
    try {
      this.assertUsable(level) // what it belongs to may have ended in between
    } catch (error) {
      if (taken) await this.#host.holder.release(taken)
      throw error
    }
    const lease = taken ?? (this.#lease as Lease<Connection>) // an open level has one
    if (alone) this.#host.mayHaveCommitted()
    this.#identity?.sent()
    this.#wire.stream = ended
    this.#lease = lease
    const lost = new Promise<never>((_, reject) => {
      if (lease.lost) reject(lease.lost)
      else lease.onLost = reject
    })
    lost.catch(() => {}) // whoever waits for the stream races with it
    const settle = async (failure: unknown) => {
      this.#wire.stream = undefined
      lease.onLost = undefined
      this.#wire.active()
      if (alone) {
        this.#lease = undefined
        const broken = failure !== undefined && lease.adapter.traits(failure).reply === 'unanswered'
        await this.#releaseAlone(lease, broken ? asError(failure) : undefined)
      } else if (failure !== undefined) {
        await this.#failBy(level, lease, failure)
      } else {
        failByStatus(level, lease)
      }
    }
    return { connection: lease.connection, lost, settle }
  }

  /** Opens `level`, and waits until the server has said so. */
  async begin(level: Level): Promise<void> {
    await this.open(level)
    if (this.#begun) await this.#checkBegin()
  }

  /** Makes sure that `level` is open on the server, or on the way with its first statement. */
  open(level: Level): Promise<void> | undefined {
    if (level.opened || level.opening) return level.opening
    const opening = level.parent ? this.#openSavepoint(level, level.parent) : this.#begin()
    const over = () => {
      level.opening = undefined
    }
    level.opening = opening
    opening.then(over, over)
    return opening
  }

  async #openSavepoint(level: Level, parent: Level): Promise<void> {
    await this.open(parent)
    this.assertUsable(level)
    if (this.#begun) await this.#checkBegin()
    const { adapter, capabilities, connection } = this.#lease as Lease<Connection> // the parent is open
    if (!capabilities.savepoints) {
      const what = 'A nested block needs a savepoint, and the engine has none.'
      throw new AmbientError('AMBIENT_UNSUPPORTED', what, { database: this.#host.name })
    }
    level.name = `ambient_${++this.#savepoints}`
    try {
      await this.#wire.answer(adapter.savepoint(connection, level.name))
    } catch (error) {
      await this.#failBy(parent, this.#lease as Lease<Connection>, error)
      throw error
    }
    level.opened = true
  }

  async #begin(): Promise<void> {
    this.#place = this.#host.place()
    let lease: Lease<Connection>
    try {
      lease = await this.#acquire()
    } catch (error) {
      assertLive(this.root) // then why there was no connection is of no interest
      throw error
    }
    this.#startedAt = performance.now()
    if (this.root.refusal) {
      await this.#host.holder.release(lease) // it came too late
      throw this.root.refusal()
    }
    let answered = false
    this.#beginning = lease
    try {
      const bare = Object.values(this.settings).every((value) => value === undefined)
      if (bare && !this.#host.afterBegin && lease.adapter.mayPipelineBegin?.(lease.connection)) {
        this.#begun = lease.adapter.begin(lease.connection, this.settings)
        this.#begun.catch(() => {}) // looked at after the statement that travels with it
      } else {
        const begin = () => this.#beginOn(lease)
        await this.#wire.insist(begin, lease, this.#host.acquireTimeout, () => this.root.refusal !== undefined)
      }
      answered = true
      assertLive(this.root)
    } catch (error) {
      answered ||= lease.adapter.traits(error).reply === 'answered'
      // A server that did not answer has not said that there is nothing any more.
      this.#cleaning = answered
        ? this.#rollBackOn(lease, error)
        : this.#host.holder.release(lease, asError(error)).then(() => false)
      await this.#cleaning
      throw error
    } finally {
      this.#beginning = undefined
    }
    this.#lease = lease
    this.root.opened = true
    this.#publish('begun')
    if (!this.#host.afterBegin) return
    try {
      await this.#host.afterBegin()
      this.assertUsable(this.root)
    } catch (error) {
      if (this.#lease !== lease) throw error // the end of the transaction has given it back meanwhile
      this.root.opened = false
      this.root.failure = undefined
      this.#lease = undefined
      await this.#cleanUp(lease, error)
      throw error
    }
  }

  /** Sends BEGIN; waiting for its answer counts as waiting for the connection. */
  #beginOn({ adapter, connection }: Lease<Connection>): Promise<unknown> {
    return this.#boundedBegin(adapter.begin(connection, this.settings))
  }

  #boundedBegin(begin: Promise<unknown>): Promise<unknown> {
    const { acquireTimeout, name } = this.#host
    return bounded(begin, acquireTimeout, () => {
      const what = `BEGIN got no answer within ${acquireTimeout} ms.`
      return new AmbientError('AMBIENT_ACQUIRE_TIMEOUT', what, { database: name, statusCode: 503 })
    })
  }

  #acquire(): Promise<Lease<Connection>> {
    return this.#wire.connection(this.#host.holder.lease(() => !this.root.refusal))
  }

  /**
   * A pipelined BEGIN that failed left the statement that was sent behind it outside any transaction, so the outcome is
   * `'unknown'`. It has its answer before the statement does; only where no statement was sent is there anything to wait for.
   */
  async #checkBegin(outcome?: 'unknown'): Promise<void> {
    try {
      if (this.#begun) await this.#boundedBegin(this.#begun)
    } catch (cause) {
      const what = outcome ? 'BEGIN failed, so the statement behind it may have committed.' : 'BEGIN failed.'
      this.root.failure ??= { what, cause, ...(outcome && { outcome }) }
      throw this.#aborted(this.root.failure)
    } finally {
      this.#begun = undefined
    }
  }

  #failBy(level: Level, lease: Lease<Connection>, error: unknown): Promise<void> {
    return this.#wire.finding(failByError(level, lease, error))
  }

  /** A statement without a transaction, on a connection of its own. */
  async #alone<Result>(level: Level, statement: (connection: Connection) => Promise<Result>): Promise<Result> {
    const lease = await this.#acquire()
    let broken: Error | undefined
    let result: Result
    let leftOpen = false
    this.#lease = lease
    this.#startedAt = performance.now()
    try {
      assertLive(level)
      this.#host.mayHaveCommitted()
      result = await this.#wire.answer(statement(lease.connection))
      leftOpen = lease.adapter.transactionStatus?.(lease.connection) === 'open'
    } catch (error) {
      if (lease.adapter.traits(error).reply === 'unanswered') broken = asError(error)
      else await lease.adapter.afterError?.(lease.connection)
      throw error
    } finally {
      this.#lease = undefined
      await this.#releaseAlone(lease, broken)
    }
    if (!leftOpen) return result
    const what = 'SQL that began a transaction left it open, so it was rolled back.'
    throw new AmbientError('AMBIENT_TRANSACTION_CONTROL', what, { database: this.#host.name })
  }

  /** SQL of the user's may have left a transaction open on the connection. */
  async #releaseAlone(lease: Lease<Connection>, broken?: Error): Promise<void> {
    const status = lease.adapter.transactionStatus?.(lease.connection)
    if (!broken && (status === 'open' || status === 'aborted')) await this.#cleanUp(lease, undefined)
    else await this.#host.holder.release(lease, broken)
  }

  /** Marks `level` as unable to commit because of `error` thrown in a joined block (A1). */
  doom(level: Level, error: unknown): void {
    level.failure ??= { what: 'A block that had joined it threw.', cause: error }
  }

  /** Asks what the transaction can be found again by if the answer to COMMIT is lost, unless that is known. */
  identify(): Promise<true> | undefined {
    const lease = this.#lease
    const identity = lease && this.opened ? this.#identityOn(lease) : undefined
    return lease && identity?.due ? this.#identify(identity, lease) : undefined
  }

  async #identify(identity: Identity<Connection>, lease: Lease<Connection>): Promise<true> {
    try {
      await this.#wire.answer(this.#wire.bounded(identity.ask(lease)))
      return true
    } catch (error) {
      const answered = lease.adapter.traits(error).reply === 'answered'
      if (!answered) lease.lose(asError(error))
      else await lease.adapter.afterError?.(lease.connection)
      this.root.failure ??= answered ? notIdentified(error) : connectionLost(error)
      throw this.#aborted(this.root.failure)
    }
  }

  /** A transaction that can only read leaves nothing to look for. */
  #identityOn({ capabilities }: Lease<Connection>): Identity<Connection> | undefined {
    return capabilities.commitLookup && this.settings.readOnly !== true ? this.#identity : undefined
  }

  /**
   * Sends COMMIT. The transaction has ended whatever comes of it, except that one which cannot commit is left for a rollback.
   *
   * @param aborted whether it is not wanted any more: what the server has not done yet is not asked of it again.
   * @throws `AMBIENT_TRANSACTION_ABORTED`, `AMBIENT_COMMIT_UNKNOWN`, or the server's own error.
   */
  async commit(aborted: () => boolean): Promise<void> {
    this.assertUsable(this.root)
    if (this.#begun) await this.#checkBegin()
    if (!this.opened) await this.stop(false) // a block inside that was cut off may be at BEGIN
    this.assertUsable(this.root) // it may have been ended meanwhile
    const lease = this.#lease
    if (!lease || !this.opened) return
    const id = this.#identity?.id
    const commit = () => this.#wire.bounded(lease.adapter.commit(lease.connection))
    try {
      const answer = await this.#wire.insist(commit, lease, this.#host.acquireTimeout, aborted)
      this.#lease = undefined
      await this.#host.holder.release(lease)
      if (answer === 'committed') return this.#publish('committed')
      this.#publish('rolled-back')
    } catch (error) {
      const { reply, lost } = lease.adapter.traits(error)
      if (lost) {
        lease.lose(asError(error))
        this.root.failure ??= connectionLost(error)
        throw this.#aborted(this.root.failure)
      }
      this.#lease = undefined
      if (reply === 'answered') {
        this.#publish('failed', error)
        await this.#cleanUp(lease, error)
        throw error
      }
      const unknown = new AmbientError('AMBIENT_COMMIT_UNKNOWN', 'The answer to COMMIT never came.', {
        database: this.#host.name,
        outcome: 'unknown',
        cause: error,
        resolve: resolver(id === undefined ? undefined : lease.lookupOf(id)),
      })
      this.#publish('unknown', unknown)
      await this.#host.holder.release(lease, asError(error))
      throw unknown
    }
    throw this.#aborted({ what: 'The server answered COMMIT with ROLLBACK.', cause: undefined, outcome: 'rolled-back' })
  }

  /**
   * Sends ROLLBACK. In any case nothing can be committed any more: a connection that does not answer is destroyed.
   *
   * @returns whether the server said that it rolled back (or there was nothing to roll back).
   */
  async rollback(error?: unknown): Promise<boolean> {
    await this.stop(false) // a block inside that was cut off may be at its end
    if (this.#beginning) await this.root.opening?.catch(() => {}) // which rolls back by itself what has ended meanwhile
    const lease = this.#lease
    if (lease && this.opened) {
      this.#lease = undefined
      await this.#cleanUp(lease, error)
    }
    const said = (await this.#cleaning) ?? true
    const doubt = this.#doubt
    if (doubt) attachCleanupError(error, doubt)
    return said && !doubt
  }

  /** Shows the connection clean by an answered ROLLBACK, or destroys it (S7). */
  #cleanUp(lease: Lease<Connection>, error: unknown): Promise<boolean> {
    this.#cleaning = this.#rollBackOn(lease, error)
    return this.#cleaning
  }

  async #rollBackOn(lease: Lease<Connection>, error: unknown): Promise<boolean> {
    try {
      if (lease.lost) throw lease.lost
      await this.#wire.answer(this.#wire.bounded(lease.adapter.rollback(lease.connection)))
      if (failByLeftovers(this.root, lease)) this.#told = false
      this.#publish('rolled-back', error)
    } catch (second) {
      attachCleanupError(error, second)
      this.#publish('cleanup-failed', second)
      await this.#host.holder.release(lease, asError(second))
      return false
    }
    await this.#host.holder.release(lease)
    return true
  }

  /** Keeps the work of a savepoint, or undoes it and throws if it cannot be kept; late code is refused with `refusal`. */
  async releaseLevel(level: Level, refusal: () => AmbientError): Promise<void> {
    const failure = level.failure
    if (failure) {
      await this.rollbackLevel(level, refusal)
      throw this.#aborted(failure)
    }
    this.assertUsable(level)
    const parent = level.parent as Level // only savepoints are released
    if (level.opened) {
      const lease = this.#lease as Lease<Connection> // an open level has one
      try {
        await this.#wire.answer(lease.adapter.releaseSavepoint(lease.connection, level.name))
        failByStatus(parent, lease)
      } catch (error) {
        await this.#failBy(parent, lease, error)
        throw error
      }
    }
    level.opened = false
    moveHooks(level.hooks, parent.hooks)
  }

  /**
   * Undoes the work of a savepoint, and ends it for good if late code is to be refused with `refusal`. If the server does not say so,
   * the whole transaction can only be rolled back.
   */
  async rollbackLevel(level: Level, refusal?: () => AmbientError): Promise<void> {
    level.refusal ??= refusal // first, so that a block inside that was cut off undoes nothing beside it
    await this.stop(false) // a block inside that was cut off may be at its end
    const step = async (act: (lease: Lease<Connection>) => Promise<unknown>) => {
      const lease = this.#lease
      if (level.opened && lease && !lease.lost && !this.root.failure && !hasEnded(level.parent)) {
        await this.#wire.answer(this.#wire.bounded(act(lease)))
        if (failByLeftovers(this.root, lease)) this.#told = false
      }
    }
    try {
      await step(({ adapter, connection }) => adapter.rollbackTo(connection, level.name))
      if (refusal) await step(({ adapter, connection }) => adapter.releaseSavepoint(connection, level.name))
    } catch (error) {
      this.root.failure ??= { what: 'Rolling back to a savepoint failed.', cause: error }
      const lease = this.#lease
      if (lease?.adapter.traits(error).reply === 'unanswered') lease.lose(asError(error)) // no ROLLBACK would overtake it
    }
    level.failure = undefined
    if (refusal) level.opened = false
    this.#host.forget()
    dropHooks(level.hooks)
  }

  /** Awaits what is at the database. With `cancel`, asks the server to stop it, or destroys the connection. */
  stop(cancel: boolean): Promise<void> {
    return this.#wire.stop(this.#lease ?? this.#beginning, cancel)
  }

  #aborted({ what, cause, outcome }: Failure): AmbientError {
    return new AmbientError('AMBIENT_TRANSACTION_ABORTED', what, { database: this.#host.name, cause, outcome })
  }

  #publish(type: TransactionEvent['type'], error?: unknown): void {
    if (!transactionChannel.hasSubscribers) return
    const { id: sessionId, contextId, name: database } = this.#host
    const duration = performance.now() - this.#startedAt
    transactionChannel.publish({ type, sessionId, contextId, database, duration, error })
  }
}

function asError(error: unknown): Error {
  return error instanceof Error ? error : new Error(String(error))
}
