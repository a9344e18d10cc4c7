import { DatabaseSync } from 'node:sqlite'
import { CompiledQuery, PostgresDialect, SqliteDialect } from 'kysely'
import { Pool } from 'pg'
import QueryStream from 'pg-query-stream'
import { kyselyAdapter, kyselyHandle } from '../../../src/adapters/kysely.ts'
import { pgAdapter } from '../../../src/adapters/pg.ts'
import { type AmbientSession, defineDatabase, detach, newContext } from '../../../src/index.ts'
import { forKysely } from '../../support/sqlite.ts'

/** What contexts are used for before they end and must be forgotten. */
export interface Use {
  readonly name: string
  /** How many contexts the long run has of it, and the short one. */
  readonly contexts: { readonly long: number; readonly short: number }
  /** Bytes tell nothing where each context leaves a timer behind; what it pins does. */
  readonly measured: 'bytes' | 'pins'
  run(tools: Tools): Promise<unknown>
}

/** What a use is made of. */
export interface Tools {
  /** Each context is known to it, to see whether it is ever forgotten. */
  watch(object: object): void
  /** Leaves a timer behind that is never cleared. */
  forgetTimer(): void
  /** One signal for all contexts. */
  readonly signal: AbortSignal
}

const pool = new Pool({ connectionString: process.env.DATABASE_URL, max: 4 })
export const main = defineDatabase({ name: 'main', adapter: pgAdapter(() => pool) })
export const file = defineDatabase({
  name: 'file',
  adapter: kyselyAdapter<unknown>(() => new SqliteDialect({ database: forKysely(new DatabaseSync(':memory:')) })),
})

const kysely = kyselyHandle<unknown>(main, (handle) => new PostgresDialect({ pool: handle }))

/** Connections that did not come back. */
export function connectionsOut(): number {
  return pool.totalCount - pool.idleCount + pool.waitingCount
}

const failing = () => Promise.reject(new Error('of the work'))
const million = { long: 1_000_000, short: 40_000 }
const many = { long: 100_000, short: 2000 }
const some = { long: 1000, short: 50 }

/** Does `work` with a session that is watched, and its handle, and leaves a timer behind in its context. */
function pinned(name: string, work: (session: AmbientSession<Pool>, tools: Tools) => unknown): Use {
  const run = (tools: Tools) =>
    newContext(async () => {
      const session = main.session()
      tools.watch(session)
      tools.watch(session.db)
      await session.db.query('select 1')
      tools.forgetTimer()
      await work(session, tools)
    }).catch(() => {})
  return { name: `a forgotten timer, ${name}`, contexts: some, measured: 'pins', run }
}

export const uses: readonly Use[] = [
  { name: 'nothing', contexts: million, measured: 'bytes', run: () => newContext(() => {}) },
  { name: 'a session', contexts: million, measured: 'bytes', run: () => newContext(() => void main.session()) },
  {
    name: 'a shared signal and a timeout',
    contexts: million,
    measured: 'bytes',
    run: ({ signal }) => newContext(() => void main.session(), { signal, timeout: 60_000 }),
  },
  {
    name: 'a transaction, pg',
    contexts: many,
    measured: 'bytes',
    run: () => newContext(() => main.db.query('select 1')),
  },
  {
    name: 'a transaction, SQLite',
    contexts: many,
    measured: 'bytes',
    run: () => newContext(() => file.db.executeQuery(CompiledQuery.raw('select 1'))),
  },
  {
    name: 'a transaction that fails',
    contexts: many,
    measured: 'bytes',
    run: () => newContext(() => main.db.query('select 1').then(failing)).catch(() => {}),
  },
  pinned('committed', () => {}),
  pinned('failed', failing),
  pinned('with hooks', (session, { watch }) => {
    for (const register of [session.beforeCommit, session.afterCommit, session.afterRollback]) {
      const hook = () => {}
      watch(hook)
      register(hook)
    }
  }),
  pinned('in a block', async ({ db }, { forgetTimer }) => {
    await main.atomic(async () => {
      await db.query('select 1')
      forgetTimer()
      await main.atomic(async () => {
        await db.query('select 1')
        forgetTimer()
      })
    })
  }),
  pinned('in a native transaction', (_, { forgetTimer }) =>
    kysely.transaction().execute(async () => {
      await main.db.query('select 1')
      forgetTimer()
    }),
  ),
  pinned('in hooks', (_, { forgetTimer }) => {
    for (const register of [main.beforeCommit, main.afterCommit]) register(() => forgetTimer())
  }),
  pinned('after a stream', async ({ db }) => {
    for await (const _ of db.query(new QueryStream('select generate_series(1, 3)')));
  }),
  pinned('beside a session of its own', (_, { watch, forgetTimer }) =>
    main.newSession(async (session) => {
      watch(session)
      watch(session.db)
      await session.db.query('select 1')
      forgetTimer()
      await session.savepoint(async () => {
        await session.db.query('select 1')
        forgetTimer()
      })
    }),
  ),
  pinned('with detached work', (_, { forgetTimer }) => detach(forgetTimer)),
  {
    name: 'a forgotten timer, aborted by the shared signal',
    contexts: some,
    measured: 'pins',
    run: (tools) => {
      const controller = new AbortController()
      const signal = AbortSignal.any([tools.signal, controller.signal])
      const work = async () => {
        tools.watch(main.session())
        await main.db.query('select 1')
        tools.forgetTimer()
        controller.abort()
        await new Promise(() => {})
      }
      return newContext(work, { signal }).catch(() => {})
    },
  },
  {
    name: 'a forgotten timer, in a block that is aborted and never returns',
    contexts: some,
    measured: 'pins',
    run: (tools) => {
      const controller = new AbortController()
      const block = async () => {
        await main.db.query('select 1')
        tools.forgetTimer()
        controller.abort()
        await new Promise(() => {})
      }
      const work = () => {
        tools.watch(main.session())
        return main.atomic(block)
      }
      return newContext(work, { signal: controller.signal }).catch(() => {})
    },
  },
]
