import { PrismaPg } from '@prisma/adapter-pg'
import { defineDatabase, isAmbientError, newContext } from 'ambient-db'
import { kyselyHandle } from 'ambient-db/kysely'
import { pgAdapter } from 'ambient-db/pg'
import { prismaAdapter, prismaHandle } from 'ambient-db/prisma'
import { PostgresDialect } from 'kysely'
import { Pool, type PoolClient, type QueryConfig } from 'pg'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { Prisma, PrismaClient } from '../../.tools/prisma-client/client.ts'
import { gate, until } from '../support/gate.ts'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'
import { tables } from '../support/prisma/tables.ts'

const planned = new Error('planned')
const known = Prisma.PrismaClientKnownRequestError

let database: TestDatabase
let pool: Pool
let sent: string[]
const warnings: Error[] = []
const listen = (warning: Error) => warnings.push(warning)
let built = 0

/** A pool that tells what is sent. */
function listeningPool(): Pool {
  const made = new Pool({ connectionString: database.url, max: 4 })
  made.on('connect', (client) => {
    const query = client.query.bind(client) as (...args: unknown[]) => never
    client.query = (...args: unknown[]) => {
      const [config] = args as [string | QueryConfig]
      sent.push(typeof config === 'string' ? config : config.text)
      return query(...args)
    }
  })
  pool = made
  return made
}

const makeClient = (virtual: Pool) => {
  built++
  return new PrismaClient({ adapter: new PrismaPg(virtual) })
}

let main = define()
function define() {
  return defineDatabase({ name: 'main', adapter: prismaAdapter(pgAdapter(listeningPool), makeClient) })
}

beforeAll(async () => {
  database = await createDatabase()
  await database.witness.rows(tables)
  process.on('warning', listen)
})
afterAll(async () => {
  await database.drop()
  process.off('warning', listen)
  expect(warnings).toEqual([]) // pg warns once, of a query that it has to queue
})
beforeEach(() => {
  sent = []
  main = define()
})
afterEach(async () => {
  await main.shutdown()
  await database.witness.rows('truncate items cascade')
})

async function ids(): Promise<number[]> {
  const rows = await database.witness.rows<{ id: number }>('select id from items order by id')
  return rows.map(({ id }) => id)
}

/** The client, one that is extended, or that of a transaction. */
interface Inserter {
  readonly item: { create(args: { data: { id: number } }): Prisma.PrismaPromise<{ id: number; n: number }> }
}
const insert = (id: number, db: Inserter = main.db) => db.item.create({ data: { id } })
const failing = (db: Pick<PrismaClient, '$executeRaw'> = main.db) => db.$executeRaw`select * from missing`
const ambient = (code: string) => expect.objectContaining({ name: 'AmbientError', code })

