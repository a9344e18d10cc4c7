import { defineDatabase, newContext } from 'ambient-db'
import { kyselyAdapter, kyselyHandle } from 'ambient-db/kysely'
import { pgAdapter } from 'ambient-db/pg'
import {
  CamelCasePlugin,
  CompiledQuery,
  type Generated,
  Kysely,
  type LogEvent,
  PostgresDialect,
  type PostgresPool,
  sql,
} from 'kysely'
import { Pool } from 'pg'
import Cursor from 'pg-cursor'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { databaseGate, gate, until } from '../support/gate.ts'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'

interface Tables {
  notes: { id: Generated<number>; text: string }
}

let database: TestDatabase
let pool: Pool
const dialect = (ambient: PostgresPool) => new PostgresDialect({ pool: ambient, cursor: Cursor })

const define = (options: { plugins?: CamelCasePlugin[]; log?: (event: LogEvent) => void } = {}) =>
  defineDatabase({
    name: 'main',
    adapter: kyselyAdapter<Tables>(
      pgAdapter(() => pool),
      dialect,
      options,
    ),
  })
const main = define()
const { db } = main
const note = (text: string, handle: Kysely<Tables> = db) => handle.insertInto('notes').values({ text }).execute()
const texts = async () => {
  const rows = await database.witness.rows<{ text: string }>('select text from notes order by id')
  return rows.map(({ text }) => text)
}
const transactionId = async (handle: Kysely<Tables> = db) => {
  const { rows } = await sql<{ id: string }>`select pg_current_xact_id()::text as id`.execute(handle)
  return rows[0]?.id
}
const planned = new Error('planned')

beforeAll(async () => {
  database = await createDatabase()
  await database.witness.rows('create table notes (id serial primary key, text text unique)')
  await database.witness.rows('create schema other')
  await database.witness.rows('create table other.notes (id serial primary key, text text unique)')
  pool = new Pool({ connectionString: database.url, max: 5 })
})
beforeEach(() => database.witness.rows('truncate notes, other.notes'))
afterEach(() => expect(pool.idleCount).toBe(pool.totalCount))
afterAll(async () => {
  await main.shutdown()
  await until(async () => (await database.backends()).length === 0, 'connections to end')
  await database.drop()
})

