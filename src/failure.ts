import type { Lease } from './engine.ts'
import type { Level } from './level.ts'

/** Why nothing more can be done in a transaction or savepoint but roll it back. */
export interface Failure {
  readonly what: string
  readonly cause: unknown
  readonly outcome?: 'rolled-back' | 'unknown'
}

/** The connection is gone, and COMMIT was not on it. */
export function connectionLost(cause: unknown): Failure {
  return { what: 'The connection was lost before COMMIT was sent.', cause }
}

/** COMMIT was not sent, because it could not have been looked up. */
export function notIdentified(cause: unknown): Failure {
  return { what: 'The server did not give the id that `resolvable` asks for.', cause, outcome: 'rolled-back' }
}

function endedBehindBack(cause?: unknown): Failure {
  const what =
    'The transaction was ended behind the back of the session (COMMIT or ROLLBACK in SQL, or a statement that commits by itself): earlier work may be committed.'
  return { what, cause, outcome: 'unknown' }
}

function statementFailed(cause?: unknown): Failure {
  return { what: 'A statement failed.', cause, outcome: 'rolled-back' }
}

/** Marks what a ROLLBACK could not undo; returns whether there is anything. */
export function failByLeftovers<Connection>(root: Level, { adapter, connection }: Lease<Connection>): boolean {
  const leftovers = adapter.leftovers?.(connection)
  if (leftovers === undefined) return false
  root.failure = {
    what: `Not everything was rolled back: ${leftovers}.`,
    cause: root.failure?.cause,
    outcome: 'unknown',
  }
  return true
}

/** Marks what an answer says about the transaction beyond the statement (S10). */
export function failByStatus<Connection>(level: Level, { adapter, connection }: Lease<Connection>): void {
  const status = adapter.transactionStatus?.(connection)
  if (status === 'none') level.root.failure ??= endedBehindBack()
  else if (status === 'aborted') level.failure ??= statementFailed()
}

/** Marks what the `error` of a statement in `level` leaves behind. */
export async function failByError<Connection>(level: Level, lease: Lease<Connection>, error: unknown): Promise<void> {
  const { adapter, capabilities, connection } = lease
  const { reply } = adapter.traits(error)
  if (lease.lost) {
    level.root.failure ??= connectionLost(error)
  } else if (reply === 'unanswered') {
    level.root.failure ??= { what: 'A statement got no answer.', cause: error }
    if (capabilities.cancelling) await lease.interrupt(Promise.resolve()) // it may still run, and hold its locks
  } else if (reply === 'answered') {
    await adapter.afterError?.(connection)
    if (!capabilities.failedStatementAborts) {
      const status = await probe(lease, error).catch((cause: unknown) => {
        level.root.failure ??= { what: 'The engine could not be asked for the transaction.', cause }
      })
      const what = 'The engine rolled the transaction back.'
      if (status === 'none') level.root.failure ??= { what, cause: error, outcome: 'rolled-back' }
      else if (status === 'ended') level.root.failure ??= endedBehindBack(error)
    } else if (adapter.transactionStatus?.(connection) === 'none') {
      level.root.failure ??= endedBehindBack(error)
    } else {
      level.failure ??= statementFailed(error)
    }
  }
}

async function probe<Connection>({ adapter, connection }: Lease<Connection>, error: unknown) {
  return adapter.probeTransaction
    ? adapter.probeTransaction(connection, error)
    : adapter.transactionStatus?.(connection)
}
