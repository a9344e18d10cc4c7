import type { NativeBlock, TransactionSettings } from './adapter.ts'
import { Block } from './atomic.ts'
import { type Context, currentScope, enclosingScopes, runInScope, type Scope } from './context.ts'
import { AmbientError } from './errors.ts'
import { moveHooks } from './hooks.ts'
import type { Session } from './session.ts'
import { Level, type Transaction } from './transaction.ts'

/** A transaction that a library's own code begins and ends: a block of the session, as a savepoint (A4). */
export class NativeTransaction<Connection> implements NativeBlock {
  /** Made by `begin`: a query alone needs none. */
  block: Block<Connection> | undefined
  readonly session: Session<Connection>
  /** The scope of what is entered; begin puts the block into it. */
  #scope: { parent: Scope | undefined; context: Context | undefined; block?: Block<Connection> } | undefined
  #savepoints: Map<string, Level> | undefined
  #finish: (outcome: 'commit' | 'rollback') => void = () => {}
  #turn: Promise<void> | undefined

  constructor(session: Session<Connection>) {
    this.session = session
  }

  enter<Result>(work: () => Result): Result {
    const parent = currentScope()
    this.#scope ??= { parent, context: parent?.context }
    return runInScope(this.#scope, work)
  }

  begin(settings: TransactionSettings = {}): Promise<void> {
    const { session } = this
    const refuse = (error: AmbientError) => Promise.reject(error)
    if (this.block?.live) {
      const what = 'A transaction was begun twice on one client.'
      return refuse(new AmbientError('AMBIENT_TRANSACTION_OPEN', what, { database: session.name }))
    }
    try {
      session.assertAccepts()
    } catch (error) {
      return refuse(error as AmbientError) // assertAccepts throws nothing else
    }
    const block = new Block(session, 'native transaction', session.transaction.root, currentScope())
    block.begun = false
    this.block = block
    this.#savepoints = undefined
    const enclosing = session.enclosingBlock()
    const lane = enclosing?.inner ?? session.lane
    if (this.#scope && [...enclosingScopes()].includes(this.#scope)) this.#scope.block = block
    else block.exclusive = 'transaction'
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
        await this.#settle(block, transaction, owns, await finished)
      }
      this.#turn = session.inTurn(lane, block, turn)
      this.#turn.catch(reject)
    })
  }

  async #settle(
    block: Block<Connection>,
    transaction: Transaction<Connection>,
    owns: boolean,
    outcome: 'commit' | 'rollback',
  ): Promise<void> {
    const { session } = this
    const base = owns ? transaction.root : this.#base(block)
    try {
      if (outcome === 'commit') await block.join()
      await block.end()
      mergeLevels(block.level, base)
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
    return this.#control('SAVEPOINT', async (block) => {
      const level = new Level(block.level)
      await this.session.transaction.open(level)
      this.#savepoints ??= new Map()
      this.#savepoints.set(name, level)
      block.level = level
    })
  }

  rollbackTo(name: string): Promise<void> {
    return this.#control('ROLLBACK TO SAVEPOINT', async (block) => {
      const level = this.#named(name)
      await this.session.transaction.rollbackLevel(level, true)
      block.level = level
    })
  }

  releaseSavepoint(name: string): Promise<void> {
    return this.#control('RELEASE SAVEPOINT', async (block) => {
      const level = this.#named(name)
      mergeLevels(block.level, level)
      block.level = level.parent as Level // a named savepoint has one
      this.#savepoints?.delete(name)
      await this.session.transaction.releaseLevel(level)
    })
  }

  #control(label: string, act: (block: Block<Connection>) => Promise<void>): Promise<void> {
    const { block, session } = this
    if (block) return block.inner.run({ label, place: session.place() }, () => act(block))
    const what = `${label} was sent without a transaction on its client.`
    return Promise.reject(new AmbientError('AMBIENT_TRANSACTION_CONTROL', what, { database: session.name }))
  }

  #named(name: string): Level {
    const level = this.#savepoints?.get(name)
    if (level) return level
    throw new AmbientError('AMBIENT_INVALID_ARGUMENT', `There is no savepoint '${name}'.`, {
      database: this.session.name,
    })
  }

  /** The savepoint of the block itself. */
  #base(block: Block<Connection>): Level {
    const first: Level | undefined = this.#savepoints?.values().next().value
    return first?.parent ?? block.level
  }
}

/** Named savepoints that are still open inside `outer` become part of it. */
function mergeLevels(inner: Level, outer: Level): void {
  for (let each = inner; each !== outer && each.parent; each = each.parent) {
    if (each.failure) each.parent.failure ??= each.failure
    moveHooks(each.hooks, each.parent.hooks)
  }
}
