import express, { type ErrorRequestHandler } from 'express'
import { type Kysely, PostgresDialect } from 'kysely'
import { Pool } from 'pg'
import type { Adapter } from '../../../../src/adapter.ts'
import { kyselyAdapter } from '../../../../src/adapters/kysely.ts'
import { pgAdapter } from '../../../../src/adapters/pg.ts'
import { databaseContext } from '../../../../src/frameworks/express.ts'
import { defineDatabase, isAmbientError, newContext } from '../../../../src/index.ts'
import { listen } from '../listen.ts'
import type { OpenStack, Stack, Work } from '../stack.ts'

export interface Tables {
  marks: { label: string }
}

export const stack: Stack = {
  name: 'ambient-db, Kysely over pg',
  packages: ['ambient-db', 'kysely', 'pg'],
  documentation: 'README.md',
  open: async ({ url, poolSize }) =>
    openKysely(
      kyselyAdapter<Tables>(
        pgAdapter(() => new Pool({ connectionString: url, max: poolSize })),
        (pool) => new PostgresDialect({ pool }),
      ),
    ),
}

export function openKysely<Engine, Connection>(adapter: Adapter<Kysely<Tables>, Engine, Connection>): OpenStack {
  const main = defineDatabase({ name: 'main', adapter })
  const work: Work = {
    write: (label) => main.db.insertInto('marks').values({ label }).execute(),
    nested: (inner) => main.atomic(() => inner(work), { current: 'savepoint' }),
  }
  return {
    unit: (inner) => newContext(() => inner(work)),
    saysUnknown: (error) => isAmbientError(error) && error.outcome === 'unknown',
    serve() {
      const app = express()
      app.use(databaseContext())
      app.post('/marks/:label', async (request, response) => {
        await work.write(request.params.label)
        response.sendStatus(201)
      })
      app.use(((_error, _request, response, _next) => response.sendStatus(500)) satisfies ErrorRequestHandler)
      return listen(app)
    },
    close: main.shutdown,
  }
}
