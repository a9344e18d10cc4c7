import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { DatabaseSync } from 'node:sqlite'
import { PGlite } from '@electric-sql/pglite'
import { defineEntity, MikroORM, p } from '@mikro-orm/postgresql'
import { MikroORM as SqliteOrm } from '@mikro-orm/sqlite'
import { type AmbientDatabase, defineDatabase, newContext } from 'ambient-db'
import { drizzleAdapter } from 'ambient-db/drizzle'
import { knexAdapter } from 'ambient-db/knex'
import { kyselyAdapter } from 'ambient-db/kysely'
import { mikroOrmAdapter } from 'ambient-db/mikro-orm'
import { mysql2Adapter } from 'ambient-db/mysql2'
import { pgAdapter } from 'ambient-db/pg'
import { pgliteAdapter } from 'ambient-db/pglite'
import { postgresJsAdapter } from 'ambient-db/postgres-js'
import { sequelizeAdapter } from 'ambient-db/sequelize'
import { sandbox } from 'ambient-db/testing'
import { typeormAdapter } from 'ambient-db/typeorm'
import { drizzle } from 'drizzle-orm/node-postgres'
import knex from 'knex'
import { CompiledQuery, type Kysely, PostgresDialect, SqliteDialect } from 'kysely'
import { createPool } from 'mysql2/promise'
import { Pool, type PoolConfig } from 'pg'
import postgres, { type Sql } from 'postgres'
import { Sequelize } from 'sequelize'
import { DataSource, type EntityManager } from 'typeorm'
import { afterAll, beforeAll, describe, expect, it, type TestContext } from 'vitest'
import { statement } from '../support/drizzle.ts'
import { createMysqlDatabase } from '../support/mysql.ts'
import { createDatabase } from '../support/postgres.ts'
import { forKysely } from '../support/sqlite.ts'

/** A database with the tables `notes (id)`, and `children (parent)` whose foreign key to `parents (id)` is deferred. */
interface Subject {
  readonly main: AmbientDatabase<unknown, unknown>
  run(sql: string): Promise<unknown>
  ids(): Promise<number[]>
  /** Those that are committed. */
  witness(): Promise<number[]>
  close(): Promise<unknown>
}

const select = 'select id from notes order by id'
const idsOf = (rows: unknown) => (rows as { id: number }[]).map(({ id }) => Number(id))
const tables = [
  'create table notes (id int primary key)',
  'create table parents (id int primary key)',
  'create table children (parent int references parents deferrable initially deferred)',
]

async function onPostgres(
  define: (pool: () => Pool, url: string) => AmbientDatabase<unknown, unknown>,
  run: (db: never, sql: string) => Promise<unknown>,
  config: PoolConfig = {},
): Promise<Subject> {
  const database = await createDatabase()
  for (const sql of tables) await database.witness.rows(sql)
  const main = define(() => new Pool({ connectionString: database.url, ...config }), database.url)
  const rows = async (sql: string) => {
    const result = (await run(main.db as never, sql)) as { rows: unknown }
    return result.rows
  }
  return {
    main,
    run: rows,
    ids: async () => idsOf(await rows(select)),
    witness: async () => idsOf(await database.witness.rows(select)),
    async close() {
      await main.shutdown()
      await database.drop()
    },
  }
}

async function onSqlite(): Promise<Subject> {
  const folder = await mkdtemp(join(tmpdir(), 'ambient-db-'))
  const file = join(folder, 'main.sqlite')
  const other = new DatabaseSync(file)
  other.exec('pragma journal_mode = wal')
  for (const sql of tables) other.exec(sql)
  const adapter = kyselyAdapter<never>(() => new SqliteDialect({ database: forKysely(new DatabaseSync(file)) }))
  const main = defineDatabase({ name: 'main', adapter })
  const run = async (sql: string) => (await main.db.executeQuery(CompiledQuery.raw(sql))).rows
  return {
    main,
    run,
    ids: async () => idsOf(await run(select)),
    witness: async () => idsOf(other.prepare(select).all()),
    async close() {
      await main.shutdown()
      other.close()
      await rm(folder, { recursive: true })
    },
  }
}

