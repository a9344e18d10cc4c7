import { type DatabaseOptions, defineDatabase, newContext } from 'ambient-db'
import { knexAdapter } from 'ambient-db/knex'
import knex, { type Knex } from 'knex'
import { Pool } from 'pg'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { gate, until } from '../support/gate.ts'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'

let database: TestDatabase
let made: Knex[] = []
const ends: (() => Promise<void>)[] = []
const planned = new Error('planned')

type Options = Partial<Omit<DatabaseOptions<Knex, Knex, object>, 'adapter'>>

function define({ config, ...options }: Options & { config?: Knex.Config } = {}) {
  const open = () => {
    const engine = knex({ client: 'pg', connection: database.url, pool: { min: 0, max: 5 }, ...config })
    made.push(engine)
    return engine
  }
  const factory = options.host === undefined ? () => open() : (_host: string) => open()
  const main = defineDatabase({ name: 'main', adapter: knexAdapter(factory), ...options })
  ends.push(main.shutdown)
  return main
}

const committed = async () =>
  (await database.witness.rows<{ id: number }>('select id from items order by id')).map(({ id }) => id)

beforeAll(async () => {
  database = await createDatabase()
  await database.witness.rows('create table items (id int primary key, n int not null default 0)')
})
beforeEach(async () => {
  made = []
  await database.witness.rows('truncate items')
})
afterEach(async () => {
  for (const end of ends.splice(0)) await end()
})
afterAll(() => database.drop())

