import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { DatabaseSync } from 'node:sqlite'
import { defineDatabase } from 'ambient-db'
import type { AdapterHarness, EngineProbe } from 'ambient-db/conformance'
import { kyselyAdapter } from 'ambient-db/kysely'
import BetterSqlite3 from 'better-sqlite3'
import { CompiledQuery, type Kysely, type SqliteDatabase, SqliteDialect } from 'kysely'
import { afterAll, beforeAll, describe } from 'vitest'
import { forKysely } from '../support/sqlite.ts'
import { kyselyOperations, type Tables } from './kysely-subject.ts'
import { itHoldsTheSuite } from './support.ts'

/** What the tests need to see of a database of either library. */
interface Opened {
  readonly database: SqliteDatabase
  readonly inTransaction: boolean
  readonly open: boolean
  exec(sql: string): unknown
  ids(): number[]
}

const selectIds = 'select id from items order by id'
const idOf = (row: unknown) => (row as { id: number }).id

const libraries: Record<string, (file: string) => Opened> = {
  'node:sqlite': (file) => {
    const own = new DatabaseSync(file, { timeout: 0 })
    return {
      database: forKysely(own),
      get inTransaction() {
        return own.isOpen && own.isTransaction
      },
      get open() {
        return own.isOpen
      },
      exec: (sql) => own.exec(sql),
      ids: () => own.prepare(selectIds).all().map(idOf),
    }
  },
  'better-sqlite3': (file) => {
    const own = new BetterSqlite3(file, { timeout: 0 })
    return {
      database: own,
      get inTransaction() {
        return own.inTransaction
      },
      get open() {
        return own.open
      },
      exec: (sql) => own.exec(sql),
      ids: () => own.prepare(selectIds).all().map(idOf),
    }
  },
}

interface SqliteHarness extends AdapterHarness<Kysely<Tables>> {
  /** A connection of the same library: two copies of SQLite in one process do not see each other's locks. */
  readonly other: Opened
  readonly folder: string
}

async function sqliteHarness(open: (file: string) => Opened): Promise<SqliteHarness> {
  const folder = await mkdtemp(join(tmpdir(), 'ambient-db-'))
  const file = join(folder, 'main.sqlite')
  const other = open(file)
  other.exec(`
    pragma journal_mode = wal;
    create table items (id integer primary key, n integer not null default 0);
    create table orphans (item integer references items deferrable initially deferred);
  `)
  let probes: EngineProbe[] = []
  const { query, ...operations } = kyselyOperations
  return {
    ...operations,
    other,
    folder,
    capabilities: {
      savepoints: true,
      streaming: true,
      cancelling: false,
      failedStatementAborts: false,
      transactionStatus: false,
      pipelining: false,
      lossDetection: false,
      singleConnection: true,
    },
    define({ connections: _, ...options } = {}) {
      const dialect = (host?: string) => {
        const opened = open(file)
        probes.push({
          host,
          get open() {
            return opened.open ? 1 : 0
          },
          get busy() {
            return opened.inTransaction ? 1 : 0
          },
          get closed() {
            return !opened.open
          },
        })
        return new SqliteDialect({ database: opened.database })
      }
      const factory = options.host === undefined ? () => dialect() : (host: string) => dialect(host)
      return defineDatabase({ name: 'main', ...options, adapter: kyselyAdapter<Tables>(factory) })
    },
    async reset() {
      probes = []
      other.exec('delete from orphans; delete from items')
    },
    engines: () => probes,
    insert: (handle, id) => query(handle, 'insert into items (id) values (?)', [id]),
    ids: async (handle) => {
      const { rows } = await query(handle, selectIds)
      return rows.map(idOf)
    },
    fail: (handle) => query(handle, 'select * from missing'),
    witness: async () => other.ids(),
    async spoilCommit(handle) {
      await handle.executeQuery(CompiledQuery.raw('insert into orphans values (-1)'))
    },
  }
}

for (const [library, open] of Object.entries(libraries)) {
  describe(`kyselyAdapter over ${library} holds the suite`, () => {
    let harness: SqliteHarness
    beforeAll(async () => {
      harness = await sqliteHarness(open)
    })
    afterAll(async () => {
      harness.other.database.close()
      await rm(harness.folder, { recursive: true })
    })

    itHoldsTheSuite(() => harness)
  })
}
