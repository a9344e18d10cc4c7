import { once } from 'node:events'
import { type AmbientError, defineDatabase, newContext } from 'ambient-db'
import { pgAdapter } from 'ambient-db/pg'
import pg, { Pool, type PoolClient } from 'pg'
import Cursor from 'pg-cursor'
import QueryStream from 'pg-query-stream'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { until } from '../support/gate.ts'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'

let database: TestDatabase
let pool: Pool
const main = defineDatabase({ name: 'main', adapter: pgAdapter(() => pool) })
const { db } = main
const sent: string[] = []
const note = (text: string, client: Pool | PoolClient = db) => client.query('insert into notes values ($1)', [text])
const texts = async () => {
  const rows = await database.witness.rows<{ text: string }>('select text from notes order by text')
  return rows.map(({ text }) => text)
}
const planned = new Error('planned')

class RecordingClient extends pg.Client {
  override query(...args: unknown[]): never {
    const [config] = args
    sent.push(typeof config === 'string' ? config : String((config as { text?: unknown }).text))
    return super.query(...(args as [string])) as never
  }
}

beforeAll(async () => {
  database = await createDatabase()
  await database.witness.rows('create table notes (text text primary key)')
  pool = new Pool({ connectionString: database.url, max: 5, Client: RecordingClient } as pg.PoolConfig)
})
beforeEach(async () => {
  await database.witness.rows('truncate notes')
  sent.length = 0
})
afterEach(() => expect(pool.idleCount).toBe(pool.totalCount))
afterAll(async () => {
  await main.shutdown()
  await until(async () => (await database.backends()).length === 0, 'connections to end')
  await database.drop()
})

describe('the pool', () => {
  it('is an instance of Pool, with the options, counters and events of the real one', async () => {
    expect(db).toBeInstanceOf(Pool)
    expect(db.constructor.name).toMatch(/Pool/)
    const events: string[] = []
    const own = new Pool({ connectionString: database.url, max: 3 })
    const other = defineDatabase({ name: 'other', adapter: pgAdapter(() => own) })
    expect([other.db.totalCount, other.db.idleCount, other.db.waitingCount]).toEqual([0, 0, 0])
    for (const event of ['connect', 'acquire', 'release', 'remove'] as const)
      other.db.on(event, () => events.push(event))
    await newContext(async () => {
      await other.db.query('select 1')
      expect([other.db.totalCount, other.db.idleCount, other.db.waitingCount]).toEqual([1, 0, 0])
    })
    expect(other.db.options.max).toBe(3)
    expect(other.db.idleCount).toBe(1)
    await other.shutdown()
    await until(() => events.length === 4, 'the last event')
    expect(events).toEqual(['connect', 'acquire', 'release', 'remove'])
  })

  it('cannot be ended', async () => {
    await expect(db.end()).rejects.toMatchObject({ code: 'AMBIENT_UNSUPPORTED' })
    await newContext(() => note('one'))
    expect(await texts()).toEqual(['one'])
  })

  it('refuses transaction control, before a byte is sent', async () => {
    await newContext(async () => {
      for (const text of ['BEGIN', 'commit', ' rollback;', 'SAVEPOINT a', 'start transaction read only']) {
        await expect(db.query(text)).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_CONTROL' })
      }
      await expect(db.query({ text: 'commit' })).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_CONTROL' })
    })
    expect(sent).toEqual([])
  })

  it('survives idle clients that break', async () => {
    await newContext(() => note('one'))
    const gone = new Promise((resolve) => pool.once('remove', resolve))
    await database.witness.rows(
      'select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()',
    )
    await gone
    await newContext(() => note('two'))
    expect(await texts()).toEqual(['one', 'two'])
  })
})

describe('the adapter', () => {
  it('S4 tells a COMMIT that was answered with ROLLBACK from one that committed', async () => {
    const own = new Pool({ connectionString: database.url })
    const adapter = pgAdapter(() => own)
    const engine = await adapter.createEngine(undefined)
    const connection = await adapter.acquire(engine, () => {})
    await adapter.begin(connection, { isolationLevel: 'serializable', readOnly: true, deferrable: true })
    const { rows } = await connection.query(`select current_setting('transaction_isolation') as level,
      current_setting('transaction_read_only') as read_only, current_setting('transaction_deferrable') as deferrable`)
    expect(rows).toEqual([{ level: 'serializable', read_only: 'on', deferrable: 'on' }])
    expect(await adapter.commit(connection)).toBe('committed')
    await adapter.begin(connection, {})
    await expect(connection.query('select * from missing')).rejects.toMatchObject({ code: '42P01' })
    expect(await adapter.commit(connection)).toBe('rolled-back')
    expect(adapter.transactionStatus?.(connection)).toBe('none')
    await adapter.release(engine, connection)
    await adapter.closeEngine(engine)
  })
})