describe('the ambient Knex', () => {
  it('D1 builds queries before any session with the engine that sessions use, one per host', async () => {
    const main = define({ host: 'one' })
    const query = main.db('items').where({ id: 1 })
    expect(query.toSQL().toNative()).toMatchObject({ sql: 'select * from "items" where "id" = $1' })
    expect(main.db.fn.now().toString()).toBe('CURRENT_TIMESTAMP')
    await newContext(() => query)
    expect(made).toEqual([await main.connect()])
    await main.changeHost('two')
    await newContext(() => main.db('items').select())
    expect(made).toHaveLength(2)
    await main.changeHost('one')
    await newContext(() => main.db('items').select())
    expect(made).toHaveLength(3)
    const closed = () => made.map(({ client }) => client.pool === undefined)
    await until(async () => closed()[1] === true, 'the engine that was left to be closed') // in the background
    expect(closed()).toEqual([true, true, false])
  })

  it('C2 says what was refused without the query and its values', async () => {
    const main = define()
    const error = await main
      .db('items')
      .insert({ id: 4711 })
      .catch((reason: Error) => reason)
    expect(error).toMatchObject({ code: 'AMBIENT_NO_CONTEXT', message: expect.not.stringMatching(/4711|insert/) })
    await expect(main.db.transaction()).rejects.toMatchObject({ code: 'AMBIENT_NO_CONTEXT' })
    await expect(main.db.transaction(async () => {})).rejects.toMatchObject({ code: 'AMBIENT_NO_CONTEXT' })
  })

  it.each(['begin', 'commit', ' /* now */ rollback;', 'savepoint a', 'start transaction'])(
    'S10 refuses %j, also in a native transaction',
    async (sql) => {
      const main = define()
      const refused = { code: 'AMBIENT_TRANSACTION_CONTROL' }
      await newContext(async () => {
        await expect(main.db.raw(sql)).rejects.toMatchObject(refused)
        await main.db.transaction(async (trx) => {
          await expect(trx.raw(sql)).rejects.toMatchObject(refused)
          await trx('items').insert({ id: 1 })
        })
        const rows = main.db.raw(sql).stream()
        await expect(rows[Symbol.asyncIterator]().next()).rejects.toMatchObject(refused)
      })
      expect(await committed()).toEqual([1])
    },
  )

  it('O1 hears of queries, and so does the engine', async () => {
    const main = define()
    const heard: string[] = []
    main.db.on('query', ({ sql }) => heard.push(`handle: ${sql}`))
    const engine = await main.connect()
    engine.on('query', ({ sql }) => heard.push(`engine: ${sql}`))
    await newContext(() => main.db.transaction((trx) => trx('items').insert({ id: 1 })))
    const sql = 'insert into "items" ("id") values (?)'
    expect(heard.map((each) => each.replace('$1', '?')).sort()).toEqual([`engine: ${sql}`, `handle: ${sql}`])
  })

  it('S2 gives each copy by withUserParams the session', async () => {
    const main = define()
    const heard: unknown[] = []
    main.db.on('query', (query) => heard.push(query))
    const tenant = main.db.withUserParams({ tenant: 1 })
    await expect(
      newContext(async () => {
        await tenant('items').insert({ id: 1 })
        await tenant.transaction(async (trx) => {
          expect(trx.userParams).toEqual({ tenant: 1 })
          await trx('items').insert({ id: 2 })
        })
        throw planned
      }),
    ).rejects.toBe(planned)
    expect(await committed()).toEqual([])
    expect(heard).toHaveLength(2)
    expect(main.db.userParams).toEqual({})
  })

  it('S2 refuses a connection that is not of the session', async () => {
    const main = define()
    const engine = await main.connect()
    const connection = await engine.client.acquireConnection()
    await newContext(async () => {
      const unsupported = { code: 'AMBIENT_UNSUPPORTED' }
      await expect(main.db('items').select().connection(connection)).rejects.toMatchObject(unsupported)
      await expect(main.db.transaction(async () => {}, { connection })).rejects.toMatchObject(unsupported)
      await expect(main.db.destroy()).rejects.toMatchObject(unsupported)
      expect(() => main.db.initialize()).toThrow(expect.objectContaining(unsupported))
    })
    await engine.client.releaseConnection(connection)
  })

  it('C8 cancels a query that exceeds its own timeout, and no other', async () => {
    const main = define()
    await newContext(async () => {
      await expect(main.atomic(() => main.db.raw('select pg_sleep(10)').timeout(50, { cancel: true }))).rejects.toThrow(
        /timeout of 50ms exceeded/,
      )
      await main.db('items').insert({ id: 1 })
    })
    expect(await committed()).toEqual([1])
  })

  it('C8 withdraws a query that exceeds its timeout before its turn', async () => {
    const main = define()
    await newContext(() =>
      main.db.transaction(async (trx) => {
        const slow = trx.raw('select pg_sleep(0.3)').then(() => 'slow')
        const late = trx('items').insert({ id: 1 }).timeout(30, { cancel: true })
        await expect(late).rejects.toThrow(/timeout of 30ms exceeded/)
        expect(await slow).toBe('slow')
        await trx('items').insert({ id: 2 })
      }),
    )
    expect(await committed()).toEqual([2])
  })

  it('S2 works with a pool of pg in place of that of Knex', async () => {
    const pool = new Pool({ connectionString: database.url })
    const main = defineDatabase({
      name: 'main',
      adapter: knexAdapter(() => knex({ client: 'pg', connectionPool: pool } as Knex.Config)),
    })
    await newContext(() => main.db('items').insert({ id: 1 }))
    await expect(
      newContext(async () => {
        await main.db('items').insert({ id: 2 })
        throw planned
      }),
    ).rejects.toBe(planned)
    expect([pool.totalCount, pool.idleCount]).toEqual([1, 1])
    await main.shutdown()
    await pool.end()
    expect(await committed()).toEqual([1])
  })

  it('S7 closes a connection that is not to be used again, and does not wait for Knex to look at it', async () => {
    const main = define()
    await main.newSession(({ db }) => db('items').insert({ id: 1 }), { hold: true })
    const others =
      "select pid from pg_stat_activity where datname = current_database() and backend_type = 'client backend'"
    await until(async () => (await database.witness.rows(others)).length === 1, 'the server to be left')
  })

  it('D1 refuses a client that it does not know', async () => {
    const other = defineDatabase({ name: 'other', adapter: knexAdapter(() => knex({ client: 'pgnative' })) })
    await expect(newContext(() => other.db('items').select())).rejects.toMatchObject({
      code: 'AMBIENT_UNSUPPORTED',
      message: expect.stringMatching(/pgnative/),
    })
    await other.shutdown()
  })
})

