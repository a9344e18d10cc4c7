import { bounded } from './clock.ts'
import { AmbientError, attachCleanupError, isAmbientError, stateOutcome } from './errors.ts'
import type { Bound } from './lane.ts'

/** A session as its context sees it when the context ends. */
export interface Participant {
  readonly name: string
  /** The context that ends it. */
  readonly owner: object
  /** Databases commit in the order in which they were defined. */
  readonly order: number
  /** Statements or blocks are under way. */
  readonly busy: boolean
  readonly inTransaction: boolean
  readonly closed: boolean
  /** Something happened in it that the end must look at. */
  readonly touched: boolean
  /** Bound of joining and of COMMIT, in ms. */
  readonly settleTimeout: number
  /** Ends an open stream (`'destroy'`) or throws because of it (`'refuse'`). */
  endStream(way: 'destroy' | 'refuse'): void
  /** Resolves when nothing is under way, waiting within `bound`; rejects with the first failure among what was awaited. */
  quiet(bound: Bound): Promise<void>
  /** Rejects what is queued; refuses what comes from now on. */
  fence(): void
  /** Verifies that the transaction can commit, and does what is due before COMMIT, if anything is: then it is called again. */
  prepare(): Promise<true> | undefined
  /** `aborted` says whether a COMMIT that could not be done at once is not to be tried again. */
  commitAtEnd(aborted: () => boolean): Promise<void>
  /** Awaits (or cancels) what is on the wire; resolves with whether the server said that it rolled back. */
  rollbackAtEnd(error: unknown, cancel: boolean): Promise<boolean>
  closeAtEnd(): Promise<void> | undefined
  /** Where the caller is, while tracing. */
  place(): string | undefined
}

/** What a context hands to the settlement. */
export interface Unit {
  readonly streams: 'destroy' | 'refuse'
  readonly unawaited: 'join' | 'error'
  readonly settleTimeout: number | undefined
  /** Something of it is committed, or may be, so its end cannot say that everything was rolled back. */
  readonly committed: boolean
  /** Set once the unit was aborted: the error to end with. */
  readonly abortion: AmbientError | undefined
  /** Rejects when the unit is aborted. */
  readonly aborted: Promise<never>
  participants(): Participant[]
  /** Lets in nothing but what the hooks do. */
  fence(): void
  /** Lets in nothing at all. */
  seal(): void
}

/**
 * Joins, fences, runs the hooks and commits every session (C4, C5, C6). On any failure before a COMMIT all are rolled back. An
 * abort is one until the first COMMIT is sent; after that the others follow it, for half of the work is what nobody asked for.
 */
export async function commitAll(unit: Unit): Promise<void> {
  try {
    await join(unit)
    unit.fence()
    const preparing = prepareAll(unit)
    if (preparing) await preparing
  } catch (error) {
    await rollbackAll(unit, error)
    throw error
  }
  const committed: string[] = []
  const aborted = () => unit.abortion !== undefined && committed.length === 0
  for (const session of unit.participants()) {
    if (aborted()) {
      await rollbackAll(unit, unit.abortion)
      throw unit.abortion
    }
    const wrote = session.inTransaction
    try {
      await session.commitAtEnd(aborted)
    } catch (error) {
      throw await notAllCommitted(unit, committed, session, error)
    }
    if (wrote) committed.push(session.name)
  }
}

/** Rolls back what comes after `failed`; resolves with the error that says what became of each. */
async function notAllCommitted(unit: Unit, committed: string[], failed: Participant, error: unknown): Promise<unknown> {
  const sessions = unit.participants()
  const rest = sessions.slice(sessions.indexOf(failed) + 1).filter(({ inTransaction }) => inTransaction)
  await rollbackEach(rest, error, false)
  if (committed.length === 0) return error
  const unknown = isAmbientError(error, 'AMBIENT_COMMIT_UNKNOWN') ? [failed.name] : []
  const rolledBack = [failed, ...rest].map(({ name }) => name).filter((name) => !unknown.includes(name))
  const list = (names: string[]) => names.map((name) => `'${name}'`).join(', ')
  return new AmbientError(
    'AMBIENT_PARTIAL_COMMIT',
    `Committed: ${list(committed)}. Not committed: ${list([...rolledBack, ...unknown])}.`,
    { cause: error, outcome: 'partial', databases: { committed, rolledBack, unknown } },
  )
}

