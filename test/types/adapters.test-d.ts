import { PGlite } from '@electric-sql/pglite'
import { defineEntity, MikroORM, type PostgreSqlDriver, p, type SqlEntityManager } from '@mikro-orm/postgresql'
import { MikroORM as SqliteOrm } from '@mikro-orm/sqlite'
import { PrismaPg } from '@prisma/adapter-pg'
import {
  type AmbientDatabase,
  type AmbientSession,
  type DatabaseOptions,
  defineDatabase,
  newContext,
  openContext,
  type TransactionOptions,
} from 'ambient-db'
import { type AdapterHarness, adapterSuite } from 'ambient-db/conformance'
import { drizzleAdapter, drizzleHandle } from 'ambient-db/drizzle'
import { knexAdapter } from 'ambient-db/knex'
import { kyselyAdapter, kyselyHandle } from 'ambient-db/kysely'
import { mikroOrmAdapter } from 'ambient-db/mikro-orm'
import { mysql2Adapter } from 'ambient-db/mysql2'
import { pgAdapter } from 'ambient-db/pg'
import { pgliteAdapter } from 'ambient-db/pglite'
import { postgresJsAdapter } from 'ambient-db/postgres-js'
import { prismaAdapter, prismaHandle } from 'ambient-db/prisma'
import { sequelizeAdapter } from 'ambient-db/sequelize'
import { typeormAdapter } from 'ambient-db/typeorm'
import { drizzle as drizzleMysql, type MySql2Database } from 'drizzle-orm/mysql2'
import { drizzle as drizzlePg, type NodePgDatabase } from 'drizzle-orm/node-postgres'
import { pgTable, serial, text } from 'drizzle-orm/pg-core'
import { drizzle as drizzlePglite, type PgliteDatabase } from 'drizzle-orm/pglite'
import { drizzle as drizzlePostgresJs, type PostgresJsDatabase } from 'drizzle-orm/postgres-js'
import { defineRelations } from 'drizzle-orm-next'
import { drizzle as drizzleNextMysql, type MySql2Database as NextMysqlDatabase } from 'drizzle-orm-next/mysql2'
import { drizzle as drizzleNext } from 'drizzle-orm-next/node-postgres'
import { pgTable as pgTableNext, text as textNext } from 'drizzle-orm-next/pg-core'
import knex, { type Knex } from 'knex'
import { type Generated, type Kysely, MysqlDialect, PostgresDialect, SqliteDialect } from 'kysely'
import { createPool as createCallbackPool } from 'mysql2'
import { createPool, type Pool as MysqlPool, type RowDataPacket } from 'mysql2/promise'
import { Pool, type PoolConfig, type QueryResult } from 'pg'
import postgres, { type Sql } from 'postgres'
import { DataTypes, Model, Sequelize, type Transaction } from 'sequelize'
import { DataSource, type EntityManager } from 'typeorm'
import { describe, expectTypeOf, it } from 'vitest'
import { PrismaClient } from '../../.tools/prisma-client/client.ts'

interface Tables {
  users: { id: Generated<number>; name: string }
}

class OwnPool extends Pool {
  readonly own = true
}

const onPg = defineDatabase({ name: 'main', adapter: pgAdapter(() => new Pool()) })
const onKysely = defineDatabase({
  name: 'main',
  adapter: kyselyAdapter<Tables>(
    pgAdapter(() => new Pool()),
    (pool) => new PostgresDialect({ pool }),
  ),
})
const onDialect = defineDatabase({
  name: 'main',
  adapter: kyselyAdapter<Tables>(() => new SqliteDialect({ database: { close() {}, prepare: () => never() } })),
})
declare function never(): never
const onMysql = defineDatabase({ name: 'main', adapter: mysql2Adapter(() => createPool({})) })
const onKyselyMysql = defineDatabase({
  name: 'main',
  adapter: kyselyAdapter<Tables>(
    mysql2Adapter(() => createPool({})),
    (pool) => new MysqlDialect({ pool }),
  ),
})

