import { isAmbientError, newContext } from 'ambient-db'
import { DelayedError, type Job, Queue, Worker } from 'bullmq'
import { Redis } from 'ioredis'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it, vi } from 'vitest'
import { gate, until } from '../support/gate.ts'
import { acquireRedis, type RedisServer } from '../support/redis-server.ts'
import { createUser, startWorker } from './recipes/bullmq.ts'
import { useWorkplace } from './support.ts'

type UserJob = Job<{ name: string }, void>
type UserWorker = Worker<{ name: string }, void>
type Options = Partial<Parameters<typeof startWorker>[0]>

const workplace = useWorkplace()
const { lockUsers, users, waiting } = workplace
let redis: RedisServer
let prefix: string
let queue: Queue<{ name: string }, void>
let workers: UserWorker[] = []
let complaints: unknown[] = []
let tests = 0

beforeAll(async () => {
  redis = await acquireRedis()
}, 120_000) // the first time, its package is unpacked
afterAll(() => redis.stop())
beforeEach(() => {
  prefix = `ambient-db-test-${process.pid}-${++tests}`
  queue = new Queue('users', { connection: { url: redis.url }, prefix })
  complaints = []
  vi.spyOn(console, 'error').mockImplementation((error) => void complaints.push(error))
})
afterEach(async () => {
  vi.restoreAllMocks()
  await workplace.unlock() // a job that waits would keep its worker from closing
  await Promise.all(workers.map((worker) => worker.close()))
  workers = []
  await queue.obliterate({ force: true })
  await queue.close()
})

/** The worker of the recipe. */
function work(options: Options = {}): Told {
  return listen(startWorker({ connection: { url: redis.url }, prefix, ...options }))
}

/** A worker with a processor that does something else in a context. */
function workBy(processor: (job: UserJob) => Promise<unknown>, options: Options = {}): Told {
  const process = async (job: UserJob) => void (await processor(job))
  return listen(
    new Worker<{ name: string }, void>('users', process, { connection: { url: redis.url }, prefix, ...options }),
  )
}

/** What a worker tells of its jobs. */
interface Told {
  readonly worker: UserWorker
  readonly completed: string[]
  readonly failed: unknown[]
  /** Resolves when so many runs have ended, and Redis knows. */
  ended(count: number): Promise<void>
}

function listen(worker: UserWorker): Told {
  workers.push(worker)
  const completed: string[] = []
  const failed: unknown[] = []
  worker.on('completed', ({ data }) => completed.push(data.name))
  worker.on('failed', (_job, error) => failed.push(error))
  return { worker, completed, failed, ended: (count) => until(() => completed.length + failed.length === count) }
}

const insert = (name: string) => workplace.main.db.insertInto('users').values({ name }).execute()
const add = (name: string, attempts = 1) => queue.add('create', { name }, { attempts })

describe('a job of BullMQ', () => {
  it('H8 is committed before it is completed', async () => {
    const commit = gate()
    const trap = workplace.proxy.at(/^> Q commit/i, commit)
    const { completed, ended } = work()
    const job = await add('ann')
    await trap.caught
    expect([await job.getState(), completed, await users()]).toEqual(['active', [], []])
    commit.open()
    await ended(1)
    expect([await job.getState(), completed, await users()]).toEqual(['completed', ['ann'], ['ann']])
  })

  it('H8 that throws is rolled back before BullMQ tries it again', async () => {
    const seen: string[][] = []
    const { failed, ended } = workBy((job) =>
      newContext(async () => {
        seen.push(await users())
        await insert(`${job.data.name} ${job.attemptsMade}`)
        if (job.attemptsMade < 2) throw new Error('not yet')
      }),
    )
    const job = await add('ann', 3)
    await ended(3)
    expect([await job.getState(), failed]).toEqual(['completed', [new Error('not yet'), new Error('not yet')]])
    expect([seen, await users()]).toEqual([[[], [], []], ['ann 2']])
  })

  it('H8 that puts itself off by a throw is rolled back', async () => {
    const { failed, ended } = workBy((job) =>
      newContext(async () => {
        await insert(`${job.data.name} ${job.attemptsStarted}`)
        if (job.attemptsStarted > 1) return
        await job.moveToDelayed(Date.now() + 10, job.token)
        throw new DelayedError()
      }),
    )
    await add('ann')
    await ended(1)
    expect([failed, await users()]).toEqual([[], ['ann 2']])
  })

  it('S4 whose COMMIT is refused has failed', async () => {
    const { failed, ended } = workBy(() => newContext(workplace.doom))
    const job = await add('ann')
    await ended(1)
    expect(failed).toMatchObject([{ code: '23503' }])
    expect(await job.getState()).toBe('failed')
  })

  it('S4 that swallows the error of a statement has failed', async () => {
    const { failed, ended } = workBy(() =>
      newContext(async () => {
        await insert('ann')
        await insert(null as never).catch(() => {})
      }),
    )
    await add('ann')
    await ended(1)
    expect(failed).toMatchObject([{ code: 'AMBIENT_TRANSACTION_ABORTED', outcome: 'rolled-back' }])
    expect(await users()).toEqual([])
  })

  it('C1 has a context of its own, however many run at once', async () => {
    const all = gate()
    let inside = 0
    const { completed, failed, ended } = workBy(
      ({ data: { name } }) =>
        newContext(async () => {
          await insert(name)
          if (++inside === 4) all.open()
          await all.passed
          if (name === 'bob') throw new Error('not bob')
        }),
      { concurrency: 4 },
    )
    for (const name of ['ann', 'bob', 'cid', 'dan']) await add(name)
    await ended(4)
    expect([completed.sort(), failed]).toEqual([['ann', 'cid', 'dan'], [new Error('not bob')]])
    expect((await users()).sort()).toEqual(['ann', 'cid', 'dan'])
  })

  it('C8 that takes too long is cancelled and rolled back', async () => {
    const unlock = await lockUsers()
    const { failed, ended } = workBy(({ data }) => newContext(() => insert(data.name), { timeout: 100 }))
    await add('ann')
    await ended(1)
    expect(failed).toMatchObject([{ code: 'AMBIENT_TIMEOUT', outcome: 'rolled-back' }])
    expect(await waiting()).toBe(0)
    await unlock()
    expect(await users()).toEqual([])
  })

  it('C8 that is cancelled is rolled back', async () => {
    const unlock = await lockUsers()
    const { worker, failed, ended } = work()
    const job = await add('ann')
    await until(async () => (await waiting()) === 1)
    expect(worker.cancelJob(String(job.id), 'enough')).toBe(true)
    await ended(1)
    expect(failed).toMatchObject([{ code: 'AMBIENT_ABORTED', outcome: 'rolled-back', cause: 'enough' }])
    expect(await waiting()).toBe(0)
    await unlock()
    expect(await users()).toEqual([])
  })
})