describe('the ambient handle is a whole Kysely', () => {
  it('is an instance of Kysely, and compiles before any session or engine exists', () => {
    const never = defineDatabase({
      name: 'never',
      adapter: kyselyAdapter<Tables>(
        pgAdapter((): Pool => {
          throw planned
        }),
        dialect,
      ),
    })
    expect(never.db).toBeInstanceOf(Kysely)
    const { sql: text, parameters } = never.db.selectFrom('notes').selectAll().where('id', '=', 1).compile()
    expect([text, parameters]).toEqual(['select * from "notes" where "id" = $1', [1]])
  })

  it('has functions, dynamic references and raw SQL', async () => {
    await newContext(async () => {
      await note('one')
      await note('two')
      const { fn, dynamic } = db
      const count = await db.selectFrom('notes').select(fn.countAll<string>().as('count')).executeTakeFirstOrThrow()
      expect(count).toEqual({ count: '2' })
      const { ref } = dynamic
      const rows = await db.selectFrom('notes').select(ref<'text'>('text')).orderBy('id').execute()
      expect(rows).toEqual([{ text: 'one' }, { text: 'two' }])
      expect(await sql<{ text: string }>`select text from notes where id > ${0} order by id`.execute(db)).toMatchObject(
        {
          rows,
        },
      )
      expect(await db.executeQuery(CompiledQuery.raw('select 1 as one'))).toMatchObject({ rows: [{ one: 1 }] })
    })
  })

  it.each<[string, (handle: Kysely<Tables>) => Kysely<Tables>]>([
    ['withSchema', (handle) => handle.withSchema('public')],
    ['withPlugin', (handle) => handle.withPlugin(new CamelCasePlugin())],
    ['withoutPlugins', (handle) => handle.withoutPlugins()],
    ['$extendTables', (handle) => handle.$extendTables<{ more: { id: number } }>() as unknown as Kysely<Tables>],
    ['$omitTables', (handle) => handle.$omitTables<never>() as unknown as Kysely<Tables>],
  ])('keeps the session after %s, made at module level', async (_name, derive) => {
    const derived = derive(db)
    await newContext(async () => {
      const id = await transactionId()
      expect(await transactionId(derived)).toBe(id)
      await expect(
        derived.transaction().execute(async (transaction) => {
          await note('inner', transaction)
          await note('helper')
          throw planned
        }),
      ).rejects.toBe(planned)
      await note('outer', derived)
    })
    expect(await texts()).toEqual(['outer'])
  })

  it('writes to the schema that it was told', async () => {
    await newContext(() => note('there', db.withSchema('other')))
    expect(await texts()).toEqual([])
    expect(await database.witness.rows('select text from other.notes')).toEqual([{ text: 'there' }])
  })

  it('has the plugins and the log that it was given', async () => {
    const events: LogEvent[] = []
    const camel = define({ plugins: [new CamelCasePlugin()], log: (event) => events.push(event) })
    await newContext(async () => {
      const { rows } = await sql<{ camelCase: number }>`select 1 as camel_case`.execute(camel.db)
      expect(rows).toEqual([{ camelCase: 1 }])
      await camel
        .session()
        .savepoint(() => sql`select * from missing`.execute(camel.db))
        .catch(() => {})
    })
    const logged = events.map(({ level, query }) => [level, query.sql])
    expect(logged).toEqual([
      ['query', 'select 1 as camel_case'],
      ['error', 'select * from missing'],
    ])
  })

  it('introspects', async () => {
    const tables = await newContext(() => db.introspection.getTables())
    expect(tables.map(({ name }) => name)).toContain('notes')
  })

  it('refuses to be destroyed, and goes on', async () => {
    await expect(db.destroy()).rejects.toMatchObject({ code: 'AMBIENT_UNSUPPORTED' })
    await newContext(() => note('still here'))
    expect(await texts()).toEqual(['still here'])
  })

  it('refuses SQL that begins or ends a transaction, before a byte is sent', async () => {
    await newContext(async () => {
      await note('kept')
      for (const text of ['begin', 'commit', 'rollback', 'savepoint a', 'start transaction', 'ABORT;']) {
        const refused = sql.raw(text).execute(db)
        await expect(refused).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_CONTROL' })
      }
    })
    expect(await texts()).toEqual(['kept'])
  })
})

