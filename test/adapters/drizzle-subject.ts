import { DrizzleQueryError } from 'drizzle-orm'
import { int, mysqlTable } from 'drizzle-orm/mysql-core'
import { integer, pgTable } from 'drizzle-orm/pg-core'

/** The table of the suite. */
export const pgItems = pgTable('items', { id: integer().primaryKey(), n: integer().notNull().default(0) })
export const mysqlItems = mysqlTable('items', {
  id: int().primaryKey(),
  n: int().notNull().default(0),
})

/** Drizzle wraps what a driver throws. */
export function driverError(error: unknown): unknown {
  return error instanceof DrizzleQueryError ? error.cause : error
}
