import { defineDatabase } from 'ambient-db'
import { kyselyAdapter } from 'ambient-db/kysely'
import { pgAdapter } from 'ambient-db/pg'
import { type Kysely, PostgresDialect } from 'kysely'
import type { Pool } from 'pg'
import Cursor from 'pg-cursor'
import { afterAll, beforeAll, describe } from 'vitest'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'
import { kyselyOperations, type Tables } from './kysely-subject.ts'
import { itHoldsTheSuite, type PostgresSubject, postgresHarness } from './support.ts'

type Harness = Awaited<ReturnType<typeof postgresHarness<Kysely<Tables>>>>

const overPool: PostgresSubject<Kysely<Tables>> = {
  ...kyselyOperations,
  define(pool, options) {
    const driver = pgAdapter(options.host === undefined ? () => pool() : (host: string) => pool(host))
    const dialect = (ambient: Pool) => new PostgresDialect({ pool: ambient, cursor: Cursor })
    return defineDatabase({ name: 'main', ...options, adapter: kyselyAdapter<Tables>(driver, dialect) })
  },
}

const overDialect: PostgresSubject<Kysely<Tables>> = {
  ...kyselyOperations,
  capabilities: { cancelling: false, transactionStatus: false, lossDetection: false, commitLookup: false },
  define(pool, options) {
    const dialect = (host?: string) => new PostgresDialect({ pool: pool(host), cursor: Cursor })
    const factory = options.host === undefined ? () => dialect() : (host: string) => dialect(host)
    return defineDatabase({ name: 'main', ...options, adapter: kyselyAdapter<Tables>(factory) })
  },
}

for (const [name, subject] of Object.entries({ 'over pgAdapter': overPool, 'over a dialect': overDialect })) {
  describe(`kyselyAdapter ${name} holds the suite`, () => {
    let database: TestDatabase
    let harness: Harness
    beforeAll(async () => {
      database = await createDatabase()
      harness = await postgresHarness(database, subject)
    })
    afterAll(async () => {
      await harness.close()
      await database.drop()
    })

    itHoldsTheSuite(() => harness)
  })
}
