import { defineDatabase } from 'ambient-db'
import { drizzleAdapter } from 'ambient-db/drizzle'
import { pgAdapter } from 'ambient-db/pg'
import { drizzle, type NodePgDatabase } from 'drizzle-orm/node-postgres'
import type { Pool, PoolConfig } from 'pg'
import QueryStream from 'pg-query-stream'
import { afterAll, beforeAll, describe } from 'vitest'
import { statement } from '../support/drizzle.ts'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'
import { driverError, pgItems } from './drizzle-subject.ts'
import { itHoldsTheSuite, type PostgresSubject, postgresHarness } from './support.ts'

type Handle = NodePgDatabase & { $client: Pool }
type Harness = Awaited<ReturnType<typeof postgresHarness<Handle>>>

const subject: PostgresSubject<Handle> = {
  define(pool, options) {
    const driver = pgAdapter(options.host === undefined ? () => pool() : (host: string) => pool(host))
    return defineDatabase({
      name: 'main',
      ...options,
      adapter: drizzleAdapter(driver, (client) => drizzle({ client })),
    })
  },
  query: (handle, sql, parameters) => handle.execute(statement(sql, parameters)).then((result) => result), // sent at once
  driverError,
  async *stream(handle) {
    const rows = handle.$client.query(new QueryStream('select id from items order by id', [], { batchSize: 1 }))
    for await (const { id } of rows) yield id
  },
  transaction: (handle, work) =>
    handle.transaction((transaction) => work({ insert: async (id) => transaction.insert(pgItems).values({ id }) })),
}

const pipelined: PostgresSubject<Handle> = { ...subject, capabilities: { pipelining: true, streaming: false } }

for (const [name, each, config] of [
  ['over pgAdapter', subject, {}],
  ['over a pipelined pool', pipelined, { pipeline: true } as PoolConfig],
] as const) {
  describe(`drizzleAdapter ${name} holds the suite`, () => {
    let database: TestDatabase
    let harness: Harness
    beforeAll(async () => {
      database = await createDatabase()
      harness = await postgresHarness(database, each, config)
    })
    afterAll(async () => {
      await harness.close()
      await database.drop()
    })

    itHoldsTheSuite(() => harness)
  })
}
