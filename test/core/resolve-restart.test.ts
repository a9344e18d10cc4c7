import { rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { type AmbientError, defineDatabase, isAmbientError, newContext } from 'ambient-db'
import { pgAdapter } from 'ambient-db/pg'
import { Client, Pool } from 'pg'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { until } from '../support/gate.ts'
import { type StartedPostgres, startPostgres } from '../support/postgres-server.ts'
import { startProxy, type WireProxy } from '../support/proxy.ts'

/** Servers of our own: they are restarted, crashed and promoted. What is written reaches the disk only when somebody waits for it. */
const settings = { wal_writer_delay: '10s', bgwriter_delay: '10s' }
let server: StartedPostgres
let proxy: WireProxy
let main: ReturnType<typeof define>

beforeAll(async () => {
  server = await startPostgres({ settings })
  await rows('create table t (id int primary key)')
})
afterAll(() => server.stop())
beforeEach(async () => {
  await rows('truncate t')
  proxy = await startProxy(server.url)
  main = define()
})
afterEach(async () => {
  await proxy.close()
  await main.shutdown()
})

function define() {
  const adapter = pgAdapter(() => new Pool({ connectionString: proxy.url, max: 1 }))
  return defineDatabase({ name: 'main', resolvable: true, adapter })
}

/** Asks the server by a connection of its own. */
async function rows<Row extends object = Record<string, unknown>>(sql: string): Promise<Row[]> {
  const client = new Client({ connectionString: server.url, application_name: 'witness' })
  client.on('error', () => {}) // it may be the one that is killed
  await client.connect()
  try {
    return (await client.query<Row>(sql)).rows
  } finally {
    await client.end()
  }
}

async function ids(): Promise<number[]> {
  return (await rows<{ id: number }>('select id from t order by id')).map(({ id }) => id)
}

/** Writes a row in a transaction whose COMMIT is cut, and what it was told. `id` is that of the transaction. */
async function loseCommit(message: '> Q COMMIT' | '< C COMMIT'): Promise<{ error: AmbientError; id: string }> {
  proxy.at(message, 'reset')
  let id = ''
  const error: unknown = await newContext(async () => {
    const result = await main.db.query('insert into t values (1) returning pg_current_xact_id()::text as id')
    id = (result.rows as { id: string }[])[0]?.id ?? ''
  }).catch((thrown) => thrown)
  if (!isAmbientError(error, 'AMBIENT_COMMIT_UNKNOWN')) throw new Error('COMMIT was to be lost.', { cause: error })
  await until(async () => (await status(id)) !== 'in progress', 'the server to notice')
  return { error, id }
}

/** What the server says of an id, whosever it is. */
async function status(id: string): Promise<string | null | undefined> {
  const asked = rows<{ status: string | null }>(`select pg_xact_status('${id}') as status`)
  return asked.then(
    ([row]) => row?.status,
    (error) => error.message,
  )
}

describe('resolve() after a restart', () => {
  it('S5 waits until the server is back', async () => {
    const { error } = await loseCommit('< C COMMIT')
    const restarted = server.restart('shutdown')
    expect(await error.resolve?.()).toBe('committed')
    await restarted
  })

  it('S5 tells what was committed and what was not, once the server was shut down and started', async () => {
    const kept = await loseCommit('< C COMMIT')
    await rows('delete from t')
    const lost = await loseCommit('> Q COMMIT')
    await server.restart('shutdown')
    await server.restart('shutdown')
    expect(await kept.error.resolve?.()).toBe('committed')
    expect(await lost.error.resolve?.()).toBe('rolled-back')
  })

  it('S5 says that what a crash has undone was rolled back, and never that it was committed, whoever gets its id', async () => {
    const { error, id } = await loseCommit('> Q COMMIT')
    const again = await loseCommit('> Q COMMIT')
    await server.restart('crash')
    expect(await status(id)).toMatch(/in the future/)
    expect(await again.error.resolve?.()).toBe('rolled-back')
    await until(async () => {
      await rows('insert into t select coalesce(max(id), 1) + 1 from t')
      return (await status(id)) === 'committed'
    }, 'another transaction to get the id')
    expect(await ids()).not.toContain(1)
    expect(await error.resolve?.()).toBe('unknown')
  })

  it('S5 does not vouch for what survived a crash, which looks the same', async () => {
    const { error, id } = await loseCommit('< C COMMIT')
    await server.restart('crash')
    expect(await status(id)).toBe('committed')
    expect(await ids()).toEqual([1])
    expect(await error.resolve?.()).toBe('unknown')
  })

  it('S5 tells of a crash that the server recovered from by itself', async () => {
    const { error, id } = await loseCommit('< C COMMIT')
    const [before] = await rows<{ started: Date }>('select pg_postmaster_start_time() as started')
    const victim = new Client({ connectionString: server.url })
    victim.on('error', () => {})
    await victim.connect()
    const { rows: pids } = await victim.query('select pg_backend_pid() as pid')
    const gone = new Promise((resolve) => victim.once('end', resolve))
    process.kill(pids[0].pid, 'SIGKILL')
    await gone
    await until(async () => (await status(id)) === 'committed', 'the server to be back')
    expect(await rows('select pg_postmaster_start_time() as started')).toEqual([before])
    expect(await error.resolve?.()).toBe('unknown')
  })
})

describe('resolve() and standbys', () => {
  it('S5 waits while COMMIT waits for a standby, its client gone', async () => {
    await rows("alter system set synchronous_standby_names = 'missing'")
    await rows('select pg_reload_conf()')
    try {
      proxy.at('> Q COMMIT', 'reset', { when: 'after' })
      const error: unknown = await newContext(() => main.db.query('insert into t values (1)')).catch((thrown) => thrown)
      if (!isAmbientError(error, 'AMBIENT_COMMIT_UNKNOWN')) throw error
      const waits = "select 1 from pg_stat_activity where wait_event = 'SyncRep'"
      await until(async () => (await rows(waits)).length === 1, 'COMMIT to wait')
      expect(await error.resolve?.({ timeout: 300 })).toBe('unknown')
      expect(await ids()).toEqual([])
      const resolved = error.resolve?.()
      await rows('alter system reset synchronous_standby_names')
      await rows('select pg_reload_conf()')
      expect(await resolved).toBe('committed')
      expect(await ids()).toEqual([1])
    } finally {
      await rows('alter system reset synchronous_standby_names')
      await rows('select pg_reload_conf()')
    }
  })

  it('S5 waits for a standby to be promoted; then it tells what it has lost, and does not vouch for what it has', async () => {
    const kept = await loseCommit('< C COMMIT')
    await rows('delete from t')
    const lost = await loseCommit('> Q COMMIT')
    const signal = join(server.dataDirectory, 'standby.signal')
    await writeFile(signal, '', { mode: 0o666 })
    try {
      await server.restart('shutdown')
      expect(await status(kept.id)).toBe('committed')
      expect(await kept.error.resolve?.({ timeout: 300 })).toBe('unknown')
      expect(await lost.error.resolve?.({ timeout: 300 })).toBe('unknown')
      const read = () => main.db.query('select pg_is_in_recovery() as standby')
      expect((await newContext(read)).rows).toEqual([{ standby: true }]) // the question harms nobody there
      const resolved = lost.error.resolve?.()
      await rows('select pg_promote()')
      expect(await resolved).toBe('rolled-back')
      expect(await kept.error.resolve?.()).toBe('unknown')
    } finally {
      await rm(signal, { force: true })
    }
  })
})

describe('resolve() and other servers', () => {
  it('S5 believes no server that is another', async () => {
    const { error } = await loseCommit('< C COMMIT')
    const other = await startPostgres({ settings })
    try {
      Object.assign((await main.connect()).options, { connectionString: other.url }) // as if its name led there now
      expect(await error.resolve?.()).toBe('unknown')
    } finally {
      await other.stop()
    }
  })
})
