import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type EventArgs, LockMode } from '@mikro-orm/core'
import { defineEntity, EntityManager, MikroORM, p, SqlEntityManager } from '@mikro-orm/postgresql'
import { MikroORM as SqliteOrm } from '@mikro-orm/sqlite'
import { type AmbientDatabase, defineDatabase, newContext, openContext } from 'ambient-db'
import { mikroOrmAdapter } from 'ambient-db/mikro-orm'
import { sandbox } from 'ambient-db/testing'
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { createDatabase } from '../support/postgres.ts'

const Author = defineEntity({
  name: 'Author',
  properties: {
    id: p.integer().primary(),
    name: p.string().unique(),
    books: () => p.oneToMany(Book).mappedBy('author'),
    tags: () => p.manyToMany(Tag),
  },
})
const Book = defineEntity({
  name: 'Book',
  properties: { id: p.integer().primary(), title: p.string(), author: () => p.manyToOne(Author) },
})
const Tag = defineEntity({ name: 'Tag', properties: { id: p.integer().primary() } })
const planned = new Error('planned')

/** What the tests use of a database on either engine; the manager for PostgreSQL stands for both. */
interface Subject {
  readonly main: AmbientDatabase<EntityManager, MikroORM>
  /** The names of authors that are committed, in the order of the alphabet. */
  names(): Promise<string[]>
  clear(): Promise<unknown>
  close(): Promise<unknown>
}

const entities = [Author, Book, Tag]
const tables = [
  'create table author (id integer primary key, name varchar(255) not null unique)',
  'create table book (id integer primary key, title varchar(255) not null, author_id integer not null references author)',
  'create table tag (id integer primary key)',
  'create table author_tags (author_id integer references author, tag_id integer references tag, primary key (author_id, tag_id))',
]
const select = 'select name from author order by name'

const subjects: Record<string, () => Promise<Subject>> = {
  async PostgreSQL() {
    const database = await createDatabase()
    const { rows } = database.witness
    for (const sql of tables) await rows(sql)
    const main = defineDatabase({
      name: 'main',
      adapter: mikroOrmAdapter(() => new MikroORM({ entities, clientUrl: database.url, logger: () => {} })),
    })
    return {
      main: main as unknown as Subject['main'],
      names: async () => (await rows<{ name: string }>(select)).map(({ name }) => name),
      clear: () => rows('truncate author, book, tag, author_tags'),
      async close() {
        await main.shutdown()
        await database.drop()
      },
    }
  },
  async SQLite() {
    const folder = await mkdtemp(join(tmpdir(), 'ambient-db-'))
    const dbName = join(folder, 'main.sqlite')
    const other = new SqliteOrm({ entities, dbName, logger: () => {} })
    const execute = <Row>(sql: string) => other.em.fork().execute<Row[]>(sql)
    await execute('pragma journal_mode = wal')
    for (const sql of tables) await execute(sql)
    const main = defineDatabase({
      name: 'main',
      adapter: mikroOrmAdapter(() => new SqliteOrm({ entities, dbName, logger: () => {} })),
    })
    return {
      main: main as unknown as Subject['main'],
      names: async () => (await execute<{ name: string }>(select)).map(({ name }) => name),
      async clear() {
        for (const table of ['author_tags', 'tag', 'book']) await execute(`delete from ${table}`)
        await execute('delete from author')
      },
      async close() {
        await main.shutdown()
        await other.close()
        await rm(folder, { recursive: true })
      },
    }
  },
}