const drizzleUsers = pgTable('users', { id: serial().primaryKey(), name: text().notNull() })
const schema = { users: drizzleUsers }
const onDrizzle = defineDatabase({
  name: 'main',
  adapter: drizzleAdapter(
    pgAdapter(() => new OwnPool()),
    (client) => drizzlePg({ client, schema }),
  ),
})
const onDrizzleMysql = defineDatabase({
  name: 'main',
  adapter: drizzleAdapter(
    mysql2Adapter(() => createPool({})),
    (client) => drizzleMysql({ client }),
  ),
})
const nextUsers = pgTableNext('users', { name: textNext().notNull() })
const relations = defineRelations({ users: nextUsers })
const onDrizzleNext = defineDatabase({
  name: 'main',
  adapter: drizzleAdapter(
    pgAdapter(() => new Pool()),
    (client) => drizzleNext({ client, relations }),
  ),
})

describe('Drizzle handles', () => {
  it('have exactly the type that `drizzle` returned', () => {
    expectTypeOf(onDrizzle.db).toEqualTypeOf<NodePgDatabase<typeof schema> & { $client: Pool }>()
    expectTypeOf(onDrizzleMysql.db).toEqualTypeOf<MySql2Database & { $client: MysqlPool }>()
    expectTypeOf(onDrizzleNext.db).toEqualTypeOf<ReturnType<typeof drizzleNext<typeof relations, Pool>>>()
    const onNextMysql = drizzleHandle(onMysql, (client) => drizzleNextMysql({ client }))
    expectTypeOf(onNextMysql).toEqualTypeOf<NextMysqlDatabase & { $client: MysqlPool }>()
    const handle = drizzleHandle(onPg, (client) => drizzlePg({ client, schema }))
    expectTypeOf(handle).toEqualTypeOf<NodePgDatabase<typeof schema> & { $client: Pool }>()
    expectTypeOf(onDrizzle.session()).toEqualTypeOf<AmbientSession<typeof onDrizzle.db>>()
    expectTypeOf(onDrizzle.connect).returns.resolves.toEqualTypeOf<OwnPool>()
  })

  it('infer what queries give', () => {
    const { db } = onDrizzle
    const found = () => db.query.users.findMany({ columns: { name: true } })
    expectTypeOf(found).returns.resolves.toEqualTypeOf<{ name: string }[]>()
    const selected = async () => db.transaction((tx) => tx.select().from(drizzleUsers))
    expectTypeOf(selected).returns.resolves.toEqualTypeOf<{ id: number; name: string }[]>()
    const next = () => onDrizzleNext.db.query.users.findMany()
    expectTypeOf(next).returns.resolves.toEqualTypeOf<{ name: string }[]>()
  })

  it('know the tables', () => {
    void (() => [
      // @ts-expect-error there is no such table
      onDrizzle.db.query.missing,
      // @ts-expect-error a name is a string
      onDrizzle.db.insert(drizzleUsers).values({ name: 1 }),
      // @ts-expect-error no table of this schema has relations of its own
      onDrizzleMysql.db.query.users,
    ])
  })

  it('are made over the client of a driver, and are those of Drizzle', () => {
    const driver = pgAdapter(() => new Pool())
    const mysqlDriver = mysql2Adapter(() => createPool({}))
    drizzleAdapter(driver, (client) => {
      expectTypeOf(client).toEqualTypeOf<Pool>()
      return drizzlePg({ client })
    })
    void (() => [
      // @ts-expect-error a driver adapter, not a pool
      drizzleAdapter(new Pool(), (client: Pool) => drizzlePg({ client })),
      // @ts-expect-error a Drizzle database, not the client itself
      drizzleAdapter(driver, (client) => client),
      // @ts-expect-error the pool of mysql2 is no client of node-postgres
      drizzleAdapter(mysqlDriver, (client) => drizzlePg({ client })),
      // @ts-expect-error a function that makes it over the client, not one made over a pool of its own
      drizzleAdapter(driver, drizzlePg({ client: new Pool() })),
      // @ts-expect-error over a driver database: the handle of this one is a Kysely
      drizzleHandle(onKysely, (client) => drizzlePg({ client })),
    ])
  })
})

interface User {
  id: number
  name: string
}

const onKnex = defineDatabase({ name: 'main', adapter: knexAdapter(() => knex<User, User[]>({ client: 'pg' })) })