describe('native transactions', () => {
  it('A4 are savepoints of one transaction, whoever issues their statements', async () => {
    await newContext(async () => {
      const id = await transactionId()
      await db.transaction().execute(async (transaction) => {
        expect(await transactionId(transaction)).toBe(id)
        const helper = async () => db.transaction().execute(() => note('helper'))
        await helper()
        await note('inner', transaction)
      })
    })
    expect(await texts()).toEqual(['helper', 'inner'])
  })

  it('A7 agree with the transaction that is open, or are refused', async () => {
    await newContext(
      async () => {
        const level = () => sql<{ level: string }>`select current_setting('transaction_isolation') as level`.execute(db)
        const inner = () => db.transaction().setIsolationLevel('serializable').execute(level)
        expect((await inner()).rows).toEqual([{ level: 'serializable' }])
        const other = db.transaction().setIsolationLevel('read committed').execute(level)
        await expect(other).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_OPTIONS' })
      },
      { transaction: { isolationLevel: 'serializable' } },
    )
  })

  it('A7 set the options of the transaction that they open', async () => {
    await newContext(async () => {
      const settings = sql<{ level: string; readonly: string }>`
        select current_setting('transaction_isolation') as level, current_setting('transaction_read_only') as readonly`
      const { rows } = await db
        .transaction()
        .setIsolationLevel('repeatable read')
        .setAccessMode('read only')
        .execute((transaction) => settings.execute(transaction))
      expect(rows).toEqual([{ level: 'repeatable read', readonly: 'on' }])
    })
  })

  it('A4 in parallel: each keeps or undoes its own work', async () => {
    await newContext(async () => {
      const results = await Promise.allSettled(
        ['a', 'b', 'c'].map((text) =>
          db.transaction().execute(async (transaction) => {
            await note(`${text}1`, transaction)
            await note(`${text}2`)
            if (text === 'b') throw planned
          }),
        ),
      )
      expect(results.map(({ status }) => status)).toEqual(['fulfilled', 'rejected', 'fulfilled'])
    })
    expect(await texts()).toEqual(['a1', 'a2', 'c1', 'c2'])
  })

  it('A6 refuse a late statement of the transaction object and of its async scope', async () => {
    const ended = gate()
    await newContext(async () => {
      let late: Promise<unknown> = Promise.resolve()
      const kept = await db.transaction().execute(async (transaction) => {
        late = ended.passed.then(() => note('late'))
        late.catch(() => {})
        return transaction
      })
      ended.open()
      await expect(late).rejects.toMatchObject({ code: 'AMBIENT_BLOCK_ENDED' })
      await expect(note('later', kept)).rejects.toThrow('already committed')
    })
    expect(await texts()).toEqual([])
  })

  it('controlled: savepoints, and refused others', async () => {
    await newContext(async () => {
      const transaction = await db.startTransaction().execute()
      await note('one', transaction)
      await expect(note('beside')).rejects.toMatchObject({ code: 'AMBIENT_SESSION_BUSY' })
      const first = await transaction.savepoint('first').execute()
      await note('two', first)
      await expect(note('two', first)).rejects.toMatchObject({ code: '23505' })
      const back = await first.rollbackToSavepoint('first').execute()
      await note('three', back)
      const released = await back.releaseSavepoint('first').execute()
      await note('four', released)
      await released.commit().execute()
      expect(transaction.isCommitted).toBe(true)
      await note('five')
      const other = await db.startTransaction().execute()
      await note('six', other)
      await other.rollback().execute()
      expect(other.isRolledBack).toBe(true)
    })
    expect(await texts()).toEqual(['one', 'three', 'four', 'five'])
  })

  it('run on one connection with db.connection(), and statements go on after them', async () => {
    await newContext(async () => {
      const id = await transactionId()
      const result = await db.connection().execute(async (connection) => {
        expect(await transactionId(connection)).toBe(id)
        await note('one', connection)
        await expect(
          connection.transaction().execute(async (transaction) => {
            await note('two', transaction)
            throw planned
          }),
        ).rejects.toBe(planned)
        await note('three', connection)
        await note('four')
        await connection.transaction().execute((transaction) => note('five', transaction))
        return 'result'
      })
      expect(result).toBe('result')
      await note('six')
    })
    expect(await texts()).toEqual(['one', 'three', 'four', 'five', 'six'])
  })
})