describe.each(Object.entries(subjects))('mikroOrmAdapter on %s', (engine, make) => {
  let subject: Subject
  let main: Subject['main']
  beforeAll(async () => {
    subject = await make()
    main = subject.main
  })
  beforeEach(() => subject.clear())
  afterAll(() => subject.close())

  const create = (id: number, name: string, em: EntityManager = main.db) => em.create(Author, { id, name })
  const stored = async (id: number, name: string) => {
    await newContext(() => {
      create(id, name)
    })
  }
  const swallowed = async (work: Promise<unknown>) => {
    await expect(work).rejects.toBe(planned)
  }

  describe('sends what is pending', () => {
    it('C4 at the end of a context, which sends nothing before', async () => {
      await newContext(() => {
        create(1, 'Ada')
        expect(main.session().inTransaction).toBe(false)
      })
      expect(await subject.names()).toEqual(['Ada'])
    })

    it('C4 not when the context throws', async () => {
      const work = newContext(() => {
        create(1, 'Ada')
        throw planned
      })
      await swallowed(work)
      expect(await subject.names()).toEqual([])
    })

    it('C4 also changes of what was loaded, removals, and what is new in a relation', async () => {
      await stored(1, 'Ada')
      await stored(2, 'Eve')
      await newContext(async () => {
        const ada = await main.db.findOneOrFail(Author, 1, { populate: ['books'] })
        main.db.remove(await main.db.findOneOrFail(Author, 2))
        ada.name = 'Grace'
        await main.commit()
        ada.books.add(main.db.create(Book, { id: 1, title: 'One', author: ada }, { persist: false }))
      })
      expect(await subject.names()).toEqual(['Grace'])
      await newContext(async () => {
        expect(await main.db.count(Book)).toBe(1)
      })
    })

    it('C4 also what is only in a relation of many to many', async () => {
      await newContext(async () => {
        create(1, 'Ada')
        main.db.create(Tag, { id: 1 })
        await main.commit()
        const ada = await main.db.findOneOrFail(Author, 1, { populate: ['tags'] })
        ada.tags.add(await main.db.findOneOrFail(Tag, 1))
      })
      await newContext(async () => {
        expect(await main.db.execute('select * from author_tags')).toEqual([{ author_id: 1, tag_id: 1 }])
      })
    })

    it('S6 and is done with what only seems to have changed', async () => {
      await newContext(async () => {
        const ada = create(1, 'Ada')
        await main.commit()
        ada.books.setDirty()
        await main.commit()
        await main.closeSession()
      })
      expect(await subject.names()).toEqual(['Ada'])
    })

    it('S4 by commit(), and a failure of it rejects and keeps nothing', async () => {
      await stored(1, 'Ada')
      await newContext(async () => {
        create(2, 'Bea')
        await main.commit()
        expect(await subject.names()).toEqual(['Ada', 'Bea'])
        create(3, 'Cy')
        create(4, 'Ada')
        await expect(main.commit()).rejects.toThrow(/unique/i)
        expect(main.session().inTransaction).toBe(false)
      })
      expect(await subject.names()).toEqual(['Ada', 'Bea'])
    })

    it('S4 not what rollback() has made it forget', async () => {
      await newContext(async () => {
        create(1, 'Ada')
        await main.rollback()
        create(2, 'Bea')
      })
      expect(await subject.names()).toEqual(['Bea'])
    })

    it('S6 rather than dropping it when the session is closed', async () => {
      await newContext(async () => {
        create(1, 'Ada')
        await expect(main.closeSession()).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_OPEN' })
        await main.closeSession('commit')
        create(2, 'Bea')
        await main.closeSession('rollback')
      })
      expect(await subject.names()).toEqual(['Ada'])
    })

    it('K1 before the hooks of COMMIT, and what these leave as well', async () => {
      await newContext(() => {
        create(1, 'Ada')
        main.beforeCommit(async () => {
          expect(await main.db.execute(select)).toEqual([{ name: 'Ada' }])
          create(2, 'Bea')
        })
      })
      expect(await subject.names()).toEqual(['Ada', 'Bea'])
    })

    it('A1 before a block of its own, and at the end of it', async () => {
      await newContext(async () => {
        create(1, 'Ada')
        await main.atomic(async () => {
          expect(await subject.names()).toEqual(['Ada'])
          create(2, 'Bea')
        })
        expect(await subject.names()).toEqual(['Ada', 'Bea'])
        create(3, 'Cy')
        const raising = main.atomic(() => {}, { current: 'raise' })
        await expect(raising).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_OPEN' })
        await main.atomic(() => create(4, 'Di'), { current: 'rollback' })
      })
      expect(await subject.names()).toEqual(['Ada', 'Bea', 'Di'])
    })

    it('A1 A2 around a savepoint, whose rollback undoes its own alone', async () => {
      await newContext(async () => {
        create(1, 'Ada')
        const savepoint = main.session().savepoint(() => {
          create(2, 'Bea')
          throw planned
        })
        await swallowed(savepoint)
        await main.session().savepoint(() => {
          create(3, 'Cy')
        })
        await main.atomic(() => create(4, 'Di'), { current: 'append' })
      })
      expect(await subject.names()).toEqual(['Ada', 'Cy', 'Di'])
    })

    it('A5 once more in each attempt of a block', async () => {
      let attempts = 0
      const conflict = Object.assign(new Error('conflict'), { severity: 'ERROR', code: '40001' })
      const busy = Object.assign(new Error('busy'), { code: 'SQLITE_BUSY' })
      await newContext(() =>
        main.atomic(
          async () => {
            create(1, 'Ada')
            await main.db.flush()
            if (++attempts === 1) throw engine === 'SQLite' ? busy : conflict
          },
          { retry: { attempts: 2 } },
        ),
      )
      expect(await subject.names()).toEqual(['Ada'])
      expect(attempts).toBe(2)
    })

    it('C8 not any more when its context was aborted', async () => {
      const controller = new AbortController()
      const work = newContext(
        async () => {
          create(1, 'Ada')
          controller.abort(planned)
        },
        { signal: controller.signal },
      )
      await expect(work).rejects.toMatchObject({ code: 'AMBIENT_ABORTED' })
      expect(await subject.names()).toEqual([])
    })
  })

  describe('knows of a session what is true', () => {
    it('C1 gives each session an identity map of its own, the same by either handle', async () => {
      await stored(1, 'Ada')
      const find = () => newContext(() => main.db.findOne(Author, 1))
      const [one, another] = [await find(), await find()]
      expect(one === another).toBe(false) // `toBe` would read what is not loaded
      await newContext(async () => {
        const ada = await main.db.findOne(Author, 1)
        expect((await main.db.findOne(Author, 1)) === ada).toBe(true)
        expect((await main.session().db.findOne(Author, 1)) === ada).toBe(true)
        await main.newSession(async ({ db }) => {
          if (engine === 'PostgreSQL') expect((await db.findOne(Author, 1)) === ada).toBe(false)
        })
      })
    })

    it('C4 refuses managers, entities and repositories of a session that has ended', async () => {
      await stored(1, 'Ada')
      const context = openContext()
      const [em, ada] = await context.run(async () => {
        const found = await main.db.findOneOrFail(Author, 1)
        return [main.db.persist(found), found] as const
      })
      await context.settle('commit')
      const ended = { code: 'AMBIENT_CONTEXT_ENDED' }
      await newContext(async () => {
        expect(() => em.persist(ada)).toThrow(expect.objectContaining(ended))
        expect(() => em.remove(ada)).toThrow(expect.objectContaining(ended))
        await expect(em.find(Author, {})).rejects.toMatchObject(ended)
        await expect(ada.books.init()).rejects.toMatchObject(ended)
        expect(main.session().inTransaction).toBe(false)
      })
      expect(() => context.run(() => create(2, 'Bea'))).toThrow(expect.objectContaining(ended))
      await expect(context.run(() => main.db.find(Author, {}))).rejects.toMatchObject(ended)
      expect(await subject.names()).toEqual(['Ada'])
    })

    it('C2 refuses what is done outside of any context', async () => {
      expect(() => create(1, 'Ada')).toThrow(expect.objectContaining({ code: 'AMBIENT_NO_CONTEXT' }))
      await expect(main.db.find(Author, {})).rejects.toMatchObject({ code: 'AMBIENT_NO_CONTEXT' })
      await expect(main.db.transactional(async () => {})).rejects.toMatchObject({ code: 'AMBIENT_NO_CONTEXT' })
    })

    it('never loses a change of what a rollback has detached: it cannot commit', async () => {
      await stored(1, 'Ada')
      const work = newContext(async () => {
        const ada = await main.db.findOneOrFail(Author, 1)
        await swallowed(main.atomic(() => Promise.reject(planned), { current: 'savepoint' }))
        ada.name = 'Grace'
      })
      await expect(work).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED' })
      expect(await subject.names()).toEqual(['Ada'])
    })

    it('stores again what was new before a rollback, and changes of what was loaded again', async () => {
      await stored(1, 'Ada')
      await newContext(async () => {
        const bea = create(2, 'Bea')
        await main.db.flush()
        const before = await main.db.findOneOrFail(Author, 1)
        await main.rollback()
        main.db.persist(bea)
        const ada = await main.db.findOneOrFail(Author, 1)
        expect(ada === before).toBe(false)
        ada.name = 'Grace'
      })
      expect(await subject.names()).toEqual(['Bea', 'Grace'])
    })

    it('does not believe what a block has written that was rolled back', async () => {
      await stored(1, 'Ada')
      await newContext(async () => {
        const block = main.atomic(async () => {
          const ada = await main.db.findOneOrFail(Author, 1)
          ada.name = 'Grace'
          await main.db.flush()
          throw planned
        })
        await swallowed(block)
        expect(await main.db.findOneOrFail(Author, 1)).toMatchObject({ name: 'Ada' })
      })
      expect(await subject.names()).toEqual(['Ada'])
    })

    it('closes without a question when only unchanged entities are left', async () => {
      await stored(1, 'Ada')
      await newContext(async () => {
        await main.db.findOneOrFail(Author, 1, { populate: ['books'] })
        await main.commit()
        await main.closeSession()
        expect(main.session().inTransaction).toBe(false)
      })
    })
  })

  describe('flushes', () => {
    it('all or nothing, also where statements run on their own', async () => {
      await newContext(
        async () => {
          create(1, 'Ada')
          main.db.create(Book, { id: 1, title: 'One', author: main.db.getReference(Author, 99) })
          await expect(main.db.flush()).rejects.toThrow(/foreign key/i)
          expect(await subject.names()).toEqual([])
          create(2, 'Bea')
          await main.db.flush()
          expect(await subject.names()).toEqual(['Bea'])
          create(3, 'Cy')
          expect(await main.db.find(Author, {})).toHaveLength(2) // flushes first
          expect(await subject.names()).toEqual(['Bea', 'Cy'])
          create(4, 'Di')
        },
        { transaction: 'autocommit' },
      )
      expect(await subject.names()).toEqual(['Bea', 'Cy', 'Di'])
    })

    it('S4 lets an error that was swallowed keep nothing of its own, and nothing else from being kept', async () => {
      await stored(1, 'Ada')
      await newContext(async () => {
        await main.db.insert(Author, { id: 2, name: 'Bea' })
        create(3, 'Cy')
        create(4, 'Ada')
        await expect(main.db.flush()).rejects.toThrow(/unique/i)
      })
      expect(await subject.names()).toEqual(['Ada', 'Bea'])
    })

    it('A3 one after the other', async () => {
      await newContext(async () => {
        create(1, 'Ada')
        const first = main.db.flush()
        create(2, 'Bea')
        await Promise.all([first, main.db.flush(), main.db.find(Author, {})])
      })
      expect(await subject.names()).toEqual(['Ada', 'Bea'])
    })
  })

  describe('makes transactions of MikroORM savepoints', () => {
    it('A4 with a callback, whose rollback keeps the outer work', async () => {
      await newContext(async () => {
        create(1, 'Ada')
        await main.db.transactional((em) => {
          create(2, 'Bea', em)
        })
        const failing = main.db.transactional(async (em) => {
          create(3, 'Cy', em)
          create(4, 'Di') // the handle finds it as well
          await em.transactional(() => {
            create(5, 'Eve')
          })
          throw planned
        })
        await swallowed(failing)
      })
      expect(await subject.names()).toEqual(['Ada', 'Bea'])
    })

    it('A4 of which each has a manager that its callback finds, and what was pending before is outside', async () => {
      await newContext(async () => {
        create(1, 'Ada')
        const failing = main.db.transactional(async (em) => {
          const bea = create(2, 'Bea')
          expect(em.getUnitOfWork().getPersistStack().has(bea)).toBe(true)
          if (engine === 'PostgreSQL') {
            await newContext(() => expect(main.db.getUnitOfWork().getPersistStack().size).toBe(0))
          }
          throw planned
        })
        await swallowed(failing)
        const fork = main.db.fork()
        fork.resetTransactionContext()
        expect(await fork.find(Author, {})).toHaveLength(1) // still in the session
      })
      expect(await subject.names()).toEqual(['Ada'])
    })

    it('A4 in parallel, and one that joins', async () => {
      await newContext(async () => {
        await Promise.all(
          [1, 2, 3].map((id) => main.db.transactional((em) => em.insert(Author, { id, name: `${id}` }))),
        )
        await main.db.transactional((em) => em.insert(Author, { id: 4, name: '4' }), { propagation: 'required' })
      })
      expect(await subject.names()).toEqual(['1', '2', '3', '4'])
    })

    it('A4 between begin() and commit() or rollback(), also nested', async () => {
      await newContext(async () => {
        const em = main.db.fork()
        await em.begin()
        await expect(em.begin()).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_OPEN' })
        create(1, 'Ada', em)
        await em.flush()
        const inner = em.transactional(async (nested) => {
          await nested.insert(Author, { id: 2, name: 'Bea' })
          throw planned
        })
        await swallowed(inner)
        await em.transactional((nested) => nested.insert(Author, { id: 3, name: 'Cy' }))
        await em.commit()
        await em.begin()
        await em.insert(Author, { id: 4, name: 'Di' })
        await em.rollback()
        await em.insert(Author, { id: 5, name: 'Eve' })
        await expect(em.commit()).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_CONTROL' })
        await expect(em.rollback()).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_CONTROL' })
      })
      expect(await subject.names()).toEqual(['Ada', 'Cy', 'Eve'])
    })

    it('A7 with options that agree', async () => {
      await newContext(
        async () => {
          await main.db.find(Author, {})
          const other = main.db.transactional(async () => {}, { readOnly: true })
          await expect(other).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_OPTIONS' })
          await main.db.transactional(async () => {}, { isolationLevel: 'serializable' })
          const unknown = main.db.transactional(async () => {}, { isolationLevel: 'snapshot' })
          await expect(unknown).rejects.toMatchObject({ code: 'AMBIENT_UNSUPPORTED' })
        },
        { transaction: { isolationLevel: 'serializable' } },
      )
    })

    it.each(['requires_new', 'not_supported'] as const)('A4 but none with propagation %s', async (propagation) => {
      await newContext(async () => {
        const work = main.db.transactional(async () => {}, { propagation })
        await expect(work).rejects.toMatchObject({ code: 'AMBIENT_UNSUPPORTED' })
      })
    })

    it('S10 refuses SQL that ends the transaction', async () => {
      await newContext(async () => {
        for (const sql of ['commit', 'ROLLBACK', 'begin', 'savepoint a']) {
          await expect(main.db.execute(sql)).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_CONTROL' })
        }
      })
    })
  })

  describe('serves all of a manager in the session', () => {
    it('forks, repositories, query builders, Kysely and streams', async () => {
      const repository = main.db.getRepository(Author)
      await newContext(async () => {
        await main.db.insert(Author, { id: 1, name: 'Ada' })
        expect(await main.db.fork().find(Author, {})).toHaveLength(1)
        expect(await repository.findAll()).toHaveLength(1)
        expect(await main.db.createQueryBuilder(Author).where({ id: 1 }).getResultList()).toHaveLength(1)
        const kysely = main.db.getKysely<{ author: { id: number; name: string } }>()
        await kysely.insertInto('author').values({ id: 2, name: 'Bea' }).execute()
        expect(await kysely.selectFrom('author').selectAll().execute()).toHaveLength(2)
        await kysely.transaction().execute((trx) => trx.deleteFrom('author').where('id', '=', 2).execute())
        const streamed: string[] = []
        for await (const { name } of main.db.stream(Author, { orderBy: { id: 1 } })) streamed.push(name)
        expect(streamed).toEqual(['Ada'])
        const fork = main.db.fork()
        create(3, 'Cy', fork)
        await fork.flush()
        await main.rollback()
      })
      expect(await subject.names()).toEqual([])
    })

    it('its events, and errors that are those of MikroORM', async () => {
      await stored(1, 'Ada')
      const flushed: string[] = []
      const { em } = await main.connect()
      em.getEventManager().registerSubscriber({
        getSubscribedEntities: () => [Author],
        afterCreate: async ({ entity }: EventArgs<{ name: string }>) => {
          flushed.push(entity.name)
        },
      })
      await stored(2, 'Bea')
      expect(flushed).toEqual(['Bea'])
      await newContext(async () => {
        const error = await main.db.insert(Author, { id: 3, name: 'Ada' }).catch((thrown: unknown) => thrown)
        expect(error).toMatchObject({ name: 'UniqueConstraintViolationException', cause: expect.anything() })
        if (engine === 'SQLite') return
        await expect(main.db.find(Author, {})).rejects.toMatchObject({
          code: 'AMBIENT_TRANSACTION_ABORTED',
          cause: error,
        })
        await main.rollback()
      })
    })

    it('locks', async () => {
      await stored(1, 'Ada')
      await newContext(async () => {
        const lockMode = engine === 'SQLite' ? LockMode.NONE : LockMode.PESSIMISTIC_WRITE
        expect(await main.db.findOneOrFail(Author, 1, { lockMode })).toMatchObject({ name: 'Ada' })
        expect(main.db.isInTransaction()).toBe(true)
      })
    })

    it('and what the session cannot do is refused', async () => {
      await newContext(async () => {
        expect(() => main.db.setSessionContext({ variables: { tenant: 1 } })).toThrow()
      })
      expect(main.db).toBeInstanceOf(engine === 'SQLite' ? SqlEntityManager : EntityManager)
      expect((main.db as { then?: unknown }).then).toBeUndefined()
    })

    it('in a sandbox', async () => {
      const box = sandbox(main)
      await box.begin()
      try {
        await stored(1, 'Ada')
        await newContext(async () => {
          expect(await main.db.find(Author, {})).toHaveLength(1)
          create(2, 'Bea')
          await main.commit()
          create(3, 'Cy')
          await main.rollback()
        })
        await expect(stored(4, 'Ada')).rejects.toThrow(/unique/i)
        expect((await main.db.execute<unknown[]>(select)).length).toBe(2)
      } finally {
        await box.rollback()
      }
      expect(await subject.names()).toEqual([])
    })
  })
})

