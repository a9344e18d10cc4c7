import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { MikroORM } from '@mikro-orm/sqlite'
import type { AdapterHarness, EngineProbe, HarnessOptions } from 'ambient-db/conformance'
import { mikroOrmAdapter } from 'ambient-db/mikro-orm'
import type { Database } from 'better-sqlite3'
import { afterAll, beforeAll, describe } from 'vitest'
import { type Em, Item, mikroOrmOperations } from './mikro-orm-subject.ts'
import { defineOverOwnPool } from './own-pools.ts'
import { itHoldsTheSuite } from './support.ts'

let folder: string
let other: Database
let orm: MikroORM
let probes: EngineProbe[] = []

const optionsFor = (file: string) => ({
  entities: [Item],
  dbName: file,
  driverOptions: { timeout: 0 },
  logger: () => {},
})

function define({ connections: _, ...options }: HarnessOptions<Em> = {}) {
  const open = (host?: string) => {
    const engine = MikroORM.init(optionsFor(join(folder, 'main.sqlite')))
    let made: MikroORM | undefined
    void engine.then((orm) => {
      made = orm
    })
    const opened = () => (made?.em.getConnection() as { database?: Database } | undefined)?.database
    const probe: EngineProbe = {
      host,
      get open() {
        return opened()?.open ? 1 : 0
      },
      get busy() {
        return opened()?.open && opened()?.inTransaction ? 1 : 0
      },
      get closed() {
        return !opened()?.open
      },
    }
    return { engine, probe }
  }
  return defineOverOwnPool(mikroOrmAdapter<MikroORM>, open, options, (probe) => probes.push(probe))
}

const harness = {
  ...mikroOrmOperations,
  capabilities: {
    savepoints: true,
    streaming: true,
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
  witness: async () =>
    (other.prepare('select id from items order by id').all() as { id: number }[]).map(({ id }) => id),
  spoilCommit: (em) => em.execute('insert into orphans values (-1)'),
} satisfies AdapterHarness<Em>

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'ambient-db-'))
  // Two copies of SQLite in one process do not see each other's locks, so this one is that of MikroORM.
  orm = await MikroORM.init(optionsFor(join(folder, 'main.sqlite')))
  await orm.connect()
  other = (await orm.em.getConnection().getNativeClient()) as Database
  other.exec(`
    pragma journal_mode = wal;
    create table items (id integer primary key, n integer not null default 0);
    create table orphans (item integer references items deferrable initially deferred);
  `)
})
afterAll(async () => {
  await orm.close()
  await rm(folder, { recursive: true })
})

describe('mikroOrmAdapter on SQLite holds the suite', () => {
  itHoldsTheSuite(() => harness as never)
})
