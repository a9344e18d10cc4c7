import { defineDatabase, isAmbientError, newContext } from 'ambient-db'
import { drizzleAdapter } from 'ambient-db/drizzle'
import { postgresJsAdapter } from 'ambient-db/postgres-js'
import { sql } from 'drizzle-orm'
import { pgTable, timestamp } from 'drizzle-orm/pg-core'
import { drizzle, type PostgresJsDatabase } from 'drizzle-orm/postgres-js'
import postgres, { type Sql } from 'postgres'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { statement } from '../support/drizzle.ts'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'
import { driverError, pgItems } from './drizzle-subject.ts'
import { sqlEngines } from './postgres-js-support.ts'
import { itHoldsTheSuite, type PostgresSubject, postgresHarnessOver } from './support.ts'

type Handle = PostgresJsDatabase & { $client: Sql }
type Harness = Awaited<ReturnType<typeof postgresHarnessOver<Handle, Sql>>>

const subject: PostgresSubject<Handle, Sql> = {
  define(make, options) {
    const driver = postgresJsAdapter(options.host === undefined ? () => make() : (host: string) => make(host))
    const adapter = drizzleAdapter(driver, (client) => drizzle({ client }))
    return defineDatabase({ name: 'main', ...options, adapter })
  },
  query: (handle, sql, parameters) =>
    handle.execute(statement(sql, parameters)).then((rows) => ({ rows: rows as unknown[] })), // sent at once
  driverError,
  async *stream(handle) {
    for await (const rows of handle.$client`select id from items order by id`.cursor(1))
      for (const { id } of rows) yield id
  },
  transaction: (handle, work) =>
    handle.transaction((transaction) => work({ insert: async (id) => transaction.insert(pgItems).values({ id }) })),
}

describe('drizzleAdapter over postgresJsAdapter holds the suite', () => {
  let database: TestDatabase
  let harness: Harness
  beforeAll(async () => {
    database = await createDatabase()
    harness = await postgresHarnessOver(database, subject, sqlEngines())
  })
  afterAll(async () => {
    await harness.close()
    await database.drop()
  })

  itHoldsTheSuite(() => harness)
})

describe('drizzleAdapter over postgresJsAdapter', () => {
  let database: TestDatabase
  const driver = postgresJsAdapter(() => postgres(database.url))
  const main = defineDatabase({ name: 'main', adapter: drizzleAdapter(driver, (client) => drizzle({ client })) })
  const { db } = main
  beforeAll(async () => {
    database = await createDatabase()
    await database.witness.rows('create table moments (at timestamp with time zone not null)')
  })
  afterAll(async () => {
    await main.shutdown()
    await database.drop()
  })

  const show = async (name: string) => Object.values((await db.execute(sql.raw(`show ${name}`)))[0] ?? {})[0]

  it('A7 begins with the settings of the native transaction, or refuses them', async () => {
    await newContext(() =>
      db.transaction(
        async () => {
          expect(await show('transaction_isolation')).toBe('serializable')
          expect(await show('transaction_read_only')).toBe('on')
        },
        { isolationLevel: 'serializable', accessMode: 'read only' },
      ),
    )
    await newContext(async () => {
      await db.execute(sql`select 1`)
      const other = db.transaction(async () => {}, { isolationLevel: 'serializable' })
      await expect(other).rejects.toSatisfy((error) => isAmbientError(error, 'AMBIENT_TRANSACTION_OPTIONS'))
    })
  })

  it('has the types of Drizzle: its conversions are those of each engine, also before there is one', async () => {
    const moments = pgTable('moments', { at: timestamp({ withTimezone: true }).notNull() })
    const at = new Date('2020-02-02T02:02:02.123Z')
    const other = defineDatabase({ name: 'other', adapter: drizzleAdapter(driver, (client) => drizzle({ client })) })
    const engine = await other.connect()
    expect(engine.options.parsers[1184]?.('as it is')).toBe('as it is')
    expect(engine.options.serializers[1184]?.('as it is')).toBe('as it is')
    await other.shutdown()
    await newContext(async () => {
      await db.insert(moments).values({ at })
      expect(await db.select().from(moments)).toEqual([{ at }])
      expect(await main.session().db.select().from(moments)).toEqual([{ at }])
    })
    const { parsers } = db.$client.options
    expect((await main.connect()).options.parsers[1184]?.('as it is')).toBe('as it is')
    expect(parsers[1184]?.('as it is')).toBe('as it is')
  })
})
