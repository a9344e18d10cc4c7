import { db } from './database.ts'

export interface OrderLine {
  readonly item: string
  readonly pieces: number
}

export interface NewOrder {
  readonly customer: string
  readonly lines: readonly OrderLine[]
}

export interface Order extends NewOrder {
  readonly id: number
}

export class OutOfStock extends Error {
  readonly statusCode = 409

  constructor(item: string) {
    super(`There are not enough pieces of '${item}'.`)
  }
}

// No function takes a session or a transaction: whoever calls them decides what belongs together.

/** Writes an order and takes its pieces out of the stock. */
export async function placeOrder(order: NewOrder): Promise<Order> {
  const placed = await writeOrder(order)
  // In the same sequence for all, so that no two orders wait for each other.
  const lines = order.lines.toSorted((one, other) => one.item.localeCompare(other.item))
  for (const line of lines) await takeFromStock(line)
  return placed
}

/** Writes an order and its lines. Whether its items exist is checked by the database at COMMIT. */
export async function writeOrder({ customer, lines }: NewOrder): Promise<Order> {
  const { id } = await db.insertInto('orders').values({ customer }).returning('id').executeTakeFirstOrThrow()
  await db
    .insertInto('order_lines')
    .values(lines.map(({ item, pieces }) => ({ order_id: id, item, pieces })))
    .execute()
  return { id, customer, lines }
}

async function takeFromStock({ item, pieces }: OrderLine): Promise<void> {
  const { numUpdatedRows } = await db
    .updateTable('stock')
    .set(({ eb }) => ({ pieces: eb('pieces', '-', pieces) }))
    .where('item', '=', item)
    .where('pieces', '>=', pieces)
    .executeTakeFirst()
  if (numUpdatedRows === 0n) throw new OutOfStock(item)
}

export async function listStock(): Promise<OrderLine[]> {
  return db.selectFrom('stock').select(['item', 'pieces']).orderBy('item').execute()
}

export async function listOrders(): Promise<Order[]> {
  const orders = await db.selectFrom('orders').select(['id', 'customer']).orderBy('id').execute()
  const lines = await db.selectFrom('order_lines').selectAll().execute()
  return orders.map((order) => ({
    ...order,
    lines: lines.filter((line) => line.order_id === order.id).map(({ item, pieces }) => ({ item, pieces })),
  }))
}
