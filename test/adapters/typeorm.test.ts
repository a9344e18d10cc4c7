import { defineDatabase, newContext } from 'ambient-db'
import { typeormAdapter } from 'ambient-db/typeorm'
import { BaseEntity, DataSource, EntitySchema, type MigrationInterface, type QueryRunner } from 'typeorm'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'

interface Author {
  id: number
  name: string
  books?: Book[]
}

interface Book {
  id: number
  title: string
  author?: Author
}

const authors = new EntitySchema<Author>({
  name: 'authors',
  columns: { id: { type: 'int', primary: true, generated: true }, name: { type: 'text' } },
  relations: { books: { type: 'one-to-many', target: 'books', inverseSide: 'author', cascade: true } },
})

const books = new EntitySchema<Book>({
  name: 'books',
  columns: { id: { type: 'int', primary: true, generated: true }, title: { type: 'text', unique: true } },
  relations: { author: { type: 'many-to-one', target: 'authors', inverseSide: 'books', joinColumn: true } },
})

class Note extends BaseEntity {
  id!: number
  text!: string
}

const notes = new EntitySchema<Note>({
  name: 'Note',
  tableName: 'notes',
  target: Note,
  columns: { id: { type: 'int', primary: true, generated: true }, text: { type: 'text' } },
})

const migrated: boolean[] = []
class Migration1700000000000 implements MigrationInterface {
  async up(runner: QueryRunner) {
    migrated.push(runner.isTransactionActive)
    await runner.query('create table migrated (id int)')
  }
  async down() {}
}

const planned = new Error('planned')
let database: TestDatabase
let source: DataSource
let sent: string[]
const make = (): DataSource => {
  sent = []
  const log = (sql: string) => sent.push(sql)
  const ignore = () => {}
  return new DataSource({
    type: 'postgres',
    url: database.url,
    entities: [authors, books, notes],
    migrations: [Migration1700000000000],
    logging: ['query'],
    logger: {
      logQuery: log,
      logQueryError: ignore,
      logQuerySlow: ignore,
      logSchemaBuild: ignore,
      logMigration: ignore,
      log: ignore,
    },
  })
}
const main = defineDatabase({
  name: 'main',
  adapter: typeormAdapter(() => {
    source = make()
    return source
  }),
})

beforeAll(async () => {
  database = await createDatabase()
  const setup = await new DataSource({
    type: 'postgres',
    url: database.url,
    entities: [authors, books, notes],
  }).initialize()
  await setup.synchronize()
  await setup.destroy()
})
afterAll(async () => {
  await main.shutdown()
  await database.drop()
})
beforeEach(() => main.connect())
afterEach(() => database.witness.rows('truncate authors, books, notes restart identity'))

const titles = async () =>
  (await database.witness.rows<{ title: string }>('select title from books order by title')).map(({ title }) => title)
const names = async () =>
  (await database.witness.rows<{ name: string }>('select name from authors order by name')).map(({ name }) => name)

