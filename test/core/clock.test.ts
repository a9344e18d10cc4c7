import { AsyncLocalStorage } from 'node:async_hooks'
import { Pool } from 'pg'
import { afterAll, beforeAll, expect, it } from 'vitest'
import { bounded } from '../../src/clock.ts'
import { runChild, sourceUrl } from '../support/child.ts'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'

let database: TestDatabase

beforeAll(async () => {
  database = await createDatabase()
})
afterAll(() => database.drop())

const never = new Promise<never>(() => {})

it('S11 ends what takes too long, in the order in which it began, and nothing else', async () => {
  const ended: string[] = []
  const wait = (name: string, ms: number, promise: Promise<unknown> = never) =>
    bounded(promise, ms, () => name).then(
      () => ended.push(`${name} settled`),
      (reason) => ended.push(`${reason} too late`),
    )
  await Promise.all([
    wait('slow', 60),
    wait('in time', 60, Promise.resolve()),
    wait('other limit', 20),
    new Promise((resolve) => setTimeout(resolve, 30)).then(() => wait('began later', 60)),
  ])
  expect(ended).toEqual(['in time settled', 'other limit too late', 'slow too late', 'began later too late'])
})

it('passes on what it waited for, with its identity', async () => {
  const failure = new Error('of the driver')
  await expect(bounded(Promise.reject(failure), 1000, () => 'late')).rejects.toBe(failure)
  expect(await bounded(Promise.resolve(1), 1000, () => 'late')).toBe(1)
})

it('S5 takes no delay of the process itself for the silence of the other side', async () => {
  const pool = new Pool({ connectionString: database.url, max: 1 })
  const client = await pool.connect()
  const answer = client.query('select 1 as one')
  const bound = bounded(answer, 300, () => 'late')
  await new Promise((resolve) => setImmediate(resolve)) // it is sent
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 2000) // holds the process up; the answer comes meanwhile
  expect(await bound).toMatchObject({ rows: [{ one: 1 }] })
  client.release()
  await pool.end()
})

it('S12 tells the time outside any async context', async () => {
  const storage = new AsyncLocalStorage<string>()
  const seen: unknown[] = []
  const look = () => seen.push(storage.getStore())
  await storage.run('first', () => bounded(never, 10, look).catch(() => {}))
  expect(seen).toEqual([undefined])
})

it('keeps a process alive that waits, and none that does not', async () => {
  const script = `
    import { bounded } from ${JSON.stringify(sourceUrl('src/clock.ts'))}
    await bounded(Promise.resolve(), 60_000, () => {})
    await bounded(new Promise(() => {}), 50, () => 'late').catch(console.log)
    await bounded(Promise.resolve(), 50, () => {})
    console.log('done')
  `
  const startedAt = performance.now()
  expect(await runChild(script)).toEqual({ status: 0, stdout: 'late\ndone\n', stderr: '' })
  expect(performance.now() - startedAt).toBeLessThan(30_000)
})
