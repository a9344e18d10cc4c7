import { type AtomicOptions, defineDatabase, newContext } from 'ambient-db'
import { pgAdapter } from 'ambient-db/pg'
import { Pool, type PoolConfig } from 'pg'
import { afterAll, beforeAll, expect, it } from 'vitest'
import { databaseGate, until } from '../support/gate.ts'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'

let database: TestDatabase

beforeAll(async () => {
  database = await createDatabase()
  await database.witness.rows('create table notes (id int primary key)')
})
afterAll(() => database.drop())

function define(name: string, pool: PoolConfig = {}, settleTimeout = 30_000) {
  const adapter = pgAdapter(() => new Pool({ connectionString: database.url, application_name: name, ...pool }))
  return defineDatabase({ name, adapter, settleTimeout })
}

it('S3 fails a session that holds its connection once that is lost, rather than go on with another', async () => {
  const main = define('held')
  await main.newSession(
    async (session) => {
      await session.db.query('select pg_advisory_lock(7)')
      await session.commit()
      await database.witness.rows(
        "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'held'",
      )
      await until(async () => (await database.backends()).every(({ applicationName }) => applicationName !== 'held'))
      await expect(session.db.query('insert into notes values (1)')).rejects.toThrow()
      await session.rollback()
      await expect(session.db.query('insert into notes values (2)')).rejects.toMatchObject({
        code: 'AMBIENT_TRANSACTION_ABORTED',
        cause: expect.any(Error),
      })
    },
    { hold: true },
  )
  expect(await database.witness.rows('select * from notes')).toEqual([])
  await main.shutdown()
})

it('C8 runs nothing of the work when the signal has fired already', async () => {
  let ran = false
  const work = () => {
    ran = true
  }
  const reason = new Error('too late')
  await expect(newContext(work, { signal: AbortSignal.abort(reason) })).rejects.toMatchObject({
    code: 'AMBIENT_ABORTED',
    cause: reason,
  })
  expect(ran).toBe(false)
})

it('C4 cancels what did not end within settleTimeout, without waiting for it once more', async () => {
  const main = define('slow', {}, 1500)
  const gate = await databaseGate(database.url)
  const startedAt = performance.now()
  await expect(
    newContext(() => {
      main.db.query(gate.sql).catch(() => {})
    }),
  ).rejects.toMatchObject({ code: 'AMBIENT_SETTLE_TIMEOUT', outcome: 'rolled-back' })
  expect(performance.now() - startedAt).toBeLessThan(2 * 1500)
  await gate.open()
  await main.shutdown()
})

it('S2 answers begin() on a pipelined pool only when the server has answered BEGIN', async () => {
  const main = define('pipelined', { pipeline: true })
  await newContext(async () => {
    await main.begin()
    const [backend] = (await database.backends()).filter(({ applicationName }) => applicationName === 'pipelined')
    expect(backend?.state).toBe('idle in transaction')
  })
  await main.shutdown()
})

it('C4 leaves no timer behind that would keep the process', async () => {
  const main = define('timers', { idleTimeoutMillis: 0 })
  const timers = () => process.getActiveResourcesInfo().filter((name) => name === 'Timeout').length
  await database.witness.rows('truncate notes')
  await newContext(() => main.db.query('select 1')) // opens the connection
  const before = timers()
  const late = { timeout: 60_000 }
  await newContext(async () => {
    await Promise.all([
      main.atomic(async () => {
        await main.db.query('insert into notes values (1)')
        await main.atomic(() => main.db.query('insert into notes values (2)'), late)
      }, late),
      main.db.query('select 1'), // waits behind the block
    ])
    await main.atomic(() => main.db.query('select * from missing'), late).catch(() => {})
    expect(timers()).toBeGreaterThan(before)
  }, late)
  await main.newSession(() => Promise.reject(new Error('planned')), late).catch(() => {})
  await newContext(() => main.db.query('select * from missing'), late).catch(() => {})
  expect(timers()).toBeLessThanOrEqual(before) // one of the tools may have fired meanwhile
  await main.shutdown()
})

it('A1 S6 refuses a misspelt answer rather than commit', async () => {
  const main = define('misspelt')
  const invalid = { code: 'AMBIENT_INVALID_ARGUMENT' }
  await database.witness.rows('truncate notes')
  await newContext(async () => {
    await main.db.query('insert into notes values (1)')
    const nested = { current: 'nested' } as unknown as AtomicOptions // as from JavaScript
    await expect(main.atomic(() => {}, nested)).rejects.toMatchObject(invalid)
    await expect(main.closeSession('ROLLBACK' as 'rollback')).rejects.toMatchObject(invalid) // likewise
    expect(await database.witness.rows('select * from notes')).toEqual([])
    await main.rollback()
  })
  expect(await database.witness.rows('select * from notes')).toEqual([])
  await main.shutdown()
})