describe('Knex handles', () => {
  it('have exactly the type that `knex` returned', () => {
    expectTypeOf(onKnex.db).toEqualTypeOf<Knex<User, User[]>>()
    expectTypeOf(onKnex.session()).toEqualTypeOf<AmbientSession<Knex<User, User[]>>>()
    expectTypeOf(onKnex.connect).returns.resolves.toEqualTypeOf<Knex<User, User[]>>()
  })

  it('infer what queries give', () => {
    const selected = async () => onKnex.db<User>('users').select('name')
    expectTypeOf(selected).returns.resolves.toEqualTypeOf<Pick<User, 'name'>[]>()
    const inTransaction = async () => onKnex.db.transaction((trx) => trx<User>('users').first('id'))
    expectTypeOf(inTransaction).returns.resolves.toEqualTypeOf<Pick<User, 'id'> | undefined>()
  })

  it('are made by a function', () => {
    void (() => [
      knexAdapter((host) => knex({ client: 'pg', connection: { host } })),
      // @ts-expect-error a function that makes the Knex
      knexAdapter(knex({ client: 'pg' })),
      // @ts-expect-error the Knex, not its configuration
      knexAdapter(() => ({ client: 'pg' })),
      // @ts-expect-error queries are built before anything could be awaited
      knexAdapter(async () => knex({ client: 'pg' })),
    ])
  })
})

const onTypeorm = defineDatabase({ name: 'main', adapter: typeormAdapter(() => new DataSource({ type: 'postgres' })) })

describe('TypeORM handles', () => {
  it('are an EntityManager, and the engine is a DataSource', () => {
    expectTypeOf(onTypeorm.db).toEqualTypeOf<EntityManager>()
    expectTypeOf(onTypeorm.session()).toEqualTypeOf<AmbientSession<EntityManager>>()
    expectTypeOf(onTypeorm.connect).returns.resolves.toEqualTypeOf<DataSource>()
    void (() => [
      typeormAdapter((host) => new DataSource({ type: 'mysql', host })),
      // @ts-expect-error a function that makes it
      typeormAdapter(new DataSource({ type: 'postgres' })),
      // @ts-expect-error the data source before it is initialized, which would connect
      typeormAdapter(() => new DataSource({ type: 'postgres' }).initialize()),
    ])
  })
})

const Person = defineEntity({ name: 'Person', properties: { id: p.integer().primary(), name: p.string() } })

describe('MikroORM handles', () => {
  const onInit = defineDatabase({
    name: 'main',
    adapter: mikroOrmAdapter((host) => MikroORM.init({ entities: [Person], host })),
  })
  const atOnce = defineDatabase({
    name: 'main',
    adapter: mikroOrmAdapter(() => new SqliteOrm({ entities: [Person], dbName: ':memory:' })),
  })

  it('are managers of the driver', () => {
    expectTypeOf(onInit.db).toExtend<SqlEntityManager<PostgreSqlDriver>>()
    expectTypeOf(onInit.db).toEqualTypeOf<Awaited<ReturnType<typeof onInit.connect>>['em']>()
    expectTypeOf(atOnce.connect).returns.resolves.toExtend<SqliteOrm>()
    expectTypeOf(atOnce.session().db).toEqualTypeOf(atOnce.db)
  })

  it('know the entities', () => {
    const found = async () => (await onInit.db.findOneOrFail(Person, 1)).name
    expectTypeOf(found).returns.resolves.toEqualTypeOf<string>()
    void (() => [
      // @ts-expect-error a name is a string
      atOnce.db.create(Person, { name: 1 }),
      // @ts-expect-error a function that makes the ORM
      mikroOrmAdapter(new SqliteOrm({ entities: [Person] })),
      // @ts-expect-error the ORM, not its manager
      mikroOrmAdapter(() => onInit.db),
    ])
  })
})

