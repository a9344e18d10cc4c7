import { PGlite } from '@electric-sql/pglite'
import { type AmbientDatabase, defineDatabase, newContext } from 'ambient-db'
import { pgAdapter } from 'ambient-db/pg'
import { pgliteAdapter } from 'ambient-db/pglite'
import { Pool } from 'pg'

/** What the functions of the bank need of a database: `pg` and PGlite have it in common. */
interface Queries {
  query(sql: string, values?: unknown[]): Promise<{ readonly rows: unknown[] }>
}

const { DATABASE_URL: url } = process.env

const onPostgres = () => defineDatabase({ name: 'bank', adapter: pgAdapter(() => new Pool({ connectionString: url })) })
/** In the memory of the process. */
const embedded = () => defineDatabase({ name: 'bank', adapter: pgliteAdapter(() => new PGlite()) })

export const main: AmbientDatabase<Queries, unknown> = url ? onPostgres() : embedded()
export const { db } = main

export async function createTables(): Promise<void> {
  await newContext(async () => {
    await db.query(`create table if not exists accounts (
      id text primary key,
      balance integer not null check (balance >= 0)
    )`)
    await db.query(`create table if not exists transfers (
      id integer generated always as identity primary key,
      source text not null references accounts,
      target text not null references accounts deferrable initially deferred,
      amount integer not null check (amount > 0)
    )`)
  })
}