describe('a job of BullMQ whose COMMIT got no answer', () => {
  it('S5 has failed, though its rows may be there', async () => {
    workplace.proxy.at('< C COMMIT', 'reset')
    const { completed, failed, ended } = work()
    const job = await add('ann')
    await ended(1)
    expect(isAmbientError(failed[0], 'AMBIENT_COMMIT_UNKNOWN')).toBe(true)
    expect([await job.getState(), completed, await users()]).toEqual(['failed', [], ['ann']])

    const stored = await queue.getJob(String(job.id))
    expect(stored?.failedReason).toMatch(/^Database 'main': The answer to COMMIT never came\./)
    expect(JSON.stringify(stored)).not.toContain('not-to-be-shown')
  })

  it.each([
    ['did arrive', '< C COMMIT'],
    ['did not arrive', /^> Q commit/i],
  ])('S5 is done once when it comes again, by the key that the database knows: it %s', async (_which, message) => {
    workplace.proxy.at(message, 'reset')
    const { completed, failed, ended } = work()
    await add('ann', 2)
    await ended(2)
    expect(failed).toMatchObject([{ code: 'AMBIENT_COMMIT_UNKNOWN' }])
    expect([completed, await users()]).toEqual([['ann'], ['ann']])
  })
})

describe('a job of BullMQ whose worker is taken for dead', () => {
  const soon = { lockDuration: 1_000, stalledInterval: 200 }

  it('C8 is rolled back when its lock cannot be renewed, and done by another worker', async () => {
    const unlock = await lockUsers()
    const first = work({ ...soon, skipStalledCheck: true })
    const job = await add('ann')
    await until(async () => (await waiting()) === 1)
    const keys = new Redis(redis.url)
    await keys.del(`${prefix}:users:${job.id}:lock`)
    await keys.quit()
    await until(async () => (await waiting()) === 0)
    await unlock()
    expect(await users()).toEqual([])
    await first.worker.close() // it would take the job again

    const second = work(soon)
    await second.ended(1)
    expect([first.completed, second.completed, await users()]).toEqual([[], ['ann'], ['ann']])
    expect(complaints.map(String)).toContainEqual(expect.stringContaining('could not renew lock'))
  })

  it('is done once though two workers have it at the same time: the second waits for the key', async () => {
    const unlock = await lockUsers()
    const first = work({ ...soon, skipLockRenewal: true, skipStalledCheck: true })
    await add('ann')
    await until(async () => (await waiting()) === 1)
    const second = work(soon)
    await until(async () => (await waiting()) === 2)
    await unlock()
    await second.ended(1)
    expect([first.completed, second.completed, await users()]).toEqual([[], ['ann'], ['ann']])
  })
})

it('K2 a job that is added by `afterCommit` finds the rows, and none is added for work that was rolled back', async () => {
  const request = (name: string, fails: boolean) =>
    newContext(async () => {
      await insert(name)
      workplace.main.afterCommit(async () => void (await add(name)))
      if (fails) throw new Error('no')
    })
  const seen: string[][] = []
  const { completed, ended } = workBy(async () => seen.push(await users()))
  await expect(request('bob', true)).rejects.toThrow('no')
  await request('ann', false)
  await ended(1)
  expect([seen, completed, await queue.count()]).toEqual([[['ann']], ['ann'], 0])
})

it('the recipe takes a signal in a way that BullMQ notices', () => {
  expect(createUser.length).toBe(3)
})
