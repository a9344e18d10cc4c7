import { Abortion, type AbortOptions } from './abortion.ts'
import type { TransactionSettings, UnitOfWork } from './adapter.ts'
import { bounded } from './clock.ts'
import { currentScope, type Scope, type ScopeBlock, startInScope } from './context.ts'
import { AmbientError, isAmbientError, stateOutcome } from './errors.ts'
import { Lane, type Occupant } from './lane.ts'
import { Level } from './level.ts'
import type { Session } from './session.ts'
import { sleep } from './time.ts'

/** What an atomic block does about a transaction that is already open. */
export type CurrentTransaction = 'commit' | 'rollback' | 'append' | 'raise' | 'savepoint' | 'join'

const modes: readonly CurrentTransaction[] = ['commit', 'rollback', 'append', 'raise', 'savepoint', 'join']

/** Options of an atomic block. */
export interface AtomicOptions extends TransactionSettings, AbortOptions {
  /**
   * What happens to a transaction that is already open: `'commit'` it and start a new one, `'rollback'` it and start a new
   * one, `'append'` goes on in it and commits it at the end, `'raise'` throws `AMBIENT_TRANSACTION_OPEN`, `'savepoint'` nests
   * in it, `'join'` takes part and leaves its end to the outside.
   * Default is `'commit'`, inside another block `'savepoint'`.
   */
  readonly current?: CurrentTransaction | undefined
  /**
   * Runs the whole block again after a serialization failure or deadlock, `attempts` times in all, with growing random
   * pauses. Only where the block owns the whole transaction, never after an unknown outcome. Default is one attempt.
   */
  readonly retry?: { readonly attempts: number } | undefined
}

/** A stretch of code that owns its session while it runs: an atomic or native block, a retry attempt, a hook (A3, A6). */
export class Block<Connection> implements ScopeBlock, Occupant {
  readonly session: Session<Connection>
  readonly label: string
  readonly place: string | undefined
  readonly owns = true
  readonly hook: boolean
  readonly inner: Lane
  scope: Scope
  /** Where its statements run; named savepoints of a native block move it. */
  level: Level
  exclusive?: 'transaction' | undefined
  promise?: Promise<unknown>
  /** It is a call of a library's, which adds no level. */
  call = false
  /** A native block takes part from its BEGIN on. */
  begun = true
  live = true

  constructor(
    session: Session<Connection>,
    label: string,
    level: Level,
    surrounding: Scope | undefined,
    hook = false,
    place: string | undefined = session.place(),
  ) {
    this.session = session
    this.label = label
    this.place = place
    this.level = level
    this.hook = hook
    this.inner = new Lane(session)
    this.scope = { parent: surrounding, context: surrounding?.context, block: this }
    session.blocks ??= new Set()
    session.blocks.add(this)
  }

  get database(): object {
    return this.session.database
  }

  get owner(): object {
    return this.session.owner
  }

  /** Leaves its scope, so that a timer that was forgotten in it pins no session. */
  leave(): void {
    const { begun, hook, label, place, database, owner } = this
    this.session.blocks?.delete(this)
    if (this.scope.block !== this) return
    this.scope.block = begun ? { live: false, begun, hook, label, place, database, owner } : undefined
  }

  /** What refuses late code of a block that has ended, at `session`, which may follow the one that it ran in. */
  static ended<Connection>(session: Session<Connection>, { label, hook, place }: ScopeBlock): Block<Connection> {
    const block = new Block(session, label, session.transaction.root, undefined, hook, place)
    block.live = false
    block.leave()
    block.inner.close(() => session.blockEnded(block))
    return block
  }

  /** Awaits what is under way in it; the first failure is thrown. */
  async join(): Promise<void> {
    this.session.streams.endIn(this.inner, 'the end of its block')
    const timeout = this.session.settleTimeout
    await this.inner.quiet((waiting) =>
      bounded(waiting, timeout, () => {
        const what = `Work was still under way ${timeout} ms after ${this.label} had ended.`
        return new AmbientError('AMBIENT_SETTLE_TIMEOUT', what, { database: this.session.name })
      }),
    )
  }