describe('handles', () => {
  it('have exactly the type of the library', () => {
    expectTypeOf(onPg.db).toEqualTypeOf<Pool>()
    expectTypeOf(onMysql.db).toEqualTypeOf<MysqlPool>()
    expectTypeOf(onKyselyMysql.db).toEqualTypeOf<Kysely<Tables>>()
    expectTypeOf(onKysely.db).toEqualTypeOf<Kysely<Tables>>()
    expectTypeOf(onDialect.db).toEqualTypeOf<Kysely<Tables>>()
    expectTypeOf(kyselyHandle<Tables>(onPg, (pool) => new PostgresDialect({ pool }))).toEqualTypeOf<Kysely<Tables>>()
  })

  it('are the same on the session', () => {
    expectTypeOf(onPg.session()).toEqualTypeOf<AmbientSession<Pool>>()
    expectTypeOf(onKysely.session().db).toEqualTypeOf<Kysely<Tables>>()
  })

  it('infer what queries give', () => {
    const users = () => onKysely.db.selectFrom('users').selectAll().execute()
    expectTypeOf(users).returns.resolves.toEqualTypeOf<{ id: number; name: string }[]>()
    const rows = () => onPg.db.query<{ n: number }>('select 1 as n')
    expectTypeOf(rows).returns.resolves.toEqualTypeOf<QueryResult<{ n: number }>>()
    const found = () => onMysql.db.query<({ n: number } & RowDataPacket)[]>('select 1 as n')
    expectTypeOf(found).returns.resolves.toHaveProperty(0).toEqualTypeOf<({ n: number } & RowDataPacket)[]>()
  })

  it('know the tables', () => {
    // @ts-expect-error there is no such table
    expectTypeOf(onKysely.db.selectFrom('missing')).not.toBeAny()
    // @ts-expect-error a name is a string
    onKysely.db.insertInto('users').values({ name: 1 })
  })
})

describe('connect()', () => {
  it('gives the engine that the factory made', () => {
    expectTypeOf(onPg.connect).returns.resolves.toEqualTypeOf<Pool>()
    expectTypeOf(onMysql.connect).returns.resolves.toEqualTypeOf<MysqlPool>()
    const own = defineDatabase({ name: 'own', adapter: pgAdapter(async () => new OwnPool()) })
    expectTypeOf(own.connect).returns.resolves.toEqualTypeOf<OwnPool>()
    expectTypeOf(own.db).toEqualTypeOf<Pool>()
  })

  it('gives a plain Kysely over a dialect', () => {
    expectTypeOf(onDialect.connect).returns.resolves.toEqualTypeOf<Kysely<Tables>>()
  })
})

describe('adapters', () => {
  it('take factories that want a host, which is a string', () => {
    pgAdapter((host) => {
      expectTypeOf(host).toEqualTypeOf<string>()
      return new Pool({ host })
    })
    kyselyAdapter<Tables>((host) => {
      expectTypeOf(host).toEqualTypeOf<string>()
      return new SqliteDialect({ database: never() })
    })
  })

  it('refuse what they cannot adapt', () => {
    // @ts-expect-error a pool, not its configuration
    pgAdapter(() => ({}) satisfies PoolConfig)
    // @ts-expect-error a factory, so that nothing is opened at import
    pgAdapter(new Pool())
    // @ts-expect-error the pool with promises, not the one with callbacks
    mysql2Adapter(() => createCallbackPool({}))
    // @ts-expect-error a driver needs a dialect over its pool
    kyselyAdapter<Tables>(pgAdapter(() => new Pool()))
    // @ts-expect-error a dialect, not a Kysely
    kyselyAdapter<Tables>(() => onKysely.db)
    // @ts-expect-error plugins are a list
    kyselyAdapter<Tables>(() => new SqliteDialect({ database: never() }), { plugins: true })
  })
})