describe('mikroOrmAdapter over MikroORM.init', () => {
  it('waits for it where it can, and says what to do where it cannot', async () => {
    const options = { entities, dbName: ':memory:', logger: () => {} }
    const main = defineDatabase({ name: 'main', adapter: mikroOrmAdapter(() => SqliteOrm.init(options)) })
    await newContext(async () => {
      const early = { code: 'AMBIENT_UNSUPPORTED', message: expect.stringContaining('await connect()') }
      expect(() => main.db.create(Author, { id: 1, name: 'Ada' })).toThrow(expect.objectContaining(early))
      expect(() => main.db.createQueryBuilder(Author)).toThrow(expect.objectContaining(early))
      expect(await main.db.execute('select 1 as one')).toEqual([{ one: 1 }])
      expect(main.db.create(Author, { id: 1, name: 'Ada' }).name).toBe('Ada')
      await main.rollback()
    })
    await main.shutdown()
  })

  it('tries again when it has failed', async () => {
    let calls = 0
    const open = async () => {
      if (++calls === 1) throw planned
      return SqliteOrm.init({ entities, dbName: ':memory:', logger: () => {} })
    }
    const main = defineDatabase({ name: 'main', adapter: mikroOrmAdapter(open) })
    await newContext(async () => {
      await expect(main.db.execute('select 1')).rejects.toBe(planned)
      await main.db.execute('select 1')
    })
    await main.shutdown()
  })
})
