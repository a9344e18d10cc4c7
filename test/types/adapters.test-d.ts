import {
  type AmbientDatabase,
  type AmbientSession,
  type DatabaseOptions,
  defineDatabase,
  newContext,
  openContext,
  type TransactionOptions,
} from 'ambient-db'
import { type AdapterHarness, adapterSuite } from 'ambient-db/conformance'
import { kyselyAdapter, kyselyHandle } from 'ambient-db/kysely'
import { mysql2Adapter } from 'ambient-db/mysql2'
import { pgAdapter } from 'ambient-db/pg'
import { type Generated, type Kysely, MysqlDialect, PostgresDialect, SqliteDialect } from 'kysely'
import { createPool as createCallbackPool } from 'mysql2'
import { createPool, type Pool as MysqlPool, type RowDataPacket } from 'mysql2/promise'
import { Pool, type PoolConfig, type QueryResult } from 'pg'
import { describe, expectTypeOf, it } from 'vitest'

interface Tables {
  users: { id: Generated<number>; name: string }
}

class OwnPool extends Pool {
  readonly own = true
}

const onPg = defineDatabase({ name: 'main', adapter: pgAdapter(() => new Pool()) })
const onKysely = defineDatabase({
  name: 'main',
  adapter: kyselyAdapter<Tables>(
    pgAdapter(() => new Pool()),
    (pool) => new PostgresDialect({ pool }),
  ),
})
const onDialect = defineDatabase({
  name: 'main',
  adapter: kyselyAdapter<Tables>(() => new SqliteDialect({ database: { close() {}, prepare: () => never() } })),
})
declare function never(): never
const onMysql = defineDatabase({ name: 'main', adapter: mysql2Adapter(() => createPool({})) })
const onKyselyMysql = defineDatabase({
  name: 'main',
  adapter: kyselyAdapter<Tables>(
    mysql2Adapter(() => createPool({})),
    (pool) => new MysqlDialect({ pool }),
  ),
})

describe('handles', () => {
  it('have exactly the type of the library', () => {
    expectTypeOf(onPg.db).toEqualTypeOf<Pool>()
    expectTypeOf(onMysql.db).toEqualTypeOf<MysqlPool>()
    expectTypeOf(onKyselyMysql.db).toEqualTypeOf<Kysely<Tables>>()
    expectTypeOf(onKysely.db).toEqualTypeOf<Kysely<Tables>>()
    expectTypeOf(onDialect.db).toEqualTypeOf<Kysely<Tables>>()
    expectTypeOf(kyselyHandle<Tables>(onPg, (pool) => new PostgresDialect({ pool }))).toEqualTypeOf<Kysely<Tables>>()
  })

  it('are the same on the session', () => {
    expectTypeOf(onPg.session()).toEqualTypeOf<AmbientSession<Pool>>()
    expectTypeOf(onKysely.session().db).toEqualTypeOf<Kysely<Tables>>()
  })

  it('infer what queries give', () => {
    const users = () => onKysely.db.selectFrom('users').selectAll().execute()
    expectTypeOf(users).returns.resolves.toEqualTypeOf<{ id: number; name: string }[]>()
    const rows = () => onPg.db.query<{ n: number }>('select 1 as n')
    expectTypeOf(rows).returns.resolves.toEqualTypeOf<QueryResult<{ n: number }>>()
    const found = () => onMysql.db.query<({ n: number } & RowDataPacket)[]>('select 1 as n')
    expectTypeOf(found).returns.resolves.toHaveProperty(0).toEqualTypeOf<({ n: number } & RowDataPacket)[]>()
  })

  it('know the tables', () => {
    // @ts-expect-error there is no such table
    expectTypeOf(onKysely.db.selectFrom('missing')).not.toBeAny()
    // @ts-expect-error a name is a string
    onKysely.db.insertInto('users').values({ name: 1 })
  })
})

describe('connect()', () => {
  it('gives the engine that the factory made', () => {
    expectTypeOf(onPg.connect).returns.resolves.toEqualTypeOf<Pool>()
    expectTypeOf(onMysql.connect).returns.resolves.toEqualTypeOf<MysqlPool>()
    const own = defineDatabase({ name: 'own', adapter: pgAdapter(async () => new OwnPool()) })
    expectTypeOf(own.connect).returns.resolves.toEqualTypeOf<OwnPool>()
    expectTypeOf(own.db).toEqualTypeOf<Pool>()
  })

  it('gives a plain Kysely over a dialect', () => {
    expectTypeOf(onDialect.connect).returns.resolves.toEqualTypeOf<Kysely<Tables>>()
  })
})

