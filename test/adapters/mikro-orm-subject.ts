import { EntitySchema } from '@mikro-orm/core'
import type { PostgreSqlDriver, SqlEntityManager } from '@mikro-orm/postgresql'
import type { SqliteDriver } from '@mikro-orm/sqlite'
import type { AdapterHarness } from 'ambient-db/conformance'

/** A row of the suite's table. */
export interface Item {
  id: number
  n: number
}

export const Item = new EntitySchema<Item>({
  name: 'Item',
  tableName: 'items',
  properties: { id: { type: 'integer', primary: true }, n: { type: 'integer', default: 0 } },
})

/** The manager of either driver. */
export type Em = SqlEntityManager<PostgreSqlDriver> | SqlEntityManager<SqliteDriver>

/** How the suite uses a manager, whatever its database. */
export const mikroOrmOperations = {
  insert: (em, id) => em.execute('insert into items (id) values (?)', [id]),
  ids: async (em) => (await em.execute<{ id: number }[]>('select id from items order by id')).map(({ id }) => id),
  fail: (em) => em.execute('select * from missing'),
  async *stream(em) {
    for await (const { id } of em.createQueryBuilder(Item).select('id').orderBy({ id: 1 }).stream({ chunkSize: 1 }))
      yield id
  },
  transaction: (em, work) =>
    em.transactional((inner) => work({ insert: (id) => inner.execute('insert into items (id) values (?)', [id]) })),
  async beginTransaction(em) {
    const fork = em.fork()
    await fork.begin()
    return {
      insert: (id) => fork.execute('insert into items (id) values (?)', [id]),
      commit: () => fork.commit(),
      rollback: () => fork.rollback(),
    }
  },
} satisfies Partial<AdapterHarness<Em>>
