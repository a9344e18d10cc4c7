import { defineDatabase } from 'ambient-db'
import { drizzleAdapter } from 'ambient-db/drizzle'
import { postgresJsAdapter } from 'ambient-db/postgres-js'
import { drizzle, type PostgresJsDatabase } from 'drizzle-orm/postgres-js'
import type { Sql } from 'postgres'
import { afterAll, beforeAll, describe } from 'vitest'
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
