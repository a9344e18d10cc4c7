import { type Kysely, MysqlDialect } from 'kysely'
import type { Pool } from 'mysql2/promise'
import { kyselyAdapter } from '../../src/adapters/kysely.ts'
import { mysql2Adapter } from '../../src/adapters/mysql2.ts'
import { kyselyHandles, type Library, type Tables } from './libraries.ts'

const mysql2: Library<Pool, unknown, unknown, Pool> = {
  name: 'mysql2',
  limits: {},
  adapter: mysql2Adapter,
  execute: (db, sql, parameters) => (parameters.length > 0 ? db.execute(sql, parameters as never) : db.query(sql)), // texts
  stream: (db) => db.pool.query('select n from numbers').stream({ highWaterMark: 10 }),
  async transaction(db, work) {
    const connection = await db.getConnection()
    try {
      await connection.beginTransaction()
      await work((sql, parameters) => connection.execute(sql, parameters as never)) // they are texts
      await connection.commit()
    } catch (error) {
      await connection.rollback().catch(() => {})
      throw error
    } finally {
      connection.release()
    }
  },
}

const kyselyOverMysql2: Library<Kysely<Tables>, unknown, unknown, Pool> = {
  name: 'kysely-mysql2',
  limits: {},
  adapter: (pool) => kyselyAdapter<Tables>(mysql2Adapter(pool), (ambient) => new MysqlDialect({ pool: ambient })),
  ...kyselyHandles,
}

/** Libraries over MySQL. */
export const mysqlLibraries: readonly Library[] = [mysql2, kyselyOverMysql2] as unknown as Library[] // each sees only its own handles
