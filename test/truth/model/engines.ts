import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { DatabaseSync } from 'node:sqlite'
import { SqliteDialect } from 'kysely'
import { Client, Pool, type PoolConfig } from 'pg'
import type { Adapter } from '../../../src/adapter.ts'
import { kyselyAdapter } from '../../../src/adapters/kysely.ts'
import { createDatabaseAt } from '../../support/database.ts'
import { forKysely } from '../../support/sqlite.ts'
import { kyselyHandles, type Library, libraries, type Tables } from '../libraries.ts'
import type { Nature } from './rules.ts'

/** A library on an engine. */
export interface Engine {
  readonly library: Library
  readonly nature: Nature
  open(serverUrl: string): Promise<Ground>
}

/** Where the programs of one engine run: their tables, and a connection to them that no code under test knows of. */
export interface Ground {
  /** What `adapter` makes its engine with. */
  readonly pool: () => never
  /** Something is at the database, or about to be sent. */
  readonly busy: () => boolean
  /** The rows that are committed of this run. */
  rows(run: number): Promise<ReadonlySet<string>>
  /** What is still held or open when nothing runs any more. */
  leftOpen(): Promise<string | undefined>
  /** Has nothing more to do with the engines that were made so far: a program that went wrong may be left in them. */
  forget(): void
  close(): Promise<void>
}

const tables = [
  'create table markers (run int, label text, primary key (run, label))',
  'create table parents (id int primary key)',
  'create table orphans (parent int references parents deferrable initially deferred)',
]

async function openPostgres(serverUrl: string): Promise<Ground> {
  const database = await createDatabaseAt(serverUrl)
  for (const table of tables) await database.witness.rows(table)
  let running = 0
  let overlapping: unknown
  class CountingClient extends Client {
    #running = 0
    override query(...args: unknown[]): never {
      const answer: unknown = super.query(...(args as [string]))
      if (answer instanceof Promise) {
        running++
        if (this.#running++ > 0) overlapping ??= args[0]
        const over = () => {
          running--
          this.#running--
        }
        answer.then(over, over)
      }
      return answer as never // the overloads of pg.Client stand for it
    }
  }
  const pools: Pool[] = []
  const pool = () => {
    const config = { connectionString: database.url, max: 25, idleTimeoutMillis: 0, Client: CountingClient }
    const made = new Pool(config as PoolConfig)
    pools.push(made)
    return made as never
  }
  return {
    pool,
    busy: () => running > 0 || pools.some(({ waitingCount }) => waitingCount > 0),
    async rows(run) {
      const rows = await database.witness.rows<{ label: string }>('select label from markers where run = $1', [run])
      return new Set(rows.map(({ label }) => label))
    },
    async leftOpen() {
      if (overlapping) return `a statement was sent before the last one was answered: ${JSON.stringify(overlapping)}`
      const held = pools.reduce((sum, { totalCount, idleCount }) => sum + totalCount - idleCount, 0)
      if (held > 0) return `${held} connections are not back in their pool`
      const [open] = (await database.backends()).filter(({ transactionStart }) => transactionStart !== null)
      return open && `a transaction is open: ${open.query}`
    },
    forget() {
      for (const left of pools.splice(0)) left.end().catch(() => {})
    },
    close: () => database.drop(),
  }
}

async function openSqlite(): Promise<Ground> {
  const directory = await mkdtemp(join(tmpdir(), 'ambient-db-model-'))
  const file = join(directory, 'model.db')
  const witness = new DatabaseSync(file)
  witness.exec('pragma journal_mode = wal')
  for (const table of tables) witness.exec(table)
  const select = witness.prepare('select label from markers where run = ?')
  const open: DatabaseSync[] = []
  const pool = () => {
    const database = new DatabaseSync(file)
    database.exec('pragma synchronous = off')
    open.push(database)
    return database as never
  }
  return {
    pool,
    busy: () => false,
    rows: async (run) => new Set(select.all(run).map(({ label }) => String(label))),
    leftOpen: async () => {
      const left = open.some((database) => database.isOpen && database.isTransaction)
      return left ? 'a transaction is open' : undefined
    },
    forget() {
      for (const left of open.splice(0)) if (left.isOpen) left.close()
    },
    async close() {
      witness.close()
      await rm(directory, { recursive: true, force: true })
    },
  }
}

const sqlite: Library = {
  name: 'kysely-sqlite',
  limits: {},
  adapter: (database: () => DatabaseSync) =>
    kyselyAdapter<Tables>(() => new SqliteDialect({ database: forKysely(database()) })),
  ...kyselyHandles,
} as unknown as Library // it sees only its own handles

const overPostgres = libraries.filter(({ name }) => name !== 'kysely-bare')

export const engines: readonly Engine[] = [
  ...overPostgres.map(
    (library): Engine => ({
      library,
      nature: { failedStatementAborts: true, singleConnection: false, native: library.name !== 'pg' },
      open: openPostgres,
    }),
  ),
  { library: sqlite, nature: { failedStatementAborts: false, singleConnection: true, native: true }, open: openSqlite },
]

/** Makes a fault of the adapter. */
export type Mutate = (adapter: Adapter<unknown, unknown, unknown>) => Adapter<unknown, unknown, unknown>
