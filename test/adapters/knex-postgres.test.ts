import knex, { type Knex } from 'knex'
import { afterAll, beforeAll, describe } from 'vitest'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'
import { knexOperations, sendRaw, withKnexPools } from './knex-subject.ts'
import { itHoldsTheSuite, postgresHarness } from './support.ts'

let database: TestDatabase
let harness: Awaited<ReturnType<typeof postgresHarness<Knex>>>
beforeAll(async () => {
  database = await createDatabase()
  const base = await postgresHarness<Knex>(database, {
    ...knexOperations,
    query: async (handle, sql, parameters) => {
      const { rows } = (await sendRaw(handle, sql.replaceAll(/\$\d/g, '?'), parameters)) as { rows: unknown[] }
      return { rows }
    },
    define: () => {
      throw new Error('The engines are those of Knex.')
    },
  })
  harness = withKnexPools(base, (max, afterCreate) =>
    knex({ client: 'pg', connection: base.wire.url, pool: { min: 0, max, afterCreate }, log: { warn() {} } }),
  )
})
afterAll(async () => {
  await harness.close()
  await database.drop()
})

describe('knexAdapter over pg holds the suite', () => {
  itHoldsTheSuite(() => harness)
})
