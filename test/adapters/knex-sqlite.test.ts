import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { newContext } from 'ambient-db'
import type { AdapterHarness, EngineProbe, HarnessOptions } from 'ambient-db/conformance'
import { knexAdapter } from 'ambient-db/knex'
import BetterSqlite3, { type Database } from 'better-sqlite3'
import knex, { type Knex } from 'knex'
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { knexOperations, sendRaw } from './knex-subject.ts'
import { defineOverOwnPool } from './own-pools.ts'
import { itHoldsTheSuite } from './support.ts'

let folder: string
let other: Database
let probes: EngineProbe[] = []

function define({ connections: _, ...options }: HarnessOptions<Knex> = {}) {
  const open = (host?: string) => {
    let opened: Database | undefined
    const pool = {
      afterCreate(connection: Database, done: (error: null, connection: Database) => void) {
        opened = connection
        connection.pragma('busy_timeout = 0')
        done(null, connection)
      },
    }
    const connection = { filename: join(folder, 'main.sqlite') }
    const engine = knex({ client: 'better-sqlite3', connection, pool, useNullAsDefault: true, log: { warn() {} } })
    const probe: EngineProbe = {
      host,
      get open() {
        return opened?.open ? 1 : 0
      },
      get busy() {
        return opened?.open && opened.inTransaction ? 1 : 0
      },
      get closed() {
        return engine.client.pool === undefined
      },
    }
    return { engine, probe }
  }
  return defineOverOwnPool(knexAdapter<Knex>, open, options, (probe) => probes.push(probe))
}

const { stream: _, ...operations } = knexOperations
const harness: AdapterHarness<Knex> = {
  ...operations,
  capabilities: {
    savepoints: true,
    streaming: false,
    cancelling: false,
    failedStatementAborts: false,
    transactionStatus: false,
    pipelining: false,
    lossDetection: false,
    commitLookup: false,
    singleConnection: true,
  },
  define,
  async reset() {
    probes = []
    other.exec('delete from orphans; delete from items')
  },
  engines: () => probes,
  insert: (handle, id) => sendRaw(handle, 'insert into items (id) values (?)', [id]),
  ids: async (handle) =>
    ((await sendRaw(handle, 'select id from items order by id')) as { id: number }[]).map(({ id }) => id),
  fail: (handle) => sendRaw(handle, 'select * from missing'),
  witness: async () =>
    (other.prepare('select id from items order by id').all() as { id: number }[]).map(({ id }) => id),
  spoilCommit: (handle) => sendRaw(handle, 'insert into orphans values (-1)'),
}

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'ambient-db-'))
  other = new BetterSqlite3(join(folder, 'main.sqlite'), { timeout: 0 })
  other.exec(`
    pragma journal_mode = wal;
    create table items (id integer primary key, n integer not null default 0);
    create table orphans (item integer references items deferrable initially deferred);
  `)
})
afterAll(async () => {
  other.close()
  await rm(folder, { recursive: true })
})

describe('knexAdapter over better-sqlite3 holds the suite', () => {
  itHoldsTheSuite(() => harness)
})

describe('knexAdapter knows SQLite', () => {
  beforeEach(() => harness.reset())

  it('S13 begins IMMEDIATE, unless it is read-only', async () => {
    const main = define()
    await newContext(async () => {
      await harness.ids(main.db)
      expect(() => other.exec('begin immediate')).toThrow(/locked/)
    })
    await newContext(
      async () => {
        await harness.ids(main.db)
        other.exec('begin immediate; rollback')
        await expect(harness.insert(main.db, 1)).rejects.toThrow(/readonly/)
      },
      { transaction: { readOnly: true } },
    )
    await newContext(() => harness.insert(main.db, 2))
    expect(await harness.witness()).toEqual([2])
    await main.shutdown()
  })

  it('S13 rolls back when COMMIT stays busy, and keeps the connection', async () => {
    other.exec('pragma journal_mode = delete') // there a reader holds up COMMIT, and nothing else
    const main = define({ acquireTimeout: 30 })
    other.exec('begin; select * from items')
    await expect(newContext(() => harness.insert(main.db, 1))).rejects.toMatchObject({ code: 'SQLITE_BUSY' })
    other.exec('commit')
    await newContext(() => harness.insert(main.db, 2))
    expect(await harness.witness()).toEqual([2])
    expect(harness.engines()).toHaveLength(1)
    await main.shutdown()
    other.exec('pragma journal_mode = wal')
  })

  it('S4 detects that a statement rolled the transaction back', async () => {
    const main = define()
    await newContext(() => harness.insert(main.db, 1))
    const work = newContext(async () => {
      await harness.insert(main.db, 2)
      await expect(main.db.raw('insert or rollback into items (id) values (1)')).rejects.toThrow(/UNIQUE/)
      await expect(harness.insert(main.db, 3)).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED' })
    })
    await expect(work).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', outcome: 'rolled-back' })
    expect(await harness.witness()).toEqual([1])
    await main.shutdown()
  })

  it.each([{ isolationLevel: 'read committed' }, { deferrable: true }] as const)(
    'A7 refuses %o, which SQLite does not have',
    async (transaction) => {
      const main = define()
      const work = newContext(() => harness.insert(main.db, 1), { transaction })
      await expect(work).rejects.toMatchObject({ code: 'AMBIENT_UNSUPPORTED' })
      await main.shutdown()
    },
  )

  it('S8 changes a table by the way of SQLite, which rebuilds it in a transaction of its own', async () => {
    const main = define()
    await newContext(async () => {
      await main.db.schema.createTable('changing', (table) => {
        table.integer('a')
        table.integer('b')
      })
      await main.db('changing').insert({ a: 1, b: 2 })
      await main.db.schema.alterTable('changing', (table) => table.dropColumn('b'))
      expect(await main.db('changing').select()).toEqual([{ a: 1 }])
      await main.rollback()
      expect(await main.db.schema.hasTable('changing')).toBe(false)
    })
    await main.shutdown()
  })

  it('S9 streams rows that it has read before', async () => {
    const main = define()
    await newContext(async () => {
      await main.db('items').insert([{ id: 1 }, { id: 2 }])
      const ids: number[] = []
      for await (const { id } of main.db('items').select('id').orderBy('id').stream()) ids.push(id)
      expect(ids).toEqual([1, 2])
    })
    await main.shutdown()
  })
})
