import { type AmbientDatabase, type DatabaseOptions, defineDatabase, isAmbientError } from 'ambient-db'
import { pgAdapter } from 'ambient-db/pg'
import { Pool, type PoolClient, type PoolConfig } from 'pg'
import { afterAll, afterEach, beforeAll, beforeEach, expect } from 'vitest'
import { type Backend, createDatabase, type TestDatabase } from '../support/postgres.ts'
import { startProxy, type WireProxy } from '../support/proxy.ts'

/** A database behind a proxy, fresh for each test file; proxy and pools are fresh for each test. */
export interface Wire {
  readonly database: TestDatabase
  readonly proxy: WireProxy
  /** Process warnings of the test so far: the driver reports misuse by them. */
  readonly warnings: string[]
  /** Defines a database whose pool connects through the proxy. */
  define(options?: WireOptions): AmbientDatabase<Pool, Pool>
  /** Ids of the rows of table `t` that are committed, in order. */
  ids(): Promise<number[]>
  /** The connections of the pools, as the server sees them. */
  backends(): Promise<Backend[]>
  /** Ends the backend that runs or ran a statement like this last, and waits until it is gone. */
  kill(pid: number): Promise<void>
}

/** Options of the database, and of its pool. */
export type WireOptions = Partial<Omit<DatabaseOptions<Pool, Pool, PoolClient>, 'adapter'>> & { pool?: PoolConfig }

/** Sets a {@link Wire} up for the tests of the file. Table `t` is empty when a test begins. */
export function useWire(): Wire {
  let database: TestDatabase
  let proxy: WireProxy
  let defined: AmbientDatabase<Pool, Pool>[] = []
  const warnings: string[] = []
  const unexpected: unknown[] = []
  const onWarning = (warning: Error) => warnings.push(warning.message)
  const onUnexpected = (error: unknown) => unexpected.push(error)

  beforeAll(async () => {
    database = await createDatabase()
    await database.witness.rows('create table t (id int primary key)')
    await database.witness.rows('create table c (id int primary key deferrable initially deferred)')
    process.on('warning', onWarning)
    process.on('uncaughtExceptionMonitor', onUnexpected)
    process.on('unhandledRejection', onUnexpected)
  })
  afterAll(async () => {
    process.off('warning', onWarning)
    process.off('uncaughtExceptionMonitor', onUnexpected)
    process.off('unhandledRejection', onUnexpected)
    await database.drop()
  })
  beforeEach(async () => {
    await database.witness.rows('truncate t, c')
    proxy = await startProxy(database.url)
    warnings.length = 0
  })
  afterEach(async () => {
    await proxy.close()
    await Promise.all(defined.map(({ shutdown }) => shutdown()))
    defined = []
    expect(unexpected.splice(0)).toEqual([])
  })

  return {
    get database() {
      return database
    },
    get proxy() {
      return proxy
    },
    warnings,
    define({ pool, ...options } = {}) {
      const config = { connectionString: proxy.url, application_name: 'app', ...pool }
      const main = defineDatabase({ name: 'main', adapter: pgAdapter(() => new Pool(config)), ...options })
      defined.push(main)
      return main
    },
    async ids() {
      const rows = await database.witness.rows<{ id: number }>('select id from t order by id')
      return rows.map(({ id }) => id)
    },
    async backends() {
      return (await database.backends()).filter(({ applicationName }) => applicationName === 'app')
    },
    async kill(pid) {
      await database.witness.rows('select pg_terminate_backend($1, 5000)', [pid])
    },
  }
}

/** What `promise` rejects with; an error if it does not. One of ours says what happened before it says what to do. */
export async function failure(promise: Promise<unknown>): Promise<Error & Record<string, unknown>> {
  const result = await promise.then(
    (value) => ({ value }),
    (error) => ({ error }),
  )
  if ('error' in result) {
    const { error } = result
    if (isAmbientError(error)) expect(error.message).toMatch(/^(?:Database '[^']+': )?\S.*\. \S/s)
    return error
  }
  throw new Error(`It was to reject, but resolved with ${JSON.stringify(result.value)}.`)
}
