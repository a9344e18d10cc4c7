import 'reflect-metadata'
import { DataSource, type EntityManager, EntitySchema } from 'typeorm'
import type { Stack, Work } from '../../../test/truth/field/stack.ts'

/** https://typeorm.io/docs/entity/separating-entity-definition */
export const Mark = new EntitySchema<{ label: string }>({
  name: 'marks',
  columns: { label: { type: 'text', primary: true } },
})

export const stack: Stack = {
  name: 'typeorm',
  packages: ['typeorm', 'pg'],
  documentation: 'https://typeorm.io/docs/advanced-topics/transactions',
  async open({ url, poolSize }) {
    const dataSource = await new DataSource({ type: 'postgres', url, poolSize, entities: [Mark] }).initialize()
    return {
      unit: (work) => dataSource.transaction((manager) => work(workOf(manager))),
      close: () => dataSource.destroy(),
    }
  },
}

function workOf(manager: EntityManager): Work {
  return {
    write: (label) => manager.insert(Mark, { label }),
    nested: (work) => manager.transaction((inner) => work(workOf(inner))),
  }
}