describe('a data source of TypeORM', () => {
  it('S2 has all its ways in the session: managers, repositories, entities, builders, runners', async () => {
    const write = async () => {
      await main.db.save(authors, { name: 'Ada', books: [{ title: 'one' }] })
      await source.getRepository(authors).save({ name: 'Bob' })
      await main.db.getRepository(authors).insert({ name: 'Cid' })
      await source.manager.insert(authors, { name: 'Dan' })
      await source.createQueryBuilder().insert().into(authors).values({ name: 'Eve' }).execute()
      await main.db.createQueryBuilder().update(authors).set({ name: 'Ede' }).where({ name: 'Eve' }).execute()
      await Note.save([Note.create({ text: 'note' })])
      await source.transaction((manager) => manager.insert(authors, { name: 'Fay' }))
      const runner = source.createQueryRunner()
      await runner.connect()
      await runner.query("insert into authors (name) values ('Gus')")
      await runner.release()
      expect(await main.db.find(authors, { relations: { books: true }, where: { name: 'Ada' } })).toEqual([
        { id: 1, name: 'Ada', books: [{ id: 1, title: 'one' }] },
      ])
      expect(await Note.count()).toBe(1)
      expect(await main.session().db.count(authors)).toBe(7)
      expect(await names()).toEqual([])
    }
    await expect(
      newContext(async () => {
        await write()
        throw planned
      }),
    ).rejects.toBe(planned)
    expect([await names(), await titles()]).toEqual([[], []])
    await database.witness.rows('truncate authors, books, notes restart identity')
    await newContext(write)
    expect(await names()).toEqual(['Ada', 'Bob', 'Cid', 'Dan', 'Ede', 'Fay', 'Gus'])
  })

  it('C2 refuses outside of a context, and what connect() gives works there', async () => {
    const missing = { code: 'AMBIENT_NO_CONTEXT' }
    await expect(main.db.find(authors)).rejects.toMatchObject(missing)
    await expect(source.getRepository(authors).find()).rejects.toMatchObject(missing)
    await expect(source.manager.save(authors, { name: 'Ada' })).rejects.toMatchObject(missing)
    await expect(source.transaction(async () => {})).rejects.toMatchObject(missing)
    await expect(Note.find()).rejects.toMatchObject(missing)
    await expect(source.runMigrations()).rejects.toMatchObject(missing)
    const engine = await main.connect()
    await engine.runMigrations()
    expect(migrated).toEqual([true])
    await engine.synchronize()
    await engine.getRepository(authors).save({ name: 'Ada' })
    await engine.transaction((manager) => manager.save(authors, { name: 'Bob' }))
    expect(await names()).toEqual(['Ada', 'Bob'])
  })

  it('S1 is initialized by the first use, which can be of anything that is asynchronous', async () => {
    const own = make()
    const late = defineDatabase({ name: 'late', adapter: typeormAdapter(() => own) })
    await newContext(async () => {
      expect(() => late.db.createQueryBuilder(authors, 'a')).toThrow(
        expect.objectContaining({ code: 'AMBIENT_UNSUPPORTED', message: expect.stringMatching(/await connect\(\)/) }),
      )
      expect(own.isInitialized).toBe(false)
      expect(await late.db.find(authors)).toEqual([])
      expect(await late.db.createQueryBuilder(authors, 'a').getCount()).toBe(0)
    })
    await late.shutdown()
    expect(own.isInitialized).toBe(false)
  })

  it('D4 may have been initialized, and may be destroyed, by others', async () => {
    const own = await make().initialize()
    const other = defineDatabase({ name: 'other', adapter: typeormAdapter(() => own) })
    await newContext(() => other.db.insert(authors, { name: 'Ada' }))
    await own.destroy()
    await other.shutdown()
    expect(await names()).toEqual(['Ada'])
  })

  it('D1 refuses a type that it does not know, before anything connects', async () => {
    const unknown = new DataSource({ type: 'better-sqlite3', database: ':memory:' })
    const other = defineDatabase({ name: 'other', adapter: typeormAdapter(() => unknown) })
    await expect(newContext(() => other.db.query('select 1'))).rejects.toMatchObject({
      code: 'AMBIENT_UNSUPPORTED',
      message: expect.stringMatching(/better-sqlite3/),
    })
    expect(unknown.isInitialized).toBe(false)
    await other.shutdown()
  })

  it('S10 refuses SQL that begins or ends a transaction, unsent, wherever it comes from', async () => {
    const refused = { code: 'AMBIENT_TRANSACTION_CONTROL' }
    await newContext(async () => {
      for (const sql of ['BEGIN', 'commit', 'ROLLBACK', 'savepoint a']) {
        await expect(main.db.query(sql)).rejects.toMatchObject(refused)
        await main.db.transaction(async (manager) => {
          await expect(manager.query(sql)).rejects.toMatchObject(refused)
        })
      }
      await main.db.insert(authors, { name: 'Ada' })
    })
    expect(await names()).toEqual(['Ada'])
  })

  it('S4 fails the transaction for an error that was swallowed, with the error of TypeORM as its cause', async () => {
    const unit = newContext(async () => {
      await main.db.insert(books, { title: 'one' })
      await main.db.insert(books, { title: 'one' }).catch(() => {})
    })
    const cause = { name: 'QueryFailedError', code: '23505' }
    await expect(unit).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', cause })
    expect(await titles()).toEqual([])
  })

  it('S8 has a transaction for what asks for one: locks, and builders with their own', async () => {
    await newContext(async () => {
      await main.db.insert(authors, { name: 'Ada' })
      const lock = { mode: 'pessimistic_write' } as const
      expect(await main.db.findOne(authors, { where: { name: 'Ada' }, lock })).toMatchObject({ name: 'Ada' })
      await main.db.createQueryBuilder().insert().into(authors).values({ name: 'Bob' }).useTransaction(true).execute()
    })
    expect(sent.filter((sql) => /transaction|savepoint/i.test(sql))).toEqual([])
    expect(await names()).toEqual(['Ada', 'Bob'])
  })

  it('O1 lets its streams be, and what was left of them', async () => {
    await newContext(async () => {
      await main.db.insert(authors, [{ name: 'Ada' }, { name: 'Bob' }])
      const stream = await main.db.createQueryBuilder(authors, 'a').orderBy('a.name').stream()
      const seen: string[] = []
      for await (const row of stream) seen.push((row as { a_name: string }).a_name)
      expect(seen).toEqual(['Ada', 'Bob'])
      await main.db.transaction(async (manager) => {
        const inner = await manager.createQueryBuilder(authors, 'a').stream()
        for await (const row of inner) seen.push((row as { a_name: string }).a_name)
      })
      expect(seen).toHaveLength(4)
    })
  })
})

