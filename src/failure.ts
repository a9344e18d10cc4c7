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

function endedBehindBack(cause?: unknown): Failure {
  const what =
    'The transaction was ended behind the back of the session (COMMIT or ROLLBACK in SQL, or a statement that commits by itself): earlier work may be committed.'
  return { what, cause, outcome: 'unknown' }
}

function statementFailed(cause?: unknown): Failure {
  return { what: 'A statement failed.', cause, outcome: 'rolled-back' }
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
      const status = await (adapter.probeTransaction ?? adapter.transactionStatus)?.(connection)
      if (status !== 'none') return
      level.root.failure ??= { what: 'The engine rolled the transaction back.', cause: error, outcome: 'rolled-back' }
    } else if (adapter.transactionStatus?.(connection) === 'none') {
      level.root.failure ??= endedBehindBack(error)
    } else {
      level.failure ??= statementFailed(error)
    }
  }
}