/** Closes every session; failures are attached to `error`. */
export function closeAll(unit: Unit, error: unknown): Promise<unknown> | undefined {
  const closing: Promise<void>[] = []
  for (const session of unit.participants()) {
    const ending = session.closeAtEnd()
    if (ending) closing.push(ending.catch((second) => attachCleanupError(error, second)))
  }
  return closing.length > 0 ? Promise.all(closing) : undefined
}

/** Fences at once, awaits (or cancels) what is on the wire and rolls every session back; failures are attached to `error`. */
export async function rollbackAll(unit: Unit, error: unknown): Promise<void> {
  unit.seal()
  const waitedEnough = unit.abortion !== undefined || isAmbientError(error, 'AMBIENT_SETTLE_TIMEOUT')
  const said = await rollbackEach(unit.participants(), error, waitedEnough)
  stateOutcome(error, said && !unit.committed)
}

/** Resolves with whether every server said that it rolled back. */
async function rollbackEach(sessions: Participant[], error: unknown, cancel: boolean): Promise<boolean> {
  const said = await Promise.all(
    sessions.map(async (session) => {
      try {
        session.endStream('destroy')
      } catch (second) {
        attachCleanupError(error, second) // what is open is rolled back all the same
      }
      try {
        return await session.rollbackAtEnd(error, cancel)
      } catch (second) {
        attachCleanupError(error, second)
        return false
      }
    }),
  )
  return said.every(Boolean)
}

/** Waits until no session has anything under way, whatever its branches go on to issue. */
async function join(unit: Unit): Promise<void> {
  const unawaited = unit.unawaited === 'error' && isBusy(unit)
  do {
    await quietAll(unit)
  } while (isBusy(unit))
  if (unawaited) {
    throw new AmbientError('AMBIENT_UNAWAITED_WORK', 'Statements were still under way when the work returned.')
  }
}

function isBusy(unit: Unit): boolean {
  return unit.participants().some((session) => session.busy)
}

/** Resolves when nothing is under way in any session, though one may have issued more while another was waited for. */
function quietAll(unit: Unit): Promise<unknown> {
  const sessions = unit.participants()
  for (const session of sessions) session.endStream(unit.streams)
  const bound: Bound = (waiting) => {
    const timeout = unit.settleTimeout ?? Math.max(...sessions.map((session) => session.settleTimeout))
    return bounded(Promise.race([waiting, unit.aborted]), timeout, () => {
      const names = sessions.filter((session) => session.busy).map((session) => `'${session.name}'`)
      return new AmbientError(
        'AMBIENT_SETTLE_TIMEOUT',
        `Work on ${names.join(', ')} was still under way ${timeout} ms after its context had ended.`,
      )
    })
  }
  const quiet = sessions.map((session) => session.quiet(bound))
  return quiet.length === 1 ? (quiet[0] as Promise<void>) : Promise.all(quiet)
}

/** Runs all hooks of all sessions, if there are any; a hook may register more, and use databases that had no session yet. */
function prepareAll(unit: Unit): Promise<void> | undefined {
  for (const session of unit.participants()) {
    const running = session.prepare()
    if (running) return awaitHooks(unit, running)
  }
  return undefined
}

async function awaitHooks(unit: Unit, running: Promise<unknown>): Promise<void> {
  await Promise.race([running, unit.aborted])
  await join(unit)
  await prepareAll(unit)
}
