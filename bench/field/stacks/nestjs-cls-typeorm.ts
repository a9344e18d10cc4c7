import { TransactionalAdapterTypeOrm } from '@nestjs-cls/transactional-adapter-typeorm'
import { DataSource } from 'typeorm'
import type { Stack } from '../../../test/truth/field/stack.ts'
import { openNest } from './nestjs-cls.ts'
import { Mark } from './typeorm.ts'

export const stack: Stack = {
  name: 'nestjs-cls transactional, typeorm',
  packages: [
    '@nestjs-cls/transactional',
    '@nestjs-cls/transactional-adapter-typeorm',
    'nestjs-cls',
    '@nestjs/core',
    'typeorm',
    'pg',
  ],
  documentation: 'https://papooch.github.io/nestjs-cls/plugins/available-plugins/transactional/typeorm-adapter',
  async open({ url, poolSize }) {
    const dataSource = await new DataSource({ type: 'postgres', url, poolSize, entities: [Mark] }).initialize()
    const token = 'DATA_SOURCE'
    return openNest({
      token,
      client: dataSource,
      adapter: new TransactionalAdapterTypeOrm({ dataSourceToken: token }),
      write: (manager, label) => manager.getRepository(Mark).insert({ label }),
      close: () => dataSource.destroy(),
    })
  },
}
