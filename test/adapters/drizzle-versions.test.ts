import { defineDatabase, newContext } from 'ambient-db'
import { drizzleAdapter, drizzleHandle } from 'ambient-db/drizzle'
import { mysql2Adapter } from 'ambient-db/mysql2'
import { pgAdapter } from 'ambient-db/pg'
import { eq, relations, sql } from 'drizzle-orm'
import { int, mysqlTable, varchar } from 'drizzle-orm/mysql-core'
import { drizzle as drizzleMysql } from 'drizzle-orm/mysql2'
import { drizzle } from 'drizzle-orm/node-postgres'
import { integer, pgTable, text } from 'drizzle-orm/pg-core'
import { defineRelations, sql as nextSql } from 'drizzle-orm-next'
import { drizzle as drizzleNext } from 'drizzle-orm-next/node-postgres'
import { integer as nextInteger, pgTable as nextTable, text as nextText } from 'drizzle-orm-next/pg-core'
import { createPool } from 'mysql2/promise'
import { Pool } from 'pg'
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { createMysqlDatabase, type MysqlDatabase } from '../support/mysql.ts'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'

const planned = new Error('planned')

const users = pgTable('users', { id: integer().primaryKey(), name: text().notNull() })
const posts = pgTable('posts', { id: integer().primaryKey(), author: integer().notNull(), title: text().notNull() })
const schema = {
  users,
  posts,
  usersRelations: relations(users, ({ many }) => ({ posts: many(posts) })),
  postsRelations: relations(posts, ({ one }) => ({
    author: one(users, { fields: [posts.author], references: [users.id] }),
  })),
}

const nextUsers = nextTable('users', { id: nextInteger().primaryKey(), name: nextText().notNull() })
const nextPosts = nextTable('posts', {
  id: nextInteger().primaryKey(),
  author: nextInteger().notNull(),
  title: nextText().notNull(),
})
const nextRelations = defineRelations({ users: nextUsers, posts: nextPosts }, (r) => ({
  users: { posts: r.many.posts({ from: r.users.id, to: r.posts.author }) },
}))

describe('relational queries on PostgreSQL', () => {
  let database: TestDatabase
  let pool: Pool
  const main = defineDatabase({ name: 'main', adapter: pgAdapter(() => pool) })
  const db = drizzleHandle(main, (client) => drizzle({ client, schema }))
  const next = drizzleHandle(main, (client) => drizzleNext({ client, relations: nextRelations }))

  // At import.
  const byName = db.query.users
    .findFirst({ where: eq(users.name, sql.placeholder('name')), with: { posts: { columns: { title: true } } } })
    .prepare('user_by_name')
  const nextByName = next.query.users
    .findFirst({ where: { name: nextSql.placeholder('name') }, with: { posts: { columns: { title: true } } } })
    .prepare('next_user_by_name')

  const ada = { id: 1, name: 'Ada', posts: [{ title: 'Notes' }, { title: 'Engines' }] }

  beforeAll(async () => {
    database = await createDatabase()
    await database.witness.rows('create table users (id int primary key, name text not null)')
    await database.witness.rows('create table posts (id int primary key, author int not null, title text not null)')
    pool = new Pool({ connectionString: database.url })
  })
  beforeEach(() => database.witness.rows('truncate users, posts'))
  afterAll(async () => {
    await main.shutdown()
    await database.drop()
  })

  const insert = async () => {
    await db.insert(users).values({ id: 1, name: 'Ada' })
    await next.insert(nextPosts).values([
      { id: 1, author: 1, title: 'Notes' },
      { id: 2, author: 1, title: 'Engines' },
    ])
  }

  it('S2 see what the session has written, whichever Drizzle wrote it', async () => {
    const work = newContext(async () => {
      await insert()
      const columns = { title: true } as const
      expect(await db.query.users.findMany({ with: { posts: { columns } } })).toEqual([ada])
      expect(await next.query.users.findMany({ with: { posts: { columns } } })).toEqual([ada])
      expect(await db.query.posts.findFirst({ with: { author: true } })).toMatchObject({ author: { name: 'Ada' } })
      throw planned
    })
    await expect(work).rejects.toBe(planned)
    expect(await database.witness.rows('select * from users')).toEqual([])
  })

  it('run in the session of whoever executes them, if they were prepared at import', async () => {
    await newContext(async () => {
      await insert()
      for (const prepared of [byName, nextByName]) {
        expect(await prepared.execute({ name: 'Ada' })).toEqual(ada)
        expect(await newContext(() => prepared.execute({ name: 'Ada' }))).toBeUndefined() // not committed yet
      }
    })
    await newContext(async () => expect(await byName.execute({ name: 'Ada' })).toEqual(ada))
  })

  it('A4 belong to the native transaction that they are in', async () => {
    await newContext(async () => {
      const work = db.transaction(async (tx) => {
        await insert()
        expect(await tx.query.users.findFirst()).toEqual({ id: 1, name: 'Ada' })
        expect(await next.query.users.findFirst()).toEqual({ id: 1, name: 'Ada' })
        tx.rollback()
      })
      await expect(work).rejects.toThrow('Rollback')
      expect(await db.query.users.findMany()).toEqual([])
      expect(await next.transaction((tx) => tx.query.users.findMany())).toEqual([])
    })
  })

  it('C2 are refused outside any context', async () => {
    const refused = { code: 'AMBIENT_NO_CONTEXT' }
    await expect(db.query.users.findMany()).rejects.toMatchObject(refused)
    await expect(next.query.users.findMany()).rejects.toMatchObject(refused)
    await expect(byName.execute({ name: 'Ada' })).rejects.toMatchObject(refused)
    await expect(nextByName.execute({ name: 'Ada' })).rejects.toMatchObject(refused)
  })
})

describe('queries on MySQL', () => {
  let database: MysqlDatabase
  beforeAll(async () => {
    database = await createMysqlDatabase()
    await database.witness.rows('create table users (id int primary key, name varchar(20) not null)')
  })
  afterAll(() => database.drop())

  it('S9 refuse what comes behind an iterator that 0.45 has left open in a transaction, rather than hang', async () => {
    const main = defineDatabase({ name: 'main', adapter: mysql2Adapter(() => createPool({ uri: database.url })) })
    const db = drizzleHandle(main, (client) => drizzleMysql({ client }))
    await newContext(async () => {
      const left = db.transaction(async (tx) => {
        for await (const _ of tx.select({ n: sql`seq` }).from(sql`seq_1_to_10000`).prepare().iterator()) break
        await tx.execute('select 1')
      })
      await expect(left).rejects.toMatchObject({ code: 'AMBIENT_STREAM_OPEN' })
      await db.execute('select 1')
    })
    await main.shutdown()
  })

  it('S2 see what the session has written', async () => {
    const table = mysqlTable('users', { id: int().primaryKey(), name: varchar({ length: 20 }).notNull() })
    const main = defineDatabase({
      name: 'main',
      adapter: drizzleAdapter(
        mysql2Adapter(() => createPool({ uri: database.url })),
        (client) => drizzleMysql({ client, schema: { users: table }, mode: 'default' }),
      ),
    })
    const work = newContext(async () => {
      await main.db.insert(table).values({ id: 1, name: 'Ada' })
      expect(await main.db.query.users.findMany()).toEqual([{ id: 1, name: 'Ada' }])
      throw planned
    })
    await expect(work).rejects.toBe(planned)
    expect(await database.witness.rows('select * from users')).toEqual([])
    await main.shutdown()
  })
})
