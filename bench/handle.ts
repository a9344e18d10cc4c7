import { newContext } from 'ambient-db'
import type { Transaction } from 'kysely'
import type { PoolClient } from 'pg'
import type { Bench, Measure } from './measure.ts'
import { insert, kyselyTarget, pgTarget } from './targets.ts'

/** One query in a transaction that is open: through the ambient handle, and on the connection itself. */
export async function handle(bench: Bench): Promise<Measure[]> {
  return [await overPg(bench), await overKysely(bench)]
}

const common = { kind: 'comparison', shows: 'overhead', goal: 0.03 } as const

async function overPg(bench: Bench): Promise<Measure> {
  const { main, pool } = await pgTarget(bench)
  let client: PoolClient
  return {
    ...common,
    name: 'handle: a query in a transaction, pg',
    baseline: {
      operation: () => client.query(insert, ['by hand']),
      async around(slice) {
        client = await pool.connect()
        await client.query('BEGIN')
        await slice()
        await client.query('COMMIT')
        client.release()
      },
    },
    subject: {
      operation: () => main.db.query(insert, ['ambient']),
      around: (slice) =>
        newContext(async () => {
          await main.begin()
          await slice()
        }),
    },
  }
}

async function overKysely(bench: Bench): Promise<Measure> {
  const { main, kysely } = await kyselyTarget(bench)
  let transaction: Transaction<{ bench_rows: { name: string } }>
  return {
    ...common,
    name: 'handle: a query in a transaction, Kysely',
    baseline: {
      operation: () => transaction.insertInto('bench_rows').values({ name: 'by hand' }).execute(),
      around: (slice) =>
        kysely.transaction().execute(async (trx) => {
          transaction = trx
          await slice()
        }),
    },
    subject: {
      operation: () => main.db.insertInto('bench_rows').values({ name: 'ambient' }).execute(),
      around: (slice) =>
        newContext(async () => {
          await main.begin()
          await slice()
        }),
    },
  }
}
