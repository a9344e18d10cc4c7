import { type AmbientDatabase, defineDatabase } from 'ambient-db'
import { kyselyAdapter } from 'ambient-db/kysely'
import { pgAdapter } from 'ambient-db/pg'
import { Kysely, PostgresDialect } from 'kysely'
import { Pool, type PoolConfig } from 'pg'
import type { Bench } from './measure.ts'

interface Tables {
  bench_rows: { name: string }
}

/** A database under measure and the pool that hand-written code shares with it. */
export interface PgTarget {
  readonly main: AmbientDatabase<Pool, Pool>
  readonly pool: Pool
}

/** The same over Kysely, beside a plain Kysely over the same pool. */
export interface KyselyTarget {
  readonly main: AmbientDatabase<Kysely<Tables>, Pool>
  readonly kysely: Kysely<Tables>
  readonly pool: Pool
}

export const insert = 'insert into bench_rows (name) values ($1)'

/** Makes the table that all measures write to, without what it held. */
export async function prepareTable(url: string): Promise<void> {
  const pool = new Pool({ connectionString: url, max: 1 })
  await pool.query('drop table if exists bench_rows')
  await pool.query('create table bench_rows (name text not null)')
  await pool.end()
}

export async function pgTarget(bench: Bench, config: PoolConfig = {}): Promise<PgTarget> {
  const pool = new Pool({ connectionString: bench.url, max: 10, ...config })
  const main = defineDatabase({ name: 'main', adapter: pgAdapter(() => pool) })
  bench.atEnd(main.shutdown)
  await main.connect()
  return { main, pool }
}

export async function kyselyTarget(bench: Bench): Promise<KyselyTarget> {
  const pool = new Pool({ connectionString: bench.url, max: 10 })
  const adapter = kyselyAdapter<Tables, Pool>(
    pgAdapter(() => pool),
    (over) => new PostgresDialect({ pool: over }),
  )
  const main = defineDatabase({ name: 'main', adapter })
  bench.atEnd(main.shutdown)
  await main.connect()
  return { main, kysely: new Kysely<Tables>({ dialect: new PostgresDialect({ pool }) }), pool }
}

/** What one writes without the library. */
export async function insertByHand(pool: Pool): Promise<void> {
  const client = await pool.connect()
  let broken: Error | undefined
  try {
    await client.query('BEGIN')
    await client.query(insert, ['by hand'])
    await client.query('COMMIT')
  } catch (error) {
    await client.query('ROLLBACK').catch((second) => {
      broken = second
    })
    throw error
  } finally {
    client.release(broken)
  }
}

/** The same on a pool with `pipeline: true`, where BEGIN travels with the statement behind it. */
export async function insertByHandPipelined(pool: Pool): Promise<void> {
  const client = await pool.connect()
  let broken: Error | undefined
  try {
    await Promise.all([client.query('BEGIN'), client.query(insert, ['by hand'])])
    await client.query('COMMIT')
  } catch (error) {
    await client.query('ROLLBACK').catch((second) => {
      broken = second
    })
    throw error
  } finally {
    client.release(broken)
  }
}
