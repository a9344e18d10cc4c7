import type { Adapter, Statements } from 'ambient-db'

/** The engine: a set of numbers in memory, with transactions and one connection. */
export class MemoryStore {
  /** What is committed, then what each open transaction or savepoint has made of it. */
  readonly #states: { name: string; numbers: Set<number> }[] = [{ name: '', numbers: new Set() }]
  closed = false

  get #current(): Set<number> {
    return this.#states[this.#states.length - 1]?.numbers as Set<number> // the first one stays
  }

  get committed(): number[] {
    return [...(this.#states[0]?.numbers ?? [])].sort((a, b) => a - b)
  }

  get inTransaction(): boolean {
    return this.#states.length > 1
  }

  async add(number: number): Promise<void> {
    if (!Number.isInteger(number)) throw new StoreError(`${number} is no whole number.`)
    if (this.#current.has(number)) throw new StoreError(`${number} is there already.`)
    this.#current.add(number)
  }

  async list(): Promise<number[]> {
    return [...this.#current].sort((a, b) => a - b)
  }

  async begin(name = 'transaction'): Promise<void> {
    this.#states.push({ name, numbers: new Set(this.#current) })
  }

  /** Keeps the work of the innermost one that is called so, and of all inside of it. */
  async keep(name = 'transaction'): Promise<void> {
    const numbers = new Set(this.#current)
    await this.undo(name)
    this.#current.clear()
    for (const number of numbers) this.#current.add(number)
  }

  async undo(name = 'transaction'): Promise<void> {
    const index = this.#states.findLastIndex((state) => state.name === name)
    if (index > 0) this.#states.splice(index)
  }
}

/** What the engine answers a statement with that it cannot do. */
class StoreError extends Error {}

/** The handle of users: each call runs in the session. */
export interface MemoryHandle {
  add(number: number): Promise<void>
  list(): Promise<number[]>
}

export function memoryAdapter(factory: () => MemoryStore): Adapter<MemoryHandle, MemoryStore, MemoryStore> {
  return {
    capabilities: () => ({
      savepoints: true,
      streaming: false,
      cancelling: false,
      failedStatementAborts: false, // a statement that failed leaves the transaction as it was
      transactionStatus: false,
      pipelining: false,
      lossDetection: false,
      commitLookup: false,
      singleConnection: true, // so sessions wait for each other
    }),
    createEngine: () => factory(),
    closeEngine: async (store) => {
      store.closed = true
    },
    acquire: async (store) => store, // its one connection is the engine itself
    release() {},
    begin: (store) => store.begin(),
    async commit(store) {
      await store.keep()
      return 'committed' // only because the engine has said so
    },
    rollback: (store) => store.undo(),
    savepoint: (store, name) => store.begin(name),
    async rollbackTo(store, name) {
      await store.undo(name)
      await store.begin(name) // which stays, as in SQL
    },
    releaseSavepoint: (store, name) => store.keep(name),
    traits: (error) => ({ reply: error instanceof StoreError ? 'answered' : 'unanswered', retryable: false }),
    createHandle: (statements: Statements<MemoryStore>) => ({
      add: (number) => statements.run((store) => store.add(number)),
      list: () => statements.run((store) => store.list()),
    }),
  }
}
