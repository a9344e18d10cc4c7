import { newContext } from 'ambient-db'
import knex, { type Knex } from 'knex'
import type { Connection } from 'mysql2'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { createMysqlDatabase, type MysqlDatabase } from '../support/mysql.ts'
import { knexOperations, sendRaw, withKnexPools } from './knex-subject.ts'
import { mysqlHarness } from './mysql-support.ts'
import { itHoldsTheSuite } from './support.ts'

let database: MysqlDatabase
let harness: Awaited<ReturnType<typeof mysqlHarness<Knex>>>
beforeAll(async () => {
  database = await createMysqlDatabase()
  const base = await mysqlHarness<Knex>(database, {
    ...knexOperations,
    query: async (handle, sql, parameters) => {
      const [rows] = (await sendRaw(handle, sql, parameters)) as [unknown]
      return { rows }
    },
    define: () => {
      throw new Error('The engines are those of Knex.')
    },
  })
  const [snapshots] = await database.witness.rows("show variables like 'innodb_snapshot_isolation'")
  harness = withKnexPools(base, (max, afterCreate) => {
    const settle = (connection: Connection, done: () => void) =>
      connection.query(snapshots ? 'set innodb_snapshot_isolation = on' : 'do 0', () => afterCreate(connection, done))
    const pool = { min: 0, max, afterCreate: settle }
    return knex({ client: 'mysql2', connection: base.wire.url, pool, log: { warn() {} } })
  })
})
afterAll(async () => {
  await harness.close()
  await database.drop()
})

describe('knexAdapter over mysql2 holds the suite', () => {
  itHoldsTheSuite(() => harness)
})

describe('knexAdapter knows MySQL', () => {
  it('S7 says what a rollback could not undo', async () => {
    await harness.reset()
    await database.witness.rows('create table kept (id int) engine = MyISAM')
    const main = harness.define()
    const work = newContext(async () => {
      await main.db('kept').insert({ id: 1 })
      await harness.insert(main.db, 1)
      await main.rollback()
    })
    await expect(work).rejects.toThrow(/Not everything was rolled back/)
    expect(await harness.witness()).toEqual([])
    expect(await database.witness.rows('select id from kept')).toEqual([{ id: 1 }])
    await main.shutdown()
  })
})
