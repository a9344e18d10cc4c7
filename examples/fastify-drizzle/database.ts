import { PGlite } from '@electric-sql/pglite'
import { type AmbientDatabase, defineDatabase, newContext } from 'ambient-db'
import { drizzleAdapter } from 'ambient-db/drizzle'
import { pgAdapter } from 'ambient-db/pg'
import { pgliteAdapter } from 'ambient-db/pglite'
import { drizzle as drizzlePg } from 'drizzle-orm/node-postgres'
import type { PgDatabase, PgQueryResultHKT } from 'drizzle-orm/pg-core'
import { drizzle as drizzlePglite } from 'drizzle-orm/pglite'
import { Pool } from 'pg'
import { migration } from './schema.ts'

/** What Drizzle over `pg` and over PGlite have in common. */
type Database = PgDatabase<PgQueryResultHKT>

const { DATABASE_URL: url } = process.env

function onPostgres(): AmbientDatabase<Database, unknown> {
  const driver = pgAdapter(() => new Pool({ connectionString: url }))
  return defineDatabase({ name: 'shop', adapter: drizzleAdapter(driver, (client) => drizzlePg({ client })) })
}

/** In the memory of the process. */
function embedded(): AmbientDatabase<Database, unknown> {
  const driver = pgliteAdapter(() => new PGlite())
  return defineDatabase({ name: 'shop', adapter: drizzleAdapter(driver, (client) => drizzlePglite({ client })) })
}

export const main: AmbientDatabase<Database, unknown> = url ? onPostgres() : embedded()
export const { db } = main

export async function createTables(): Promise<void> {
  await newContext(async () => {
    for (const statement of migration) await db.execute(statement)
  })
}
