import { Kysely, PostgresDialect } from 'kysely'
import { Pool } from 'pg'
import type { Stack } from '../../../test/truth/field/stack.ts'

interface Tables {
  marks: { label: string }
}

export const stack: Stack = {
  name: 'kysely',
  packages: ['kysely', 'pg'],
  documentation: 'https://kysely.dev/docs/examples/transactions/simple-transaction',
  async open({ url, poolSize }) {
    const pool = new Pool({ connectionString: url, max: poolSize })
    pool.on('error', () => {}) // https://node-postgres.com/apis/pool: "It is important you add an event listener"
    const db = new Kysely<Tables>({ dialect: new PostgresDialect({ pool }) })
    return {
      unit: (work) =>
        db
          .transaction()
          .execute((trx) => work({ write: (label) => trx.insertInto('marks').values({ label }).execute() })),
      close: () => db.destroy(),
    }
  },
}
