import type { AdapterHarness } from 'ambient-db/conformance'
import { type Knex, knex } from 'knex'
import { afterAll, beforeAll, describe } from 'vitest'
import { until } from '../support/gate.ts'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'
import { knexOperations, withKnexPools } from './knex-subject.ts'
import { itHoldsTheSuite, postgresHarness } from './support.ts'

let database: TestDatabase
let harness: AdapterHarness<Knex> & { close(): Promise<void> }
beforeAll(async () => {
  database = await createDatabase()
  const base = await postgresHarness<Knex>(database, {
    ...knexOperations,
    query: (handle, sql, parameters = []) => {
      const raw = handle.raw(sql.replaceAll(/\$\d/g, '?'), parameters as Knex.RawBinding[])
      return raw.then((result) => result) // Knex sends it now
    },
    define: () => {
      throw new Error('The engines are those of Knex.')
    },
  })
  const pools = withKnexPools((max, afterCreate) => {
    const pool = { min: 0, max, ...(afterCreate && { afterCreate }) }
    return knex({ client: 'pg', connection: base.wire.url, pool, log: { warn() {} } })
  })
  harness = {
    ...base,
    define: pools.define,
    engines: pools.probes,
    async reset() {
      pools.forget()
      await base.reset()
    },
    async kill() {
      await base.kill?.()
      await until(async () => pools.probes().every(({ living }) => living.size === 0), 'the clients to notice')
    },
  }
})
afterAll(async () => {
  await harness.close()
  await database.drop()
})

describe('knexAdapter over pg holds the suite', () => {
  itHoldsTheSuite(() => harness)
})
