import { DrizzleQueryError, type SQL, sql } from 'drizzle-orm'
import { int, mysqlTable } from 'drizzle-orm/mysql-core'
import { integer, pgTable } from 'drizzle-orm/pg-core'

/** The table of the suite. */
export const pgItems = pgTable('items', { id: integer().primaryKey(), n: integer().notNull().default(0) })
export const mysqlItems = mysqlTable('items', {
  id: int().primaryKey(),
  n: int().notNull().default(0),
})

/** SQL with the placeholders of a driver as Drizzle has it. */
export function statement(text: string, parameters: unknown[] = []): SQL {
  const [first = '', ...rest] = text.split(parameters.length > 0 ? /\$\d|\?/ : /(?!)/)
  const chunks = rest.flatMap((part, index) => [sql`${parameters[index]}`, sql.raw(part)])
  return sql.join([sql.raw(first), ...chunks])
}

/** Drizzle wraps what a driver throws. */
export function driverError(error: unknown): unknown {
  return error instanceof DrizzleQueryError ? error.cause : error
}