describe('streams', () => {
  const numbers = (count = 1000) =>
    db
      .selectFrom(sql<{ n: number }>`generate_series(1, ${sql.lit(count)})`.as('series'))
      .select(sql<number>`series`.as('n'))
      .stream(10)

  it('S9 read to the end, left early, and failing', async () => {
    await newContext(async () => {
      let last = 0
      for await (const { n } of numbers(25)) last = n
      expect(last).toBe(25)
      for await (const { n } of numbers()) if (n === 3) break
      await note('after')
      const failing = async () => {
        const stream = db.selectFrom('notes').select(sql<number>`1 / (id - id)`.as('n')).stream(10)
        for await (const _ of stream);
      }
      await expect(main.session().savepoint(failing)).rejects.toMatchObject({ code: '22012' })
      await note('after the failure')
    })
    expect(await texts()).toEqual(['after', 'after the failure'])
  })

  it('S4 doom the transaction in which they failed', async () => {
    let failure: unknown
    const work = newContext(async () => {
      await note('one')
      try {
        for await (const _ of db.selectFrom('notes').select(sql<number>`1 / (id - id)`.as('n')).stream(10));
      } catch (error) {
        failure = error
      }
    })
    await expect(work).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', cause: { code: '22012' } })
    expect(failure).toMatchObject({ code: '22012' })
    expect(await texts()).toEqual([])
  })

  it('S9 inside a native transaction belong to it', async () => {
    await newContext(async () => {
      await db.transaction().execute(async (transaction) => {
        await note('one', transaction)
        const seen: string[] = []
        for await (const { text } of transaction.selectFrom('notes').select('text').stream(1)) seen.push(text)
        expect(seen).toEqual(['one'])
        await note('two')
      })
    })
    expect(await texts()).toEqual(['one', 'two'])
  })

  it('C8 are not begun when the work is aborted before they read', async () => {
    const own = new Pool({ connectionString: database.url, max: 1 })
    const abort = new AbortController()
    const aborted = defineDatabase({
      name: 'aborted',
      adapter: kyselyAdapter<Tables>(
        pgAdapter(() => own),
        (ambient) =>
          new PostgresDialect({ pool: ambient, cursor: Cursor, onCreateConnection: async () => abort.abort() }),
      ),
    })
    await database.witness.rows("insert into notes (text) values ('there is a row')")
    let rows = 0
    const reading = newContext(
      async () => {
        for await (const _ of aborted.db.selectFrom('notes').select('id').stream(1)) rows++
      },
      { signal: abort.signal },
    )
    await expect(reading).rejects.toMatchObject({ code: 'AMBIENT_ABORTED', outcome: 'rolled-back' })
    await newContext(() => note('the connection is free', aborted.db))
    expect(rows).toBe(0)
    await aborted.shutdown()
  })

  it('end by a signal, and the session goes on', async () => {
    await newContext(async () => {
      const controller = new AbortController()
      for (const text of ['one', 'two', 'three']) await note(text)
      const read = async () => {
        const stream = db.selectFrom('notes').selectAll().stream({ chunkSize: 1, signal: controller.signal })
        for await (const _ of stream) controller.abort(planned)
      }
      await expect(read()).rejects.toBe(planned)
      await note('four')
    })
    expect(await texts()).toEqual(['one', 'two', 'three', 'four'])
  })
})

describe('abort signals', () => {
  it('are refused before a byte is sent if they have fired', async () => {
    await newContext(async () => {
      const query = db.insertInto('notes').values({ text: 'never' })
      await expect(query.execute({ signal: AbortSignal.abort(planned) })).rejects.toBe(planned)
      await note('one')
    })
    expect(await texts()).toEqual(['one'])
  })

  it('let a query that is ignored go on inside of the transaction', async () => {
    const wait = await databaseGate(database.url)
    const controller = new AbortController()
    await newContext(async () => {
      const query = sql.raw(wait.sql).execute(db, { signal: controller.signal })
      query.catch(() => {})
      await until(async () => (await database.backends()).some(({ query: text }) => text === wait.sql), 'the query')
      controller.abort(planned)
      await expect(query).rejects.toBe(planned)
      const behind = note('behind')
      await wait.open()
      await behind
    })
    expect(await texts()).toEqual(['behind'])
  })

  it('cancel the query on the server if told to', async () => {
    const wait = await databaseGate(database.url)
    const controller = new AbortController()
    await newContext(async () => {
      await note('one')
      await expect(
        main.session().savepoint(async () => {
          const options = { signal: controller.signal, inflightQueryAbortStrategy: 'cancel query' } as const
          const query = sql.raw(wait.sql).execute(db, options)
          query.catch(() => {})
          await until(async () => (await database.backends()).some(({ query: text }) => text === wait.sql), 'the query')
          controller.abort(planned)
          await query
        }),
      ).rejects.toBe(planned)
      await note('two')
    })
    await wait.open()
    expect(await texts()).toEqual(['one', 'two'])
  })
})

