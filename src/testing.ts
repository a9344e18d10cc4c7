import { Context, detach } from './context.ts'
import { type AmbientDatabase, accessForTesting } from './database.ts'
import { AmbientError } from './errors.ts'
import { sandboxAdapter, sandboxEnded } from './sandbox.ts'

/** A transaction around a test, which is rolled back in the end. Its methods are bound. */
export interface Sandbox<Handle> {
  /** Begins it; for `beforeEach`. */
  begin(): Promise<void>
  /** Rolls it back; for `afterEach`. Rejects if sessions of the test are still open, after it has ended them. */
  rollback(): Promise<void>
  /** The handle of the database, which needs no context while the sandbox is open. */
  readonly db: Handle
}

/**
 * A transaction around each test. While it is open, every transaction on `database` is a savepoint of it, whoever begins one: a
 * request behind a middleware, a job, `atomic`, a commit by hand. They see what was committed before, as ever, and all of it is rolled
 * back in the end. Their code is unchanged; hooks run, and deferred constraints are checked, at the simulated COMMIT.
 *
 * There is one connection, so transactions that overlap wait for each other. A context inside another one that has a transaction open
 * would wait for itself: `AMBIENT_SELF_DEADLOCK`, at once.
 *
 * @throws `AMBIENT_SANDBOX`, `AMBIENT_SANDBOX_ENDED`, `AMBIENT_SESSION_LEFT_OPEN`: by `begin` and `rollback`.
 * @example
 * ```ts
 * import { sandbox } from 'ambient-db/testing'
 * import { afterEach, beforeEach, expect, it } from 'vitest'
 *
 * const box = sandbox(main)
 * beforeEach(box.begin)
 * afterEach(box.rollback)
 *
 * it('keeps nothing', async () => {
 *   await box.db.insertInto('users').values({ name: 'ann' }).execute()
 *   expect(await box.db.selectFrom('users').selectAll().execute()).toHaveLength(1)
 * })
 * ```
 */
export function sandbox<Handle>(database: AmbientDatabase<Handle, unknown>): Sandbox<Handle> {
  const access = accessForTesting(database)
  const { name, db } = database
  let end: (() => Promise<void>) | undefined
  let beginning = false

  async function begin(): Promise<void> {
    if (end || beginning) throw new AmbientError('AMBIENT_SANDBOX', 'This sandbox is open already.', { database: name })
    beginning = true
    try {
      end = await detach(open)
    } finally {
      beginning = false
    }
  }

  async function open(): Promise<() => Promise<void>> {
    const { adapter, engines } = access
    const engine = await engines.engine()
    if (!adapter.capabilities(engine).savepoints) {
      throw new AmbientError('AMBIENT_SANDBOX', 'Its adapter has no savepoints.', { database: name })
    }
    let lost: Error | undefined
    const connection = await engines.within(
      adapter.acquire(engine, (error) => {
        lost ??= error
      }),
    )
    let restore = async () => {}
    try {
      restore = engines.divert(sandboxAdapter(name, adapter, engine, connection))
      await adapter.begin(connection, {})
    } catch (error) {
      await adapter.release(engine, connection, new Error('Its sandbox did not begin.'))
      await restore()
      throw error
    }
    // Statements of the test itself keep nothing from those of the code under test: each is done when it is answered.
    access.standIn = new Context({ transaction: 'autocommit' }, (context) => ({ parent: undefined, context }))
    return async () => {
      const leaks = await endSessions()
      await access.standIn?.settle('rollback')
      access.standIn = undefined
      const ended = lost !== undefined || adapter.transactionStatus?.(connection) === 'none'
      let failure: unknown
      await adapter.rollback(connection).catch((error: unknown) => {
        failure = error
      })
      await adapter.release(engine, connection, lost ?? (failure as Error | undefined))
      await restore()
      if (lost ?? failure) throw lost ?? failure
      if (ended) throw sandboxEnded(name)
      if (leaks) throw leaks
    }
  }

  async function rollback(): Promise<void> {
    const close = end
    end = undefined
    if (!close) throw new AmbientError('AMBIENT_SANDBOX', 'This sandbox is not open.', { database: name })
    await detach(close)
  }

  /** What is still at work would go on with the next test. */
  async function endSessions(): Promise<AmbientError | undefined> {
    const leaks = leftOpen(database)
    const busy = [...access.sessions].filter(({ owner }) => owner !== access.standIn)
    if (leaks) await Promise.all(busy.map((session) => session.abort(leaks)))
    return leaks
  }

  return { begin, rollback, db }
}

/**
 * Throws if sessions of `database` are still open, and says how many have a transaction, and where they began if it is traced
 * (`trace: true`, or `AMBIENT_DB_TRACE=1`). For `afterEach`, or the end of a suite.
 *
 * @throws `AMBIENT_SESSION_LEFT_OPEN`.
 */
export function expectNoOpenSessions(database: AmbientDatabase<unknown, unknown>): void {
  const leaks = leftOpen(database)
  if (leaks) throw leaks
}

function leftOpen(database: AmbientDatabase<unknown, unknown>): AmbientError | undefined {
  const { sessions, standIn } = accessForTesting(database)
  const open = [...sessions].filter(({ owner, touched }) => owner !== standIn && touched)
  if (open.length === 0) return undefined
  const places = open.map((session) => session.transaction.whereBegun)
  const each = open.map(({ inTransaction }, index) =>
    inTransaction ? `one with a transaction.${places[index]}` : 'one at work.',
  )
  const what = `Sessions are still open (${open.length}): ${each.join(' ')}`
  return new AmbientError('AMBIENT_SESSION_LEFT_OPEN', what, { database: database.name })
}