describe('transactions of TypeORM', () => {
  it('A4 keeps the outer work when an inner transaction rolls back, also between parallel ones', async () => {
    await newContext(async () => {
      await main.db.insert(authors, { name: 'outer' })
      const results = await Promise.allSettled([
        main.db.transaction((manager) => manager.save(authors, { name: 'first' })),
        main.db.transaction(async (manager) => {
          await manager.save(authors, { name: 'lost' })
          throw planned
        }),
        main.db.transaction(async (manager) => {
          await manager.insert(authors, { name: 'second' })
          const inner = await Promise.allSettled([
            manager.transaction((own) => own.insert(authors, { name: 'inner' })),
            manager.transaction(async (own) => {
              await own.insert(authors, { name: 'lost as well' })
              throw planned
            }),
          ])
          expect(inner.map(({ status }) => status)).toEqual(['fulfilled', 'rejected'])
          await main.db.insert(authors, { name: 'ambient' })
        }),
      ])
      expect(results.map(({ status }) => status)).toEqual(['fulfilled', 'rejected', 'fulfilled'])
    })
    expect(await names()).toEqual(['ambient', 'first', 'inner', 'outer', 'second'])
  })

  it('A4 undoes what belongs to a transaction that failed, also what helpers did', async () => {
    const helper = () => source.getRepository(authors).insert({ name: 'helper' })
    await newContext(async () => {
      await main.db.insert(authors, { name: 'outer' })
      const failed = main.db.transaction(async () => {
        await helper()
        throw planned
      })
      await expect(failed).rejects.toBe(planned)
    })
    expect(await names()).toEqual(['outer'])
  })

  it('A4 lets query runners begin, nest and roll back by hand', async () => {
    await newContext(async () => {
      const runner = source.createQueryRunner()
      await runner.startTransaction()
      await runner.manager.insert(authors, { name: 'kept' })
      await runner.startTransaction()
      await runner.manager.insert(authors, { name: 'lost' })
      await runner.rollbackTransaction()
      await expect(main.db.insert(authors, { name: 'other' })).rejects.toMatchObject({
        code: 'AMBIENT_SESSION_BUSY',
      })
      await runner.commitTransaction()
      await runner.release()
      const left = source.createQueryRunner()
      await left.startTransaction()
      await left.manager.insert(authors, { name: 'left open' })
      await left.release()
    })
    expect(await names()).toEqual(['kept'])
  })

  it.each(['transaction', 'runner'])('A5 begins with its isolation level where nothing is open (%s)', async (how) => {
    const level = async (manager: { query(sql: string): Promise<{ transaction_isolation: string }[]> }) =>
      (await manager.query('show transaction_isolation'))[0]?.transaction_isolation
    await newContext(async () => {
      if (how === 'transaction') {
        expect(await main.db.transaction('SERIALIZABLE', level)).toBe('serializable')
      } else {
        const runner = source.createQueryRunner()
        await runner.startTransaction('SERIALIZABLE')
        expect(await level(runner)).toBe('serializable')
        await runner.commitTransaction()
        await runner.release()
      }
    })
    await newContext(async () => {
      await main.db.insert(authors, { name: 'Ada' })
      await expect(main.db.transaction('SERIALIZABLE', async () => {})).rejects.toMatchObject({
        code: 'AMBIENT_TRANSACTION_OPTIONS',
      })
    })
  })

  it('S8 saves an entity with all that hangs on it, or nothing, also without a transaction, and several at once', async () => {
    await newContext(
      async () => {
        const save = (name: string, ...own: string[]) =>
          main.db.save(authors, { name, books: own.map((title) => ({ title })) })
        const results = await Promise.allSettled([save('Ada', 'one'), save('Bob', 'two', 'one'), save('Cid', 'three')])
        expect(results.map(({ status }) => status)).toEqual(['fulfilled', 'rejected', 'fulfilled'])
      },
      { transaction: 'autocommit' },
    )
    expect(await names()).toEqual(['Ada', 'Cid'])
    expect(await titles()).toEqual(['one', 'three'])
  })
})