describe('queries', () => {
  it('take every form that pg takes', async () => {
    await newContext(async () => {
      expect((await db.query('select 1 as n')).rows).toEqual([{ n: 1 }])
      expect((await db.query('select $1::int as n', [2])).rows).toEqual([{ n: 2 }])
      expect((await db.query({ text: 'select $1::int as n', values: [3] })).rows).toEqual([{ n: 3 }])
      expect((await db.query({ text: 'select $1::int as n' }, [4])).rows).toEqual([{ n: 4 }])
      expect((await db.query({ text: 'select 5 as n, 6 as m', rowMode: 'array' })).rows).toEqual([[5, 6]])
      const types = { getTypeParser: () => (value: string) => `raw ${value}` }
      expect((await db.query({ text: 'select 7 as n', types: types as never })).rows).toEqual([{ n: 'raw 7' }])
      const results = (await db.query('select 8 as n; select 9 as n')) as unknown as pg.QueryResult[]
      expect(results.map(({ rows }) => rows)).toEqual([[{ n: 8 }], [{ n: 9 }]])
    })
  })

  it('can be prepared under a name, again on every connection', async () => {
    const named = { name: 'by-id', text: 'select $1::int as n' }
    await Promise.all(
      [1, 2].map((n) =>
        newContext(async () => {
          for (let round = 0; round < 3; round++) {
            expect((await db.query({ ...named, values: [n] })).rows).toEqual([{ n }])
          }
        }),
      ),
    )
    const prepared = newContext(() =>
      db.query("select count(*)::int as n from pg_prepared_statements where name = 'by-id'"),
    )
    expect((await prepared).rows).toEqual([{ n: 1 }])
  })

  it('take callbacks, which run in the context of their caller', async () => {
    await newContext(async () => {
      const session = main.session()
      const call = (...args: unknown[]) =>
        new Promise<[unknown, pg.QueryResult | undefined, boolean]>((resolve) => {
          const callback = (error: unknown, result?: pg.QueryResult) =>
            resolve([error, result, main.session() === session])
          expect((db.query as (...args: unknown[]) => unknown)(...args, callback)).toBeUndefined()
        })
      const [error, result, same] = await call('select 1 as n')
      expect([error, result?.rows, same]).toEqual([undefined, [{ n: 1 }], true])
      expect((await call('select $1::int as n', [2]))[1]?.rows).toEqual([{ n: 2 }])
      expect((await call({ text: 'select 3 as n' }))[1]?.rows).toEqual([{ n: 3 }])
      expect((await call('commit'))[0]).toMatchObject({ code: 'AMBIENT_TRANSACTION_CONTROL' })
      const [failure] = await main
        .session()
        .savepoint(() => call('select * from missing'))
        .catch((thrown: AmbientError) => [thrown.cause])
      expect(failure).toMatchObject({ code: '42P01' })
    })
  })

  it('reject bad arguments without dooming the transaction', async () => {
    await newContext(async () => {
      await note('one')
      await expect((async () => db.query(undefined as never))()).rejects.toBeInstanceOf(Error)
      await note('two')
    })
    expect(await texts()).toEqual(['one', 'two'])
  })

  it('can be pg.Query objects, which wait for their turn like any other', async () => {
    await newContext(async () => {
      const rows: unknown[] = []
      const query = new pg.Query('select 1 as n', [] as never)
      query.on('row', (row) => rows.push(row))
      const ended = once(query as unknown as NodeJS.EventEmitter, 'end')
      expect(db.query(query as never)).toBe(query)
      await note('behind')
      await ended
      expect(rows).toEqual([{ n: 1 }])
      const failing = new pg.Query('select * from missing', [] as never)
      const failed = once(failing as unknown as NodeJS.EventEmitter, 'error')
      db.query(failing as never)
      expect((await failed)[0]).toMatchObject({ code: '42P01' })
      await expect(note('never')).rejects.toMatchObject({
        code: 'AMBIENT_TRANSACTION_ABORTED',
        cause: { code: '42P01' },
      })
      await main.rollback()
    })
    expect(await texts()).toEqual([])
  })
})

describe('cursors and streams', () => {
  const numbers = 'select n from generate_series(1, 100) as n'

  it('S9 read with promises and with callbacks, inside of the transaction', async () => {
    await newContext(async () => {
      await note('one')
      const cursor = db.query(new Cursor<{ n: number }>(numbers))
      expect(await cursor.read(2)).toEqual([{ n: 1 }, { n: 2 }])
      const session = main.session()
      const [rows, same] = await new Promise<[unknown[], boolean]>((resolve, reject) => {
        cursor.read(1, (error, read) => (error ? reject(error) : resolve([read, main.session() === session])))
      })
      expect([rows, same]).toEqual([[{ n: 3 }], true])
      await expect(note('refused')).rejects.toMatchObject({ code: 'AMBIENT_STREAM_OPEN' })
      await cursor.close()
      await note('two')
    })
    expect(await texts()).toEqual(['one', 'two'])
  })

  it('S9 answer whoever reads when they fail, and doom the transaction', async () => {
    const work = newContext(async () => {
      await note('one')
      const cursor = db.query(new Cursor('select 1 / 0'))
      await expect(cursor.read(1)).rejects.toMatchObject({ code: '22012' })
    })
    await expect(work).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', cause: { code: '22012' } })
  })

  it('S9 stream, in the context of their issuer, also on a connection that another opened', async () => {
    await newContext(() => note('opens the connection'))
    await newContext(async () => {
      const session = main.session()
      const stream = db.query(new QueryStream(numbers, [], { batchSize: 10 }))
      const seen: number[] = []
      stream.on('data', ({ n }: { n: number }) => {
        expect(main.session()).toBe(session)
        seen.push(n)
      })
      await once(stream, 'end')
      expect(seen).toHaveLength(100)
      await note('behind')
    })
    expect(await texts()).toEqual(['behind', 'opens the connection'])
  })

  it('S9 are refused outside a context through their own error', async () => {
    const stream = db.query(new QueryStream(numbers))
    await expect(stream.toArray()).rejects.toMatchObject({ code: 'AMBIENT_NO_CONTEXT' })
    const cursor = db.query(new Cursor(numbers))
    await expect(cursor.read(1)).rejects.toMatchObject({ code: 'AMBIENT_NO_CONTEXT' })
  })
})