const Note = defineEntity({ name: 'Note', properties: { id: p.integer().primary() } })

async function onMikroSqlite(): Promise<Subject> {
  const folder = await mkdtemp(join(tmpdir(), 'ambient-db-'))
  const dbName = join(folder, 'main.sqlite')
  const open = () => new SqliteOrm({ entities: [Note], dbName, logger: () => {} })
  const other = open()
  await other.em.fork().execute('pragma journal_mode = wal')
  for (const sql of tables) await other.em.fork().execute(sql)
  const main = defineDatabase({ name: 'main', adapter: mikroOrmAdapter(open) })
  const run = (sql: string) => main.db.execute(sql)
  return {
    main,
    run,
    ids: async () => idsOf(await run(select)),
    witness: async () => idsOf(await other.em.fork().execute(select)),
    async close() {
      await main.shutdown()
      await other.close()
      await rm(folder, { recursive: true })
    },
  }
}

async function onPGlite(): Promise<Subject> {
  const engine = new PGlite()
  for (const sql of tables) await engine.exec(sql)
  const main = defineDatabase({ name: 'main', adapter: pgliteAdapter(() => engine) })
  const run = async (sql: string) => (await main.db.query(sql)).rows
  return {
    main,
    run,
    ids: async () => idsOf(await run(select)),
    witness: async () => idsOf((await engine.query(select)).rows),
    close: () => main.shutdown(),
  }
}

async function onMysql(): Promise<Subject> {
  const database = await createMysqlDatabase()
  for (const sql of tables.slice(0, 2)) await database.witness.rows(sql)
  const main = defineDatabase({ name: 'main', adapter: mysql2Adapter(() => createPool({ uri: database.url })) })
  const run = async (sql: string) => (await main.db.query(sql))[0]
  return {
    main,
    run,
    ids: async () => idsOf(await run(select)),
    witness: async () => idsOf(await database.witness.rows(select)),
    async close() {
      await main.shutdown()
      await database.drop()
    },
  }
}

const query = (db: Pool, sql: string) => db.query(sql)
const execute = (db: Kysely<never>, sql: string) => db.executeQuery(CompiledQuery.raw(sql))
const overPg = (pool: () => Pool) => defineDatabase({ name: 'main', adapter: pgAdapter(pool) })

