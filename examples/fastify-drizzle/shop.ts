import { and, eq, gt, sql } from 'drizzle-orm'
import { db, main } from './database.ts'
import { orders, products } from './schema.ts'

/** What is told of an order once it is there for good. */
export const mails: string[] = []

export async function stock(product: string, pieces: number): Promise<void> {
  await db.insert(products).values({ id: product, stock: pieces })
}

/** The order, or undefined if there is none left. */
export async function order(product: string, customer: string) {
  const [taken] = await db
    .update(products)
    .set({ stock: sql`${products.stock} - 1` })
    .where(and(eq(products.id, product), gt(products.stock, 0)))
    .returning()
  if (!taken) return undefined
  const [placed] = await db.insert(orders).values({ product, customer }).returning()
  main.afterCommit(() => void mails.push(`${customer}: your ${product} is on its way.`))
  return placed
}

export async function inventory() {
  return {
    products: await db.select().from(products).orderBy(products.id),
    orders: await db.select({ product: orders.product, customer: orders.customer }).from(orders).orderBy(orders.id),
  }
}
