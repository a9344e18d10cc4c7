import { type AmbientDatabase, defineDatabase } from 'ambient-db'
import type { AdapterHarness, HarnessOptions } from 'ambient-db/conformance'
import { typeormAdapter } from 'ambient-db/typeorm'
import { type DataSource, type EntityManager, EntitySchema } from 'typeorm'

/** The table of the suite. */
export interface Item {
  id: number
  n: number
}

export const items = new EntitySchema<Item>({
  name: 'items',
  columns: { id: { type: 'int', primary: true }, n: { type: 'int', default: 0 } },
})

/** How the suite uses an EntityManager, whatever its database. */
export const typeormOperations = {
  transaction: (handle, work) =>
    handle.transaction((manager) => work({ insert: (id) => manager.insert(items, { id }) })),
  async beginTransaction(handle) {
    const runner = handle.dataSource.createQueryRunner()
    await runner.startTransaction()
    const end = (outcome: () => Promise<void>) => async () => {
      await outcome.call(runner)
      await runner.release()
    }
    return {
      insert: (id) => runner.manager.insert(items, { id }),
      commit: end(runner.commitTransaction),
      rollback: end(runner.rollbackTransaction),
    }
  },
} satisfies Partial<AdapterHarness<EntityManager>>

/** Streams the ids: each many times, because a stream reads ahead, and fewer rows would be over before they are read. */
export async function* streamIds(handle: EntityManager): AsyncGenerator<number> {
  const many = `select 1${' union all select 1'.repeat(199)}`
  const runner = handle.dataSource.createQueryRunner()
  let last: number | undefined
  try {
    for await (const { id } of await runner.stream(`select id from items join (${many}) many on true order by id`)) {
      if (id !== last) yield id
      last = id
    }
  } finally {
    await runner.release()
  }
}

/** Defines a database over data sources that `make` makes. */
export function defineTypeorm(
  make: (host?: string) => DataSource,
  options: HarnessOptions<EntityManager>,
): AmbientDatabase<EntityManager, DataSource> {
  const adapter = typeormAdapter(options.host === undefined ? () => make() : (host: string) => make(host))
  return defineDatabase({ name: 'main', ...options, adapter })
}
