import { defineDatabase } from 'ambient-db'
import { pgAdapter } from 'ambient-db/pg'
import type { Pool } from 'pg'
import QueryStream from 'pg-query-stream'
import { afterAll, beforeAll, describe } from 'vitest'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'
import { itHoldsTheSuite, postgresHarness } from './support.ts'

let database: TestDatabase
let harness: Awaited<ReturnType<typeof postgresHarness<Pool>>>
beforeAll(async () => {
  database = await createDatabase()
  harness = await postgresHarness<Pool>(database, {
    define: (pool, options) => {
      const factory = options.host === undefined ? () => pool() : (host: string) => pool(host)
      return defineDatabase({ name: 'main', ...options, adapter: pgAdapter(factory) })
    },
    query: (handle, sql, parameters) => handle.query(sql, parameters),
    async *stream(handle) {
      const rows = handle.query(new QueryStream('select id from items order by id', [], { batchSize: 1 }))
      for await (const { id } of rows) yield id
    },
    async beginTransaction(handle) {
      const client = await handle.connect()
      await client.query('begin')
      const end = (text: string) => client.query(text).finally(() => client.release())
      return {
        insert: (id) => client.query('insert into items (id) values ($1)', [id]),
        commit: () => end('commit'),
        rollback: () => end('rollback'),
      }
    },
  })
})
afterAll(async () => {
  await harness.close()
  await database.drop()
})

describe('pgAdapter holds the suite', () => {
  itHoldsTheSuite(() => harness)
})