  /** Lets nothing in any more, or on with `cut`, and awaits (or cancels) what is at the database. */
  async end(cut = false, cancel = false): Promise<void> {
    this.live = false
    this.leave()
    this.session.streams.endIn(this.inner, 'the end of its block')
    this.inner.answerFor()
    this.inner.close(() => this.session.blockEnded(this), cut)
    const { transaction } = this.session
    if (transaction.root === this.level.root) await this.session.stop(cancel) // else what is at the database is not its own
  }

  async #flush(unit: UnitOfWork): Promise<void> {
    await startInScope(this.scope, () => unit.flush())
  }

  /** Runs `work` in the scope of the block, joins and ends it; the level is left to the caller. */
  async run<Result>(work: () => Result | Promise<Result>, abortion?: Abortion): Promise<Result> {
    const raced = <Value>(promise: Promise<Value>) => (abortion ? Promise.race([promise, abortion.promise]) : promise)
    try {
      const result = await raced((async () => startInScope(this.scope, work))())
      const { unit } = this.session
      if (unit?.pending && !this.hook && !this.call) await raced(this.#flush(unit)) // it belongs to the block
      await raced(this.join())
      await this.end()
      return result
    } catch (error) {
      // What waits for a connection may be at the level of what surrounds the block, which goes on.
      await this.end(true, abortion?.error !== undefined)
      throw error
    }
  }
}

/** Runs `work` in a transaction of its own: durable when it returns, undone when it throws (A1, A2, A5, A7). */
export function atomic<Connection, Result>(
  session: Session<Connection>,
  work: () => Result | Promise<Result>,
  options: AtomicOptions = {},
): Promise<Result> {
  const label = `atomic block${work.name === '' ? '' : ` '${work.name}'`}`
  const owner: Owner = { label, place: session.place(), owns: true }
  const enclosing = session.enclosingBlock()
  const lane = enclosing?.inner ?? session.lane
  return lane.track(owner, runAtomic(session, owner, enclosing, lane, work, options))
}

/** The turn of an atomic block; each attempt brings a lane of its own. */
interface Owner extends Occupant {
  inner?: Lane
}

async function runAtomic<Connection, Result>(
  session: Session<Connection>,
  owner: Owner,
  enclosing: Block<Connection> | undefined,
  lane: Lane,
  work: () => Result | Promise<Result>,
  options: AtomicOptions,
): Promise<Result> {
  session.assertAccepts()
  const { current, retry, signal, timeout, ...settings } = options
  const { label } = owner
  const mode = current ?? (enclosing ? 'savepoint' : 'commit')
  if (!modes.includes(mode)) {
    // A slip must not fall through to what commits.
    const what = `\`current\` must be one of ${modes.join(', ')}.`
    throw new AmbientError('AMBIENT_INVALID_ARGUMENT', what, { database: session.name })
  }
  session.assertAccepts() // also where its lane is free: what the end has in hand is no turn of it
  if (enclosing?.live && mode !== 'savepoint' && mode !== 'join') throw nestingError(session, mode)
  const abortion = signal || timeout !== undefined ? new Abortion({ signal, timeout }) : undefined
  const attempt = async (level: Level): Promise<Result> => {
    if (abortion?.error) throw abortion.error
    session.assertAccepts()
    const block = new Block(session, label, level, currentScope())
    owner.inner = block.inner
    return block.run(work, abortion)
  }

  let started = false
  const turn = async (): Promise<Result> => {
    if (abortion?.error) throw abortion.error
    started = true
    const transaction = session.transaction
    const outer = enclosing?.level ?? transaction.root
    const open = enclosing !== undefined || session.dirty
    if (open && mode === 'raise') throw transactionOpen(session, label)
    if (open && mode === 'commit') await session.ending.commit(transaction)
    if (open && mode === 'rollback') await session.ending.rollback(transaction)
    if (mode === 'join' || (open && mode === 'savepoint')) {
      return nested(session, mode, outer, enclosing !== undefined, settings, attempt)
    }
    if (open && mode === 'append') {
      transaction.agree(settings)
      transaction.assertUsable(outer)
      return owning(session, settings, 1, attempt, abortion)
    }
    session.ending.setApart()
    try {
      return await owning(session, settings, retry?.attempts ?? 1, attempt, abortion)
    } finally {
      session.ending.reunite()
    }
  }

  try {
    const running = session.inTurn(lane, owner, turn)
    if (!abortion) return await running
    const abortedInLine = new Promise<never>((_, reject) => {
      abortion.promise.catch((error) => {
        if (!started) reject(error)
      })
    })
    return await Promise.race([running, abortedInLine])
  } finally {
    abortion?.stop()
  }
}

