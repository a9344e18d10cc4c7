import { defineDatabase, newContext } from 'ambient-db'
import { kyselyAdapter, kyselyHandle } from 'ambient-db/kysely'
import { mysql2Adapter } from 'ambient-db/mysql2'
import { type Kysely, MysqlDialect } from 'kysely'
import { createPool, type Pool } from 'mysql2/promise'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { gate } from '../support/gate.ts'
import { createMysqlDatabase, type MysqlDatabase } from '../support/mysql.ts'
import { kyselyOperations, type Tables } from './kysely-subject.ts'
import { type MysqlSubject, mysqlHarness } from './mysql-support.ts'
import { itHoldsTheSuite } from './support.ts'

type Harness = Awaited<ReturnType<typeof mysqlHarness<Kysely<Tables>>>>

const overPool: MysqlSubject<Kysely<Tables>> = {
  ...kyselyOperations,
  define(pool, options) {
    const driver = mysql2Adapter(options.host === undefined ? () => pool() : (host: string) => pool(host))
    const dialect = (ambient: Pool) => new MysqlDialect({ pool: ambient.pool })
    return defineDatabase({ name: 'main', ...options, adapter: kyselyAdapter<Tables>(driver, dialect) })
  },
}

const overDialect: MysqlSubject<Kysely<Tables>> = {
  ...kyselyOperations,
  capabilities: { cancelling: false, transactionStatus: false, lossDetection: false },
  define(pool, options) {
    const dialect = (host?: string) => new MysqlDialect({ pool: pool(host).pool })
    const factory = options.host === undefined ? () => dialect() : (host: string) => dialect(host)
    return defineDatabase({ name: 'main', ...options, adapter: kyselyAdapter<Tables>(factory) })
  },
}

for (const [name, subject] of Object.entries({ 'over mysql2Adapter': overPool, 'over a dialect': overDialect })) {
  describe(`kyselyAdapter ${name} holds the suite on MySQL`, () => {
    let database: MysqlDatabase
    let harness: Harness
    beforeAll(async () => {
      database = await createMysqlDatabase()
      const { gate, ...rest } = await mysqlHarness(database, subject)
      // Whatever runs on a connection of a pool that is out of reach cannot be ended: it goes on until the server answers.
      harness = { ...rest, ...(subject === overPool && { gate }) }
    })
    afterAll(async () => {
      await harness.close()
      await database.drop()
    })

    itHoldsTheSuite(() => harness)
  })
}

describe('Kysely over mysql2', () => {
  let database: MysqlDatabase
  beforeAll(async () => {
    database = await createMysqlDatabase()
    await database.witness.rows('create table items (id int primary key, n int not null default 0)')
  })
  afterAll(() => database.drop())

  const define = (pool: Pool) =>
    defineDatabase({
      name: 'main',
      adapter: kyselyAdapter<Tables, Pool>(
        mysql2Adapter(() => pool),
        (ambient) => new MysqlDialect({ pool: ambient }),
      ),
    })

  it('A4 shares the session and its transaction with raw SQL on the pool', async () => {
    const main = defineDatabase({ name: 'main', adapter: mysql2Adapter(() => createPool({ uri: database.url })) })
    const kysely = kyselyHandle<Tables>(main, (pool) => new MysqlDialect({ pool }))
    const planned = new Error('planned')
    const work = newContext(async () => {
      await main.db.query('insert into items (id) values (1)')
      await kysely.transaction().execute((trx) => trx.insertInto('items').values({ id: 2, n: 0 }).execute())
      expect(await kysely.selectFrom('items').select('id').orderBy('id').execute()).toEqual([{ id: 1 }, { id: 2 }])
      throw planned
    })
    await expect(work).rejects.toBe(planned)
    expect(await database.witness.rows('select id from items')).toEqual([])
    await main.shutdown()
  })

  it('C8 S9 keeps its connection when the rest of a stream that was left is cancelled', async () => {
    const pool = createPool({ uri: database.url, connectionLimit: 1 })
    const main = define(pool)
    // Large, so that the first row comes at once, and slow, so that the rest is still to come.
    await database.witness.rows(
      "create view many as select sleep(0.01) as id, repeat('x', 50000) as n from seq_1_to_1000000",
    )
    const controller = new AbortController()
    const left = gate()
    const work = newContext(
      async () => {
        for await (const _ of main.db
          .selectFrom('many' as 'items')
          .selectAll()
          .stream(1))
          break
        const behind = main.db.insertInto('items').values({ id: 1, n: 0 }).execute() // it waits for the rest
        left.open()
        await behind
      },
      { signal: controller.signal },
    )
    work.catch(() => {})
    await left.passed
    const [before] = await database.backends()
    expect(before?.query).toMatch(/many/)
    controller.abort()
    await expect(work).rejects.toMatchObject({ code: 'AMBIENT_ABORTED' })
    await newContext(() => main.db.insertInto('items').values({ id: 2, n: 0 }).execute())
    expect(await database.witness.rows('select id from items')).toEqual([{ id: 2 }])
    expect((await database.backends()).map(({ id }) => id)).toContain(before?.id)
    await main.shutdown()
  })
})
