import type { NativeBlock, TransactionSettings } from './adapter.ts'
import { Block } from './atomic.ts'
import { currentScope, enclosingScopes, runInScope, type Scope } from './context.ts'
import { AmbientError } from './errors.ts'
import { moveHooks } from './hooks.ts'
import { Level } from './level.ts'
import type { Session } from './session.ts'
import type { Transaction } from './transaction.ts'

/** A transaction that a library's own code begins and ends: a block of the session, as a savepoint (A4). */
export class NativeTransaction<Connection> implements NativeBlock {
  /** Made by `begin`: a query alone needs none. */
  block: Block<Connection> | undefined
  readonly session: Session<Connection>
  released = false
  /** The scope of what is entered; begin puts the block into it. */
  #scope: Scope | undefined
  /** Named savepoints that are open, from the outside in; a name hides an older one of the same name. */
  #savepoints: { readonly name: string; readonly level: Level }[] = []
  #finish: (outcome: 'commit' | 'rollback') => void = () => {}
  #turn: Promise<void> | undefined

  constructor(session: Session<Connection>) {
    this.session = session
  }

  get inTransaction(): boolean {
    return this.session.runsInTransaction(this)
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
      session.assertAccepts(this)
    } catch (error) {
      return refuse(error as AmbientError) // assertAccepts throws nothing else
    }
    const block = new Block(session, 'native transaction', session.transaction.root, currentScope())
    block.begun = false
    this.block = block
    this.#savepoints = []
    const enclosing = session.enclosingBlock()
    const lane = enclosing?.inner ?? session.lane
    if (this.#scope && [...enclosingScopes()].includes(this.#scope)) {
      block.scope = this.#scope
      block.scope.block = block
    } else {
      block.exclusive = 'transaction'
    }
    const finished = new Promise<'commit' | 'rollback'>((resolve) => {
      this.#finish = resolve
    })
    return new Promise<void>((resolve, reject) => {
      const turn = async () => {
        const { transaction } = session
        const outer = enclosing?.level ?? transaction.root
        transaction.assertUsable(outer)
        const owns = transaction.autocommit && !transaction.opened && (!enclosing || enclosing.call)
        const letGo = transaction.claim(settings)
        block.level = owns ? transaction.root : new Level(outer)
        block.begun = true
        if (owns) session.ending.setApart()
        resolve()
        try {
          await this.#settle(block, block.level, transaction, await finished)
        } finally {
          if (owns) session.ending.reunite()
          if (owns && enclosing) enclosing.level = session.transaction.root // the call goes on behind it
          letGo()
        }
      }
      this.#turn = session.inTurn(lane, block, turn)
      this.#turn.catch((error) => {
        block.live = false // also if it never had its turn, so that the client can begin again
        block.leave()
        reject(error)
      })
    })
  }

  /** `base` is the savepoint of the block itself, or the root of a transaction that it owns. */
  async #settle(
    block: Block<Connection>,
    base: Level,
    transaction: Transaction<Connection>,
    outcome: 'commit' | 'rollback',
  ): Promise<void> {
    const { session } = this
    const owns = base === transaction.root
    const refusal = () => session.blockEnded(block)
    const undo = async () => {
      base.refusal ??= refusal
      if (!owns) await transaction.rollbackLevel(base, refusal)
      else if (session.transaction === transaction) await session.ending.rollback(transaction)
    }
    try {
      if (outcome === 'commit') await block.join()
      await block.end()
      mergeLevels(block.level, base)
      if (outcome === 'rollback') await undo()
      else if (owns) await session.ending.commit(transaction)
      else await transaction.releaseLevel(base, refusal)
    } catch (error) {
      await block.end()
      await undo()
      throw error
    }
    base.refusal ??= refusal
  }

  leaveOpen(): void {
    if (this.block?.live) this.block.exclusive = 'transaction'
  }

  async commit(): Promise<void> {
    this.#end('commit')
    await this.#turn
  }

  release(): void {
    this.released = true
  }

  async rollback(): Promise<void> {
    this.#end('rollback')
    await this.#turn?.catch(() => {}) // its failure was thrown where it happened
  }

  /** From here on others need not be told from it: they wait for its end. */
  #end(outcome: 'commit' | 'rollback'): void {
    if (this.block) this.block.exclusive = undefined
    this.#finish(outcome)
  }

  savepoint(name: string): Promise<void> {
    return this.#control('SAVEPOINT', async (block) => {
      const level = new Level(block.level)
      await this.session.transaction.open(level)
      this.#savepoints.push({ name, level })
      block.level = level
    })
  }

  rollbackTo(name: string): Promise<void> {
    return this.#control('ROLLBACK TO SAVEPOINT', async (block) => {
      const index = this.#indexOf(name)
      const { level } = this.#savepoints[index] as { level: Level } // indexOf has found it
      this.#savepoints.length = index + 1
      await this.session.transaction.rollbackLevel(level)
      block.level = level
    })
  }

  releaseSavepoint(name: string): Promise<void> {
    return this.#control('RELEASE SAVEPOINT', async (block) => {
      const index = this.#indexOf(name)
      const { level } = this.#savepoints[index] as { level: Level } // indexOf has found it
      this.#savepoints.length = index
      mergeLevels(block.level, level)
      block.level = level.parent as Level // a named savepoint has one
      await this.session.transaction.releaseLevel(level, () => this.session.blockEnded(block))
    })
  }

  #control(label: string, act: (block: Block<Connection>) => Promise<void>): Promise<void> {
    const { block, session } = this
    if (block) return block.inner.run({ label, place: session.place() }, () => act(block))
    const what = `${label} was sent without a transaction on its client.`
    return Promise.reject(new AmbientError('AMBIENT_TRANSACTION_CONTROL', what, { database: session.name }))
  }

  #indexOf(name: string): number {
    const index = this.#savepoints.findLastIndex((each) => each.name === name)
    if (index >= 0) return index
    throw new AmbientError('AMBIENT_INVALID_ARGUMENT', `There is no savepoint '${name}'.`, {
      database: this.session.name,
    })
  }
}

/** Named savepoints that are still open inside `outer` become part of it. */
function mergeLevels(inner: Level, outer: Level): void {
  for (let each = inner; each !== outer && each.parent; each = each.parent) {
    if (each.failure) each.parent.failure ??= each.failure
    moveHooks(each.hooks, each.parent.hooks)
  }
}
