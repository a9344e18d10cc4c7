import { TransactionalAdapterDrizzleOrm } from '@nestjs-cls/transactional-adapter-drizzle-orm'
import { drizzle, type NodePgDatabase } from 'drizzle-orm/node-postgres'
import { Pool } from 'pg'
import type { Stack } from '../../../test/truth/field/stack.ts'
import { marks } from './drizzle.ts'
import { openNest } from './nestjs-cls.ts'

export const stack: Stack = {
  name: 'nestjs-cls transactional, drizzle',
  packages: [
    '@nestjs-cls/transactional',
    '@nestjs-cls/transactional-adapter-drizzle-orm',
    'nestjs-cls',
    '@nestjs/core',
    'drizzle-orm',
    'pg',
  ],
  documentation: 'https://papooch.github.io/nestjs-cls/plugins/available-plugins/transactional/drizzle-orm-adapter',
  async open({ url, poolSize }) {
    const pool = new Pool({ connectionString: url, max: poolSize })
    pool.on('error', () => {}) // https://node-postgres.com/apis/pool: "It is important you add an event listener"
    const token = 'DRIZZLE'
    return openNest<NodePgDatabase>({
      token,
      client: drizzle({ client: pool }),
      adapter: new TransactionalAdapterDrizzleOrm<NodePgDatabase>({ drizzleInstanceToken: token }),
      write: async (tx, label) => tx.insert(marks).values({ label }),
      close: () => pool.end(),
    })
  },
}
