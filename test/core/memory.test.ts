import { afterAll, beforeAll, expect, it } from 'vitest'
import { runChild, sourceUrl } from '../support/child.ts'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'

let database: TestDatabase

beforeAll(async () => {
  database = await createDatabase()
})
afterAll(() => database.drop())

/** Runs `body`, which notes objects with `watch(name, object)`, and tells which of them the garbage collector left alive. */
async function aliveAfter(body: string): Promise<string[]> {
  const script = `
    import { defineDatabase, newContext, openContext } from ${JSON.stringify(sourceUrl('src/index.ts'))}
    import { pgAdapter } from ${JSON.stringify(sourceUrl('src/adapters/pg.ts'))}
    import { Pool } from ${JSON.stringify(sourceUrl('node_modules/pg/esm/index.mjs'))}
    const main = defineDatabase({
      name: 'main',
      adapter: pgAdapter(() => new Pool({ connectionString: process.env.TEST_URL, max: 1 })),
    })
    const watched = []
    const watch = (name, object) => watched.push([name, new WeakRef(object)])
    const forget = () => void setInterval(() => {}, 60_000)
    await newContext(() => main.db.query('select 1')) // pg-pool keeps the call that made a client as long as the client
    await (async () => { ${body} })()
    for (let round = 0; round < 10; round++) {
      await new Promise((resolve) => setImmediate(resolve))
      gc()
    }
    console.log(JSON.stringify(watched.filter(([, reference]) => reference.deref()).map(([name]) => name)))
    process.exit()
  `
  const { status, stdout, stderr } = await runChild(script, {
    flags: ['--expose-gc'],
    env: { TEST_URL: database.url },
  })
  expect({ status, stderr }).toEqual({ status: 0, stderr: '' })
  return JSON.parse(stdout) as string[]
}

it('sees what a timer pins', async () => {
  expect(
    await aliveAfter(`
      const pinned = {}
      watch('pinned', pinned)
      setInterval(() => pinned, 60_000)
      watch('free', {})
    `),
  ).toEqual(['pinned'])
})

it('C4 empties the container: a forgotten timer pins neither session, nor handle, nor hooks', async () => {
  expect(
    await aliveAfter(`
      await newContext(async () => {
        const session = main.session()
        watch('session', session)
        watch('handle', session.db)
        await session.db.query('select 1')
        const hook = () => {}
        watch('hook', hook)
        main.afterCommit(hook)
        const other = () => {}
        watch('hook of the other outcome', other)
        main.afterRollback(other)
        forget()
      })
    `),
  ).toEqual([])
})

it('C4 empties the container of a context that failed, and drops its signal', async () => {
  expect(
    await aliveAfter(`
      const controller = new AbortController()
      watch('signal', controller.signal)
      await newContext(async () => {
        const session = main.session()
        watch('session', session)
        await session.db.query('select 1')
        const hook = () => {}
        watch('hook', hook)
        main.beforeCommit(hook)
        forget()
        throw new Error('no')
      }, { signal: controller.signal, timeout: 60_000 }).catch(() => {})
    `),
  ).toEqual([])
})

it('C4 lets a timer that was forgotten in a block, or in a session beside, pin neither session, nor handle, nor hooks, nor results', async () => {
  expect(
    await aliveAfter(`
      await newContext(async () => {
        const session = main.session()
        watch('session', session)
        watch('handle', session.db)
        const result = await main.atomic(async () => {
          await session.db.query('select 1')
          const hook = () => {}
          watch('hook', hook)
          main.afterCommit(hook)
          await main.atomic(async () => {
            await session.db.query('select 1')
            const inner = () => {}
            watch('inner hook', inner)
            main.afterRollback(inner)
            forget()
          })
          forget()
          return {}
        })
        watch('result', result)
      })
      await main.newSession(async (session) => {
        await session.db.query('select 1')
        watch('session beside', session)
        watch('handle of a session beside', session.db)
        forget()
      })
    `),
  ).toEqual([])
})

it('C4 keeps no chain of contexts that were started in each other after their end', async () => {
  expect(
    await aliveAfter(`
      let context = openContext()
      watch('first', context)
      for (let count = 0; count < 3; count++) {
        await context.settle('commit')
        const previous = context
        context = previous.run(() => openContext())
      }
      globalThis.last = context
      let go
      let work = new Promise((resolve) => { go = resolve })
      await main.newSession(async (session) => {
        watch('session beside', session)
        work = work.then(() => main.newSession(() => new Promise(() => forget())))
      })
      go()
    `),
  ).toEqual([])
})

/** A database whose COMMIT is done and not answered, because the connection is lost, and its error, which is kept. */
const keptError = `
  const real = pgAdapter(() => new Pool({ connectionString: process.env.TEST_URL, max: 1 }))
  const commit = async (connection) => {
    watch('connection', connection)
    await real.commit(connection)
    connection.connection.stream.destroy()
    return real.commit(connection)
  }
  const other = defineDatabase({ name: 'other', adapter: { ...real, commit }, resolvable: true })
  const warmUp = async () => {
    await other.db.query('select 1')
    throw new Error('rolled back')
  }
  await newContext(warmUp).catch(() => {}) // pg-pool keeps the call that made a client as long as the client
  globalThis.kept = await newContext(async () => {
    watch('session', other.session())
    watch('handle', other.session().db)
    await other.db.query('select pg_current_xact_id()')
  }).catch((error) => error)
  watch('engine', await other.connect())
  await other.shutdown()
`

it('C4 lets an error that can still be resolved keep the engine alone, and nothing once it was', async () => {
  expect(await aliveAfter(keptError)).toEqual(['engine'])
  const resolved = `if (await kept.resolve() !== 'committed') throw kept`
  expect(await aliveAfter(`${keptError}; ${resolved}`)).toEqual([])
})
