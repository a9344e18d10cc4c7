import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { DatabaseSync } from 'node:sqlite'
import { defineDatabase, newContext } from 'ambient-db'
import { kyselyAdapter } from 'ambient-db/kysely'
import { type Dialect, type Driver, SqliteDialect } from 'kysely'
import { afterEach, beforeEach, expect, it } from 'vitest'
import { forKysely } from '../support/sqlite.ts'

interface Tables {
  notes: { id: number }
}

let folder: string
let witness: DatabaseSync

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'ambient-db-'))
  witness = new DatabaseSync(join(folder, 'test.db'))
  witness.exec('create table notes (id integer primary key)')
})
afterEach(async () => {
  witness.close()
  await rm(folder, { recursive: true })
})

function dialect(): Dialect {
  return new SqliteDialect({ database: forKysely(new DatabaseSync(join(folder, 'test.db'))) })
}

/** A dialect like one whose driver leaves the optional members out. */
function withoutSavepoints(whole: Dialect): Dialect {
  return {
    createAdapter: () => whole.createAdapter(),
    createIntrospector: (db) => whole.createIntrospector(db),
    createQueryCompiler: () => whole.createQueryCompiler(),
    createDriver: (): Driver => {
      const driver = whole.createDriver()
      return {
        init: () => driver.init(),
        acquireConnection: () => driver.acquireConnection(),
        beginTransaction: (connection, settings) => driver.beginTransaction(connection, settings),
        commitTransaction: (connection) => driver.commitTransaction(connection),
        rollbackTransaction: (connection) => driver.rollbackTransaction(connection),
        releaseConnection: (connection) => driver.releaseConnection(connection),
        destroy: () => driver.destroy(),
      }
    },
  }
}

function ids(): number[] {
  return witness
    .prepare('select id from notes order by id')
    .all()
    .map(({ id }) => Number(id))
}

it('A4 refuses a nested block where the dialect has no savepoints, rather than keep what it rolls back', async () => {
  const main = defineDatabase({ name: 'main', adapter: kyselyAdapter<Tables>(() => withoutSavepoints(dialect())) })
  const insert = (id: number) => main.db.insertInto('notes').values({ id }).execute()
  await newContext(async () => {
    await insert(1)
    const unsupported = { code: 'AMBIENT_UNSUPPORTED', database: 'main' }
    await expect(main.atomic(() => insert(2), { current: 'savepoint' })).rejects.toMatchObject(unsupported)
    await expect(
      main.db.transaction().execute((trx) => trx.insertInto('notes').values({ id: 3 }).execute()),
    ).rejects.toMatchObject(unsupported)
    await insert(4)
  })
  expect(ids()).toEqual([1, 4])
  await main.shutdown()
})

it('A7 lets nothing be written in a read-only transaction of SQLite, and everything after it', async () => {
  const main = defineDatabase({ name: 'main', adapter: kyselyAdapter<Tables>(dialect) })
  const insert = (id: number) => main.db.insertInto('notes').values({ id }).execute()
  const readOnly = { transaction: { readOnly: true } }
  await expect(newContext(() => insert(1), readOnly)).rejects.toThrow(/readonly/)
  expect(await newContext(() => main.db.selectFrom('notes').selectAll().execute(), readOnly)).toEqual([])
  await newContext(() => insert(2))
  expect(ids()).toEqual([2])
  await main.shutdown()
})
