import type { Adapter } from './adapter.ts'
import { AmbientError } from './errors.ts'

/**
 * The connection of a sandbox as an adapter of its own: all sessions take turns on it, and what they take for a transaction is a
 * savepoint in the one that is rolled back in the end.
 */
export function sandboxAdapter<Connection>(
  database: string,
  real: Adapter<unknown, unknown, Connection>,
  engine: unknown,
  connection: Connection,
): Adapter<unknown, unknown, Connection> {
  let savepoints = 0
  /** The savepoint of the session whose turn it is. */
  let open: string | undefined
  /** It has begun a transaction, as it takes it. */
  let begun = false

  const assertAlive = () => {
    if (real.transactionStatus?.(connection) === 'none') throw sandboxEnded(database)
  }
  const enter = async () => {
    assertAlive()
    const name = `ambient_sandbox_${++savepoints}`
    await real.savepoint(connection, name)
    open = name
  }
  const keep = async () => {
    if (open) await real.releaseSavepoint(connection, open)
    open = undefined
  }
  const undo = async () => {
    const name = open
    open = undefined
    assertAlive()
    if (!name) return
    await real.rollbackTo(connection, name)
    await real.releaseSavepoint(connection, name)
  }
  // What a sandbox cannot do is left out.
  const { mayPipelineBegin, identifyTransaction, lookUpTransaction, ...rest } = real
  return {
    ...rest,
    capabilities: () => ({
      ...real.capabilities(engine),
      pipelining: false,
      commitLookup: false,
      singleConnection: true,
    }),
    createEngine: () => engine,
    closeEngine: async () => {},
    async acquire() {
      await enter() // also for statements without a transaction: one that fails must not spoil the rest
      return connection
    },
    async release(_engine, _connection, broken) {
      if (!open) return
      if (broken || real.transactionStatus?.(connection) === 'aborted') await undo()
      else await keep().catch(undo) // a statement has failed, where the driver cannot tell
    },
    async begin() {
      if (!open) await enter()
      begun = true
    },
    async commit() {
      begun = false
      try {
        assertAlive()
        await real.checkDeferred?.(connection)
      } catch (error) {
        await undo()
        throw error
      }
      await keep()
      return 'committed'
    },
    async rollback() {
      begun = false
      await undo()
    },
    transactionStatus(of) {
      const status = real.transactionStatus?.(of)
      return status !== undefined && !begun ? 'none' : status
    },
  }
}

export function sandboxEnded(database: string): AmbientError {
  const what = 'The transaction of the sandbox was ended, so the work of this test may be there for good.'
  return new AmbientError('AMBIENT_SANDBOX_ENDED', what, { database })
}