describe('work', () => {
  it('gives its result, awaited', () => {
    expectTypeOf(() => onPg.atomic(() => 1)).returns.resolves.toEqualTypeOf<number>()
    expectTypeOf(() => onPg.atomic(async () => 'text')).returns.resolves.toEqualTypeOf<string>()
    expectTypeOf(() => newContext(async () => true)).returns.resolves.toEqualTypeOf<boolean>()
    expectTypeOf(() => newContext(() => {})).returns.resolves.toEqualTypeOf<void>()
    expectTypeOf(() => onPg.session().savepoint(async () => 1)).returns.resolves.toEqualTypeOf<number>()
    expectTypeOf(() => openContext().run(async () => 1)).returns.resolves.toEqualTypeOf<number>()
    expectTypeOf(() => openContext().run(() => 1)).returns.toEqualTypeOf<number>()
  })

  it('gets its session from newSession', () => {
    const work = () =>
      onKysely.newSession(async (session) => {
        expectTypeOf(session).toEqualTypeOf<AmbientSession<Kysely<Tables>>>()
        return session.db.selectFrom('users').select('name').execute()
      })
    expectTypeOf(work).returns.resolves.toEqualTypeOf<{ name: string }[]>()
  })

  it('takes options that exist', () => {
    void (() => [
      onPg.atomic(() => {}, { current: 'append', isolationLevel: 'serializable', retry: { attempts: 3 }, timeout: 1 }),
      newContext(() => {}, { transaction: 'autocommit', unawaited: 'error', signal: AbortSignal.abort() }),
      onPg.newSession(() => {}, { hold: true, transaction: { readOnly: true } }),
      // @ts-expect-error no such mode
      onPg.atomic(() => {}, { current: 'nested' }),
      // @ts-expect-error no such isolation level
      onPg.begin({ isolationLevel: 'snapshot' }),
      // @ts-expect-error `begin` opens a transaction, so there is no autocommit
      onPg.begin('autocommit'),
      // @ts-expect-error modes are strings, not booleans
      onPg.closeSession(true),
      // @ts-expect-error what only middlewares of the package may say
      newContext(() => {}, { adoptable: true }),
    ])
    expectTypeOf<'autocommit'>().toExtend<TransactionOptions>()
    // @ts-expect-error a database has a name
    defineDatabase({ adapter: pgAdapter(() => new Pool()) })
    defineDatabase({
      name: 'main',
      adapter: pgAdapter(() => new Pool()),
      beforeSession: (database) => expectTypeOf(database).toEqualTypeOf<AmbientDatabase<Pool, Pool>>(),
      hooks: { afterBegin: (session) => expectTypeOf(session.db).toEqualTypeOf<Pool>() },
    })
  })
})

describe('databases', () => {
  it('can be passed where their types do not matter', () => {
    expectTypeOf(onKysely).toExtend<AmbientDatabase<unknown, unknown>>()
    expectTypeOf(onPg).toExtend<AmbientDatabase<Pool, unknown>>()
    expectTypeOf(onPg).not.toExtend<AmbientDatabase<Kysely<Tables>, unknown>>()
    expectTypeOf<DatabaseOptions<Pool, Pool, unknown>['name']>().toEqualTypeOf<string>()
  })

  it('have methods that can be taken off', () => {
    const { atomic, commit, shutdown } = onPg
    expectTypeOf(commit).toEqualTypeOf<() => Promise<void>>()
    expectTypeOf(shutdown).toExtend<NodeJS.SignalsListener>()
    expectTypeOf(() => atomic(() => 1)).returns.resolves.toEqualTypeOf<number>()
  })
})

describe('the suite', () => {
  it('takes the harness of any handle', () => {
    const harness = {} as AdapterHarness<Kysely<Tables>>
    const [first] = adapterSuite
    expectTypeOf(() => first?.run(harness)).returns.toEqualTypeOf<
      Promise<{ readonly skipped: string } | undefined> | undefined
    >()
  })
})

describe('postgresJsAdapter', () => {
  it('gives an Sql with the types of the one that the factory makes', () => {
    const point = { to: 600, from: [600], serialize: (value: number[]) => value, parse: () => [1, 2] }
    const main = defineDatabase({
      name: 'main',
      adapter: postgresJsAdapter(async (host: string) => postgres(host, { types: { point } })),
      host: 'postgres://localhost',
    })
    expectTypeOf(main.db).toEqualTypeOf<Sql<{ point: number[] }>>()
    expectTypeOf(main.connect).returns.resolves.toEqualTypeOf<Sql<{ point: number[] }>>()
    const sql = main.db
    expectTypeOf(sql<{ id: number }[]>`select ${sql.types.point([1])}`).resolves.items.toEqualTypeOf<{ id: number }>()
    expectTypeOf(sql.begin(() => [sql<{ id: number }[]>`select 1`])).resolves.toExtend<{ id: number }[][]>()
    // @ts-expect-error no such type was defined
    sql.types.circle(1)
    // @ts-expect-error it makes a pool of pg
    postgresJsAdapter(() => new Pool())
  })

  it('carries Drizzle', () => {
    const driver = postgresJsAdapter(() => postgres())
    const main = defineDatabase({
      name: 'main',
      adapter: drizzleAdapter(driver, (client) => drizzlePostgresJs({ client })),
    })
    expectTypeOf(main.db).toEqualTypeOf<PostgresJsDatabase & { $client: Sql }>()
    expectTypeOf(main.connect).returns.resolves.toEqualTypeOf<Sql>()
  })
})