describe('prismaAdapter', () => {
  it('S1 sends nothing, and makes one client, for handles alone', async () => {
    const before = built
    await newContext(async () => {
      const { db } = main.session()
      expect(db).not.toBe(main.db)
      expect(Reflect.get(db.item, '$parent')).toBe(db)
      void main.db.item.create({ data: { id: 1 } }) // nobody awaits it, so nothing runs: as in Prisma
    })
    expect({ sent, made: built - before }).toEqual({ sent: [], made: 0 })
    expect(await Promise.resolve(main.db)).toBe(main.db)
  })

  it('C2 refuses an operation without a context', async () => {
    await expect(insert(1)).rejects.toThrow(ambient('AMBIENT_NO_CONTEXT'))
    await expect(main.db.$transaction(async () => {})).rejects.toThrow(ambient('AMBIENT_NO_CONTEXT'))
  })

  it('S2 runs operations in the transaction of the session, with nothing but their own SQL', async () => {
    await newContext(async () => {
      await insert(1)
      expect(await main.db.item.count()).toBe(1)
      expect(await main.session().db.item.findMany()).toEqual([{ id: 1, n: 0 }])
      expect(await ids()).toEqual([])
    })
    expect(await ids()).toEqual([1])
    expect(sent).toEqual([
      'BEGIN',
      expect.stringMatching(/^INSERT/),
      expect.stringMatching(/^SELECT COUNT/),
      expect.stringMatching(/^SELECT/),
      'COMMIT',
    ])
  })

  it('S2 runs fluent calls in it', async () => {
    await newContext(async () => {
      await main.db.item.create({ data: { id: 1, n: 5, tags: { create: [{ id: 7, label: 'a' }] } } })
      expect(await main.db.item.findUnique({ where: { id: 1 } }).tags({ select: { label: true } })).toEqual([
        { label: 'a' },
      ])
      expect(await main.db.tag.findUnique({ where: { label: 'a' } }).item()).toEqual({ id: 1, n: 5 })
      const nested = main
        .session()
        .db.tag.findUnique({ where: { id: 7 } })
        .item()
        .tags()
      expect(await nested).toEqual([{ id: 7, label: 'a', itemId: 1 }])
      expect(await main.db.item.findUnique({ where: { id: 2 } }).tags()).toBeNull()
    })
  })

  it('runs an operation once, however often it is awaited', async () => {
    await newContext(async () => {
      const operation = insert(1)
      await operation
      expect(await operation).toEqual({ id: 1, n: 0 })
      await expect(insert(1).catch(() => 'caught')).resolves.toBe('caught')
      await main.rollback()
    })
    expect(sent.filter((text) => text.startsWith('INSERT'))).toHaveLength(2)
  })

  it('S8 runs what is started together in the order of issue, and lets nothing resolve that did not happen', async () => {
    await newContext(async () => {
      const results = await Promise.allSettled([insert(1), failing(), insert(2), main.db.item.findMany()])
      const shown = results.map((each) => ('value' in each ? each.value : (each.reason as { code: string }).code))
      // Prisma alone lets those behind a failure resolve with undefined.
      expect(shown).toEqual([{ id: 1, n: 0 }, 'P2010', 'AMBIENT_TRANSACTION_ABORTED', 'AMBIENT_TRANSACTION_ABORTED'])
      await main.rollback()
    })
    expect(await ids()).toEqual([])
  })

  describe('findUnique, which Prisma batches', () => {
    it('C1 never answers one context with what another has not committed', async () => {
      await database.witness.rows('insert into items (id) values (2)')
      const [written, read] = [gate(), gate()]
      const writer = newContext(async () => {
        await insert(1)
        await main.db.item.update({ where: { id: 2 }, data: { n: 9 } })
        written.open()
        await read.passed
        throw planned
      })
      writer.catch(() => {})
      await written.passed
      // All in one tick, the writer first: whoever is first is whose context Prisma's batch runs in.
      const look = (db = main.db) =>
        Promise.all([
          db.item.findUnique({ where: { id: 1 } }),
          db.item.findUnique({ where: { id: 2 } }),
          db.item.findUnique({ where: { id: 1 } }).tags(),
        ])
      const seen = await Promise.all(Array.from({ length: 20 }, () => newContext(() => look())))
      read.open()
      await expect(writer).rejects.toBe(planned)
      for (const each of seen) expect(each).toEqual([null, { id: 2, n: 0 }, null])
    })

    it('C1 keeps contexts apart that are in the same tick', async () => {
      const all = Array.from({ length: 4 }, (_, index) => index + 1)
      const arrived = all.map(() => gate())
      const together = gate()
      const work = all.map((id, index) =>
        newContext(async () => {
          await insert(id)
          arrived[index]?.open()
          await together.passed
          const found = await Promise.all(all.map((each) => main.db.item.findUnique({ where: { id: each } })))
          expect(found.map((each) => each?.id ?? 0)).toEqual(all.map((each) => (each === id ? id : 0)))
          const strict = await Promise.allSettled(
            all.map((each) => main.session().db.item.findUniqueOrThrow({ where: { id: each } })),
          )
          expect(strict.filter(({ status }) => status === 'fulfilled')).toHaveLength(1)
          await main.rollback()
        }),
      )
      await Promise.all(arrived.map(({ passed }) => passed))
      together.open()
      await Promise.all(work)
      expect(await ids()).toEqual([])
    })
  })

  describe('findUnique in one tick', () => {
    const find = (id: number) => main.db.item.findUnique({ where: { id } })
    const selects = () => sent.filter((text) => text.startsWith('SELECT')).length

    it('is one query in each context', async () => {
      await database.witness.rows('insert into items (id) values (1), (2), (3)')
      const look = async () => (await Promise.all([find(3), find(1), find(9), find(2)])).map((each) => each?.id)
      expect(await Promise.all([newContext(look), newContext(look)])).toEqual([
        [3, 1, undefined, 2],
        [3, 1, undefined, 2],
      ])
      expect(selects()).toBe(2)
    })

    it('is one query inside of a transaction, and none with what is around it', async () => {
      await newContext(async () => {
        await insert(1)
        const outside = find(1)
        const inside = main.db.$transaction((tx) =>
          Promise.all([1, 2].map((id) => tx.item.findUnique({ where: { id } }))),
        )
        await Promise.all([outside, inside])
      })
      expect(selects()).toBe(2)
    })

    it('S8 stays before or behind what else is started', async () => {
      await newContext(async () => {
        const all = [find(1), insert(1), find(1), find(1), main.db.item.delete({ where: { id: 1 } }), find(1)]
        expect((await Promise.all(all)).map((each) => each !== null)).toEqual([false, true, true, true, true, false])
      })
    })

    it('is not joined by that of another client, or of another transaction', async () => {
      const extended = main.db.$extends({ query: { item: { findUnique: async () => null } } })
      await newContext(async () => {
        await insert(1)
        const [plain, other] = await Promise.all([find(1), extended.item.findUnique({ where: { id: 1 } })])
        expect([plain, other]).toEqual([{ id: 1, n: 0 }, null])
        let own: Prisma.TransactionClient | undefined
        const [begun, end] = [gate(), gate()]
        const block = main.db.$transaction(async (tx) => {
          own = tx
          await tx.item.update({ where: { id: 1 }, data: { n: 1 } })
          begun.open()
          await end.passed
          throw planned
        })
        block.catch(() => {})
        await begun.passed
        expect(await own?.$transaction((tx) => tx.item.count())).toBe(1) // inside, though called from outside
        const outside = find(1).then((item) => item)
        expect(await own?.item.findUnique({ where: { id: 1 } })).toEqual({ id: 1, n: 1 })
        end.open()
        expect(await outside).toEqual({ id: 1, n: 0 })
      })
    })

    it('is not joined by that of another tick', async () => {
      await newContext(async () => {
        await insert(1)
        const held = gate()
        const block = main.db.$transaction(() => held.passed)
        const first = find(1).then((item) => item) // sent now
        await new Promise(setImmediate)
        const second = find(1).then((item) => item)
        held.open()
        await Promise.all([block, first, second])
      })
      expect(selects()).toBe(2)
    })

    it('is a query for each shape, one after the other: pg is to stop queuing them', async () => {
      await newContext(async () => {
        await insert(1)
        const where = { id: 1 }
        const shapes = [
          find(1),
          main.db.item.findUnique({ where, include: { tags: true } }),
          main.db.item.findUnique({ where, select: { n: true } }),
          main.db.item.findUnique({ where, omit: { n: true } }),
        ]
        expect(await Promise.all(shapes)).toEqual([{ id: 1, n: 0 }, { id: 1, n: 0, tags: [] }, { n: 0 }, { id: 1 }])
      })
      expect(selects()).toBe(5) // tags come by themselves
    })

    it('fails for all of them where the query fails', async () => {
      await newContext(async () => {
        await main.db.$executeRaw`alter table items rename to renamed`
        const results = await Promise.allSettled([find(1), find(2)])
        expect(results).toEqual(
          Array(2).fill({ status: 'rejected', reason: expect.objectContaining({ code: 'P2021' }) }),
        )
        await main.rollback()
      })
    })
  })

  describe('$transaction', () => {
    it('A4 is a savepoint: an inner rollback keeps the outer work', async () => {
      await newContext(async () => {
        await insert(1)
        const failed = main.db.$transaction(async (tx) => {
          await tx.item.create({ data: { id: 2 } })
          await failing(tx)
        })
        await expect(failed).rejects.toThrow(known)
        const result = await main.db.$transaction(async (tx) => {
          await insert(3) // a helper that takes the ambient handle
          return tx.item.count()
        })
        expect(result).toBe(2)
      })
      expect(await ids()).toEqual([1, 3])
      expect(sent.filter((text) => /^(?:SAVEPOINT|ROLLBACK TO|RELEASE)/.test(text))).toHaveLength(5)
    })

    it('A4 nests, and keeps siblings apart', async () => {
      await newContext(async () => {
        const one = main.db.$transaction(async (tx) => {
          await insert(1, tx)
          await tx.$transaction((inner) => insert(2, inner))
          await expect(
            tx.$transaction(async (inner) => {
              await insert(3, inner)
              throw planned
            }),
          ).rejects.toBe(planned)
          const parallel = [4, 5].map((id) => tx.$transaction((inner) => insert(id, inner)))
          await Promise.all(parallel)
        })
        const two = main.db.$transaction(async (tx) => {
          await insert(6, tx)
          throw planned
        })
        await Promise.allSettled([one, two, insert(7)])
      })
      expect(await ids()).toEqual([1, 2, 4, 5, 7])
    })

    it('A4 takes a list: all of it or nothing', async () => {
      await newContext(async () => {
        const { db } = main
        const results = await db.$transaction([insert(1), db.item.count(), db.$queryRaw`select 5 as n`])
        expect(results).toEqual([{ id: 1, n: 0 }, 1, [{ n: 5 }]])
        await expect(db.$transaction([insert(2), insert(1), insert(3)])).rejects.toMatchObject({ code: 'P2002' })
        await main.session().db.$transaction([db.item.findUnique({ where: { id: 1 } }).tags(), insert(4)])
      })
      expect(await ids()).toEqual([1, 4])
    })

    it('A4 refuses a list of what is no operation, before it runs any', async () => {
      await newContext(async () => {
        const wrong = main.db.$transaction([insert(1), Promise.resolve(1) as unknown as Prisma.PrismaPromise<number>])
        await expect(wrong).rejects.toThrow(/^All elements of the array need to be operations/)
      })
      expect(await ids()).toEqual([])
    })

    it('A6 refuses what comes after its end', async () => {
      await newContext(async () => {
        let late: Inserter | undefined
        await main.db.$transaction(async (tx) => {
          late = tx
        })
        await expect(insert(1, late)).rejects.toThrow(ambient('AMBIENT_BLOCK_ENDED'))
      })
      expect(await ids()).toEqual([])
    })

    it('A7 compares the isolation level with that of the transaction that is open', async () => {
      const { Serializable, RepeatableRead } = Prisma.TransactionIsolationLevel
      const level = (isolationLevel: Prisma.TransactionIsolationLevel) =>
        main.db.$transaction((tx) => tx.$queryRaw`show transaction_isolation`, { isolationLevel })
      await newContext(
        async () => {
          expect(await level(Serializable)).toEqual([{ transaction_isolation: 'serializable' }])
          await expect(level(RepeatableRead)).rejects.toThrow(ambient('AMBIENT_TRANSACTION_OPTIONS'))
          await expect(level('Snapshot' as never)).rejects.toThrow(ambient('AMBIENT_UNSUPPORTED'))
          const list = main.db.$transaction([insert(1)], { isolationLevel: RepeatableRead })
          await expect(list).rejects.toThrow(ambient('AMBIENT_TRANSACTION_OPTIONS'))
        },
        { transaction: { isolationLevel: 'serializable' } },
      )
    })

    it('begins with the isolation level where nothing is open', async () => {
      const isolationLevel = Prisma.TransactionIsolationLevel.RepeatableRead
      await newContext(() => main.db.$transaction((tx) => insert(1, tx), { isolationLevel }))
      expect(sent[0]).toBe('BEGIN ISOLATION LEVEL REPEATABLE READ')
      expect(await ids()).toEqual([1])
    })

    it('rolls back, and rejects, when it takes longer than its timeout', async () => {
      await newContext(async () => {
        const never = gate()
        const late = main.db.$transaction(
          async (tx) => {
            await insert(1, tx)
            await never.passed
          },
          { timeout: 50 },
        )
        await expect(late).rejects.toThrow(ambient('AMBIENT_TIMEOUT'))
        await insert(2)
      })
      expect(await ids()).toEqual([2])
    })

    it('has no time limit of its own accord: that of Prisma is not applied', async () => {
      const client = (virtual: Pool) =>
        new PrismaClient({ adapter: new PrismaPg(virtual), transactionOptions: { timeout: 1, maxWait: 1 } })
      main = defineDatabase({ name: 'main', adapter: prismaAdapter(pgAdapter(listeningPool), client) })
      await newContext(() => main.db.$transaction((tx) => tx.$executeRaw`select pg_sleep(0.1)`))
    })

    it('is one of its own in a context without transactions', async () => {
      await newContext(
        async () => {
          await main.db.$transaction([insert(1), insert(2)])
          expect(await ids()).toEqual([1, 2])
        },
        { transaction: 'autocommit' },
      )
    })
  })

  describe('without transactions', () => {
    const autocommit = { transaction: 'autocommit' } as const

    it('commits each operation', async () => {
      await newContext(async () => {
        await insert(1)
        expect(await ids()).toEqual([1])
        expect(await main.db.item.findUnique({ where: { id: 1 }, include: { tags: true } })).toMatchObject({ tags: [] })
      }, autocommit)
    })

    it('does all statements of an operation that writes, or none', async () => {
      const tags = {
        create: [
          { id: 1, label: 'a' },
          { id: 2, label: 'a' },
        ],
      }
      await newContext(async () => {
        const failed = main.db.item.create({ data: { id: 1, tags } })
        await expect(failed).rejects.toMatchObject({ code: 'P2002' })
        expect(await ids()).toEqual([])
        await main.db.item.create({ data: { id: 2, tags: { create: [{ id: 3, label: 'b' }] } } })
        expect(await ids()).toEqual([2])
      }, autocommit)
      expect(sent.filter((text) => /^(?:BEGIN|COMMIT|ROLLBACK)/.test(text))).toEqual([
        'BEGIN',
        'ROLLBACK',
        'BEGIN',
        'COMMIT',
      ])
    })

    it('says so when the COMMIT of such an operation fails', async () => {
      await database.witness.rows(`
        create table late (item int references items deferrable initially deferred);
        create function spoil() returns trigger language plpgsql as
          'begin insert into late values (-1); return null; end';
        create trigger spoil after insert on items for each row execute function spoil()`)
      try {
        await newContext(async () => {
          await expect(insert(1)).rejects.toMatchObject({ code: '23503' })
        }, autocommit)
        expect(await ids()).toEqual([])
      } finally {
        await database.witness.rows('drop table late; drop trigger spoil on items; drop function spoil')
      }
    })

    it('knows on a pipelined pool whether there is one', async () => {
      const pipelined = () => new Pool({ connectionString: database.url, pipeline: true } as never)
      const db = defineDatabase({ name: 'main', adapter: prismaAdapter(pgAdapter(pipelined), makeClient) })
      const tags = {
        create: [
          { id: 1, label: 'a' },
          { id: 2, label: 'a' },
        ],
      }
      await newContext(async () => {
        await expect(db.db.item.create({ data: { id: 1, tags } })).rejects.toMatchObject({ code: 'P2002' })
      }, autocommit)
      expect(await ids()).toEqual([])
      await newContext(async () => {
        await db.db.item.create({ data: { id: 2 } })
        await db.rollback()
      })
      expect(await ids()).toEqual([])
      await db.shutdown()
    })
  })

  describe('raw SQL', () => {
    it('runs in the session', async () => {
      await newContext(async () => {
        const { db } = main
        expect(await db.$executeRaw`insert into items (id) values (${1}), (${2})`).toBe(2)
        expect(await db.$executeRawUnsafe('update items set n = $1', 3)).toBe(2)
        expect(await db.$queryRaw(Prisma.sql`select n from items where id = ${1}`)).toEqual([{ n: 3 }])
        expect(await db.$queryRawUnsafe('select sum(n)::int as sum from items')).toEqual([{ sum: 6 }])
        await main.rollback()
      })
      expect(await ids()).toEqual([])
    })

    it.each(['COMMIT', 'rollback', '/* x */ BEGIN', 'SAVEPOINT a'])('refuses %s', async (text) => {
      await newContext(async () => {
        await insert(1)
        await expect(main.db.$executeRawUnsafe(text)).rejects.toThrow(ambient('AMBIENT_TRANSACTION_CONTROL'))
        await expect(main.db.$transaction((tx) => tx.$queryRawUnsafe(text))).rejects.toThrow(
          ambient('AMBIENT_TRANSACTION_CONTROL'),
        )
        expect(await main.db.item.count()).toBe(1) // the transaction is as it was
      })
      expect(await ids()).toEqual([1])
    })

    it('S10 notices what ends the transaction all the same', async () => {
      const context = newContext(async () => {
        await insert(1)
        await main.db.$executeRawUnsafe('select 1; commit')
      })
      await expect(context).rejects.toThrow(ambient('AMBIENT_TRANSACTION_ABORTED'))
    })
  })

  describe('errors', () => {
    it("are Prisma's, with that of the driver as their cause", async () => {
      await newContext(async () => {
        await insert(1)
        const error = await insert(1).catch((thrown) => thrown)
        expect(error).toBeInstanceOf(known)
        expect(error).toMatchObject({
          code: 'P2002',
          meta: { modelName: 'Item' },
          cause: { code: '23505', severity: 'ERROR' },
        })
        await main.rollback()
      })
    })

    it('S4 of the database fail the commit, with the error of the driver as cause', async () => {
      let swallowed: { cause?: unknown } | undefined
      const context = newContext(async () => {
        await insert(1)
        swallowed = await insert(1).catch((error) => error)
      })
      const error = await context.catch((thrown) => thrown)
      expect(isAmbientError(error, 'AMBIENT_TRANSACTION_ABORTED')).toBe(true)
      expect(error.cause).toBe(swallowed?.cause)
      expect(await ids()).toEqual([])
    })

    it('that Prisma finds by itself leave the transaction as it was', async () => {
      await newContext(async () => {
        await insert(1)
        const nonsense = main.db.item.findMany({ where: { nonsense: 1 } as never })
        await expect(nonsense).rejects.toThrow(Prisma.PrismaClientValidationError)
        await expect(main.db.item.update({ where: { id: 9 }, data: { n: 1 } })).rejects.toMatchObject({ code: 'P2025' })
        await expect(main.db.item.findUniqueOrThrow({ where: { id: 9 } })).rejects.toMatchObject({ code: 'P2025' })
      })
      expect(await ids()).toEqual([1])
    })

    it.each([
      ['P2034 of an operation', () => main.db.item.update({ where: { id: 1 }, data: { n: { increment: 1 } } })],
      ['40001 of raw SQL', () => main.db.$executeRaw`update items set n = n + 1 where id = 1`],
    ])('A5 retries %s', async (_, change) => {
      await database.witness.rows('insert into items (id) values (1)')
      const seen: string[] = []
      let attempts = 0
      const work = async () => {
        attempts++
        await main.db.item.count()
        if (attempts === 1) await database.witness.rows('update items set n = n + 1 where id = 1')
        await change().catch((error) => {
          seen.push(error.code)
          throw error
        })
      }
      await newContext(() => main.atomic(work, { isolationLevel: 'serializable', retry: { attempts: 3 } }))
      expect({ attempts, seen }).toEqual({ attempts: 2, seen: [expect.stringMatching(/^P20(?:34|10)$/)] })
      expect(await database.witness.rows('select n from items')).toEqual([{ n: 2 }])
    })
  })

  describe('extensions', () => {
    it('find the session: of models, of the client, of results, and of queries', async () => {
      const extended = main.db.$extends({
        model: {
          $allModels: {
            async exists<Model>(this: Model, id: number): Promise<boolean> {
              const context = Prisma.getExtensionContext(this) as unknown as PrismaClient['item']
              return (await context.findFirst({ where: { id } })) !== null
            },
          },
        },
        client: {
          async $insertTwo(one: number, other: number) {
            const context = Prisma.getExtensionContext(this) as unknown as PrismaClient
            await context.$transaction([insert(one, context), insert(other, context)])
          },
        },
        result: { item: { double: { needs: { n: true }, compute: ({ n }) => n * 2 } } },
        query: {
          item: {
            findMany: ({ args, query }) => query({ ...args, where: { ...args.where, id: { lt: 10 } } }),
          },
        },
      })
      await newContext(async () => {
        await extended.$insertTwo(1, 2)
        await extended.item.create({ data: { id: 10 } })
        expect(await extended.item.exists(2)).toBe(true)
        expect(await extended.$transaction((tx) => tx.item.exists(3))).toBe(false)
        const found = await extended.item.findMany({ orderBy: { id: 'asc' } })
        expect(found.map(({ id, double }) => [id, double])).toEqual([
          [1, 0],
          [2, 0],
        ])
        expect(await main.db.item.findMany()).toHaveLength(3)
        await main.rollback()
      })
      expect(await ids()).toEqual([])
    })

    it('of queries may use the handle in the middle of an operation', async () => {
      const audited = main.db.$extends({
        query: {
          item: {
            async create({ args, query }) {
              const before = await main.db.item.count()
              const result = await query(args)
              await main.db.tag.create({ data: { id: before + 1, label: `${before}`, itemId: result.id as number } })
              return result
            },
          },
        },
      })
      await newContext(async () => {
        await Promise.all([insert(1, audited), insert(2, audited)])
        await audited.$transaction([insert(3, audited)])
      })
      expect(await database.witness.rows('select label, item_id from tags order by id')).toEqual([
        { label: '0', item_id: 1 },
        { label: '1', item_id: 2 },
        { label: '2', item_id: 3 },
      ])
    })

    it.each(['in a transaction', 'autocommit'])(
      'of queries may start in it what they do not wait for (%s)',
      async (mode) => {
        let inner: Promise<unknown> | undefined
        const slow = main.db.$extends({
          query: {
            item: {
              async update({ args, query }) {
                await new Promise((resolve) => setTimeout(resolve, 50))
                return query(args)
              },
            },
          },
        })
        const careless = main.db.$extends({
          query: {
            item: {
              async create({ args, query }) {
                const result = await query(args)
                inner = slow.item.update({ where: { id: 1 }, data: { n: 1 } }).then((item) => item)
                inner.catch(() => {})
                return result
              },
            },
          },
        })
        const transaction = mode === 'autocommit' ? mode : {}
        await newContext(() => careless.item.create({ data: { id: 1 } }), { transaction })
        expect(await inner).toEqual({ id: 1, n: 1 })
        expect(sent.at(-1)).toBe('COMMIT') // which waited for it
        expect(await database.witness.rows('select n from items')).toEqual([{ n: 1 }])
      },
    )

    it('of queries may give up what is at the database, whose end is waited for', async () => {
      const impatient = main.db.$extends({
        query: {
          async $executeRaw({ args, query }) {
            const answer = query(args) as Promise<unknown>
            answer.catch(() => {})
            await until(() => sent.some((text) => text.includes('pg_sleep')))
            throw planned
          },
        },
      })
      const context = newContext(async () => {
        await insert(1)
        await expect(impatient.$executeRaw`select pg_sleep(0.1), 1 / (n - n) from items`).rejects.toBe(planned)
      })
      const error = await context.catch((thrown) => thrown)
      expect(error).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', cause: { code: '22012' } })
    })

    it('of queries cannot swallow an error and keep the rest, without a transaction', async () => {
      const swallowing = main.db.$extends({
        query: {
          tag: {
            async create({ args, query }) {
              const item = await main.db.item.create({ data: { id: 5 } })
              return (await query(args).catch(() => item)) as never
            },
          },
        },
      })
      await newContext(
        async () => {
          const tag = swallowing.tag.create({ data: { id: 1, label: 'a', itemId: 9 } })
          await expect(tag).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', cause: { code: '23503' } })
        },
        { transaction: 'autocommit' },
      )
      expect(await ids()).toEqual([])
    })

    it('C8 of queries that wait for themselves end with the timeout of their context', async () => {
      const waiting = main.db.$extends({
        query: { item: { create: ({ args, query }) => main.atomic(() => query(args)) } },
      })
      const context = newContext(() => waiting.item.create({ data: { id: 1 } }), { timeout: 300 })
      await expect(context).rejects.toThrow(ambient('AMBIENT_TIMEOUT'))
      expect(await ids()).toEqual([])
    })

    it('cannot leave the session by a client that is none of it', async () => {
      const plain = new Map<string, PrismaClient>()
      const build = (virtual: Pool) => {
        const client = new PrismaClient({ adapter: new PrismaPg(virtual) })
        plain.set('client', client)
        return client
      }
      main = defineDatabase({ name: 'main', adapter: prismaAdapter(pgAdapter(listeningPool), build) })
      const client = plain.get('client') as PrismaClient
      await newContext(async () => {
        await insert(1)
        await expect(insert(2, client)).rejects.toThrow(/that is none of the session/)
        await expect(client.$transaction([insert(2, client)])).rejects.toThrow(/that is none of the session/)
        const inside = main.db.$extends({
          query: { item: { create: () => client.$transaction([insert(3, client), insert(5, client)]) } },
        })
        await expect(insert(4, inside)).rejects.toThrow(/that is none of the session/)
      })
      expect(await ids()).toEqual([1])
    })

    it('cannot send anything once their operation is over, not even in the turn of the next one', async () => {
      const later = gate()
      let late: Promise<unknown> | undefined
      const forgetful = main.db.$extends({
        query: {
          item: {
            async count({ args, query }) {
              late = later.passed.then(() => query(args))
              late.catch(() => {})
              return 0 as never
            },
            async create({ args, query }) {
              later.open()
              await late?.catch(() => {})
              return query(args)
            },
          },
        },
      })
      await newContext(async () => {
        await forgetful.item.count()
        await forgetful.item.create({ data: { id: 1 } })
        await expect(late).rejects.toThrow()
      })
      expect(sent.some((text) => text.includes('COUNT'))).toBe(false)
      expect(await ids()).toEqual([1])
    })
  })

  it('lets nobody use what an operation has used, once it is over', async () => {
    let used: PoolClient | undefined
    const build = (virtual: Pool) => {
      const connect = virtual.connect.bind(virtual) as () => Promise<PoolClient>
      virtual.connect = (async () => {
        used = await connect()
        return used
      }) as never
      return makeClient(virtual)
    }
    main = defineDatabase({ name: 'main', adapter: prismaAdapter(pgAdapter(listeningPool), build) })
    await newContext(async () => {
      await insert(1)
      await expect(used?.query({ text: 'delete from items' })).rejects.toThrow(/^The operation is over/)
    })
    expect(await ids()).toEqual([1])
  })

  it('goes on after a failure, and keeps nothing of Prisma for a connection that went back', async () => {
    const begun: string[] = []
    const build = (virtual: Pool) => {
      const connect = virtual.connect.bind(virtual) as () => Promise<never>
      virtual.connect = (() => {
        begun.push('transaction')
        return connect()
      }) as never
      return makeClient(virtual)
    }
    main = defineDatabase({ name: 'main', adapter: prismaAdapter(pgAdapter(listeningPool), build) })
    const transactionsOf = async (work: () => Promise<unknown>) => {
      begun.length = 0
      await newContext(work)
      return begun.length
    }
    const three = async () => {
      for (const id of [1, 2, 3]) await main.db.item.findUnique({ where: { id } })
    }
    expect(await transactionsOf(three)).toBe(1)
    expect(await transactionsOf(three)).toBe(1)
    const failed = async () => {
      await insert(1)
      await expect(main.db.$transaction([insert(1)])).rejects.toThrow(known)
      await insert(2)
    }
    expect(await transactionsOf(failed)).toBe(2)
    expect(await ids()).toEqual([1, 2])
  })

  it('refuses a client that was built on another pool, which does nothing', async () => {
    const build = () => new PrismaClient({ adapter: new PrismaPg({ connectionString: database.url, max: 1 }) })
    main = defineDatabase({ name: 'main', adapter: prismaAdapter(pgAdapter(listeningPool), build) })
    await expect(newContext(() => insert(1))).rejects.toThrow(ambient('AMBIENT_INVALID_ARGUMENT'))
    expect(await ids()).toEqual([])
  })

  it('refuses an isolation level of the client, which would not be that of the transaction', async () => {
    const build = (virtual: Pool) =>
      new PrismaClient({ adapter: new PrismaPg(virtual), transactionOptions: { isolationLevel: 'Serializable' } })
    main = defineDatabase({ name: 'main', adapter: prismaAdapter(pgAdapter(listeningPool), build) })
    await expect(newContext(() => insert(1))).rejects.toThrow(ambient('AMBIENT_UNSUPPORTED'))
  })

  it('connects to nothing by $connect, and cannot be disconnected', async () => {
    await main.db.$connect()
    await expect(main.db.$disconnect()).rejects.toThrow(ambient('AMBIENT_UNSUPPORTED'))
    expect(sent).toEqual([])
    await newContext(async () => {
      await main.db.$transaction(async (tx) => {
        for (const key of ['$connect', '$disconnect', '$on', '$extends']) expect(tx).toHaveProperty(key, undefined)
      })
    })
  })

  it('logs the statements of users, and no transaction that there is not', async () => {
    const logged: string[] = []
    const build = (virtual: Pool) => {
      const client = new PrismaClient({ adapter: new PrismaPg(virtual), log: [{ emit: 'event', level: 'query' }] })
      client.$on('query', ({ query }) => logged.push(query))
      return client
    }
    main = defineDatabase({ name: 'main', adapter: prismaAdapter(pgAdapter(listeningPool), build) })
    await newContext(async () => {
      await insert(1)
      await main.db.item.findUnique({ where: { id: 1 } })
    })
    expect(logged).toEqual([expect.stringMatching(/^INSERT/), expect.stringMatching(/^SELECT/)])
  })

  it('C8 cancels what an operation does at the server', async () => {
    const abort = new AbortController()
    const context = newContext(() => main.db.$executeRaw`select pg_sleep(60)`, { signal: abort.signal })
    context.catch(() => {})
    await until(async () =>
      (await database.backends()).some(({ query, state }) => state === 'active' && query.includes('pg_sleep')),
    )
    abort.abort(planned)
    await expect(context).rejects.toThrow(ambient('AMBIENT_ABORTED'))
    expect((await database.backends()).filter(({ state }) => state === 'active')).toEqual([])
  })

  it('returns the pooled connections clean', async () => {
    await Promise.all(Array.from({ length: 8 }, (_, index) => newContext(() => insert(index + 1))))
    expect(pool.totalCount).toBe(pool.idleCount)
    const backends = await database.backends()
    expect(backends.every(({ state }) => state === 'idle')).toBe(true)
  })
})

describe('prismaHandle', () => {
  it('shares the transaction with other libraries on the pool', async () => {
    const shared = defineDatabase({ name: 'main', adapter: pgAdapter(listeningPool) })
    const prisma = prismaHandle(shared, makeClient)
    const kysely = kyselyHandle<{ items: { id: number } }>(shared, (client) => new PostgresDialect({ pool: client }))
    await newContext(async () => {
      await shared.db.query('insert into items (id) values (1)')
      await kysely.insertInto('items').values({ id: 2 }).execute()
      expect(await prisma.item.count()).toBe(2)
      await expect(
        prisma.$transaction(async (tx) => {
          await insert(3, tx)
          await kysely.insertInto('items').values({ id: 4 }).execute() // inside of it
          throw planned
        }),
      ).rejects.toBe(planned)
      await insert(5, prisma)
    })
    expect(await ids()).toEqual([1, 2, 5])
    expect(sent.filter((text) => text === 'BEGIN')).toHaveLength(1)
    await shared.shutdown()
  })
})