describe('adapters', () => {
  it('take factories that want a host, which is a string', () => {
    pgAdapter((host) => {
      expectTypeOf(host).toEqualTypeOf<string>()
      return new Pool({ host })
    })
    kyselyAdapter<Tables>((host) => {
      expectTypeOf(host).toEqualTypeOf<string>()
      return new SqliteDialect({ database: never() })
    })
  })

  it('refuse what they cannot adapt', () => {
    // @ts-expect-error a pool, not its configuration
    pgAdapter(() => ({}) satisfies PoolConfig)
    // @ts-expect-error a factory, so that nothing is opened at import
    pgAdapter(new Pool())
    // @ts-expect-error the pool with promises, not the one with callbacks
    mysql2Adapter(() => createCallbackPool({}))
    // @ts-expect-error a driver needs a dialect over its pool
    kyselyAdapter<Tables>(pgAdapter(() => new Pool()))
    // @ts-expect-error a dialect, not a Kysely
    kyselyAdapter<Tables>(() => onKysely.db)
    // @ts-expect-error plugins are a list
    kyselyAdapter<Tables>(() => new SqliteDialect({ database: never() }), { plugins: true })
  })
})

describe('work', () => {
  it('gives its result, awaited', () => {
    expectTypeOf(() => onPg.atomic(() => 1)).returns.resolves.toEqualTypeOf<number>()
    expectTypeOf(() => onPg.atomic(async () => 'text')).returns.resolves.toEqualTypeOf<string>()
    expectTypeOf(() => newContext(async () => true)).returns.resolves.toEqualTypeOf<boolean>()
    expectTypeOf(() => newContext(() => {})).returns.resolves.toEqualTypeOf<void>()
    expectTypeOf(() => onPg.session().savepoint(async () => 1)).returns.resolves.toEqualTypeOf<number>()
    expectTypeOf(() => openContext().run(async () => 1)).returns.resolves.toEqualTypeOf<number>()
    expectTypeOf(() => openContext().run(() => 1)).returns.toEqualTypeOf<number>()
  })

  it('gets its session from newSession', () => {
    const work = () =>
      onKysely.newSession(async (session) => {
        expectTypeOf(session).toEqualTypeOf<AmbientSession<Kysely<Tables>>>()
        return session.db.selectFrom('users').select('name').execute()
      })
    expectTypeOf(work).returns.resolves.toEqualTypeOf<{ name: string }[]>()
  })

  it('takes options that exist', () => {
    void (() => [
      onPg.atomic(() => {}, { current: 'append', isolationLevel: 'serializable', retry: { attempts: 3 }, timeout: 1 }),
      newContext(() => {}, { transaction: 'autocommit', unawaited: 'error', signal: AbortSignal.abort() }),
      onPg.newSession(() => {}, { hold: true, transaction: { readOnly: true } }),
      // @ts-expect-error no such mode
      onPg.atomic(() => {}, { current: 'nested' }),
      // @ts-expect-error no such isolation level
      onPg.begin({ isolationLevel: 'snapshot' }),
      // @ts-expect-error `begin` opens a transaction, so there is no autocommit
      onPg.begin('autocommit'),
      // @ts-expect-error modes are strings, not booleans
      onPg.closeSession(true),
      // @ts-expect-error what only middlewares of the package may say
      newContext(() => {}, { adoptable: true }),
    ])
    expectTypeOf<'autocommit'>().toExtend<TransactionOptions>()
    // @ts-expect-error a database has a name
    defineDatabase({ adapter: pgAdapter(() => new Pool()) })
    defineDatabase({
      name: 'main',
      adapter: pgAdapter(() => new Pool()),
      beforeSession: (database) => expectTypeOf(database).toEqualTypeOf<AmbientDatabase<Pool, Pool>>(),
      hooks: { afterBegin: (session) => expectTypeOf(session.db).toEqualTypeOf<Pool>() },
    })
  })
})

describe('databases', () => {
  it('can be passed where their types do not matter', () => {
    expectTypeOf(onKysely).toExtend<AmbientDatabase<unknown, unknown>>()
    expectTypeOf(onPg).toExtend<AmbientDatabase<Pool, unknown>>()
    expectTypeOf(onPg).not.toExtend<AmbientDatabase<Kysely<Tables>, unknown>>()
    expectTypeOf<DatabaseOptions<Pool, Pool, unknown>['name']>().toEqualTypeOf<string>()
  })

  it('have methods that can be taken off', () => {
    const { atomic, commit, shutdown } = onPg
    expectTypeOf(commit).toEqualTypeOf<() => Promise<void>>()
    expectTypeOf(shutdown).toExtend<NodeJS.SignalsListener>()
    expectTypeOf(() => atomic(() => 1)).returns.resolves.toEqualTypeOf<number>()
  })
})

describe('the suite', () => {
  it('takes the harness of any handle', () => {
    const harness = {} as AdapterHarness<Kysely<Tables>>
    const [first] = adapterSuite
    expectTypeOf(() => first?.run(harness)).returns.toEqualTypeOf<
      Promise<{ readonly skipped: string } | undefined> | undefined
    >()
  })
})
