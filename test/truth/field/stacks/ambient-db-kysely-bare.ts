import { PostgresDialect } from 'kysely'
import { Pool } from 'pg'
import { kyselyAdapter } from '../../../../src/adapters/kysely.ts'
import type { Stack } from '../stack.ts'
import { openKysely, type Tables } from './ambient-db-kysely.ts'

/** The second-best way, whose limits the README names: the dialect hides its pool. */
export const stack: Stack = {
  name: 'ambient-db, Kysely over a bare dialect',
  packages: ['ambient-db', 'kysely', 'pg'],
  documentation: 'README.md',
  async open({ url, poolSize }) {
    const pool = new Pool({ connectionString: url, max: poolSize })
    pool.on('error', () => {}) // https://node-postgres.com/apis/pool: "It is important you add an event listener"
    return openKysely(kyselyAdapter<Tables>(() => new PostgresDialect({ pool })))
  },
}
