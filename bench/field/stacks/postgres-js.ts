import postgres, { type TransactionSql } from 'postgres'
import type { Stack, Work } from '../../../test/truth/field/stack.ts'

export const stack: Stack = {
  name: 'postgres.js',
  packages: ['postgres'],
  documentation: 'https://github.com/porsager/postgres#transactions',
  async open({ url, poolSize }) {
    const sql = postgres(url, { max: poolSize })
    return {
      unit: (work) => sql.begin((transaction) => work(workOf(transaction))),
      close: () => sql.end({ timeout: 1 }),
    }
  },
}

function workOf(sql: TransactionSql): Work {
  return {
    write: async (label) => sql`insert into marks (label) values (${label})`,
    nested: (work) => sql.savepoint((inner) => work(workOf(inner))),
  }
}
