import type { Generated } from 'kysely'
import { db, engine, schema } from './database.ts'

/** The tables of the order service. */
export interface Tables {
  stock: { item: string; pieces: number }
  orders: { id: Generated<number>; customer: string }
  order_lines: { order_id: number; item: string; pieces: number }
  /** What scenarios.ts writes. */
  journal: { id: Generated<number>; text: string }
}

/** Creates the tables, empty but for the stock. */
export async function createTables(): Promise<void> {
  if (schema) {
    await dropTables() // what an interrupted run left behind
    await db.schema.createSchema(schema).execute()
  }
  const serial = engine === 'sqlite' ? 'integer' : 'serial'
  await db.schema
    .createTable('stock')
    .addColumn('item', 'text', (column) => column.primaryKey())
    .addColumn('pieces', 'integer', (column) => column.notNull())
    .execute()
  await db.schema
    .createTable('orders')
    .addColumn('id', serial, (column) => column.primaryKey())
    .addColumn('customer', 'text', (column) => column.notNull())
    .execute()
  await db.schema
    .createTable('order_lines')
    .addColumn('order_id', 'integer', (column) => column.notNull().references('orders.id'))
    .addColumn('item', 'text', (column) => column.notNull())
    .addColumn('pieces', 'integer', (column) => column.notNull())
    // Checked when the transaction commits, not when the line is written.
    .addForeignKeyConstraint('order_lines_item', ['item'], 'stock', ['item'], (constraint) =>
      constraint.deferrable().initiallyDeferred(),
    )
    .execute()
  await db.schema
    .createTable('journal')
    .addColumn('id', serial, (column) => column.primaryKey())
    .addColumn('text', 'text', (column) => column.notNull())
    .execute()

  await db
    .insertInto('stock')
    .values([
      { item: 'cup', pieces: 20 },
      { item: 'lamp', pieces: 1 },
      { item: 'teapot', pieces: 5 },
      { item: 'vase', pieces: 1 },
    ])
    .execute()
}

/** Removes the tables and all that is in them. */
export async function dropTables(): Promise<void> {
  if (schema) await db.schema.dropSchema(schema).ifExists().cascade().execute()
  else for (const table of ['journal', 'order_lines', 'orders', 'stock']) await db.schema.dropTable(table).execute()
}
