import { Sequelize } from 'sequelize'
import { afterAll, beforeAll, describe } from 'vitest'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'
import { sequelizeOperations, withSequelizePools } from './sequelize-subject.ts'
import { itHoldsTheSuite, postgresHarness } from './support.ts'

let database: TestDatabase
let harness: Awaited<ReturnType<typeof postgresHarness<Sequelize>>>
beforeAll(async () => {
  database = await createDatabase()
  const base = await postgresHarness<Sequelize>(database, {
    ...sequelizeOperations,
    capabilities: { streaming: false },
    define: () => {
      throw new Error('The engines are those of Sequelize.')
    },
  })
  harness = withSequelizePools(base, (max) => new Sequelize(base.wire.url, { logging: false, pool: { max } }))
})
afterAll(async () => {
  await harness.close()
  await database.drop()
})

describe('sequelizeAdapter over pg holds the suite', () => {
  itHoldsTheSuite(() => harness)
})
