import { defineDatabase } from 'ambient-db'
import { kyselyAdapter } from 'ambient-db/kysely'
import { mysql2Adapter } from 'ambient-db/mysql2'
import { pgAdapter } from 'ambient-db/pg'
import { MysqlDialect, PostgresDialect } from 'kysely'
import { createPool } from 'mysql2/promise'
import { Pool, type PoolConfig } from 'pg'
import { mysql, postgres, truths } from './truths.ts'

const limits = { name: 'main', acquireTimeout: 5000, settleTimeout: 5000 }

for (const pipeline of [false, true]) {
  truths({
    name: pipeline ? 'pg, pipelined' : 'pg',
    server: postgres,
    define(url, max) {
      const config = { connectionString: url, max, pipeline } as PoolConfig // the types of pg lack `pipeline`
      const main = defineDatabase({ ...limits, adapter: pgAdapter(() => new Pool(config)) })
      return { main, insert: (id) => main.db.query('insert into t values ($1)', [id]) }
    },
  })
}

truths({
  name: 'Kysely over pg',
  server: postgres,
  define(url, max) {
    const adapter = kyselyAdapter<{ t: { id: number } }>(
      pgAdapter(() => new Pool({ connectionString: url, max })),
      (pool) => new PostgresDialect({ pool: pool as Pool }),
    )
    const main = defineDatabase({ ...limits, adapter })
    return { main, insert: (id) => main.db.insertInto('t').values({ id }).execute() }
  },
})

truths({
  name: 'mysql2',
  server: mysql,
  define(uri, connectionLimit) {
    const main = defineDatabase({ ...limits, adapter: mysql2Adapter(() => createPool({ uri, connectionLimit })) })
    return { main, insert: (id) => main.db.execute('insert into t values (?)', [id]) }
  },
})

truths({
  name: 'Kysely over mysql2',
  server: mysql,
  define(uri, connectionLimit) {
    const adapter = kyselyAdapter<{ t: { id: number } }>(
      mysql2Adapter(() => createPool({ uri, connectionLimit })),
      (pool) => new MysqlDialect({ pool }),
    )
    const main = defineDatabase({ ...limits, adapter })
    return { main, insert: (id) => main.db.insertInto('t').values({ id }).execute() }
  },
})
