import { readFileSync } from 'node:fs'
import { DatabaseSync } from 'node:sqlite'
import type { PGliteInterface } from '@electric-sql/pglite'
import { defineEntity, MikroORM, p } from '@mikro-orm/postgresql'
import { MikroORM as SqliteOrm } from '@mikro-orm/sqlite'
import { drizzleAdapter } from 'ambient-db/drizzle'
import { knexAdapter } from 'ambient-db/knex'
import { kyselyAdapter } from 'ambient-db/kysely'
import { mikroOrmAdapter } from 'ambient-db/mikro-orm'
import { mysql2Adapter } from 'ambient-db/mysql2'
import { pgAdapter } from 'ambient-db/pg'
import { pgliteAdapter } from 'ambient-db/pglite'
import { postgresJsAdapter } from 'ambient-db/postgres-js'
import { prismaAdapter } from 'ambient-db/prisma'
import { sequelizeAdapter } from 'ambient-db/sequelize'
import { typeormAdapter } from 'ambient-db/typeorm'
import { drizzle as drizzleMysql } from 'drizzle-orm/mysql2'
import { drizzle as drizzlePg } from 'drizzle-orm/node-postgres'
import { drizzle as drizzlePglite } from 'drizzle-orm/pglite'
import { drizzle as drizzlePostgresJs } from 'drizzle-orm/postgres-js'
import knex from 'knex'
import { MysqlDialect, PostgresDialect, SqliteDialect } from 'kysely'
import { createPool } from 'mysql2/promise'
import { Pool, type PoolConfig } from 'pg'
import postgres from 'postgres'
import { Sequelize } from 'sequelize'
import { DataSource, type DataSourceOptions } from 'typeorm'
import { expect, it } from 'vitest'
import type { Adapter, Capabilities } from '../../src/adapter.ts'
import { forKysely } from '../support/sqlite.ts'

const Note = defineEntity({ name: 'Note', properties: { id: p.integer().primary() } })

/** In place of a PGlite, which takes seconds to start. */
const closable = { close: async () => {} } as PGliteInterface

/** A data source that has connected to nothing. */
function initialized(options: DataSourceOptions, pools: object): DataSource {
  const source = new DataSource(options)
  Object.assign(source.driver, pools)
  return Object.assign(source, { isInitialized: true })
}

/** Engines that connect to nothing; each has a row in the table of the documentation. */
const adapters: Record<string, () => Adapter<unknown, unknown, unknown>> = {
  '`pgAdapter`': () => pgAdapter(() => new Pool()),
  '`pgAdapter`, pool with `pipeline: true`': () => pgAdapter(() => new Pool({ pipeline: true } as PoolConfig)),
  '`mysql2Adapter`': () => mysql2Adapter(() => createPool({})),
  '`postgresJsAdapter`': () => postgresJsAdapter(() => postgres()),
  '`pgliteAdapter`': () => pgliteAdapter(() => closable),
  '`drizzleAdapter` over `pgAdapter`': () =>
    drizzleAdapter(
      pgAdapter(() => new Pool()),
      (client) => drizzlePg({ client }),
    ),
  '`drizzleAdapter` over `mysql2Adapter`': () =>
    drizzleAdapter(
      mysql2Adapter(() => createPool({})),
      (client) => drizzleMysql({ client }),
    ),
  '`drizzleAdapter` over `postgresJsAdapter`': () =>
    drizzleAdapter(
      postgresJsAdapter(() => postgres()),
      (client) => drizzlePostgresJs({ client }),
    ),
  '`drizzleAdapter` over `pgliteAdapter`': () =>
    drizzleAdapter(
      pgliteAdapter(() => closable),
      (client) => drizzlePglite({ client }),
    ),
  '`prismaAdapter` over `pgAdapter`': () =>
    prismaAdapter(
      pgAdapter(() => new Pool()),
      () => ({ $transaction: async () => undefined }),
    ),
  '`kyselyAdapter` over a `PostgresDialect`': () => kyselyAdapter(() => new PostgresDialect({ pool: new Pool() })),
  '`kyselyAdapter` over a `MysqlDialect`': () => kyselyAdapter(() => new MysqlDialect({ pool: createPool({}).pool })),
  '`kyselyAdapter` over a `SqliteDialect`': () =>
    kyselyAdapter(() => new SqliteDialect({ database: forKysely(new DatabaseSync(':memory:')) })),
  '`knexAdapter`, client `pg`': () => knexAdapter(() => knex({ client: 'pg', connection: {} })),
  '`knexAdapter`, client `mysql2`': () => knexAdapter(() => knex({ client: 'mysql2', connection: {} })),
  '`knexAdapter`, client `better-sqlite3`': () =>
    knexAdapter(() => knex({ client: 'better-sqlite3', connection: { filename: ':memory:' }, useNullAsDefault: true })),
  '`typeormAdapter`, type `postgres`': () =>
    typeormAdapter(() => initialized({ type: 'postgres' }, { master: new Pool() })),
  '`typeormAdapter`, type `mysql` or `mariadb`': () =>
    typeormAdapter(() => initialized({ type: 'mariadb' }, { pool: createPool({}).pool })),
  '`sequelizeAdapter`, dialect `postgres`': () => sequelizeAdapter(() => new Sequelize({ dialect: 'postgres' })),
  '`sequelizeAdapter`, dialect `mysql`': () => sequelizeAdapter(() => new Sequelize({ dialect: 'mysql' })),
  '`mikroOrmAdapter` on PostgreSQL': () =>
    mikroOrmAdapter(() => new MikroORM({ entities: [Note], clientUrl: 'postgres://localhost/none' })),
  '`mikroOrmAdapter` on SQLite': () => mikroOrmAdapter(() => new SqliteOrm({ entities: [Note], dbName: ':memory:' })),
}

const [head, , ...rows] = readFileSync('docs/adapters.md', 'utf8')
  .split('\n')
  .filter((line) => line.startsWith('|'))
  .map((line) =>
    line
      .split('|')
      .slice(1, -1)
      .map((cell) => cell.trim()),
  )
const [, ...names] = head as string[]

it.each(Object.entries(adapters))('the table shows the capabilities of %s', async (name, make) => {
  const adapter = make()
  const engine = await adapter.createEngine(undefined)
  const capabilities = adapter.capabilities(engine)
  const shown = rows.find(([first]) => first === name)?.slice(1)
  expect([...names].sort()).toEqual(Object.keys(capabilities).sort())
  expect(shown).toEqual(names.map((each) => (capabilities[each as keyof Capabilities] ? 'yes' : 'no')))
  await adapter.closeEngine(engine)
})

it('the table has no row of an adapter that is none', () => {
  expect(rows.map(([name]) => name)).toEqual(Object.keys(adapters))
})
