import type { Options, MikroORM as Orm } from '@mikro-orm/core'
import { MikroORM, type PostgreSqlDriver } from '@mikro-orm/postgresql'
import { mikroOrmAdapter } from 'ambient-db/mikro-orm'
import type { Pool } from 'pg'
import { afterAll, beforeAll, describe } from 'vitest'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'
import { type Em, Item, mikroOrmOperations } from './mikro-orm-subject.ts'
import { type OwnPoolProbe, withOwnPools } from './own-pools.ts'
import { itHoldsTheSuite, postgresHarness } from './support.ts'

/** The pool of an engine, and what became of its clients. */
class PoolProbe implements OwnPoolProbe {
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

type Make = (options: Partial<Options<PostgreSqlDriver>>) => Orm<PostgreSqlDriver> | Promise<Orm<PostgreSqlDriver>>

function harnessOf(make: Make) {
  const adapterOf = mikroOrmAdapter<Orm<PostgreSqlDriver>>
  return withOwnPools(base as never, adapterOf, (connections, host) => {
    const probe = new PoolProbe(host)
    const engine = make({
      entities: [Item],
      clientUrl: base.wire.url,
      pool: { min: 0, max: connections },
      driverOptions: { onPoolCreated: (pool: Pool) => probe.watch(pool) },
      logger: () => {},
    })
    return { engine, probe }
  })
}

describe('mikroOrmAdapter on PostgreSQL holds the suite', () => {
  itHoldsTheSuite(() => harnessOf((options) => MikroORM.init<PostgreSqlDriver>(options)) as never)
})

describe('mikroOrmAdapter over an ORM that is made at once holds the suite', () => {
  itHoldsTheSuite(() => harnessOf((options) => new MikroORM(options as never)) as never)
})
