import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { MikroORM } from '@mikro-orm/sqlite'
import type { AdapterHarness, EngineProbe, HarnessOptions } from 'ambient-db/conformance'
import type { Database } from 'better-sqlite3'
import { afterAll, beforeAll, describe } from 'vitest'
import { defineMikroOrm, type Em, Item, mikroOrmOperations } from './mikro-orm-subject.ts'
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
  const made = new WeakMap<object, EngineProbe>()
  const open = async (host?: string) => {
    const engine = await MikroORM.init(optionsFor(join(folder, 'main.sqlite')))
    const opened = () => (engine.em.getConnection() as unknown as { database?: Database }).database
    made.set(engine, {
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
    })
    return engine
  }
  return defineMikroOrm(open as never, options, (engine) => probes.push(made.get(engine) as EngineProbe)) // open has set it
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
