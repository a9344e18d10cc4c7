import { randomUUID } from 'node:crypto'
import { Context, detach, runInTest, testHeader, testsByHeader, testWith } from './context.ts'
import { type AmbientDatabase, accessForTesting } from './database.ts'
import { AmbientError, attachCleanupError } from './errors.ts'
import { sandboxAdapter, sandboxEnded } from './sandbox.ts'

/** A transaction around a test, which is rolled back in the end. Its methods are bound. */
export interface Sandbox<Handle> {
  /** Begins it; for `beforeEach`. */
  begin(): Promise<void>
  /** Rolls it back; for `afterEach`. Rejects if sessions of the test are still open, after it has ended them. */
  rollback(): Promise<void>
  /**
   * Runs `work` in a sandbox of its own, rolled back in the end, which its code finds by async context: several may be open at the
   * same time, as in `it.concurrent`, each on a connection of its own.
   *
   * @returns what `work` returns.
   */
  run<Result>(work: (test: SandboxedTest) => Result | Promise<Result>): Promise<Result>
  /** The handle of the database, which needs no context while the sandbox is open. */
  readonly db: Handle
}

/** What a test in {@link Sandbox.run} has of its own. */
export interface SandboxedTest {
  /** For requests over a socket, where async context does not travel: the middleware finds the sandbox by them. */
  readonly headers: Readonly<Record<string, string>>
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
      const { place, close } = await detach(() => open('all'))
      access.standIn = place.standIn
      end = async () => {
        access.standIn = undefined
        await close(undefined)
      }
    } finally {
      beginning = false
    }
  }

  async function rollback(): Promise<void> {
    const close = end
    end = undefined
    if (!close) throw new AmbientError('AMBIENT_SANDBOX', 'This sandbox is not open.', { database: name })
    await detach(close)
  }

  async function run<Result>(work: (test: SandboxedTest) => Result | Promise<Result>): Promise<Result> {
    const { place, close } = await detach(() => open('of one test'))
    const test = testWith(access.engines, place)
    const id = randomUUID()
    testsByHeader.set(id, test)
    const headers = { [testHeader]: id }
    let result: Result
    try {
      result = await runInTest(test, async () => work({ headers }))
    } catch (error) {
      // What the work failed with comes first.
      await detach(() => close(place.slot)).catch((second: unknown) => attachCleanupError(error, second))
      throw error
    } finally {
      testsByHeader.delete(id)
    }
    await detach(() => close(place.slot))
    return result
  }

  async function open(whose: 'all' | 'of one test') {
    const { adapter, engines } = access
    const engine = await engines.engine()
    const { savepoints, singleConnection } = adapter.capabilities(engine)
    if (!savepoints) throw new AmbientError('AMBIENT_SANDBOX', 'Its adapter has no savepoints.', { database: name })
    if (singleConnection && whose === 'of one test') {
      const what = 'Its engine has one connection, so its sandboxes cannot be open at the same time.'
      throw new AmbientError('AMBIENT_SANDBOX', what, { database: name })
    }
    let lost: Error | undefined
    const connection = await engines.within(
      adapter.acquire(engine, (error) => {
        lost ??= error
      }),
      () => new AmbientError('AMBIENT_ACQUIRE_TIMEOUT', 'No connection for its sandbox.', { database: name }),
    )
    let diversion: ReturnType<typeof engines.divert>
    try {
      await adapter.begin(connection, {})
      diversion = engines.divert(sandboxAdapter(name, adapter, engine, connection), whose)
    } catch (error) {
      await adapter.release(engine, connection, new Error('Its sandbox did not begin.'))
      throw error
    }
    // Statements of the test itself keep nothing from those of the code under test: each is done when it is answered.
    const standIn = new Context({ transaction: 'autocommit' }, (context) => ({ parent: undefined, context }))
    const close = async (slot: object | undefined) => {
      await standIn.settle('rollback')
      const leaks = leftOpen(database, slot)
      // What is still at work would go on with the next test.
      if (leaks) await Promise.all(sessionsOf(database, slot).map((session) => session.abort(leaks)))
      const ended = adapter.transactionStatus?.(connection) === 'none'
      let failure: unknown
      await adapter.rollback(connection).catch((error: unknown) => {
        failure = error
      })
      await adapter.release(engine, connection, lost ?? (failure as Error | undefined))
      await diversion.restore()
      if (lost ?? failure) throw lost ?? failure
      if (ended) throw sandboxEnded(name)
      if (leaks) throw leaks
    }
    return { place: { slot: diversion.slot, standIn }, close }
  }

  return { begin, rollback, run, db }
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

function leftOpen(database: AmbientDatabase<unknown, unknown>, slot?: object): AmbientError | undefined {
  const open = sessionsOf(database, slot).filter(({ touched }) => touched)
  if (open.length === 0) return undefined
  const each = open.map(({ inTransaction, transaction }) =>
    inTransaction ? `one with a transaction.${transaction.whereBegun}` : 'one at work.',
  )
  const what = `Sessions are still open (${open.length}): ${each.join(' ')}`
  return new AmbientError('AMBIENT_SESSION_LEFT_OPEN', what, { database: database.name })
}

/** Of code under test; those of one test, if there are several. */
function sessionsOf(database: AmbientDatabase<unknown, unknown>, slot: object | undefined) {
  const { sessions, standIn } = accessForTesting(database)
  return [...sessions].filter(({ owner, sandbox }) => owner !== standIn && sandbox === slot)
}
