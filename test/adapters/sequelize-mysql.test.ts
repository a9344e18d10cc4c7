import type { Connection } from 'mysql2'
import { Sequelize } from 'sequelize'
import { afterAll, beforeAll, describe } from 'vitest'
import { createMysqlDatabase, type MysqlDatabase } from '../support/mysql.ts'
import { mysqlHarness } from './mysql-support.ts'
import { sequelizeOperations, withSequelizePools } from './sequelize-subject.ts'
import { itHoldsTheSuite } from './support.ts'

let database: MysqlDatabase
let harness: Awaited<ReturnType<typeof mysqlHarness<Sequelize>>>
beforeAll(async () => {
  database = await createMysqlDatabase()
  const base = await mysqlHarness<Sequelize>(database, {
    ...sequelizeOperations,
    query: (handle, sql, parameters) => sequelizeOperations.query(handle, sql.replace('?', '$1'), parameters),
    capabilities: { streaming: false },
    define: () => {
      throw new Error('The engines are those of Sequelize.')
    },
  })
  const [snapshots] = await database.witness.rows("show variables like 'innodb_snapshot_isolation'")
  harness = withSequelizePools(base, (max) => {
    const engine = new Sequelize(base.wire.url, { logging: false, pool: { max } })
    if (snapshots) {
      engine.addHook('afterConnect', async (connection) => {
        await (connection as Connection).promise().query('set innodb_snapshot_isolation = on')
      })
    }
    return engine
  })
})
afterAll(async () => {
  await harness.close()
  await database.drop()
})

describe('sequelizeAdapter over mysql2 holds the suite', () => {
  itHoldsTheSuite(() => harness)
})
