import type { NativeBlock, TransactionSettings } from './adapter.ts'
import { Block } from './atomic.ts'
import { currentScope, enclosingScopes, runInScope } from './context.ts'
import { AmbientError } from './errors.ts'
import { moveHooks } from './hooks.ts'
import type { Session } from './session.ts'
import { Level, type Transaction } from './transaction.ts'

/** A transaction that a library's own code begins and ends: a block of the session, as a savepoint (A4). */
export class NativeTransaction<Connection> implements NativeBlock {
  block: Block<Connection>
  readonly session: Session<Connection>
  readonly #savepoints = new Map<string, Level>()
  #finish: (outcome: 'commit' | 'rollback') => void = () => {}
  #turn: Promise<void> | undefined

  constructor(session: Session<Connection>) {
    this.session = session
    this.block = this.#newBlock()
  }

  #newBlock(): Block<Connection> {
    const block = new Block(this.session, 'native transaction', this.session.transaction.root, currentScope())
    block.begun = false
    return block
  }

  enter<Result>(work: () => Result): Result {
    return runInScope(this.block.scope, work)
  }

  begin(settings: TransactionSettings = {}): Promise<void> {
    const { session } = this
    const refuse = (error: AmbientError) => Promise.reject(error)
    if (this.#turn && this.block.live) {
      const what = 'A transaction was begun twice on one client.'
      return refuse(new AmbientError('AMBIENT_TRANSACTION_OPEN', what, { database: session.name }))
    }
    try {
      session.assertAccepts()
    } catch (error) {
      return refuse(error as AmbientError) // assertAccepts throws nothing else
    }
    if (this.#turn) {
      this.block = this.#newBlock()
      this.#savepoints.clear()
    }
    const { block } = this
    const enclosing = session.enclosingBlock()
    const lane = enclosing?.inner ?? session.lane
    if (![...enclosingScopes()].includes(block.scope)) block.exclusive = 'transaction'
    const finished = new Promise<'commit' | 'rollback'>((resolve) => {
      this.#finish = resolve
    })
    return new Promise<void>((resolve, reject) => {
      const turn = async () => {
        const { transaction } = session
        const outer = enclosing?.level ?? transaction.root
        transaction.agree(settings)
        transaction.assertUsable(outer)
        const owns = transaction.autocommit && !transaction.opened && !enclosing
        if (owns) transaction.autocommit = false
        block.level = owns ? transaction.root : new Level(outer)
        block.begun = true
        resolve()
        await this.#settle(transaction, owns, await finished)
      }
      this.#turn = session.inTurn(lane, block, turn)
      this.#turn.catch(reject)
    })
  }

  async #settle(transaction: Transaction<Connection>, owns: boolean, outcome: 'commit' | 'rollback'): Promise<void> {
    const { session, block } = this
    const base = owns ? transaction.root : this.#base()
    try {
      if (outcome === 'commit') await block.join()
      await block.end()
      this.#merge(base)
      if (outcome === 'rollback') await this.#undo(transaction, owns, base)
      else if (owns) await session.commitNow()
      else await transaction.releaseLevel(base)
    } catch (error) {
      await block.end()
      await this.#undo(transaction, owns, base)
      throw error
    }
  }

  async #undo(transaction: Transaction<Connection>, owns: boolean, base: Level): Promise<void> {
    if (!owns) await transaction.rollbackLevel(base)
    else if (this.session.transaction === transaction) await this.session.rollbackNow()
  }

  async commit(): Promise<void> {
    this.#finish('commit')
    await this.#turn
  }

  async rollback(): Promise<void> {
    this.#finish('rollback')
    await this.#turn?.catch(() => {}) // its failure was thrown where it happened
  }

  savepoint(name: string): Promise<void> {
    return this.#control('SAVEPOINT', async () => {
      const level = new Level(this.block.level)
      await this.session.transaction.open(level)
      this.#savepoints.set(name, level)
      this.block.level = level
    })
  }

  rollbackTo(name: string): Promise<void> {
    return this.#control('ROLLBACK TO SAVEPOINT', async () => {
      const level = this.#named(name)
      await this.session.transaction.rollbackLevel(level, true)
      this.block.level = level
    })
  }

  releaseSavepoint(name: string): Promise<void> {
    return this.#control('RELEASE SAVEPOINT', async () => {
      const level = this.#named(name)
      this.#merge(level)
      this.block.level = level.parent as Level // a named savepoint has one
      await this.session.transaction.releaseLevel(level)
      this.#savepoints.delete(name)
    })
  }

  #control(label: string, act: () => Promise<void>): Promise<void> {
    return this.block.inner.run({ label, place: this.session.place() }, act)
  }

  #named(name: string): Level {
    const level = this.#savepoints.get(name)
    if (level) return level
    throw new AmbientError('AMBIENT_INVALID_ARGUMENT', `There is no savepoint '${name}'.`, { database: this.session.name })
  }

  /** Named savepoints that are still open inside `level` become part of it. */
  #merge(level: Level): void {
    for (let each = this.block.level; each !== level && each.parent; each = each.parent) {
      if (each.failure) each.parent.failure ??= each.failure
      moveHooks(each.hooks, each.parent.hooks)
    }
  }

  /** The savepoint of the block itself. */
  #base(): Level {
    const first = this.#savepoints.values().next().value
    return first?.parent ?? this.block.level
  }
}
