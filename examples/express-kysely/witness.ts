import { Kysely, PostgresDialect } from 'kysely'
import { engine, openFile, openPool, plugins } from './database.ts'
import type { Order, OrderLine } from './orders.ts'
import type { Tables } from './schema.ts'

/** What the database holds: committed, and nothing else. */
export interface Holdings {
  readonly stock: readonly OrderLine[]
  readonly orders: readonly Order[]
}

export interface Witness {
  look(): Promise<Holdings>
  close(): Promise<void>
}

/** A second connection, that no request and no session knows of. */
export function openWitness(): Witness {
  const dialect = engine === 'sqlite' ? openFile() : new PostgresDialect({ pool: openPool() })
  const db = new Kysely<Tables>({ dialect, plugins })
  return {
    async look() {
      const stock = await db.selectFrom('stock').selectAll().orderBy('item').execute()
      const orders = await db.selectFrom('orders').selectAll().orderBy('id').execute()
      const lines = await db.selectFrom('order_lines').selectAll().orderBy('item').execute()
      return {
        stock,
        orders: orders.map((order) => ({ ...order, lines: lines.filter(({ order_id }) => order_id === order.id) })),
      }
    },
    close: () => db.destroy(),
  }
}
