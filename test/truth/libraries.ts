import { drizzle, type NodePgDatabase } from 'drizzle-orm/node-postgres'
import { CompiledQuery, type Kysely, PostgresDialect } from 'kysely'
import type { Pool } from 'pg'
import Cursor from 'pg-cursor'
import QueryStream from 'pg-query-stream'
import type { Adapter } from '../../src/adapter.ts'
import { drizzleAdapter } from '../../src/adapters/drizzle.ts'
import { kyselyAdapter } from '../../src/adapters/kysely.ts'
import { pgAdapter } from '../../src/adapters/pg.ts'
import { isAmbientError } from '../../src/index.ts'
import { statement } from '../support/drizzle.ts'

export type Execute = (sql: string, parameters?: unknown[]) => Promise<unknown>

/** A library under test: its adapter, and how its users do what units of work do. One entry in {@link libraries} adds one. */
export interface Library<Handle = unknown, Engine = unknown, Connection = unknown, DriverPool = Pool> {
  readonly name: string
  /** What its documentation says that it can't do; failures of that kind are counted, but are none. */
  readonly limits: {
    /** A connection that is cut may be an uncaught exception, because the pool is out of reach. */
    readonly uncaught?: true
    /** A stream whose connection is cut waits for ever: Kysely waits for the answer to the close of its cursor. */
    readonly streams?: true
    /** A statement that runs when its work is aborted goes on at the server until it ends by itself. */
    readonly cancelling?: true
  }
  /** What became of a COMMIT without an answer can be found out: each is, and the answer is judged like any other. */
  readonly resolvable?: true
  /** `pool` makes the pool of its driver; it gets the host if one is configured. */
  adapter(pool: (...host: string[]) => DriverPool): Adapter<Handle, Engine, Connection>
  execute(db: Handle, sql: string, parameters: unknown[]): Promise<unknown>
  /** The rows of table `numbers`, a few at a time. */
  stream(db: Handle): AsyncIterable<unknown>
  /** The transaction of the library's own. */
  transaction(db: Handle, work: (execute: Execute) => Promise<unknown>): Promise<unknown>
}

/** What the driver threw, in which the library may have wrapped it. */
export function driverError(error: unknown): unknown {
  const { cause } = Object(error)
  return cause === undefined || isAmbientError(error) ? error : driverError(cause)
}

export interface Tables {
  numbers: { n: number }
}

const pg: Library<Pool> = {
  name: 'pg',
  limits: {},
  resolvable: true,
  adapter: pgAdapter,
  execute: (db, sql, parameters) => db.query(sql, parameters),
  stream: (db) => db.query(new QueryStream('select n from numbers', [], { batchSize: 10 })),
  async transaction(db, work) {
    const client = await db.connect()
    try {
      await client.query('BEGIN')
      await work((sql, parameters) => client.query(sql, parameters))
      await client.query('COMMIT')
    } catch (error) {
      await client.query('ROLLBACK').catch(() => {})
      throw error
    } finally {
      client.release()
    }
  },
}

export const kyselyHandles: Pick<Library<Kysely<Tables>>, 'execute' | 'stream' | 'transaction'> = {
  execute: (db, sql, parameters) => db.executeQuery(CompiledQuery.raw(sql, parameters)),
  stream: (db) => db.selectFrom('numbers').select('n').stream(10),
  transaction: (db, work) =>
    db
      .transaction()
      .execute((trx) => work((sql, parameters = []) => trx.executeQuery(CompiledQuery.raw(sql, parameters)))),
}

const dialect = (pool: Pool) => new PostgresDialect({ pool, cursor: Cursor })

const kyselyOverPg: Library<Kysely<Tables>> = {
  name: 'kysely-pg',
  limits: {},
  resolvable: true,
  adapter: (pool) => kyselyAdapter<Tables>(pgAdapter(pool), dialect),
  ...kyselyHandles,
}

const kyselyBare: Library<Kysely<Tables>> = {
  name: 'kysely-bare',
  limits: { uncaught: true, streams: true, cancelling: true },
  adapter: (pool) => kyselyAdapter<Tables>((...host: string[]) => dialect(pool(...host))),
  ...kyselyHandles,
}

const drizzleOverPg: Library<NodePgDatabase & { $client: Pool }> = {
  name: 'drizzle-pg',
  limits: {},
  resolvable: true,
  adapter: (pool) => drizzleAdapter(pgAdapter(pool), (client) => drizzle({ client })),
  execute: (db, sql, parameters) => db.execute(statement(sql, parameters)).then((result) => result), // sent at once
  stream: (db) => db.$client.query(new QueryStream('select n from numbers', [], { batchSize: 10 })),
  transaction: (db, work) =>
    db.transaction((tx) => work((sql, parameters) => tx.execute(statement(sql, parameters)).then((result) => result))),
}

export const libraries: readonly Library[] = [pg, kyselyOverPg, kyselyBare, drizzleOverPg] as unknown as Library[] // each sees only its own handles
