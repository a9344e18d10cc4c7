import { once } from 'node:events'
import { connect } from 'node:net'
import { Client, type ClientConfig } from 'pg'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { gate, until } from './gate.ts'
import { createDatabase, type TestDatabase } from './postgres.ts'
import { startProxy, type WireProxy } from './proxy.ts'

let database: TestDatabase
let proxy: WireProxy
const clients: Client[] = []

beforeAll(async () => {
  database = await createDatabase()
  await database.witness.rows('create table t (id int primary key)')
})
afterAll(() => database.drop())
beforeEach(async () => {
  proxy = await startProxy(database.url)
})
afterEach(async () => {
  for (const client of clients.splice(0)) void client.end().catch(() => {})
  await proxy.close()
})

async function connected(config: ClientConfig = {}): Promise<Client> {
  const client = new Client({ connectionString: proxy.url, ...config })
  client.on('error', () => {})
  clients.push(client)
  await client.connect()
  return client
}

describe('counts', () => {
  it('reads the messages of both sides', async () => {
    const client = await connected()
    proxy.reset()
    await client.query('BEGIN')
    await client.query('insert into t values ($1)', [1])
    await client.query('insert into t values ($1)', [1]).catch(() => {})
    await client.query('ROLLBACK')
    expect(proxy.traffic.labels).toEqual([
      ...['> Q BEGIN', '< C BEGIN', '< Z T'],
      ...['> P insert into t values ($1)', '> B', '> D', '> E', '> S', '< 1', '< 2', '< n', '< C INSERT 0 1', '< Z T'],
      ...['> P insert into t values ($1)', '> B', '> D', '> E', '> S', '< 1', '< 2', '< n', '< E 23505', '< Z E'],
      ...['> Q ROLLBACK', '< C ROLLBACK', '< Z I'],
    ])
  })

  it('counts a round trip for each answer, however many messages travel together', async () => {
    const client = await connected({ pipeline: true } as ClientConfig)
    proxy.reset()
    await Promise.all([client.query('select 1'), client.query('select 2'), client.query('select 3')])
    expect(proxy.traffic.roundTrips).toBe(1)
    await client.query('select 4')
    expect(proxy.traffic).toMatchObject({ roundTrips: 2, sent: 4 * '?1234select 1?'.length, connections: 0 })
    expect(proxy.traffic.received).toBeGreaterThan(0)
  })

  it('reads through the start-up, a refused SSLRequest and a cancel request', async () => {
    await expect(connected({ ssl: true })).rejects.toThrow('does not support SSL')
    expect(proxy.traffic.labels).toEqual(['> ssl', '< ssl N'])
    proxy.reset()
    const client = await connected()
    expect(proxy.traffic.labels[0]).toBe('> startup')
    const refused = expect(client.query('select pg_sleep(60)')).rejects.toMatchObject({ code: '57014' })
    await until(async () => (await database.backends()).some(({ state }) => state === 'active'), 'the statement')
    const { processID, secretKey } = client as Client & { processID: number; secretKey: number }
    const packet = Buffer.alloc(16)
    for (const [index, value] of [16, 80877102, processID, secretKey].entries()) packet.writeInt32BE(value, 4 * index)
    const canceller = connect(Number(new URL(proxy.url).port), '127.0.0.1')
      .end(packet)
      .resume()
    await once(canceller, 'close')
    await refused
    expect(proxy.traffic.labels).toContain('> cancel')
  })
})

