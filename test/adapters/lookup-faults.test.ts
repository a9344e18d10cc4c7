import { defineDatabase } from 'ambient-db'
import { adapterSuite } from 'ambient-db/conformance'
import { pgAdapter } from 'ambient-db/pg'
import type { Pool, PoolClient } from 'pg'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import type { Adapter } from '../../src/adapter.ts'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'
import { postgresHarness } from './support.ts'

type PgAdapter = Adapter<Pool, Pool, PoolClient>
type LookUp = NonNullable<PgAdapter['lookUpTransaction']>

const real = pgAdapter(() => {
  throw new Error('Only its way to look up is used.')
})
const honest = real.lookUpTransaction as LookUp

/** Adapters that lie about what they look up, and the case that must say so. */
const faults: [fault: string, lookUp: LookUp, found: RegExp][] = [
  ['says committed of everything', async () => 'committed', /whose COMMIT never arrived/],
  ['says rolled-back of everything', async () => 'rolled-back', /of which only the answer was lost/],
  [
    'takes what is pending for rolled back',
    async (...args) => {
      const status = await honest(...args)
      return status === 'pending' ? 'rolled-back' : status
    },
    /still under way/,
  ],
  ['never knows', async () => 'unknown', /of which only the answer was lost/],
  [
    'takes a connection of the pool',
    async (pool, id, signal) => {
      const client = await pool.connect()
      client.release()
      return honest(pool, id, signal)
    },
    /needs no free connection/,
  ],
]

const cases = adapterSuite.filter(({ name }) => name.includes('resolve()'))
let database: TestDatabase
let adapt: (adapter: PgAdapter) => PgAdapter = (adapter) => adapter
let harness: Awaited<ReturnType<typeof postgresHarness<Pool>>>
beforeAll(async () => {
  database = await createDatabase()
  harness = await postgresHarness<Pool>(database, {
    define: (pool, options) => defineDatabase({ name: 'main', ...options, adapter: adapt(pgAdapter(() => pool())) }),
    query: (handle, sql, parameters) => handle.query(sql, parameters),
  })
})
afterAll(async () => {
  await harness.close()
  await database.drop()
})

/** The cases of these names that the adapter fails. */
async function failed(wanted: RegExp): Promise<string[]> {
  const names: string[] = []
  for (const { name, run } of cases) if (wanted.test(name)) await run(harness).catch(() => names.push(name))
  return names
}

describe('the suite sees an adapter that', () => {
  it('S5 looks up what it should, and has nothing against it', async () => {
    adapt = (adapter) => adapter
    expect(await failed(/./)).toEqual([])
    expect(cases).toHaveLength(6)
  })

  it.each(faults)('S5 %s', async (_, lookUpTransaction, found) => {
    adapt = (adapter) => ({ ...adapter, lookUpTransaction })
    expect(await failed(found)).toHaveLength(1)
  })

  it('S5 gives an id to a transaction that only reads', async () => {
    const identify = async (client: PoolClient) => {
      await client.query('select pg_current_xact_id()')
      return real.identifyTransaction?.(client)
    }
    adapt = (adapter) => ({ ...adapter, identifyTransaction: identify })
    expect(await failed(/which has written nothing/)).toHaveLength(1)
  })
})
