import { defineDatabase, newContext } from 'ambient-db'
import { drizzleAdapter, drizzleHandle } from 'ambient-db/drizzle'
import { kyselyHandle } from 'ambient-db/kysely'
import { mysql2Adapter } from 'ambient-db/mysql2'
import { asc, sql, TransactionRollbackError } from 'drizzle-orm'
import { int, mysqlTable, serial, varchar } from 'drizzle-orm/mysql-core'
import { drizzle, type MySql2Database } from 'drizzle-orm/mysql2'
import { MysqlDialect } from 'kysely'
import { createPool, type Pool } from 'mysql2/promise'
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { statement } from '../support/drizzle.ts'
import { createMysqlDatabase, type MysqlDatabase } from '../support/mysql.ts'
import { startProxy, type WireProxy } from '../support/proxy.ts'
import { driverError, mysqlItems } from './drizzle-subject.ts'
import { type MysqlSubject, mysqlHarness } from './mysql-support.ts'
import { itHoldsTheSuite } from './support.ts'

type Handle = MySql2Database & { $client: Pool }

const repeats = mysqlTable('repeats', { n: int() })

const subject: MysqlSubject<Handle> = {
  define(pool, options) {
    const driver = mysql2Adapter(options.host === undefined ? () => pool() : (host: string) => pool(host))
    return defineDatabase({
      name: 'main',
      ...options,
      adapter: drizzleAdapter(driver, (client) => drizzle({ client })),
    })
  },
  query: (handle, text, parameters) => handle.execute(statement(text, parameters)).then(([rows]) => ({ rows })), // sent at once
  driverError,
  async *stream(handle) {
    // Many of each, because its stream has room for 16 rows, and fewer would be over before they are read.
    const select = handle.select({ id: mysqlItems.id }).from(mysqlItems).innerJoin(repeats, sql`true`)
    let last: number | undefined
    for await (const { id } of select.orderBy(asc(mysqlItems.id)).prepare().iterator()) {
      if (id !== last) yield id
      last = id
    }
  },
  transaction: (handle, work) =>
    handle.transaction((transaction) => work({ insert: async (id) => transaction.insert(mysqlItems).values({ id }) })),
}

describe('drizzleAdapter over mysql2Adapter holds the suite', () => {
  let database: MysqlDatabase
  let harness: Awaited<ReturnType<typeof mysqlHarness<Handle>>>
  beforeAll(async () => {
    database = await createMysqlDatabase()
    harness = await mysqlHarness(database, subject)
    await database.witness.rows('create table repeats (n int)')
    await database.witness.rows(`insert into repeats values ${Array(100).fill('(0)')}`)
  })
  afterAll(async () => {
    await harness.close()
    await database.drop()
  })

  itHoldsTheSuite(() => harness)
})

