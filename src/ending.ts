import { Abortion } from './abortion.ts'
import { Block } from './atomic.ts'
import { bounded } from './clock.ts'
import { AmbientError, isAmbientError, stateOutcome } from './errors.ts'
import {
  type AfterHook,
  byRegistration,
  copyHooks,
  dropHooks,
  type Hook,
  type Hooks,
  moveHooks,
  noHooks,
} from './hooks.ts'
import type { Level } from './level.ts'
import type { Session } from './session.ts'
import type { Transaction } from './transaction.ts'

/** A flush may lead to changes, by listeners of the user's; these must come to an end. */
const mostFlushes = 10

/** How the transactions of a session end, one after the other: hooks, COMMIT or ROLLBACK, and the hooks that run after (K1, K2). */
export class Ending<Connection> {
  /** The COMMIT that is under way. */
  underWay: Promise<void> | undefined
  readonly #session: Session<Connection>
  /** Hooks from outside the block that has a transaction to itself: the work there comes after it. */
  #outside: Hooks | undefined
  /** Hooks that come while COMMIT or ROLLBACK is under way: they belong to the next transaction. */
  #next: Hooks | undefined
  /** After-hooks that came due, until the session is free again. */
  #due: AfterHook[] = []

  constructor(session: Session<Connection>) {
    this.#session = session
  }

  /** Where hooks from outside any block go. */
  get hooks(): Hooks {
    return this.#outside ?? this.#next ?? this.#session.transaction.root.hooks
  }

  /** From now on the transaction is that of a block alone, until {@link Ending.reunite}. */
  setApart(): void {
    this.#outside = noHooks()
  }

  /** The transaction that is open is that of a block alone. */
  get apart(): boolean {
    return this.#outside !== undefined
  }

  reunite(): void {
    const outside = this.#outside
    this.#outside = undefined
    if (outside) moveHooks(outside, this.hooks)
  }