describe('fails', () => {
  it.each([
    ['reset', { code: 'ECONNRESET' }],
    ['end', { message: 'Connection terminated unexpectedly' }],
  ] as const)('cuts by %s before a message is passed on', async (how, error) => {
    const client = await connected()
    const trap = proxy.at('> Q insert', how)
    await expect(client.query('insert into t values (10)')).rejects.toMatchObject(error)
    expect(trap.count).toBe(1)
    expect(await trap.caught).toMatchObject({ label: '> Q insert into t values (10)', connection: 1 })
    expect(await database.witness.rows('select * from t where id = 10')).toEqual([])
  })

  it.each(['reset', 'end'] as const)('cuts the answer by %s when the server has done the work', async (how) => {
    const id = how === 'reset' ? 20 : 21
    const client = await connected()
    proxy.at('< C INSERT', how)
    await expect(client.query(`insert into t values (${id})`)).rejects.toThrow()
    expect(await database.witness.rows('select id from t where id = $1', [id])).toEqual([{ id }])
  })

  it('cuts after a message was passed on', async () => {
    const client = await connected()
    proxy.at('< Z I', 'reset', { when: 'after' })
    await client.query('insert into t values (22)')
    await expect(client.query('select 1')).rejects.toThrow()
    expect(proxy.open).toBe(0)
  })

  it('stalls: both sides stay open, nothing passes', async () => {
    const client = await connected()
    const trap = proxy.at('< C INSERT', 'stall')
    let settled = false
    void client
      .query('insert into t values (30)')
      .finally(() => {
        settled = true
      })
      .catch(() => {})
    await trap.caught
    expect(await database.witness.rows('select id from t where id = 30')).toEqual([{ id: 30 }])
    await connected().then((other) => other.query('select 1')) // a whole conversation fits in between
    expect(settled).toBe(false)
    expect(proxy.open).toBe(2)
  })

  it('stalls at a message, and passes on what came behind it, however short', async () => {
    const client = await connected()
    const trap = proxy.at(/^< N/, { stall: 400 })
    await client.query("do $$ begin raise notice '%', repeat('x', 200); perform pg_sleep(0.2); end $$") // a notice is sent at once
    expect(trap.count).toBe(1)
    expect((await client.query('select 1 as one')).rows).toEqual([{ one: 1 }])
  })

  it('stalls for a while, in both directions, and loses nothing of what was sent meanwhile', async () => {
    const client = await connected()
    proxy.at('< C INSERT', { stall: 300 })
    const answer = client.query('insert into t values (31)').then(() => 'answered')
    const started = performance.now()
    expect(await Promise.race([answer, new Promise((resolve) => setTimeout(resolve, 100, 'stalled'))])).toBe('stalled')
    expect(await answer).toBe('answered')
    expect(performance.now() - started).toBeGreaterThan(290)
    proxy.at('> Q insert', { stall: 300 })
    const given = client.query('insert into t values (32)').catch(() => 'given up')
    await new Promise((resolve) => setTimeout(resolve, 50))
    await client.end() // the end of a stalled connection is no news to the server
    expect(await given).toBe('given up')
    expect(await database.witness.rows('select id from t where id = 32')).toEqual([])
    await until(async () => (await database.witness.rows('select id from t where id = 32')).length === 1, 'the row')
    await until(() => proxy.open === 0, 'the end of the connection')
  })

  it('holds a message until a gate is opened, and what is behind it', async () => {
    const [client, other] = [await connected(), await connected()]
    const hold = gate()
    const trap = proxy.at('> Q insert', hold)
    const answer = client.query('insert into t values (40)')
    await trap.caught
    await other.query('select 1')
    expect(await database.witness.rows('select id from t where id = 40')).toEqual([])
    hold.open()
    await answer
    expect(await database.witness.rows('select id from t where id = 40')).toEqual([{ id: 40 }])
  })

  it('passes other bytes on in place of a message', async () => {
    const client = await connected()
    proxy.at('> Q BEGIN', ({ bytes }) => Buffer.from(bytes.toString('latin1').replace('BEGIN', 'BEGUN'), 'latin1'))
    await expect(client.query('BEGIN')).rejects.toMatchObject({ code: '42601' })
  })

  it('catches as often as it is told, on any connection', async () => {
    const trap = proxy.at(/^> Q select [12]/, 'reset', { times: 2 })
    for (const n of [1, 2]) await expect((await connected()).query(`select ${n}`)).rejects.toThrow()
    await (await connected()).query('select 1')
    expect(trap.count).toBe(2)
    proxy.at(({ label, connection }) => label.startsWith('> Q') && connection === 4, 'reset')
    await expect((await connected()).query('select 1')).rejects.toThrow()
  })
})
