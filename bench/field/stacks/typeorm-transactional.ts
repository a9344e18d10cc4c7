import 'reflect-metadata'
import express, { type ErrorRequestHandler } from 'express'
import { DataSource } from 'typeorm'
import {
  addTransactionalDataSource,
  initializeTransactionalContext,
  Propagation,
  runInTransaction,
  wrapInTransaction,
} from 'typeorm-transactional'
import { listen } from '../../../test/truth/field/listen.ts'
import type { Stack, Work } from '../../../test/truth/field/stack.ts'
import { Mark } from './typeorm.ts'

export const stack: Stack = {
  name: 'typeorm-transactional',
  packages: ['typeorm-transactional', 'typeorm', 'pg'],
  documentation: 'https://github.com/Aliheym/typeorm-transactional#usage',
  async open({ url, poolSize }) {
    initializeTransactionalContext()
    const dataSource = new DataSource({ type: 'postgres', url, poolSize, entities: [Mark] })
    addTransactionalDataSource(dataSource)
    await dataSource.initialize()
    const repository = dataSource.getRepository(Mark)
    const work: Work = {
      write: (label) => repository.insert({ label }),
      // The only one of its propagations that is documented as nested. See also Aliheym/typeorm-transactional#62.
      nested: (inner) => runInTransaction(() => inner(work), { propagation: Propagation.NESTED }),
    }
    return {
      unit: (inner) => runInTransaction(() => inner(work)),
      serve() {
        // What `@Transactional()` makes of a method of a service.
        const createMark = wrapInTransaction((label: string) => work.write(label))
        const app = express()
        app.post('/marks/:label', async (request, response) => {
          await createMark(request.params.label)
          response.sendStatus(201)
        })
        app.use(((_error, _request, response, _next) => response.sendStatus(500)) satisfies ErrorRequestHandler)
        return listen(app)
      },
      close: () => dataSource.destroy(),
    }
  },
}