/** The block shares the transaction that surrounds it, as a savepoint or as a part of it. */
async function nested<Connection, Result>(
  session: Session<Connection>,
  mode: 'savepoint' | 'join',
  outer: Level,
  enclosed: boolean,
  settings: TransactionSettings,
  attempt: (level: Level) => Promise<Result>,
): Promise<Result> {
  const { transaction } = session
  transaction.assertUsable(outer)
  const letGo = transaction.claim(settings)
  try {
    return await (mode === 'join' ? attempt(outer) : withSavepoint(session, outer, attempt))
  } catch (error) {
    if (mode === 'join' && (transaction.opened || enclosed)) transaction.doom(outer, error)
    throw error
  } finally {
    letGo()
    if (!enclosed && !transaction.opened) outer.failure = undefined // nothing was begun that could be doomed
  }
}

/** With nothing open, the savepoint is the transaction that is committed at its end (A7). */
async function withSavepoint<Connection, Result>(
  session: Session<Connection>,
  outer: Level,
  attempt: (level: Level) => Promise<Result>,
): Promise<Result> {
  const { name, transaction } = session
  await session.ending.flush(outer)
  const level = new Level(outer)
  const refusal = () => new AmbientError('AMBIENT_BLOCK_ENDED', 'The savepoint has ended.', { database: name })
  try {
    const result = await attempt(level)
    await transaction.releaseLevel(level, refusal)
    return result
  } catch (error) {
    await transaction.rollbackLevel(level, refusal)
    throw error
  } finally {
    level.refusal ??= refusal
  }
}

/** The block owns the transaction from BEGIN to COMMIT, once for each attempt. */
async function owning<Connection, Result>(
  session: Session<Connection>,
  settings: TransactionSettings,
  attempts: number,
  attempt: (level: Level) => Promise<Result>,
  abortion: Abortion | undefined,
): Promise<Result> {
  let rolledBack = true // each attempt so far, as the server said
  for (let count = 1; ; count++) {
    const transaction = session.transaction
    const resetHooks = session.ending.rememberHooks()
    if (!transaction.opened) transaction.claim(settings) // for as long as it lasts
    let unsettled = true
    try {
      const result = await attempt(transaction.root)
      unsettled = false
      await session.ending.commit(transaction, abortion)
      return result
    } catch (error) {
      const again = count < attempts && isRetryable(session, error)
      const open = unsettled || session.transaction === transaction
      if (open) {
        rolledBack = (await session.ending.rollback(transaction, error)) && rolledBack
        stateOutcome(error, rolledBack)
      }
      if (!again) throw error
      resetHooks()
    }
    const pause = sleep(Math.random() * Math.min(1000, 10 * 2 ** count)) // full jitter
    await (abortion ? Promise.race([pause, abortion.promise.catch(() => {})]) : pause)
  }
}

function isRetryable<Connection>({ database }: Session<Connection>, error: unknown): boolean {
  for (let each = error; each instanceof Error; each = each.cause) {
    if (isAmbientError(each) && (each.outcome === 'unknown' || each.outcome === 'partial')) return false
    if (database.adapter.traits(each).retryable) return true
  }
  return false
}

function nestingError<Connection>(session: Session<Connection>, mode: CurrentTransaction): AmbientError {
  if (mode === 'raise') return transactionOpen(session, 'an atomic block')
  return new AmbientError('AMBIENT_ATOMIC_NESTING', `\`current: '${mode}'\` was asked for inside another block.`, {
    database: session.name,
  })
}

function transactionOpen<Connection>(session: Session<Connection>, what: string): AmbientError {
  const text = `A transaction is open already, and ${what} wants its own.${session.transaction.whereBegun}`
  return new AmbientError('AMBIENT_TRANSACTION_OPEN', text, { database: session.name })
}
