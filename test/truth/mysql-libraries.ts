import { int, mysqlTable } from 'drizzle-orm/mysql-core'
import { drizzle, type MySql2Database } from 'drizzle-orm/mysql2'
import { type Kysely, MysqlDialect } from 'kysely'
import type { Pool } from 'mysql2/promise'
import { drizzleAdapter } from '../../src/adapters/drizzle.ts'
import { kyselyAdapter } from '../../src/adapters/kysely.ts'
import { mysql2Adapter } from '../../src/adapters/mysql2.ts'
import { statement } from '../support/drizzle.ts'
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

const numbers = mysqlTable('numbers', { n: int() })

const drizzleOverMysql2: Library<MySql2Database, unknown, unknown, Pool> = {
  name: 'drizzle-mysql2',
  limits: {},
  adapter: (pool) => drizzleAdapter(mysql2Adapter(pool), (client) => drizzle({ client })),
  execute: (db, sql, parameters) => db.execute(statement(sql, parameters)),
  stream: (db) => db.select().from(numbers).prepare().iterator(),
  transaction: (db, work) => db.transaction((tx) => work((sql, parameters) => tx.execute(statement(sql, parameters)))),
}

/** Libraries over MySQL. */
export const mysqlLibraries: readonly Library[] = [mysql2, kyselyOverMysql2, drizzleOverMysql2] as unknown as Library[] // each sees only its own handles
