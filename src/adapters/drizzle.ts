import { type Adapter, type NativeBlock, overDriver, type Statements, type TransactionSettings } from '../adapter.ts'
import { type AmbientDatabase, handleOver } from '../database.ts'
import { isAmbientError } from '../errors.ts'
import { inLease, startAtOnce } from '../leased.ts'

/** What every asynchronous Drizzle database has, whatever its driver. */
interface DrizzleDatabase {
  readonly _: object
  readonly transaction: (...args: never[]) => Promise<unknown>
}

/**
 * The adapter for Drizzle, over a driver adapter. Each query finds the session when it runs, also one that was prepared at
 * import; `db.transaction()` is a savepoint of the session, and nested or parallel ones are safe. Whatever else is built on the
 * driver shares the session and the transaction.
 *
 * Errors of the database are Drizzle's own (`DrizzleQueryError`, the driver's error as `cause`); what the session refuses is an
 * `AmbientError`, as everywhere.
 *
 * @param driver a driver adapter.
 * @param build makes the Drizzle database over the client of the driver: once, and once more for each session whose own handle
 *   (`session.db`) is asked for.
 * @example
 * ```ts
 * import { defineDatabase, newContext } from 'ambient-db'
 * import { drizzleAdapter } from 'ambient-db/drizzle'
 * import { pgAdapter } from 'ambient-db/pg'
 * import { drizzle } from 'drizzle-orm/node-postgres'
 * import { pgTable, text } from 'drizzle-orm/pg-core'
 * import { Pool } from 'pg'
 *
 * const users = pgTable('users', { name: text().notNull() })
 * const main = defineDatabase({
 *   name: 'main',
 *   adapter: drizzleAdapter(
 *     pgAdapter(() => new Pool({ connectionString: process.env.DATABASE_URL })),
 *     (client) => drizzle({ client, schema: { users } }),
 *   ),
 * })
 * await newContext(() => main.db.insert(users).values({ name: 'Ada' }))
 * ```
 */
export function drizzleAdapter<Client, Engine, Connection, Database extends DrizzleDatabase>(
  driver: Adapter<Client, Engine, Connection>,
  build: (client: Client) => Database,
): Adapter<Database, Engine, Connection> {
  return overDriver(driver, (statements, client) => inSession(statements, build(client)))
}

/**
 * One more handle over a driver database, in the same session and transaction.
 *
 * @example
 * ```ts
 * import { defineDatabase } from 'ambient-db'
 * import { drizzleHandle } from 'ambient-db/drizzle'
 * import { pgAdapter } from 'ambient-db/pg'
 * import { drizzle } from 'drizzle-orm/node-postgres'
 * import { Pool } from 'pg'
 *
 * const main = defineDatabase({ name: 'main', adapter: pgAdapter(() => new Pool()) })
 * export const db = drizzleHandle(main, (client) => drizzle({ client }))
 * ```
 */
export function drizzleHandle<Client, Database extends DrizzleDatabase>(
  main: AmbientDatabase<Client, unknown>,
  build: (client: Client) => Database,
): Database {
  return handleOver(main, (statements, client) => inSession(statements, build(client)))
}

/** A database or transaction, as far as it is ours to change: the types of its methods differ from dialect to dialect. */
interface Transactor {
  readonly session: Session
  transaction(work: (transaction: Transactor) => Promise<unknown>, config?: unknown): Promise<unknown>
}

/** What runs the queries of a database or transaction. */
interface Session {
  prepareQuery(...args: unknown[]): PreparedQuery
}

interface PreparedQuery {
  execute(...args: unknown[]): Promise<unknown>
  /** Of some dialects. */
  iterator?(...args: unknown[]): AsyncGenerator
}

/** Gives the transactions of `database` their scopes. */
function inSession<Database extends DrizzleDatabase>(statements: Statements<unknown>, database: Database): Database {
  const own = database as unknown as Transactor // see there
  const native = own.transaction.bind(own)
  const transact: Transactor['transaction'] = async (work, config) => {
    const begin = (block: NativeBlock) =>
      native((transaction) => {
        unwrapQueries(transaction.session)
        // Its own would share one connection, and the name of the savepoint, with those beside it.
        transaction.transaction = (inner, options) => block.enter(() => transact(inner, options))
        return work(transaction)
      }, config).catch(rethrow)
    return inLease(statements, begin, settingsOf(config))
  }
  own.transaction = transact
  unwrapQueries(own.session)
  return database
}

/** Over some drivers Drizzle sets the modes of a transaction behind its BEGIN, where a savepoint has none. */
function settingsOf(config: unknown): TransactionSettings {
  const { isolationLevel, accessMode, deferrable } = (config ?? {}) as TransactionSettings & { accessMode?: string }
  return {
    ...(isolationLevel && { isolationLevel }),
    ...(accessMode && { readOnly: accessMode === 'read only' }),
    ...(deferrable !== undefined && { deferrable }),
  }
}

/** Lets the refusals of the session through to those who run queries. */
function unwrapQueries(session: Session): void {
  const prepareQuery = session.prepareQuery.bind(session)
  session.prepareQuery = (...args) => {
    const query = prepareQuery(...args)
    const execute = query.execute.bind(query)
    query.execute = (...values) => startAtOnce(() => execute(...values)).catch(rethrow)
    const iterate = query.iterator?.bind(query)
    if (iterate) {
      query.iterator = async function* iterator(...values) {
        try {
          yield* iterate(...values)
        } catch (error) {
          rethrow(error)
        }
      }
    }
    return query
  }
}

/** Drizzle wraps whatever a query fails with, the refusals of the session as well, whose code callers look at. */
function rethrow(error: unknown): never {
  const isQueryError = error instanceof Error && 'query' in error
  throw isQueryError && isAmbientError(error.cause) ? error.cause : error
}
