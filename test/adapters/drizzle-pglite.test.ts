import type { PGlite } from '@electric-sql/pglite'
import { defineDatabase } from 'ambient-db'
import { drizzleAdapter } from 'ambient-db/drizzle'
import { pgliteAdapter } from 'ambient-db/pglite'
import { drizzle, type PgliteDatabase } from 'drizzle-orm/pglite'
import { afterAll, beforeAll, describe } from 'vitest'
import { statement } from '../support/drizzle.ts'
import { driverError, pgItems } from './drizzle-subject.ts'
import { pgliteHarness } from './pglite-support.ts'
import { itHoldsTheSuite } from './support.ts'

type Handle = PgliteDatabase & { $client: PGlite }

let harness: Awaited<ReturnType<typeof pgliteHarness<Handle>>>
beforeAll(async () => {
  harness = await pgliteHarness<Handle>({
    define(make, options) {
      const driver = pgliteAdapter(options.host === undefined ? () => make() : (host: string) => make(host))
      const adapter = drizzleAdapter(driver, (client) => drizzle({ client }))
      return defineDatabase({ name: 'main', ...options, adapter })
    },
    query: (handle, sql, parameters) => handle.execute(statement(sql, parameters)).then((result) => result), // sent at once
    endBehindTheBack: (handle) => handle.$client.exec('select 1; commit'),
    driverError,
    transaction: (handle, work) =>
      handle.transaction((transaction) => work({ insert: async (id) => transaction.insert(pgItems).values({ id }) })),
  })
}, 60_000)
afterAll(() => harness.close())

describe('drizzleAdapter over pgliteAdapter holds the suite', () => {
  itHoldsTheSuite(() => harness)
})