describe('several handles over one driver', () => {
  it('share one transaction: raw pg and two Kyselys', async () => {
    const sent: string[] = []
    class RecordingPool extends Pool {}
    const recorded = new RecordingPool({ connectionString: database.url })
    recorded.on('connect', (client) => {
      const query = client.query
      client.query = ((...args: [unknown]) => {
        sent.push(String((args[0] as { text?: string }).text ?? args[0]))
        return query.apply(client, args as never)
      }) as typeof query
    })
    const driver = defineDatabase({ name: 'driver', adapter: pgAdapter(() => recorded) })
    const [one, two] = [1, 2].map(() => kyselyHandle<Tables>(driver, dialect)) as [Kysely<Tables>, Kysely<Tables>]
    await newContext(async () => {
      await driver.db.query("insert into notes (text) values ('pg')")
      await note('one', one)
      const ids = await Promise.all([transactionId(one), transactionId(two)])
      const { rows } = await driver.db.query('select pg_current_xact_id()::text as id')
      expect(new Set([...ids, rows[0].id]).size).toBe(1)
      await expect(
        two.transaction().execute(async (transaction) => {
          await note('two', transaction)
          await driver.db.query("insert into notes (text) values ('pg inside')")
          throw planned
        }),
      ).rejects.toBe(planned)
    })
    expect(sent.filter((text) => /^begin/i.test(text))).toHaveLength(1)
    expect(sent.filter((text) => /^commit/i.test(text))).toHaveLength(1)
    expect(await texts()).toEqual(['pg', 'one'])
    await driver.shutdown()
  })

  it('work over the handle of a session', async () => {
    await main.newSession(async (session) => {
      await note('one', session.db)
      await session.db.transaction().execute((transaction) => note('two', transaction))
      await session.rollback()
      await note('three', session.db)
    })
    expect(await texts()).toEqual(['three'])
  })
})

describe('the adapter over a dialect', () => {
  it('S4 tells a COMMIT that was answered with ROLLBACK from one that committed', async () => {
    const own = new Pool({ connectionString: database.url })
    const adapter = kyselyAdapter<Tables>(() => new PostgresDialect({ pool: own }))
    const engine = await adapter.createEngine(undefined)
    const connection = await adapter.acquire(engine, () => {})
    await adapter.begin(connection, { isolationLevel: 'repeatable read', readOnly: true })
    expect(await adapter.commit(connection)).toBe('committed')
    await adapter.begin(connection, {})
    const failing = connection.executeQuery(CompiledQuery.raw('select * from missing'))
    await expect(failing).rejects.toMatchObject({ code: '42P01' })
    expect(await adapter.commit(connection)).toBe('rolled-back')
    await adapter.release(engine, connection, planned)
    await until(() => own.totalCount === 0, 'the connection to be discarded')
    await adapter.closeEngine(engine)
  })
})

describe('dialects per host', () => {
  it('D1 makes one dialect for each host, for compiling and for sessions', async () => {
    const made: string[] = []
    const hosts = defineDatabase({
      name: 'hosts',
      host: 'a',
      adapter: kyselyAdapter<Tables>((host) => {
        made.push(host)
        return new PostgresDialect({ pool: new Pool({ connectionString: database.url }) })
      }),
    })
    hosts.db.selectFrom('notes').selectAll().compile()
    expect(made).toEqual(['a'])
    await newContext(() => note('a', hosts.db))
    await hosts.changeHost('b')
    hosts.db.selectFrom('notes').selectAll().compile()
    await newContext(() => note('b', hosts.db))
    await newContext(() => note('c', hosts.session().db))
    expect(made).toEqual(['a', 'b'])
    await hosts.shutdown()
    expect(await texts()).toEqual(['a', 'b', 'c'])
  })

  it('says so where a dialect asks for a host and none is configured', async () => {
    const hosts = defineDatabase({
      name: 'hosts',
      adapter: kyselyAdapter<Tables>((host) => {
        throw new Error(host)
      }),
    })
    const missing = { code: 'AMBIENT_HOST_MISSING', message: expect.stringContaining('No host is configured.') }
    await expect(newContext(() => note('never', hosts.db))).rejects.toMatchObject(missing)
    expect(() => hosts.db.selectFrom('notes').compile()).toThrow(expect.objectContaining(missing))
  })
})
