import { defineDatabase } from 'ambient-db'
import { drizzleAdapter } from 'ambient-db/drizzle'
import { mysql2Adapter } from 'ambient-db/mysql2'
import { asc, sql } from 'drizzle-orm'
import { int, mysqlTable } from 'drizzle-orm/mysql-core'
import { drizzle, type MySql2Database } from 'drizzle-orm/mysql2'
import type { Pool } from 'mysql2/promise'
import { afterAll, beforeAll, describe } from 'vitest'
import { statement } from '../support/drizzle.ts'
import { createMysqlDatabase, type MysqlDatabase } from '../support/mysql.ts'
import { driverError, mysqlItems } from './drizzle-subject.ts'
import { type MysqlSubject, mysqlHarness } from './mysql-support.ts'
import { itHoldsTheSuite } from './support.ts'

type Handle = MySql2Database & { $client: Pool }

const repeats = mysqlTable('repeats', { n: int() })

const subject: MysqlSubject<Handle> = {
  define(pool, options) {
    const driver = mysql2Adapter(options.host === undefined ? () => pool() : (host: string) => pool(host))
    return defineDatabase({
      name: 'main',
      ...options,
      adapter: drizzleAdapter(driver, (client) => drizzle({ client })),
    })
  },
  query: (handle, text, parameters) => handle.execute(statement(text, parameters)).then(([rows]) => ({ rows })), // sent at once
  driverError,
  async *stream(handle) {
    // Many of each, because its stream has room for 16 rows, and fewer would be over before they are read.
    const select = handle.select({ id: mysqlItems.id }).from(mysqlItems).innerJoin(repeats, sql`true`)
    let last: number | undefined
    for await (const { id } of select.orderBy(asc(mysqlItems.id)).prepare().iterator()) {
      if (id !== last) yield id
      last = id
    }
  },
  transaction: (handle, work) =>
    handle.transaction((transaction) => work({ insert: async (id) => transaction.insert(mysqlItems).values({ id }) })),
}

describe('drizzleAdapter over mysql2Adapter holds the suite', () => {
  let database: MysqlDatabase
  let harness: Awaited<ReturnType<typeof mysqlHarness<Handle>>>
  beforeAll(async () => {
    database = await createMysqlDatabase()
    harness = await mysqlHarness(database, subject)
    await database.witness.rows('create table repeats (n int)')
    await database.witness.rows(`insert into repeats values ${Array(100).fill('(0)')}`)
  })
  afterAll(async () => {
    await harness.close()
    await database.drop()
  })

  itHoldsTheSuite(() => harness)
})
