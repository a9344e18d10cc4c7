import { Pool } from 'pg'
import { pgAdapter } from '../../../../src/adapters/pg.ts'
import { databaseContext } from '../../../../src/frameworks/node-http.ts'
import { defineDatabase, isAmbientError, newContext } from '../../../../src/index.ts'
import { listen } from '../listen.ts'
import type { Stack, Work } from '../stack.ts'
import { insert, labelOf } from './marks.ts'

export const stack: Stack = {
  name: 'ambient-db over pg',
  packages: ['ambient-db', 'pg'],
  documentation: 'README.md',
  async open({ url, poolSize }) {
    const main = defineDatabase({
      name: 'main',
      adapter: pgAdapter(() => new Pool({ connectionString: url, max: poolSize })),
    })
    const work: Work = {
      write: (label) => main.db.query(insert, [label]),
      nested: (inner) => main.atomic(() => inner(work), { current: 'savepoint' }),
    }
    return {
      unit: (inner) => newContext(() => inner(work)),
      saysUnknown: (error) => isAmbientError(error) && error.outcome === 'unknown',
      serve: () =>
        listen(
          databaseContext(async (request, response) => {
            await work.write(labelOf(request.url))
            response.writeHead(201).end()
          }),
        ),
      close: main.shutdown,
    }
  },
}
