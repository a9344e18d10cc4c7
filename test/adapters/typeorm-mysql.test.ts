import mysql from 'mysql2'
import { DataSource, type EntityManager } from 'typeorm'
import { afterAll, beforeAll, describe } from 'vitest'
import { createMysqlDatabase, type MysqlDatabase } from '../support/mysql.ts'
import { mysqlHarness } from './mysql-support.ts'
import { itHoldsTheSuite } from './support.ts'
import { defineTypeorm, items, streamIds, typeormOperations } from './typeorm-subject.ts'

let database: MysqlDatabase
let harness: Awaited<ReturnType<typeof mysqlHarness<EntityManager>>>
beforeAll(async () => {
  database = await createMysqlDatabase()
  harness = await mysqlHarness<EntityManager>(database, {
    ...typeormOperations,
    query: async (handle, sql, parameters) => ({ rows: await handle.query(sql, parameters) }),
    stream: streamIds,
    define: (pool, options) =>
      defineTypeorm((host) => {
        const createPool = () => pool(host).pool
        return new DataSource({ type: 'mariadb', driver: { ...mysql, createPool }, entities: [items] })
      }, options),
  })
})
afterAll(async () => {
  await harness.close()
  await database.drop()
})

describe('typeormAdapter over mysql2 holds the suite', () => {
  itHoldsTheSuite(() => harness)
})
