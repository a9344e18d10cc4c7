import { describe, expect, it } from 'vitest'
import { runChild, sourceUrl } from '../support/child.ts'
import { eachMessage } from './recipes/consumer.ts'
import { nightly } from './recipes/cron.ts'
import { useWorkplace } from './support.ts'

const workplace = useWorkplace()
const { users } = workplace
const seed = (...names: string[]) =>
  workplace.database.witness.rows('insert into users (name) select unnest($1::text[])', [names])

describe('the recipe for cron', () => {
  it('is committed when it resolves', async () => {
    await seed('', 'ann')
    await nightly()
    expect(await users()).toEqual(['ann'])
  })

  it('S5 leaves a COMMIT without an answer to the next night', async () => {
    await seed('', 'ann')
    workplace.proxy.at(/^> Q commit/i, 'reset')
    await nightly()
    expect(await users()).toEqual(['', 'ann'])
    await nightly()
    expect(await users()).toEqual(['ann'])
  })

  it('fails with what else goes wrong', async () => {
    workplace.proxy.at(/^> Q begin/i, 'reset')
    await expect(nightly()).rejects.toBeInstanceOf(Error)
  })
})

describe('the recipe for a consumer, called as a consumer calls it', () => {
  /** Delivers a message until it is taken, and tells how often it was delivered: no Kafka is there. */
  async function deliver(offset: string, value: string | null): Promise<number> {
    const delivery = {
      topic: 't',
      partition: 0,
      message: { offset, value: value === null ? null : Buffer.from(value) },
    }
    for (let times = 1; ; times++) {
      const taken = await eachMessage(delivery).then(
        () => true,
        () => false,
      )
      if (taken) return times
    }
  }

  it('is committed before the offset moves', async () => {
    expect(await deliver('0', 'ann')).toBe(1)
    expect(await users()).toEqual(['ann'])
  })

  it.each([
    ['did arrive', '< C COMMIT'],
    ['did not arrive', /^> Q commit/i],
  ])('S5 does once what is delivered again because COMMIT got no answer: it %s', async (_which, message) => {
    workplace.proxy.at(message, 'reset')
    expect(await deliver('0', 'ann')).toBe(2)
    expect(await deliver('1', 'bob')).toBe(1)
    expect(await users()).toEqual(['ann', 'bob'])
  })

  it('is rolled back with its key when it fails', async () => {
    await workplace.database.witness.rows(`alter table users add constraint named check (name <> 'eve')`)
    await expect(
      eachMessage({ topic: 't', partition: 0, message: { offset: '0', value: Buffer.from('eve') } }),
    ).rejects.toMatchObject({ code: '23514' })
    await workplace.database.witness.rows('alter table users drop constraint named')
    expect(await deliver('0', 'eve')).toBe(1)
    expect(await users()).toEqual(['eve'])
  })
})

describe('in a process of its own', () => {
  /** Runs a recipe as the main module of a process; `then` goes on from it. */
  function run(recipe: string, then = '') {
    const code = `
      import ${JSON.stringify(sourceUrl('examples/express-kysely/real-commit/from-source.ts'))}
      const { defineDatabase, newContext } = await import('ambient-db')
      const { kyselyAdapter } = await import('ambient-db/kysely')
      const { pgAdapter } = await import('ambient-db/pg')
      const { PostgresDialect } = await import('kysely')
      const { Pool } = await import('pg')
      const adapter = kyselyAdapter(
        pgAdapter(() => new Pool({ connectionString: process.env.URL_OF_TEST })),
        (pool) => new PostgresDialect({ pool }),
      )
      globalThis.main = defineDatabase({ name: 'main', adapter })
      const { ending } = await import(${JSON.stringify(sourceUrl(`test/jobs/recipes/${recipe}.ts`))})
      ${then}
    `
    const flags = ['--disable-warning=ExperimentalWarning'] // Node 22 has types stripped with one
    return runChild(code, { flags, env: { URL_OF_TEST: workplace.proxy.url } })
  }

  it('the recipe for a script commits all, and the process ends by itself', async () => {
    expect(await run('script')).toEqual({ status: 0, stdout: '', stderr: '' })
    expect(await users()).toEqual(['ann', 'bob'])
  })

  it('S5 the recipe for a script ends badly when COMMIT got no answer', async () => {
    workplace.proxy.at(/^> Q commit/i, 'reset')
    const { status, stderr } = await run('script')
    expect([status, stderr]).toEqual([1, expect.stringContaining('AMBIENT_COMMIT_UNKNOWN')])
    expect(await users()).toEqual([])
  })

  it('D4 the recipe for the end aborts what has its signal, finishes the rest, and the process ends by itself', async () => {
    const then = `
      const { Client } = await import('pg')
      const keeper = new Client({ connectionString: process.env.URL_OF_TEST })
      await keeper.connect()
      await keeper.query('begin; lock table users in share mode')
      const insert = (name) => main.db.insertInto('users').values({ name }).execute()
      const givenUp = newContext(() => insert('given up'), { signal: ending.signal }).catch(({ code }) => code)
      const finished = newContext(() => insert('finished'))
      const sql = "select from pg_locks where not granted and relation = 'users'::regclass"
      while ((await keeper.query(sql)).rowCount < 2);
      process.kill(process.pid, 'SIGTERM')
      console.log(await givenUp)
      await keeper.end()
      await finished
    `
    expect(await run('shutdown', then)).toEqual({ status: 0, stdout: 'AMBIENT_ABORTED\n', stderr: '' })
    expect(await users()).toEqual(['finished'])
  })
})
