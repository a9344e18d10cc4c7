import { defineDatabase, newContext } from 'ambient-db'
import { pgAdapter } from 'ambient-db/pg'
import { Pool } from 'pg'
import { afterAll, beforeAll, expect, it } from 'vitest'
import { createDatabase } from '../support/postgres.ts'

let database: Awaited<ReturnType<typeof createDatabase>>
beforeAll(async () => {
  database = await createDatabase()
  await database.witness.rows('create table t (id int primary key, v text)')
})
afterAll(() => database.drop())

it('works', async () => {
  const main = defineDatabase({ name: 'main', adapter: pgAdapter(() => new Pool({ connectionString: database.url })) })
  await newContext(async () => {
    await main.db.query('insert into t values (1)')
    expect(await database.witness.rows('select * from t')).toEqual([])
    await main.atomic(async () => {
      await main.db.query('insert into t values (2)')
      await main.atomic(async () => {
        await main.db.query('insert into t values (3)')
        throw new Error('x')
      }).catch(() => {})
    })
    expect(await database.witness.rows('select id from t order by 1')).toEqual([{ id: 1 }, { id: 2 }])
    const c = await main.db.connect()
    await c.query('begin')
    await c.query('insert into t values (4)')
    await c.query('commit')
    c.release()
  })
  expect(await database.witness.rows('select id from t order by 1')).toEqual([{ id: 1 }, { id: 2 }, { id: 4 }])
  await expect(newContext(async () => {
    await main.db.query('insert into t values (5)')
    await main.db.query('insert into t values (5)').catch(() => {})
  })).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', outcome: 'rolled-back', cause: { code: '23505' } })
  await main.shutdown()
})
