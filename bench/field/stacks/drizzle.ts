import { drizzle, type NodePgDatabase } from 'drizzle-orm/node-postgres'
import { pgTable, text } from 'drizzle-orm/pg-core'
import { Pool } from 'pg'
import type { Stack, Work } from '../../../test/truth/field/stack.ts'

export const marks = pgTable('marks', { label: text().primaryKey() })

export const stack: Stack = {
  name: 'drizzle over node-postgres',
  packages: ['drizzle-orm', 'pg'],
  documentation: 'https://orm.drizzle.team/docs/transactions',
  async open({ url, poolSize }) {
    const pool = new Pool({ connectionString: url, max: poolSize })
    pool.on('error', () => {}) // https://node-postgres.com/apis/pool: "It is important you add an event listener"
    const db = drizzle({ client: pool })
    return { unit: (work) => db.transaction((tx) => work(workOf(tx))), close: () => pool.end() }
  },
}

function workOf(tx: Pick<NodePgDatabase, 'insert' | 'transaction'>): Work {
  return {
    write: async (label) => tx.insert(marks).values({ label }),
    nested: (work) => tx.transaction((inner) => work(workOf(inner))),
  }
}
