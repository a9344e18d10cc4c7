import type { NativeBlock, Statements, TransactionSettings } from './adapter.ts'
import { controlRefused, type TransactionControl } from './sql.ts'

/** What the next lease takes as its own. */
let offered: Offer | undefined

interface Offer {
  readonly statements: unknown
  readonly block: NativeBlock
  readonly settings: TransactionSettings
}

/**
 * Runs a library's transaction method, which leases a client before it waits for anything, and begins on it, as the scope of
 * that transaction: helpers that it calls belong to it, and others wait for its end. `settings` are what it was asked for, where its
 * BEGIN may not say so.
 */
export function inLease<Connection, Result>(
  statements: Statements<Connection>,
  work: (block: NativeBlock) => Result,
  settings: TransactionSettings = {},
): Result {
  const block = statements.createBlock()
  return offerBlock(statements, block, () => work(block), settings)
}

/** Lets the lease that `work` takes, before it waits for anything, be one of `block`. */
export function offerBlock<Connection, Result>(
  statements: Statements<Connection>,
  block: NativeBlock,
  work: () => Result,
  settings: TransactionSettings = {},
): Result {
  return block.enter(() => {
    offered = { statements, block, settings }
    try {
      return work()
    } finally {
      offered = undefined
    }
  })
}

function takeOffered(statements: unknown): Offer | undefined {
  if (!offered || offered.statements !== statements) return undefined
  const taken = offered
  offered = undefined
  return taken
}

let atOnce = false

/**
 * Runs what starts a library's query. A driver whose queries start when they are awaited would start it a moment later, when it has
 * not counted as issued: what asks {@link startsAtOnce} starts it now.
 */
export function startAtOnce<Result>(work: () => Result): Result {
  atOnce = true
  try {
    return work()
  } finally {
    atOnce = false
  }
}

/** Whether a library's query is being started. */
export function startsAtOnce(): boolean {
  return atOnce
}

/** The transaction of a client that was leased from a session: its BEGIN … COMMIT is a savepoint of the session. */
export class LeasedTransaction<Connection> {
  readonly block: NativeBlock
  readonly #statements: Statements<Connection>
  readonly #settings: TransactionSettings
  #open = false
  /** Its COMMIT failed: the ROLLBACK that libraries then send has nothing left to do, and must not hide that error. */
  #failed = false

  constructor(statements: Statements<Connection>) {
    this.#statements = statements
    const taken = takeOffered(statements)
    this.block = taken?.block ?? statements.createBlock()
    this.#settings = taken?.settings ?? {}
  }

  get open(): boolean {
    return this.#open
  }

  /** Does what SQL of transaction control asks for. */
  async control(control: TransactionControl): Promise<void> {
    const { block } = this
    const failed = this.#failed
    this.#failed = false
    if (failed && control.kind === 'rollback') return
    if (control.kind === 'other' || (control.kind !== 'begin' && !this.#open))
      throw controlRefused(this.#statements.name)
    if (control.kind === 'begin') {
      const before = this.#open
      this.#open = true // from now on, for what is sent behind it without waiting
      await block.begin({ ...this.#settings, ...control.settings }).catch((error) => {
        this.#open = before
        throw error
      })
    } else if (control.kind === 'commit' || control.kind === 'rollback') {
      this.#open = false
      if (control.kind === 'rollback') return block.rollback()
      await block.commit().catch((error) => {
        this.#failed = true
        throw error
      })
    } else if (control.kind === 'savepoint') {
      await block.savepoint(control.name)
    } else if (control.kind === 'release') {
      await block.releaseSavepoint(control.name)
    } else {
      await block.rollbackTo(control.name)
    }
  }

  /** Runs `work` as its transaction, and releases it: what `work` did not end itself is committed, or rolled back if it throws. */
  run<Result>(settings: TransactionSettings, work: () => Promise<Result>): Promise<Result> {
    return this.block.enter(async () => {
      try {
        await this.control({ kind: 'begin', settings })
        const result = await work()
        if (this.#open) await this.control({ kind: 'commit' })
        return result
      } catch (error) {
        if (this.#open) await this.control({ kind: 'rollback' })
        throw error
      } finally {
        this.release()
      }
    })
  }

  /** Ends the lease; a transaction that is still open on it is rolled back. */
  release(): void {
    this.block.release()
    if (!this.#open) return
    this.#open = false
    void this.block.rollback()
  }
}
