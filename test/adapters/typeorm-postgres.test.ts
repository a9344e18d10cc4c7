import pg from 'pg'
import { DataSource, type EntityManager } from 'typeorm'
import { afterAll, beforeAll, describe } from 'vitest'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'
import { itHoldsTheSuite, postgresHarness } from './support.ts'
import { defineTypeorm, items, streamIds, typeormOperations } from './typeorm-subject.ts'

let database: TestDatabase
let harness: Awaited<ReturnType<typeof postgresHarness<EntityManager>>>
beforeAll(async () => {
  database = await createDatabase()
  harness = await postgresHarness<EntityManager>(database, {
    ...typeormOperations,
    query: async (handle, sql, parameters) => ({ rows: await handle.query(sql, parameters) }),
    stream: streamIds,
    define: (pool, options) =>
      defineTypeorm((host) => {
        const Pool = function pooled() {
          return pool(host)
        }
        return new DataSource({ type: 'postgres', driver: { ...pg, Pool }, entities: [items] })
      }, options),
  })
})
afterAll(async () => {
  await harness.close()
  await database.drop()
})

describe('typeormAdapter over pg holds the suite', () => {
  itHoldsTheSuite(() => harness)
})
