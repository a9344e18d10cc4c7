import type { Sequelize, TransactionOptions } from 'sequelize'
import type { NativeBlock, Statements, TransactionSettings } from '../../adapter.ts'
import { AmbientError } from '../../errors.ts'
import { inside, type NativeTransaction, type QueryOptions, type SequelizeClass, unsupported } from './inside.ts'
import { reveal, Turn } from './turn.ts'

/** What a transaction of Sequelize is in its session. */
export interface Part {
  readonly statements: Statements<object>
  /** None where it only takes part in what is open. */
  readonly block: NativeBlock | undefined
  /** It has no callback, by which what belongs to it could be told. */
  readonly unscoped: boolean
}

/** How a transaction is begun and ended. */
interface Control {
  begin(name: string, settings: TransactionSettings): Promise<void>
  commit(name: string): Promise<void>
  rollback(name: string): Promise<void>
}

/** The turn that the query which is being called has taken. */
let taken: Turn | undefined

/**
 * A Sequelize like the first `engine`, but what it takes for connections are turns in the session. `parts` are the transactions of
 * all the handles of the database.
 */
export function ambientSequelize<Engine extends Sequelize>(
  engine: () => Engine,
  statements: Statements<object>,
  parts: WeakMap<object, Part>,
  models: 'its own' | 'none',
): Engine {
  const first = engine()
  const own = inside(first)
  const Class = own.constructor as SequelizeClass
  const handle: Engine = Object.create(first)

  function take(part?: Part, uuid?: string): Turn {
    const turn = taken ?? new Turn(part?.statements ?? statements, part?.block, uuid)
    taken = undefined
    return turn
  }

  function partOf(transaction: object | null | undefined): Part | undefined {
    if (!transaction) return undefined
    const part = parts.get(transaction)
    if (!part) throw unsupported('A transaction from elsewhere cannot be used through the ambient Sequelize.')
    if ((transaction as NativeTransaction).finished) throw transactionEnded(statements)
    return part
  }

  class AmbientTransaction extends Class.Transaction {
    readonly #part: Part
    readonly #control: Control
    #ending = false
    #failed = false

    constructor(options: object, part: Part, control: Control) {
      super(handle, options)
      this.#part = part
      this.#control = control
      parts.set(this, part)
    }

    get connection(): Turn {
      return take(this.#part, this.id)
    }

    async prepareEnvironment(scoped: boolean): Promise<void> {
      await this.#control.begin(this.name, settingsOf(this.options))
      try {
        await this.setDeferrable()
      } catch (error) {
        await this.rollback()
        throw error
      }
      if (scoped) Class._cls?.set('transaction', this)
    }

    async commit(): Promise<void> {
      this.#end()
      if (this.#part.unscoped) this.finished = 'commit' // else what it joins may still name it
      try {
        await this.#control.commit(this.name)
      } catch (error) {
        this.#failed = true
        throw error
      } finally {
        this.finished = 'commit'
      }
    }

    async rollback(): Promise<void> {
      if (this.#failed) return // its COMMIT has, and told why
      this.#end()
      this.finished = 'rollback'
      await this.#control.rollback(this.name)
    }

    afterCommit(work: (transaction: this) => unknown): void {
      partOf(this)
      this.#part.statements.afterCommit(() => work.call(this, this), this.#part.block)
    }

    #end(): void {
      if (this.#ending) throw transactionEnded(statements)
      this.#ending = true
    }
  }

  async function transact(
    options: QueryOptions,
    work?: (transaction: AmbientTransaction) => unknown,
  ): Promise<unknown> {
    const around = partOf(options.transaction)
    const part = { statements: around?.statements ?? statements, unscoped: !work }
    const run = async (block: NativeBlock | undefined, control: Control, unscoped = part.unscoped) => {
      const transaction = new AmbientTransaction(options, { ...part, block, unscoped }, control)
      await transaction.prepareEnvironment(work !== undefined)
      if (!work) return transaction
      let result: unknown
      try {
        result = await work(transaction)
      } catch (error) {
        await transaction.rollback().catch(() => {}) // it has ended by hand
        throw error
      }
      await transaction.commit()
      return result
    }
    const scoped = (begin: () => Promise<unknown>) => (work ? Class._clsRun(begin) : begin())
    // Model.findOrCreate begins one that it ends on its way out, or never: it takes part in what is open.
    if ('where' in options) return run(around?.block, joining, around?.unscoped === true)
    // What has no callback cannot be entered, so what is nested in it is a savepoint by name.
    const outer = around?.unscoped ? around.block : undefined
    if (outer) return scoped(() => run(outer, savepoints(outer), true))
    const begin = () => {
      const block = part.statements.createBlock()
      const start = () => scoped(() => run(block, whole(block)))
      return work ? block.enter(start) : start()
    }
    return around?.block ? around.block.enter(begin) : begin()
  }

  const connectionManager = Object.assign(Object.create(own.connectionManager), {
    sequelize: handle,
    getConnection: async () => take(),
    releaseConnection() {},
    _refreshDynamicOIDs: () => inside(engine()).connectionManager._refreshDynamicOIDs?.(handle), // its parsers are in use
  })
  const queryInterface = Object.assign(Object.create(own.queryInterface), { sequelize: handle })
  Object.assign(handle, {
    options: { ...own.options, hooks: copyHooks(own.options.hooks) }, // the engine queries as well, outside of any context
    connectionManager,
    queryInterface,
    dialect: Object.assign(Object.create(own.dialect), { sequelize: handle, connectionManager, queryInterface }),
    async query(sql: unknown, options?: QueryOptions) {
      const { transaction = Class._cls?.get('transaction') } = options ?? {}
      const part = partOf(transaction)
      const uuid = (transaction as NativeTransaction | undefined)?.id
      const turn = new Turn(part?.statements ?? statements, part?.block, uuid)
      if (!inside(handle).hasHook('beforeQuery')) turn.reserve() // else the turn would wait for hooks, and they for it if they query
      taken = turn // Sequelize asks for it before it waits for anything
      try {
        const answer = own.query.call(handle, sql, { ...options, transaction })
        if (taken) turn.leave() // a `query` of the user's own that waits first takes another, which must not wait for this one
        taken = undefined
        return await answer.catch(reveal)
      } finally {
        turn.leave()
      }
    },
    transaction: (...[options, work]: [unknown, never]) =>
      typeof options === 'function' ? transact({}, options as never) : transact({ ...(options as object) }, work),
    addHook(type: string, ...hook: unknown[]) {
      if (!/Connect$|Disconnect$|PoolAcquire$/.test(type)) return own.addHook.call(handle, type, ...hook)
      throw unsupported(`Hooks of connections, such as '${type}', are those of the Sequelize that the factory makes.`)
    },
    async close() {
      throw unsupported('The ambient Sequelize cannot be closed; `shutdown()` closes the real one.')
    },
  })
  if (models === 'none') {
    const get = () => {
      const what = 'Models find the session of the context; in another one, give them a transaction of its `db`.'
      throw unsupported(what)
    }
    return Object.defineProperties(handle, { models: { get }, modelManager: { get } })
  }
  const Manager = own.modelManager.constructor as new (sequelize: object) => object
  return Object.assign(handle, { models: {}, modelManager: new Manager(handle) })
}

/** A transaction that is a block of the session. */
function whole(block: NativeBlock): Control {
  return {
    begin: (_, settings) => block.begin(settings),
    commit: () => block.commit().finally(() => block.release()),
    rollback: () => block.rollback().finally(() => block.release()),
  }
}

/** One that is a savepoint in the block of another. */
function savepoints(block: NativeBlock): Control {
  return {
    begin: (name) => block.savepoint(name),
    commit: (name) => block.releaseSavepoint(name),
    async rollback(name) {
      await block.rollbackTo(name)
      await block.releaseSavepoint(name)
    },
  }
}

/** One that has no beginning and no end of its own. */
const joining: Control = { async begin() {}, async commit() {}, async rollback() {} }

function copyHooks(hooks: object): object {
  return Object.fromEntries(Object.entries(hooks).map(([type, each]) => [type, [...each]]))
}

const levels = ['read uncommitted', 'read committed', 'repeatable read', 'serializable'] as const

function settingsOf({ isolationLevel: level, readOnly }: TransactionOptions): TransactionSettings {
  const isolationLevel = levels.find((each) => each === level?.toLowerCase())
  return { ...(isolationLevel && { isolationLevel }), ...(readOnly && { readOnly }) }
}

function transactionEnded({ name }: Statements<object>): AmbientError {
  const what = 'A transaction of Sequelize was used after it had ended.'
  return new AmbientError('AMBIENT_BLOCK_ENDED', what, { database: name })
}
