import { DatabaseSync } from 'node:sqlite'
import { pathToFileURL } from 'node:url'
import { type AmbientDatabase, defineDatabase } from 'ambient-db'
import { kyselyAdapter } from 'ambient-db/kysely'
import { pgAdapter } from 'ambient-db/pg'
import { type Dialect, type Kysely, PostgresDialect, SqliteDialect, WithSchemaPlugin } from 'kysely'
import { Pool } from 'pg'
import { nodeSqlite } from './node-sqlite.ts'
import type { Tables } from './schema.ts'

const url = readUrl(process.env.DATABASE_URL || pathToFileURL('orders.db').href)

export const engine = url.protocol === 'file:' ? 'sqlite' : 'postgres'

/** On PostgreSQL the tables live in a schema of their own. */
export const schema = engine === 'postgres' ? 'ambient_db_quickstart' : undefined
export const plugins = schema ? [new WithSchemaPlugin(schema)] : []

/** The database of the service; nothing is opened before the first query. */
export const main: AmbientDatabase<Kysely<Tables>, unknown> = engine === 'postgres'
  ? defineDatabase({
      name: 'main',
      adapter: kyselyAdapter<Tables>(pgAdapter(openPool), (pool) => new PostgresDialect({ pool }), { plugins }),
    })
  : defineDatabase({ name: 'main', adapter: kyselyAdapter<Tables>(openFile) })

/** An ordinary Kysely, of which each query finds the session of its request. */
export const { db } = main

export function openPool(): Pool {
  return new Pool({ connectionString: url.href, connectionTimeoutMillis: 5000 })
}

export function openFile(): Dialect {
  const database = new DatabaseSync(url)
  database.exec('pragma journal_mode = wal') // others can read while a transaction is open
  return new SqliteDialect({ database: nodeSqlite(database) })
}

/** Where the database is, without user and password. */
export function location(): string {
  return engine === 'sqlite' ? url.pathname : `${url.host}${url.pathname}`
}

function readUrl(text: string): URL {
  const parsed = URL.parse(text)
  if (parsed && /^(file|postgres|postgresql):\/\//.test(text)) return parsed
  throw new Error('DATABASE_URL is neither postgres://user:password@host/database nor file:///path.')
}