describe('Drizzle over mysql2', () => {
  const notes = mysqlTable('notes', { id: serial().primaryKey(), text: varchar({ length: 20 }) })
  const planned = new Error('planned')
  let database: MysqlDatabase
  let wire: WireProxy
  const driver = defineDatabase({
    name: 'main',
    adapter: mysql2Adapter(() => createPool({ uri: wire.url, connectionLimit: 2 })),
  })
  const db = drizzleHandle(driver, (client) => drizzle({ client }))
  // At import.
  const insertNote = db
    .insert(notes)
    .values({ text: sql.placeholder('text') })
    .prepare()
  const numbers = db.select({ n: sql<number>`seq` }).from(sql`seq_1_to_10000`)
  const texts = async () => {
    const rows = await database.witness.rows<{ text: string }>('select text from notes order by id')
    return rows.map(({ text }) => text)
  }
  const count = (pattern: RegExp) => wire.traffic.labels.filter((label) => pattern.test(label)).length

  beforeAll(async () => {
    database = await createMysqlDatabase()
    await database.witness.rows('create table notes (id serial primary key, text varchar(20) unique)')
    wire = await startProxy(database.url)
  })
  beforeEach(() => database.witness.rows('truncate notes'))
  afterAll(async () => {
    await driver.shutdown()
    await wire.close()
    await database.drop()
  })

  it('A4 shares one transaction with raw SQL and Kysely: one BEGIN, one COMMIT', async () => {
    const kysely = kyselyHandle<{ notes: { text: string } }>(driver, (pool) => new MysqlDialect({ pool }))
    wire.reset()
    await newContext(async () => {
      await driver.db.query("insert into notes (text) values ('raw')")
      expect(await db.insert(notes).values({ text: 'drizzle' }).$returningId()).toEqual([{ id: expect.any(Number) }])
      await kysely.insertInto('notes').values({ text: 'kysely' }).execute()
      await insertNote.execute({ text: 'prepared' })
      const undone = db.transaction(async (tx) => {
        await kysely.insertInto('notes').values({ text: 'undone' }).execute()
        await tx.insert(notes).values({ text: 'undone too' })
        tx.rollback()
      })
      await expect(undone).rejects.toBeInstanceOf(TransactionRollbackError)
      expect(await db.$count(notes)).toBe(4)
    })
    expect([count(/^> Query BEGIN/), count(/^> Query COMMIT/)]).toEqual([1, 1])
    expect(await texts()).toEqual(['raw', 'drizzle', 'kysely', 'prepared'])
  })

  it('A4 nests, also in parallel: an inner rollback keeps the outer work', async () => {
    await newContext(() =>
      db.transaction(async (outer) => {
        await insertNote.execute({ text: 'outer' })
        const inner = (text: string) =>
          outer.transaction(async (tx) => {
            await tx.insert(notes).values({ text })
            if (text === 'b') throw planned
          })
        const ends = await Promise.allSettled(['a', 'b', 'c'].map(inner))
        expect(ends.map(({ status }) => status)).toEqual(['fulfilled', 'rejected', 'fulfilled'])
      }),
    )
    expect(await texts()).toEqual(['outer', 'a', 'c'])
  })

  it('A7 sets the options of the transaction that it opens, and refuses others for one that is open', async () => {
    await newContext(async () => {
      wire.reset()
      const write = () => db.transaction((tx) => tx.insert(notes).values({ text: 'never' }), options)
      const options = { isolationLevel: 'read committed', accessMode: 'read only' } as const
      await expect(write()).rejects.toMatchObject({ cause: { errno: 1792 } }) // in a read-only transaction
      expect(count(/isolation level read committed/i)).toBe(1)
      const other = db.transaction(async () => {}, { isolationLevel: 'serializable' })
      await expect(other).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_OPTIONS' })
      const snapshot = db.transaction(async () => {}, { ...options, withConsistentSnapshot: true })
      await expect(snapshot).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_CONTROL' })
    })
  })

  it('S9 iterates inside the transaction, and goes on where a loop is left', async () => {
    await newContext(async () => {
      await insertNote.execute({ text: 'seen' })
      const seen: unknown[] = []
      for await (const { text } of db.select().from(notes).prepare().iterator()) seen.push(text)
      for await (const { n } of numbers.prepare().iterator()) if (n === 3) break
      await db.transaction(async (tx) => {
        for await (const { text } of tx.select().from(notes).prepare().iterator()) seen.push(text)
        await tx.insert(notes).values({ text: 'after' })
      })
      expect(seen).toEqual(['seen', 'seen'])
    })
    expect(await texts()).toEqual(['seen', 'after'])
  })

  it('S9 refuses statements beside an iterator, and an iterator is refused, by the code of the session', async () => {
    const outside = numbers.prepare().iterator()
    await expect(outside.next()).rejects.toMatchObject({ name: 'AmbientError', code: 'AMBIENT_NO_CONTEXT' })
    await newContext(async () => {
      const open = numbers.prepare().iterator()
      await open.next()
      await expect(insertNote.execute({ text: 'never' })).rejects.toMatchObject({ code: 'AMBIENT_STREAM_OPEN' })
      await expect(numbers.prepare().iterator().next()).rejects.toMatchObject({ code: 'AMBIENT_STREAM_OPEN' })
      await open.return?.(undefined)
      await insertNote.execute({ text: 'after' })
    })
    expect(await texts()).toEqual(['after'])
  })

  it('S9 throws what the server answers an iterator', async () => {
    await newContext(async () => {
      const failing = db.select({ n: sql`seq` }).from(sql`missing`).prepare().iterator()
      const error = await failing.next().catch((thrown: unknown) => thrown)
      expect(driverError(error)).toMatchObject({ errno: 1146 })
      await insertNote.execute({ text: 'after' })
    })
    expect(await texts()).toEqual(['after'])
  })
})
