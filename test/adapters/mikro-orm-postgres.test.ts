import { MikroORM } from '@mikro-orm/postgresql'
import type { EngineProbe, HarnessOptions } from 'ambient-db/conformance'
import type { Pool } from 'pg'
import { afterAll, beforeAll, describe } from 'vitest'
import { until } from '../support/gate.ts'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'
import { defineMikroOrm, type Em, Item, mikroOrmOperations } from './mikro-orm-subject.ts'
import { itHoldsTheSuite, postgresHarness } from './support.ts'

/** The pool of an engine, and what became of its clients. */
class PoolProbe implements EngineProbe {
  readonly living: Set<unknown> = new Set()
  readonly host: string | undefined
  pool: Pool | undefined

  constructor(host: string | undefined) {
    this.host = host
  }

  watch(pool: Pool): void {
    this.pool = pool
    pool.on('connect', (client) => {
      this.living.add(client)
      client.once('end', () => this.living.delete(client))
    })
  }

  get open(): number {
    return this.pool?.totalCount ?? 0
  }

  get busy(): number {
    return this.open - (this.pool?.idleCount ?? 0)
  }

  get closed(): boolean {
    return this.pool?.ended === true
  }
}

let database: TestDatabase
let base: Awaited<ReturnType<typeof postgresHarness<Em>>>
let probes: PoolProbe[] = []

beforeAll(async () => {
  database = await createDatabase()
  base = await postgresHarness<Em>(database, {
    ...mikroOrmOperations,
    query: async (em, sql, parameters) => ({
      rows: await em.execute(sql.replaceAll(/\$\d/g, '?'), parameters),
    }),
    define: () => {
      throw new Error('The engines are those of MikroORM.')
    },
  })
})
afterAll(async () => {
  await base.close()
  await database.drop()
})

function harnessOf(make: (options: Parameters<typeof MikroORM.init>[0]) => object | Promise<object>) {
  return {
    ...base,
    engines: () => probes,
    async reset() {
      probes = []
      await base.reset()
    },
    async kill() {
      await base.kill?.()
      await until(async () => probes.every(({ living }) => living.size === 0), 'the clients to notice')
    },
    define({ connections = 10, ...options }: HarnessOptions<Em> = {}) {
      const made = new WeakMap<object, PoolProbe>()
      const open = (host?: string) => {
        const probe = new PoolProbe(host)
        const onPoolCreated = (pool: Pool) => probe.watch(pool)
        const orm = make({
          entities: [Item],
          clientUrl: base.wire.url,
          pool: { min: 0, max: connections },
          driverOptions: { onPoolCreated },
          logger: () => {},
        })
        if (!(orm instanceof Promise)) {
          made.set(orm, probe)
          return orm
        }
        return orm.then((ready) => {
          made.set(ready, probe)
          return ready
        })
      }
      return defineMikroOrm(open as never, options, (engine) => probes.push(made.get(engine) as PoolProbe)) // open has set it
    },
  }
}

describe('mikroOrmAdapter on PostgreSQL holds the suite', () => {
  itHoldsTheSuite(() => harnessOf((options) => MikroORM.init(options)) as never)
})

describe('mikroOrmAdapter over an ORM that is made at once holds the suite', () => {
  itHoldsTheSuite(() => harnessOf((options) => new MikroORM(options as never)) as never)
})