describe('transactions of Knex', () => {
  it('A4 keeps the outer work when an inner transaction rolls back, also between parallel ones', async () => {
    const main = define()
    await newContext(() =>
      main.db.transaction(async (trx) => {
        await trx('items').insert({ id: 1 })
        const outcomes = await Promise.allSettled([
          trx.transaction(async (inner) => {
            await inner('items').insert({ id: 2 })
            throw planned
          }),
          trx.transaction((inner) => inner('items').insert({ id: 3 })),
          trx('items').insert({ id: 4 }),
          trx.savepoint(async (inner) => {
            await inner('items').insert({ id: 5 })
            await inner.transaction(async (innermost) => {
              await innermost('items').insert({ id: 6 })
              await innermost.rollback()
            })
          }),
        ])
        expect(outcomes.map(({ status }) => status)).toEqual(['rejected', 'fulfilled', 'fulfilled', 'fulfilled'])
      }),
    )
    expect(await committed()).toEqual([1, 3, 4, 5])
  })

  it('A4 lets helpers inside a callback use the ambient Knex, and others wait', async () => {
    const main = define()
    const [inside, go] = [gate(), gate()]
    await newContext(async () => {
      const transaction = main.db.transaction(async () => {
        await main.db('items').insert({ id: 1 })
        inside.open()
        await go.passed
        throw planned
      })
      await inside.passed
      const beside = main.db('items').insert({ id: 2 }).then()
      go.open()
      await expect(transaction).rejects.toBe(planned)
      await beside
    })
    expect(await committed()).toEqual([2])
  })

  it('A4 refuses others while a transaction without a callback is open, and nests in it', async () => {
    const main = define()
    await newContext(async () => {
      const trx = await main.db.transaction()
      await expect(main.db('items').insert({ id: 1 })).rejects.toMatchObject({ code: 'AMBIENT_SESSION_BUSY' })
      await trx('items').insert({ id: 2 })
      const inner = await trx.transaction()
      await inner('items').insert({ id: 3 })
      await inner.rollback()
      await trx.transaction((other) => other('items').insert({ id: 4 }))
      await expect(
        trx.transaction(async (other) => {
          await other('items').insert({ id: 5 })
          throw planned
        }),
      ).rejects.toBe(planned)
      await main.db('items').insert({ id: 6 }).transacting(trx)
      await trx.commit()
      expect(trx.isCompleted()).toBe(true)
      await main.db('items').insert({ id: 7 })
    })
    expect(await committed()).toEqual([2, 4, 6, 7])
  })

  it('A4 rejects commit() of a transaction in which an error was swallowed, with a callback and without', async () => {
    const main = define()
    await newContext(async () => {
      const trx = await main.db.transaction()
      await trx('items').insert({ id: 1 })
      await trx.raw('select * from missing').catch(() => {})
      await expect(trx.commit()).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED' })
      await expect(trx.executionPromise).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED' })
      const scoped = main.db.transaction(async (other) => {
        await other('items').insert({ id: 2 })
        await other.raw('select * from missing').catch(() => {})
      })
      await expect(scoped).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED' })
      await main.db('items').insert({ id: 3 })
    })
    expect(await committed()).toEqual([3])
  })

  it('A4 lets an error that was swallowed in a nested transaction doom only that, with a callback and without', async () => {
    const main = define()
    await newContext(async () => {
      const aborted = { code: 'AMBIENT_TRANSACTION_ABORTED' }
      const spoil = async (trx: Knex.Transaction, id: number) => {
        await trx('items').insert({ id })
        await trx.raw('select * from missing').catch(() => {})
      }
      const trx = await main.db.transaction()
      await trx('items').insert({ id: 1 })
      await expect(trx.transaction((inner) => spoil(inner, 2))).rejects.toMatchObject(aborted)
      const inner = await trx.transaction()
      await spoil(inner, 3)
      await expect(inner.commit()).rejects.toMatchObject(aborted)
      await inner.rollback()
      await trx('items').insert({ id: 4 })
      await trx.commit()
      await main.db.transaction(async (scoped) => {
        await scoped('items').insert({ id: 5 })
        await expect(scoped.transaction((other) => spoil(other, 6))).rejects.toMatchObject(aborted)
      })
    })
    expect(await committed()).toEqual([1, 4, 5])
  })

  it('A6 refuses a transaction that has ended', async () => {
    const main = define()
    await newContext(async () => {
      let left: Knex.Transaction | undefined
      await main.db.transaction(async (trx) => {
        left = trx
      })
      const ended = { code: 'AMBIENT_BLOCK_ENDED' }
      await expect(left?.('items').insert({ id: 1 })).rejects.toMatchObject(ended)
      await expect(left?.transaction()).rejects.toMatchObject(ended)
      await expect(left?.transaction(async () => {})).rejects.toMatchObject(ended)
    })
    expect(await committed()).toEqual([])
  })

  it('A7 wants the settings of the transaction that is open, and calls nobody back otherwise', async () => {
    const main = define()
    let called = false
    await newContext(async () => {
      await main.db('items').select()
      const settings = { isolationLevel: 'serializable' } as const
      const refused = { code: 'AMBIENT_TRANSACTION_OPTIONS' }
      await expect(main.db.transaction(settings)).rejects.toMatchObject(refused)
      const work = async () => {
        called = true
      }
      await expect(main.db.transaction(work, settings)).rejects.toMatchObject(refused)
      await expect(main.db.transaction(work, { isolationLevel: 'snapshot' })).rejects.toMatchObject({
        code: 'AMBIENT_UNSUPPORTED',
      })
      await main.db('items').insert({ id: 1 })
    })
    expect(called).toBe(false)
    await newContext(() =>
      main.db.transaction(
        async (trx) => {
          const { rows } = await trx.raw('show transaction_isolation')
          expect(rows).toEqual([{ transaction_isolation: 'serializable' }])
          await expect(trx.transaction((inner) => inner('items').insert({ id: 2 }))).rejects.toThrow(/read-only/)
        },
        { isolationLevel: 'serializable', readOnly: true },
      ),
    ).catch(() => {})
    expect(await committed()).toEqual([1])
  })

  it('S8 counts a transaction that was started before commit() as issued before it', async () => {
    const main = define()
    await expect(
      newContext(async () => {
        const transaction = main.db.transaction((trx) => trx('items').insert({ id: 1 }))
        await main.commit()
        await transaction
        await main.db('items').insert({ id: 2 })
        throw planned
      }),
    ).rejects.toBe(planned)
    expect(await committed()).toEqual([1])
  })

  it('A4 takes transactionProvider, batchInsert and rollback by hand', async () => {
    const main = define()
    await newContext(async () => {
      const provide = main.db.transactionProvider()
      const trx = await provide()
      expect(await provide()).toBe(trx)
      await trx('items').insert({ id: 1 })
      await trx.rollback(planned)
      await expect(trx.executionPromise).rejects.toBe(planned)
      await main.db.batchInsert('items', [{ id: 2 }, { id: 3 }, { id: 4 }], 2)
      await main.db.transaction(async (inner) => {
        await inner('items').insert({ id: 5 })
        await inner.rollback()
      })
    })
    expect(await committed()).toEqual([2, 3, 4])
  })

  it('S9 streams inside a native transaction', async () => {
    const main = define()
    await newContext(() =>
      main.db.transaction(async (trx) => {
        await trx('items').insert([{ id: 1 }, { id: 2 }, { id: 3 }])
        const ids: number[] = []
        for await (const { id } of trx('items').select('id').orderBy('id').stream()) ids.push(id)
        expect(ids).toEqual([1, 2, 3])
        await trx('items')
          .select('id')
          .stream((rows) => rows.resume())
        await trx('items').insert({ id: 4 })
      }),
    )
    expect(await committed()).toEqual([1, 2, 3, 4])
  })

  it('S8 S4 runs the statements of a schema builder inside the transaction', async () => {
    const main = define()
    await expect(
      newContext(async () => {
        await main.db.schema.createTable('made', (table) => {
          table.increments('id')
          table.integer('n').index()
        })
        await main.db('made').insert({ n: 1 })
        throw planned
      }),
    ).rejects.toBe(planned)
    await newContext(async () => expect(await main.db.schema.hasTable('made')).toBe(false))
  })
})
