import { type AmbientDatabase, defineDatabase } from 'ambient-db'
import { kyselyAdapter } from 'ambient-db/kysely'
import { pgAdapter } from 'ambient-db/pg'
import { type Kysely, PostgresDialect } from 'kysely'
import { Client, Pool } from 'pg'
import { afterAll, afterEach, beforeAll, beforeEach } from 'vitest'
import type { Tables } from '../docs/fixtures/tables.ts'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'
import { startProxy, type WireProxy } from '../support/proxy.ts'

/** A database with the tables that the recipes speak of, behind a proxy. */
export interface Workplace {
  readonly database: TestDatabase
  readonly proxy: WireProxy
  readonly main: AmbientDatabase<Kysely<Tables>, Pool>
  /** The names of the users that are committed. */
  users(): Promise<string[]>
  /** Lets nobody insert a user before what it resolves with is called, or the test has ended. */
  lockUsers(): Promise<() => Promise<void>>
  unlock(): Promise<void>
  /** How many statements wait for a lock. */
  waiting(): Promise<number>
  /** Inserts a user whose COMMIT is refused by the server. */
  doom(): Promise<void>
}

/** The recipes find the database as `main`, as those who read them do. */
export function useWorkplace(): Workplace {
  let database: TestDatabase
  let proxy: WireProxy
  let main: Workplace['main']
  let keeper: Client | undefined

  beforeAll(async () => {
    database = await createDatabase()
    const { rows } = database.witness
    await rows('create table users (id int generated always as identity primary key, name text not null)')
    await rows('create table profiles ("userId" int references users deferrable initially deferred)')
    await rows('create table "doneJobs" (id text primary key)')
  })
  beforeEach(async () => {
    await database.witness.rows('truncate users, profiles, "doneJobs"')
    proxy = await startProxy(database.url)
    main = defineDatabase({
      name: 'main',
      adapter: kyselyAdapter<Tables, Pool>(
        pgAdapter(() => new Pool({ connectionString: proxy.url, max: 5 })),
        (pool) => new PostgresDialect({ pool }),
      ),
    })
    Object.assign(globalThis, { main })
  })
  afterEach(async () => {
    await unlock()
    await main.shutdown()
    await proxy.close()
  })
  afterAll(() => database.drop())

  async function unlock(): Promise<void> {
    await keeper?.end()
    keeper = undefined
  }

  return {
    get database() {
      return database
    },
    get proxy() {
      return proxy
    },
    get main() {
      return main
    },
    async users() {
      const rows = await database.witness.rows<{ name: string }>('select name from users order by id')
      return rows.map(({ name }) => name)
    },
    async lockUsers() {
      keeper = new Client({ connectionString: database.url, application_name: 'keeper' })
      await keeper.connect()
      await keeper.query('begin; lock table users in share mode')
      return unlock
    },
    unlock,
    waiting: async () => (await database.backends()).filter(({ waitsFor }) => waitsFor === 'Lock').length,
    doom: async () => void (await main.db.insertInto('profiles').values({ userId: 0 }).execute()),
  }
}
