import { PGlite } from '@electric-sql/pglite'
import { type AmbientDatabase, defineDatabase, isAmbientError, newContext } from 'ambient-db'
import { pgliteAdapter } from 'ambient-db/pglite'
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { pgliteHarness } from './pglite-support.ts'
import { itHoldsTheSuite } from './support.ts'

let harness: Awaited<ReturnType<typeof pgliteHarness<PGlite>>>
beforeAll(async () => {
  harness = await pgliteHarness<PGlite>({
    define(make, options) {
      const factory = options.host === undefined ? () => make() : (host: string) => make(host)
      return defineDatabase({ name: 'main', ...options, adapter: pgliteAdapter(factory) })
    },
    query: (handle, sql, parameters) => handle.query(sql, parameters),
    endBehindTheBack: (handle) => handle.exec('select 1; commit'),
    transaction: (handle, work) =>
      handle.transaction((transaction) =>
        work({ insert: (id) => transaction.query('insert into items (id) values ($1)', [id]) }),
      ),
  })
}, 60_000)
afterAll(() => harness.close())

describe('pgliteAdapter holds the suite', () => {
  itHoldsTheSuite(() => harness)
})

describe('pgliteAdapter', () => {
  let main: AmbientDatabase<PGlite, PGlite>
  let engine: PGlite
  beforeAll(async () => {
    engine = new PGlite()
    await engine.exec('create table notes (id int primary key)')
    main = defineDatabase({ name: 'main', adapter: pgliteAdapter(() => engine) })
  }, 60_000)
  beforeEach(() => engine.exec('truncate notes'))
  afterAll(() => main.shutdown())

  const ids = async () =>
    (await engine.query<{ id: number }>('select id from notes order by id')).rows.map(({ id }) => id)

  it('gives the handle of PGlite: query, sql and exec, with their options', async () => {
    await newContext(async () => {
      const { affectedRows } = await main.db.query('insert into notes values ($1)', [1])
      expect(affectedRows).toBe(1)
      expect(await main.db.sql`select ${2}::int as n`).toMatchObject({ rows: [{ n: 2 }] })
      const results = await main.db.exec('insert into notes values (2); select id from notes order by id', {
        rowMode: 'array',
      })
      expect(results.at(-1)?.rows).toEqual([[1], [2]])
    })
    expect(await ids()).toEqual([1, 2])
  })

  it('S13 lets whoever uses the engine itself wait for the end of a transaction', async () => {
    let seen: Promise<number[]> = Promise.resolve([])
    await newContext(async () => {
      await main.db.query('insert into notes values (1)')
      seen = ids()
      await main.db.query('insert into notes values (2)')
    })
    expect(await seen).toEqual([1, 2])
  })

  it('A7 begins with the settings of the transaction', async () => {
    const show = async (name: string) =>
      Object.values((await main.db.query<Record<string, string>>(`show ${name}`)).rows[0] ?? {})[0]
    await newContext(
      async () => {
        expect(await show('transaction_isolation')).toBe('serializable')
        expect(await show('transaction_read_only')).toBe('on')
      },
      { transaction: { isolationLevel: 'serializable', readOnly: true } },
    )
    await newContext(async () => expect(await show('transaction_read_only')).toBe('off'))
  })

  it('S10 notices that SQL has ended the transaction, also if it failed afterwards', async () => {
    for (const text of [
      'insert into notes values (1); commit',
      'insert into notes values (2); commit; select missing',
    ]) {
      const unit = newContext(async () => {
        await main.db.query('select 1')
        await main.db.exec(text).catch(() => {})
        await main.db.query('insert into notes values (3)')
      })
      await expect(unit).rejects.toSatisfy((error) => isAmbientError(error, 'AMBIENT_TRANSACTION_ABORTED'))
    }
    expect(await ids()).toEqual([1, 2])
  })

  it('A4 rolls a transaction of its own back where it asks for that, and refuses it afterwards', async () => {
    await newContext(async () => {
      await main.db.query('insert into notes values (1)')
      await main.db.transaction(async (transaction) => {
        await transaction.sql`insert into notes values (2)`
        await transaction.rollback()
        expect(transaction.closed).toBe(true)
      })
      let late: PGlite['query'] = async () => ({ rows: [], fields: [] })
      await main.db.transaction(async (transaction) => {
        await transaction.exec('insert into notes values (3)')
        late = transaction.query
      })
      await expect(late('select 1')).rejects.toSatisfy((error) => isAmbientError(error, 'AMBIENT_BLOCK_ENDED'))
    })
    expect(await ids()).toEqual([1, 3])
  })

  it('refuses transaction control as SQL, and what is not of a session', async () => {
    await newContext(async () => {
      await expect(main.db.exec('begin')).rejects.toSatisfy((error) =>
        isAmbientError(error, 'AMBIENT_TRANSACTION_CONTROL'),
      )
      for (const name of ['close', 'listen', 'dumpDataDir', 'execProtocol', 'runExclusive', 'describeQuery'] as const) {
        const call = main.db[name] as () => unknown
        expect(() => call()).toThrow(expect.objectContaining({ code: 'AMBIENT_UNSUPPORTED' }))
      }
    })
  })
})