describe('leased clients', () => {
  it('A4 make BEGIN … COMMIT a savepoint, and ROLLBACK undoes it alone', async () => {
    await newContext(async () => {
      await note('outer')
      const client = await db.connect()
      await client.query('BEGIN')
      await note('kept', client)
      await client.query('COMMIT')
      await client.query('start transaction')
      await note('undone', client)
      await expect(note('beside')).rejects.toMatchObject({ code: 'AMBIENT_SESSION_BUSY' })
      await client.query('savepoint "A b"')
      await expect(client.query('select * from missing')).rejects.toMatchObject({ code: '42P01' })
      await client.query('rollback to savepoint "A b"')
      await client.query('release "A b"')
      await client.query('ROLLBACK')
      client.release()
    })
    expect(await texts()).toEqual(['kept', 'outer'])
    expect(sent.filter((text) => /^(?:begin|commit|rollback)$/i.test(text))).toEqual(['BEGIN', 'COMMIT'])
  })

  it('A4 roll back what was left open when they are released', async () => {
    await newContext(async () => {
      const client = await db.connect()
      await client.query('begin')
      await note('undone', client)
      client.release()
      await note('kept')
    })
    expect(await texts()).toEqual(['kept'])
  })

  it('come by callback too, and hold no connection of their own', async () => {
    await newContext(async () => {
      const [client, release] = await new Promise<[PoolClient, () => void]>((resolve, reject) => {
        db.connect((error, leased, done) => (error ? reject(error) : resolve([leased as PoolClient, done])))
      })
      expect(pool.totalCount - pool.idleCount).toBe(0)
      await note('one', client)
      expect(client.escapeIdentifier('a"b')).toBe('"a""b"')
      expect(client.escapeLiteral("a'b")).toBe("'a''b'")
      release()
    })
    expect(await texts()).toEqual(['one'])
    await expect(db.connect()).rejects.toMatchObject({ code: 'AMBIENT_NO_CONTEXT' })
  })

  it('hear the notices of their own statements', async () => {
    await newContext(async () => {
      const client = await db.connect()
      const notices: (string | undefined)[] = []
      client.on('notice', ({ message }) => notices.push(message))
      await client.query("do $$ begin raise notice 'hello'; end $$")
      await db.query("do $$ begin raise notice 'not for the client'; end $$")
      client.release()
      expect(notices).toEqual(['hello'])
    })
  })
})

describe('a pool that pipelines', () => {
  it('sends BEGIN with the first statement, and commits', async () => {
    const pipelined = new Pool({ connectionString: database.url, pipeline: true } as pg.PoolConfig)
    const other = defineDatabase({ name: 'other', adapter: pgAdapter(() => pipelined) })
    await newContext(async () => {
      await Promise.all(['a', 'b', 'c'].map((text) => note(text, other.db)))
      await expect(
        other.atomic(
          async () => {
            await note('d', other.db)
            throw planned
          },
          { current: 'savepoint' },
        ),
      ).rejects.toBe(planned)
    })
    expect(await texts()).toEqual(['a', 'b', 'c'])
    await expect(
      newContext(async () => {
        await note('e', other.db)
        await expect(note('a', other.db)).rejects.toMatchObject({ code: '23505' })
      }),
    ).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', cause: { code: '23505' } })
    expect(await texts()).toEqual(['a', 'b', 'c'])
    await other.shutdown()
  })

  it('refuses cursors with an error of their own, and goes on', async () => {
    const pipelined = new Pool({ connectionString: database.url, pipeline: true } as pg.PoolConfig)
    const other = defineDatabase({ name: 'other', adapter: pgAdapter(() => pipelined) })
    await newContext(async () => {
      await note('one', other.db)
      const cursor = other.db.query(new Cursor('select 1'))
      await expect(cursor.read(1)).rejects.toBeInstanceOf(Error)
      await note('two', other.db)
    })
    expect(await texts()).toEqual(['one', 'two'])
    await other.shutdown()
  })
})