  /**
   * Hooks, then COMMIT, unless `abortion` fires before it. A transaction that cannot commit stays for a rollback; a veto rolls back.
   *
   * @param transaction the one that is meant: its session may have ended it, and have another one, by now.
   */
  async commit(transaction: Transaction<Connection>, abortion?: Abortion): Promise<void> {
    for (let again: boolean | undefined = true; again; ) {
      transaction.assertUsable(transaction.root) // it fails just as well by an error that a hook swallowed
      try {
        again = await (abortion ? Promise.race([this.prepare(), abortion.promise]) : this.prepare())
        if (abortion?.error) throw abortion.error
        this.#session.assertAccepts() // its context may have ended in between
        again ||= transaction.root.hooks.beforeCommit.length > 0 // one may have come in between
      } catch (error) {
        stateOutcome(error, await this.rollback(transaction, error, abortion?.error !== undefined))
        throw error
      }
    }
    await this.sendCommit(transaction, () => (abortion?.error ?? this.#session.owner.abortion) !== undefined)
  }

  /**
   * Lets nothing more of `transaction` be sent, awaits what is at the database (with `cancel`, ends it), and rolls back.
   *
   * @returns whether the server said that it rolled back.
   */
  async rollback(transaction: Transaction<Connection>, error?: unknown, cancel = false): Promise<boolean> {
    const { root } = transaction
    root.refusal ??= this.#transactionEnded
    this.#beginEnd(transaction)
    await this.#session.stop(cancel)
    const { opened } = transaction
    const said = await transaction.rollback(error)
    if (!said) this.#session.mayHaveCommitted()
    this.#renew(transaction, root.failure?.outcome === 'unknown' ? undefined : 'afterRollback', opened)
    return said
  }

  /** Runs the beforeCommit hooks that are due, each in a block of its own (K1); then asks what a lost COMMIT is found again by. */
  prepare(): Promise<true> | undefined {
    const { transaction } = this.#session
    const { root } = transaction
    transaction.assertUsable(root)
    const flushing = this.flush(root)
    if (flushing) return flushing
    const due = root.hooks.beforeCommit.splice(0)
    const ownHook = this.#session.database.hooks.beforeCommit
    if (transaction.opened && !transaction.prepared) {
      transaction.prepared = true
      if (ownHook) due.unshift(() => ownHook(this.#session))
    }
    return due.length > 0 ? this.#runBeforeCommit(due) : transaction.identify()
  }

  /** Sends what the library keeps back, as part of `level`. A failure is thrown, and leaves it to the level what becomes of the rest. */
  flush(level: Level): Promise<true> | undefined {
    return this.#session.unit?.pending ? this.#flush(level) : undefined
  }

  async #flush(level: Level): Promise<true> {
    const { transaction, settleTimeout } = this.#session
    const letGo = transaction.claim({}) // all of it or nothing, also where statements run on their own
    const flush = () => this.#session.unit?.flush()
    try {
      for (let left = mostFlushes; this.#session.unit?.pending; left--) {
        if (left === 0) throw this.#neverFlushed()
        await this.#runHook('flush', flush, 'AMBIENT_SETTLE_TIMEOUT', settleTimeout, level)
      }
    } finally {
      letGo()
    }
    return true
  }

  #neverFlushed(): AmbientError {
    const what = `Changes were still pending after ${mostFlushes} flushes.`
    return new AmbientError('AMBIENT_SETTLE_TIMEOUT', what, { database: this.#session.name })
  }

  async #runBeforeCommit(hooks: Hook[]): Promise<true> {
    const { root } = this.#session.transaction
    const { settleTimeout } = this.#session
    for (const hook of hooks) {
      await this.#runHook(hookLabel('beforeCommit', hook), hook, 'AMBIENT_SETTLE_TIMEOUT', settleTimeout)
      if (root.failure || root.refusal) break // no COMMIT follows
    }
    return true
  }

  /** The database's hook for right after BEGIN, if it has one. */
  get afterBegin(): (() => Promise<void>) | undefined {
    const hook = this.#session.database.hooks.afterBegin
    if (!hook) return undefined
    const run = () => hook(this.#session)
    return () => this.#runHook('afterBegin hook', run, 'AMBIENT_ACQUIRE_TIMEOUT', this.#session.acquireTimeout)
  }

  /** One that takes longer than `timeout` is ended like a block that is aborted. */
  async #runHook(
    label: string,
    hook: Hook,
    code: 'AMBIENT_ACQUIRE_TIMEOUT' | 'AMBIENT_SETTLE_TIMEOUT',
    timeout: number,
    level: Level = this.#session.transaction.root,
  ) {
    const block = new Block<Connection>(this.#session, label, level, this.#session.owner.scope, true)
    const limit = new Abortion({})
    const running = block.run(hook, limit)
    bounded(running, timeout, () => limit.abort(this.#late(label, code, timeout))).catch(() => {})
    await running
  }

  #late(label: string, code: 'AMBIENT_ACQUIRE_TIMEOUT' | 'AMBIENT_SETTLE_TIMEOUT', timeout: number): AmbientError {
    return new AmbientError(code, `Its ${label} did not end within ${timeout} ms.`, {
      database: this.#session.name,
      statusCode: code === 'AMBIENT_ACQUIRE_TIMEOUT' ? 503 : undefined,
    })
  }

  /** How long an after-hook may take, and what becomes of its failure. */
  limitsOf(when: 'afterCommit' | 'afterRollback', hook?: Hook): Pick<AfterHook, 'timeout' | 'late' | 'onError'> {
    const { settleTimeout: timeout, hookFailed: onError } = this.#session
    return { timeout, late: () => this.#late(hookLabel(when, hook), 'AMBIENT_SETTLE_TIMEOUT', timeout), onError }
  }

  /** COMMIT without the hooks before it; see {@link Transaction.commit}. */
  sendCommit(transaction: Transaction<Connection>, aborted: () => boolean): Promise<void> {
    const committing = this.#commitTransaction(transaction, aborted)
    const over = () => {
      this.underWay = undefined
    }
    this.underWay = committing
    committing.then(over, over)
    return committing
  }

  async #commitTransaction(transaction: Transaction<Connection>, aborted: () => boolean): Promise<void> {
    const opened = transaction.opened
    this.#beginEnd(transaction)
    try {
      await transaction.commit(aborted)
      if (opened) this.#session.mayHaveCommitted()
      this.#renew(transaction, 'afterCommit', opened)
    } catch (error) {
      if (transaction.holdsConnection) await transaction.rollback(error) // COMMIT was never sent
      const unknown = isAmbientError(error) && error.outcome === 'unknown'
      if (unknown) this.#session.mayHaveCommitted()
      this.#renew(transaction, unknown ? undefined : 'afterRollback', opened)
      throw error
    }
  }

  #beginEnd(transaction: Transaction<Connection>): void {
    if (transaction === this.#session.transaction) this.#next ??= noHooks()
  }

  /** `transaction` has ended: the next statement opens a new one. */
  #renew(
    transaction: Transaction<Connection>,
    when: 'afterCommit' | 'afterRollback' | undefined,
    opened: boolean,
  ): void {
    if (transaction !== this.#session.transaction) return // somebody else has ended it meanwhile
    const { root } = transaction
    root.refusal ??= this.#transactionEnded
    if (when !== 'afterCommit') this.#session.forget()
    this.#session.renew()
    if (this.#next) moveHooks(this.#next, this.#session.transaction.root.hooks)
    this.#next = undefined
    const hooks = copyHooks(root.hooks)
    dropHooks(root.hooks) // whoever still points at the block pins none of them
    if (!when) return
    const own = opened ? this.#session.database.hooks[when] : undefined
    const due = hooks[when]
    if (own) due.unshift({ order: this.#session.database.order, run: () => own(), ...this.limitsOf(when) })
    for (const hook of due) this.#due.push({ ...hook, leave: this.#session.database.engines.hooks.enter() })
  }

  /** Hands over the after-hooks that came due, in the order of registration. */
  takeDue(): AfterHook[] {
    return this.#due.splice(0).sort(byRegistration)
  }

  /** Returns what brings back the hooks of this moment, without those of an attempt that failed (A5). */
  rememberHooks(): () => void {
    const before = copyHooks(this.#session.transaction.root.hooks)
    const due = this.#due.length
    return () => {
      for (const dropped of this.#due.splice(due)) dropped.leave?.()
      moveHooks(before, this.#session.transaction.root.hooks)
    }
  }

  #transactionEnded = (): AmbientError =>
    new AmbientError('AMBIENT_BLOCK_ENDED', 'The transaction has ended.', { database: this.#session.database.name })
}

function hookLabel(when: string, hook?: Hook): string {
  return hook?.name ? `${when} hook '${hook.name}'` : `${when} hook`
}