describe('pgliteAdapter', () => {
  it('gives a PGlite, and the engine of the factory', () => {
    const main = defineDatabase({
      name: 'main',
      adapter: pgliteAdapter(async (host: string) => new PGlite(host)),
      host: './data',
    })
    expectTypeOf(main).toEqualTypeOf<AmbientDatabase<PGlite, PGlite>>()
    expectTypeOf(main.db.query<{ id: number }>('select 1 as id')).resolves.toHaveProperty('rows')
  })

  it('carries Drizzle with its exact type', () => {
    const driver = pgliteAdapter(() => new PGlite())
    const main = defineDatabase({
      name: 'main',
      adapter: drizzleAdapter(driver, (client) => drizzlePglite({ client })),
    })
    expectTypeOf(main.db).toEqualTypeOf<PgliteDatabase & { $client: PGlite }>()
  })
})

class OwnSequelize extends Sequelize {
  readonly own = true
}

describe('sequelizeAdapter', () => {
  const main = defineDatabase({ name: 'main', adapter: sequelizeAdapter(() => new OwnSequelize()) })

  it('gives exactly the type that the factory made', () => {
    expectTypeOf(main).toEqualTypeOf<AmbientDatabase<OwnSequelize, OwnSequelize>>()
    expectTypeOf(main.session()).toEqualTypeOf<AmbientSession<OwnSequelize>>()
    expectTypeOf(main.connect).returns.resolves.toEqualTypeOf<OwnSequelize>()
  })

  it('has models and transactions of Sequelize', () => {
    class User extends Model<{ name: string }> {}
    void (() => User.init({ name: DataTypes.TEXT }, { sequelize: main.db }))
    const inTransaction = () => main.db.transaction(async (transaction) => User.findAll({ transaction }))
    expectTypeOf(inTransaction).returns.resolves.toEqualTypeOf<User[]>()
    expectTypeOf(() => main.db.transaction()).returns.resolves.toEqualTypeOf<Transaction>()
  })

  it('is made by a function', () => {
    void (() => [
      sequelizeAdapter((host) => new Sequelize({ dialect: 'postgres', host })),
      // @ts-expect-error a function that makes the Sequelize
      sequelizeAdapter(new Sequelize()),
      // @ts-expect-error the Sequelize, not its options
      sequelizeAdapter(() => ({ dialect: 'postgres' })),
      // @ts-expect-error models are defined before anything could be awaited
      sequelizeAdapter(async () => new Sequelize()),
    ])
  })
})

describe('prismaAdapter', () => {
  const build = (pool: Pool) => new PrismaClient({ adapter: new PrismaPg(pool) })

  it('gives the client that was built, extensions included, and the engine of the driver', () => {
    const main = defineDatabase({
      name: 'main',
      adapter: prismaAdapter(
        pgAdapter(() => new OwnPool()),
        build,
      ),
    })
    expectTypeOf(main).toEqualTypeOf<AmbientDatabase<PrismaClient, OwnPool>>()
    const extended = defineDatabase({
      name: 'main',
      adapter: prismaAdapter(
        pgAdapter(() => new Pool()),
        (pool) => build(pool).$extends({ client: { $greet: () => 'hello' } }),
      ),
    })
    expectTypeOf(extended.db.$greet()).toEqualTypeOf<'hello'>()
    expectTypeOf(extended.db.item.count()).resolves.toEqualTypeOf<number>()
    expectTypeOf(main.db.tag.findUnique({ where: { id: 1 } }).item({ select: { n: true } })).resolves.toEqualTypeOf<{
      n: number
    } | null>()
  })

  it('stands over pg alone, and builds a client', () => {
    const mysql = mysql2Adapter(() => createPool({}))
    // @ts-expect-error there is no driver adapter of Prisma's on mysql2
    prismaAdapter(mysql, build)
    const driver = pgAdapter(() => new Pool())
    // @ts-expect-error a pool is no client
    prismaAdapter(driver, (pool) => pool)
  })

  it('gives one more handle over pg', () => {
    expectTypeOf(prismaHandle(onPg, build)).toEqualTypeOf<PrismaClient>()
    // @ts-expect-error its client is a Kysely
    prismaHandle(onKysely, build)
  })
})
