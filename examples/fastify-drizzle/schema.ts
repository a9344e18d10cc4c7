import { sql } from 'drizzle-orm'
import { check, integer, pgTable, serial, text } from 'drizzle-orm/pg-core'

export const products = pgTable('products', { id: text().primaryKey(), stock: integer().notNull() }, ({ stock }) => [
  check('in_stock', sql`${stock} >= 0`),
])

export const orders = pgTable('orders', {
  id: serial().primaryKey(),
  product: text()
    .notNull()
    .references(() => products.id),
  customer: text().notNull(),
})

/** As a migration would have it. */
export const migration = [
  sql`create table if not exists products (id text primary key, stock integer not null, constraint in_stock check (stock >= 0))`,
  sql`create table if not exists orders (id serial primary key, product text not null references products, customer text not null)`,
]
