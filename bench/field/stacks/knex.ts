import knex, { type Knex } from 'knex'
import type { Stack, Work } from '../../../test/truth/field/stack.ts'

export const stack: Stack = {
  name: 'knex',
  packages: ['knex', 'pg'],
  documentation: 'https://knexjs.org/guide/transactions.html',
  async open({ url, poolSize }) {
    const db = knex({ client: 'pg', connection: url, pool: { min: 0, max: poolSize } })
    return { unit: (work) => db.transaction((trx) => work(workOf(trx))), close: () => db.destroy() }
  },
}

function workOf(trx: Knex.Transaction): Work {
  return {
    write: async (label) => trx('marks').insert({ label }),
    nested: (work) => trx.transaction((inner) => work(workOf(inner))),
  }
}
