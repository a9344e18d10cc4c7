import { defineDatabase } from 'ambient-db'
import { mysql2Adapter } from 'ambient-db/mysql2'
import type { Pool } from 'mysql2/promise'
import { afterAll, beforeAll, describe } from 'vitest'
import { createMysqlDatabase, type MysqlDatabase } from '../support/mysql.ts'
import { mysqlHarness } from './mysql-support.ts'
import { itHoldsTheSuite } from './support.ts'

let database: MysqlDatabase
let harness: Awaited<ReturnType<typeof mysqlHarness<Pool>>>
beforeAll(async () => {
  database = await createMysqlDatabase()
  harness = await mysqlHarness<Pool>(database, {
    define: (pool, options) => {
      const factory = options.host === undefined ? () => pool() : (host: string) => pool(host)
      return defineDatabase({ name: 'main', ...options, adapter: mysql2Adapter(factory) })
    },
    query: async (handle, sql, parameters) => {
      const [rows] = await handle.query(sql, parameters)
      return { rows }
    },
    async *stream(handle) {
      const rows = handle.pool.query('select id from items order by id').stream({ highWaterMark: 1 })
      for await (const { id } of rows) yield id
    },
    async beginTransaction(handle) {
      const connection = await handle.getConnection()
      await connection.beginTransaction()
      return {
        insert: (id) => connection.execute('insert into items (id) values (?)', [id]),
        commit: () => connection.commit().finally(() => connection.release()),
        rollback: () => connection.rollback().finally(() => connection.release()),
      }
    },
  })
})
afterAll(async () => {
  await harness.close()
  await database.drop()
})

describe('mysql2Adapter holds the suite', () => {
  itHoldsTheSuite(() => harness)
})
