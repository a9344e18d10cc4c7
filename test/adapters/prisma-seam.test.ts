import { AsyncLocalStorage } from 'node:async_hooks'
import { PrismaPg } from '@prisma/adapter-pg'
import { Pool, type PoolClient, type QueryConfig } from 'pg'
import { afterAll, beforeAll, beforeEach, expect, it } from 'vitest'
import { Prisma, PrismaClient } from '../../.tools/prisma-client/client.ts'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'
import { tables } from '../support/prisma/tables.ts'

// What the adapter relies on and Prisma does not document, each by itself: where one of these is red with a new release of Prisma, that
// is what has changed. docs/decisions/017-prisma-turns.md says what hangs on it.

const where = new AsyncLocalStorage<string>()

/** A pool that tells what PrismaPg asks of it, and of its clients, and where. */
class ToldPool extends Pool {
  readonly told: string[] = []

  #tell(what: string): void {
    this.told.push(`${where.getStore()}: ${what}`)
  }

  override query(config: unknown): never {
    this.#tell(`pool ${(config as QueryConfig).text}`)
    return super.query(config as never) as never
  }

  override connect(): Promise<PoolClient>
  override connect(callback: () => void): undefined
  override connect(callback?: (...args: never[]) => void): Promise<PoolClient> | undefined {
    if (callback) {
      super.connect(callback as never)
      return undefined
    }
    this.#tell('connect')
    const own = this.told.filter((each) => each.endsWith(': connect')).length
    return super.connect().then((client) => {
      const query = client.query.bind(client)
      const release = client.release.bind(client)
      return new Proxy(client, {
        get: (_, key) => {
          if (key === 'query') {
            return (config: QueryConfig) => {
              this.#tell(`${own} ${config.text.split(' ')[0]}`)
              if (config.text === 'ROLLBACK') {
                query('ROLLBACK').catch(() => {})
                return Promise.reject(new Error('refused'))
              }
              return query(config)
            }
          }
          if (key === 'release') {
            return () => {
              this.#tell(`${own} release`)
              release()
            }
          }
          const value = Reflect.get(client, key)
          return typeof value === 'function' ? value.bind(client) : value
        },
      })
    })
  }
}

const over = { over: true }
const unlimited = { maxWait: 2 ** 31 - 1, timeout: 2 ** 31 - 1 }

let database: TestDatabase
let pool: ToldPool
let client: PrismaClient

beforeAll(async () => {
  database = await createDatabase()
  await database.witness.rows(tables)
  await database.witness.rows('insert into items (id) values (1), (2)')
  pool = new ToldPool({ connectionString: database.url })
  client = new PrismaClient({ adapter: new PrismaPg(pool) })
})
beforeEach(() => {
  pool.told.length = 0
})
afterAll(async () => {
  await client.$disconnect()
  await pool.end()
  await database.drop()
})

const inTransaction = (name: string, work: (tx: Prisma.TransactionClient) => Promise<unknown>) =>
  where.run(name, () =>
    client
      .$transaction(async (tx) => {
        await work(tx)
        throw over
      }, unlimited)
      .catch((error: unknown) => error),
  )

it('PrismaPg takes a pool, and a transaction a client by `connect()`, in the async context of whoever begins it', async () => {
  await Promise.all(['a', 'b'].map((name) => inTransaction(name, async () => {})))
  expect(pool.told.filter((each) => each.endsWith('connect')).sort()).toEqual(['a: connect', 'b: connect'])
})

it('a transaction is BEGIN, the work, ROLLBACK on a throw, and release', async () => {
  await inTransaction('a', (tx) => tx.item.count())
  expect(pool.told).toEqual(['a: connect', 'a: 1 BEGIN', 'a: 1 SELECT', 'a: 1 ROLLBACK', 'a: 1 release'])
})

it('a ROLLBACK that fails is not told, and what was thrown comes out as it is', async () => {
  expect(await inTransaction('a', async () => {})).toBe(over)
})

it('all of an operation goes to the client of its transaction, in the async context of the operation', async () => {
  const data = { id: 3, tags: { create: [{ id: 1, label: 'a' }] } }
  await inTransaction('a', (tx) => tx.item.create({ data, include: { tags: true } }))
  const own = pool.told.slice(2, -2)
  expect(own.length).toBeGreaterThan(1)
  expect(own.every((each) => each.startsWith('a: 1 '))).toBe(true)
})

it('findUnique of several transactions in one tick goes to the client of each', async () => {
  let arrived = 0
  let go = () => {}
  const all = new Promise<void>((resolve) => {
    go = resolve
  })
  const look = async (tx: Prisma.TransactionClient) => {
    if (++arrived === 2) go()
    await all
    await Promise.all([1, 2].map((id) => tx.item.findUnique({ where: { id } })))
  }
  await Promise.all([inTransaction('a', look), inTransaction('b', look)])
  // One query for each transaction; the async context is that of the first, which is why it decides nothing.
  const selects = pool.told.filter((each) => each.endsWith('SELECT')).map((each) => each.slice('a: '.length))
  expect(selects.sort()).toEqual(['1 SELECT', '2 SELECT'])
})

it('findUnique outside of transactions is merged across async contexts: why each operation has one', async () => {
  await Promise.all(['a', 'b'].map((name, id) => where.run(name, () => client.item.findUnique({ where: { id } }))))
  expect(pool.told).toHaveLength(1)
})

it('operations, raw and fluent ones too, are Prisma promises, which begin when they are awaited', async () => {
  const all = [
    client.item.count(),
    client.item.findUnique({ where: { id: 1 } }),
    client.item.findUnique({ where: { id: 1 } }).tags(),
    client.$queryRaw`select 1`,
    client.$executeRawUnsafe('select 1'),
  ]
  await new Promise(setImmediate)
  expect(all.map((each) => each[Symbol.toStringTag])).toEqual(Array(5).fill('PrismaPromise'))
  expect(pool.told).toEqual([])
})

it('an isolation level of the client is sent behind BEGIN', async () => {
  const strict = new PrismaClient({
    adapter: new PrismaPg(pool),
    transactionOptions: { isolationLevel: Prisma.TransactionIsolationLevel.Serializable },
  })
  await strict.$transaction(async () => {}, unlimited)
  expect(pool.told.map((each) => each.split(' ').at(-1))).toEqual(['connect', 'BEGIN', 'SET', 'COMMIT', 'release'])
  await strict.$disconnect()
})

it('errors of the database carry the code of the driver, and no cause of their own', async () => {
  const error = await client.item.create({ data: { id: 1 } }).catch((thrown: unknown) => thrown)
  expect(error).toBeInstanceOf(Prisma.PrismaClientKnownRequestError)
  expect((error as Error).cause).toBeUndefined()
})
