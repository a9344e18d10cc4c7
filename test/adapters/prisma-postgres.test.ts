import { PrismaPg } from '@prisma/adapter-pg'
import { defineDatabase, isAmbientError } from 'ambient-db'
import { pgAdapter } from 'ambient-db/pg'
import { prismaAdapter } from 'ambient-db/prisma'
import type { PoolConfig } from 'pg'
import { afterAll, beforeAll, describe } from 'vitest'
import { PrismaClient } from '../../.tools/prisma-client/client.ts'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'
import { itHoldsTheSuite, type PostgresSubject, postgresHarness } from './support.ts'

type Harness = Awaited<ReturnType<typeof postgresHarness<PrismaClient>>>

const subject: PostgresSubject<PrismaClient> = {
  capabilities: { streaming: false },
  define(pool, options) {
    const driver = pgAdapter(options.host === undefined ? () => pool() : (host: string) => pool(host))
    return defineDatabase({
      name: 'main',
      ...options,
      adapter: prismaAdapter(driver, (virtual) => new PrismaClient({ adapter: new PrismaPg(virtual) })),
    })
  },
  query: (handle, sql, parameters = []) =>
    handle.$queryRawUnsafe<unknown[]>(sql, ...parameters).then((rows) => ({ rows })), // sent at once
  driverError: (error) => (isAmbientError(error) ? error : ((error as Error).cause ?? error)),
  transaction: (handle, work) =>
    handle.$transaction((tx) => work({ insert: async (id) => tx.item.create({ data: { id } }) })),
}

const pipelined: PostgresSubject<PrismaClient> = {
  ...subject,
  capabilities: { pipelining: true, streaming: false },
}

for (const [name, each, config] of [
  ['over pgAdapter', subject, {}],
  ['over a pipelined pool', pipelined, { pipeline: true } as PoolConfig],
] as const) {
  describe(`prismaAdapter ${name} holds the suite`, () => {
    let database: TestDatabase
    let harness: Harness
    beforeAll(async () => {
      database = await createDatabase()
      const made = await postgresHarness(database, each, config)
      // Prisma's adapter can't read the rows of several statements.
      harness = { ...made, endBehindTheBack: (handle) => handle.$executeRawUnsafe('select 1; commit') }
    })
    afterAll(async () => {
      await harness.close()
      await database.drop()
    })

    itHoldsTheSuite(() => harness)
  })
}