const subjects: Record<string, () => Promise<Subject>> = {
  pg: () => onPostgres(overPg, query),
  'pg with a pipelined pool': () => onPostgres(overPg, query, { pipeline: true } as PoolConfig),
  'postgres.js': () =>
    onPostgres(
      (_, url) => {
        const adapter = postgresJsAdapter(() => postgres(url, { onnotice() {} }))
        return defineDatabase({ name: 'main', adapter })
      },
      async (db: Sql, sql) => ({ rows: await db.unsafe(sql) }),
    ),
  'Drizzle over pg': () =>
    onPostgres(
      (pool) =>
        defineDatabase({ name: 'main', adapter: drizzleAdapter(pgAdapter(pool), (client) => drizzle({ client })) }),
      (db: { execute(sql: unknown): Promise<unknown> }, sql) => db.execute(statement(sql)),
    ),
  'Kysely over pg': () =>
    onPostgres(
      (pool) =>
        defineDatabase({
          name: 'main',
          adapter: kyselyAdapter<never>(pgAdapter(pool), (client) => new PostgresDialect({ pool: client })),
        }),
      execute,
    ),
  'Kysely over a bare PostgresDialect': () =>
    onPostgres(
      (pool) =>
        defineDatabase({ name: 'main', adapter: kyselyAdapter<never>(() => new PostgresDialect({ pool: pool() })) }),
      execute,
    ),
  'Knex on PostgreSQL': () =>
    onPostgres(
      (_pool, connection) =>
        defineDatabase({ name: 'main', adapter: knexAdapter(() => knex({ client: 'pg', connection })) }),
      (db: { raw(sql: string): Promise<unknown> }, sql) => db.raw(sql),
    ),
  'Sequelize on PostgreSQL': () =>
    onPostgres(
      (_pool, url) =>
        defineDatabase({ name: 'main', adapter: sequelizeAdapter(() => new Sequelize(url, { logging: false })) }),
      async (db: Sequelize, sql) => ({ rows: (await db.query(sql))[0] }),
    ),
  'TypeORM on PostgreSQL': () =>
    onPostgres(
      (_pool, url) =>
        defineDatabase({ name: 'main', adapter: typeormAdapter(() => new DataSource({ type: 'postgres', url })) }),
      async (db: EntityManager, sql) => ({ rows: await db.query(sql) }),
    ),
  'MikroORM on PostgreSQL': () =>
    onPostgres(
      (_pool, clientUrl) =>
        defineDatabase({ name: 'main', adapter: mikroOrmAdapter(() => new MikroORM({ entities: [Note], clientUrl })) }),
      async (db: { execute(sql: string): Promise<unknown> }, sql) => ({ rows: await db.execute(sql) }),
    ),
  'MikroORM on SQLite': onMikroSqlite,
  'Kysely on SQLite': onSqlite,
  PGlite: onPGlite,
  mysql2: onMysql,
}

describe.each(Object.entries(subjects))('a sandbox over %s', (name, make) => {
  let subject: Subject
  beforeAll(async () => {
    subject = await make()
  }, 60_000)
  afterAll(() => subject.close())

  async function inSandbox(work: (box: { insert(id: number): Promise<unknown> }) => Promise<void>): Promise<void> {
    const box = sandbox(subject.main)
    await box.begin()
    try {
      await work({ insert: (id) => subject.run(`insert into notes values (${id})`) })
    } finally {
      await box.rollback()
    }
    expect(await subject.witness()).toEqual([])
  }

  it('shows what units committed and undoes what they rolled back, and keeps nothing', () =>
    inSandbox(async ({ insert }) => {
      const { main, ids } = subject
      await insert(1)
      await Promise.allSettled(
        [2, 3, 4].map((id) =>
          newContext(async () => {
            await insert(id)
            await main.commit()
            await insert(id + 10)
            if (id === 3) throw new Error('no')
          }),
        ),
      )
      await newContext(() => main.atomic(() => insert(5)))
      expect(await ids()).toEqual([1, 2, 3, 4, 5, 12, 14])
    }))

  it('survives statements that fail', () =>
    inSandbox(async ({ insert }) => {
      await insert(1)
      await expect(insert(1)).rejects.toThrow()
      await newContext(async () => {
        await insert(2)
        await insert(2)
      }).catch(() => {})
      await insert(3)
      expect(await subject.ids()).toEqual([1, 3])
    }))

  it('checks deferred constraints at the simulated commit', (test: TestContext) => {
    if (name === 'mysql2') test.skip('MySQL has no deferred constraints')
    return inSandbox(async ({ insert }) => {
      const orphaned = newContext(async () => {
        await insert(1)
        await subject.run('insert into children values (1)')
      })
      await expect(orphaned).rejects.toThrow(/foreign key/i)
      await newContext(async () => {
        await subject.run('insert into children values (2)')
        await subject.run('insert into parents values (2)')
        await insert(2)
      })
      expect(await subject.ids()).toEqual([2])
    })
  })

  it('can be opened again and again', async () => {
    for (const id of [1, 1, 1]) {
      await inSandbox(async ({ insert }) => {
        await newContext(() => insert(id))
        expect(await subject.ids()).toEqual([1])
      })
    }
  })
})
