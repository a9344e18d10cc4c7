import { defineDatabase } from 'ambient-db'
import { kyselyAdapter } from 'ambient-db/kysely'
import { pgAdapter } from 'ambient-db/pg'
import { PostgresDialect } from 'kysely'
import { Pool, type PoolConfig } from 'pg'
import { truths } from './truths.ts'

const limits = { name: 'main', acquireTimeout: 5000, settleTimeout: 5000 }

for (const pipeline of [false, true]) {
  truths({
    name: pipeline ? 'pg, pipelined' : 'pg',
    define(url, max) {
      const config = { connectionString: url, max, pipeline } as PoolConfig // the types of pg lack `pipeline`
      const main = defineDatabase({ ...limits, adapter: pgAdapter(() => new Pool(config)) })
      return { main, insert: (id) => main.db.query('insert into t values ($1)', [id]) }
    },
  })
}

truths({
  name: 'Kysely over pg',
  define(url, max) {
    const adapter = kyselyAdapter<{ t: { id: number } }>(
      pgAdapter(() => new Pool({ connectionString: url, max })),
      (pool) => new PostgresDialect({ pool: pool as Pool }),
    )
    const main = defineDatabase({ ...limits, adapter })
    return { main, insert: (id) => main.db.insertInto('t').values({ id }).execute() }
  },
})
