import { createConnection as createCallbackConnection } from 'mysql2'
import { type Connection, type ConnectionOptions, createConnection } from 'mysql2/promise'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { createMysqlDatabase, type MysqlDatabase } from './mysql.ts'
import { startProxy, type WireProxy } from './proxy.ts'

let database: MysqlDatabase
let proxy: WireProxy
const connections: Connection[] = []

beforeAll(async () => {
  database = await createMysqlDatabase()
  await database.witness.rows('create table t (id int primary key)')
})
afterAll(() => database.drop())
beforeEach(async () => {
  proxy = await startProxy(database.url)
})
afterEach(async () => {
  for (const connection of connections.splice(0)) connection.destroy()
  await proxy.close()
})

async function connected(options: ConnectionOptions = {}): Promise<Connection> {
  const connection = await createConnection({ uri: proxy.url, ...options })
  connection.on('error', () => {})
  connections.push(connection)
  return connection
}

describe('counts', () => {
  it('reads the packets of both sides', async () => {
    const connection = await connected()
    expect(proxy.traffic.labels).toEqual(['< greeting', '> login', '< OK login'])
    proxy.reset()
    await connection.query('BEGIN')
    await connection.query('insert into t values (?)', [1])
    await connection.query('insert into t values (?)', [1]).catch(() => {})
    await connection.query('select id, id from t')
    await connection.ping()
    await connection.query('ROLLBACK')
    expect(proxy.traffic.labels).toEqual([
      ...['> Query BEGIN', '< OK BEGIN'],
      ...['> Query insert into t values (1)', '< OK INSERT'],
      ...['> Query insert into t values (1)', '< ERR 1062'],
      ...['> Query select id, id from t', '< Header', '< Column', '< Column', '< EOF columns', '< Row', '< EOF rows'],
      ...['> Ping', '< OK PING', '> Query ROLLBACK', '< OK ROLLBACK'],
    ])
  })

  it('tells prepared statements by their text', async () => {
    const connection = await connected()
    proxy.reset()
    await connection.execute('select ? as n', [1])
    await connection.execute('select ? as n', [2])
    await connection.execute('insert into t values (?)', [2])
    const statement = await connection.prepare('delete from t')
    await statement.close()
    await connection.ping()
    expect(proxy.traffic.labels).toEqual([
      ...['> Prepare select ? as n', '< Prepared', '< Param', '< EOF params', '< Column', '< EOF columns'],
      ...['> Execute select ? as n', '< Header', '< Column', '< EOF columns', '< Row', '< EOF rows'],
      ...['> Execute select ? as n', '< Header', '< Column', '< EOF columns', '< Row', '< EOF rows'],
      ...['> Prepare insert into t values (?)', '< Prepared', '< Param', '< EOF params'],
      ...['> Execute insert into t values (?)', '< OK INSERT'],
      ...['> Prepare delete from t', '< Prepared', '> Close', '> Ping', '< OK PING'],
    ])
  })

  it('reads several results of one question, and rows that are longer than a packet', async () => {
    const connection = await connected({ multipleStatements: true })
    await connection.query('set @a = 1; select 1; do 0')
    expect(proxy.traffic.labels.slice(3)).toEqual([
      '> Query set @a = 1; select 1; do 0',
      ...['< OK SET', '< Header', '< Column', '< EOF columns', '< Row', '< EOF rows', '< OK SET'],
    ])
    const large = await connected()
    proxy.reset()
    await large.query("select repeat('x', 16777215) as text")
    expect(proxy.traffic.labels.slice(1)).toEqual([
      ...['< Header', '< Column', '< EOF columns', '< Row', '< more', '< EOF rows'],
    ])
  })

  it('reads through a change of the user and a refused login', async () => {
    const connection = await connected()
    proxy.reset()
    await connection.changeUser({})
    await connection.query('do 0')
    expect(proxy.traffic.labels.at(0)).toBe('> ChangeUser')
    expect(proxy.traffic.labels.slice(-3)).toEqual(['< OK login', '> Query do 0', '< OK DO'])
    proxy.reset()
    await expect(connected({ password: 'wrong' })).rejects.toMatchObject({ errno: 1045 })
    expect(proxy.traffic.labels).toEqual(['< greeting', '> login', '< ERR 1045'])
  })

  it('counts a round trip for each answer', async () => {
    const connection = await connected()
    proxy.reset()
    await connection.query('do 0')
    await connection.query('select id from t')
    expect(proxy.traffic).toMatchObject({ roundTrips: 2, connections: 0 })
  })
})

describe('fails', () => {
  it.each([
    ['reset', { code: 'ECONNRESET' }],
    ['end', { code: 'PROTOCOL_CONNECTION_LOST' }],
  ] as const)('cuts by %s before a packet is passed on', async (how, error) => {
    const connection = await connected()
    const trap = proxy.at('> Query insert', how)
    await expect(connection.query('insert into t values (10)')).rejects.toMatchObject(error)
    expect(await trap.caught).toMatchObject({ label: '> Query insert into t values (10)', connection: 1 })
    expect(await database.witness.rows('select * from t where id = 10')).toEqual([])
  })

  it.each(['reset', 'end'] as const)('cuts the answer by %s when the server has done the work', async (how) => {
    const id = how === 'reset' ? 20 : 21
    const connection = await connected()
    proxy.at('< OK INSERT', how)
    await expect(connection.query(`insert into t values (${id})`)).rejects.toThrow()
    expect(await database.witness.rows('select id from t where id = ?', [id])).toEqual([{ id }])
  })

  it('passes other bytes on in place of a packet', async () => {
    const connection = await connected()
    proxy.at('> Query COMMIT', ({ bytes }) =>
      Buffer.from(bytes.toString('latin1').replace('COMMIT', 'COMMIX'), 'latin1'),
    )
    await expect(connection.query('COMMIT')).rejects.toMatchObject({ errno: 1064 })
  })

  it('passes what it cannot read: TLS', async () => {
    const connection = createCallbackConnection({ uri: proxy.url, ssl: {} })
    const error = await new Promise<Error>((resolve) => connection.on('error', resolve))
    expect(error).toMatchObject({ code: 'HANDSHAKE_NO_SSL_SUPPORT' })
    connection.destroy()
  })
})
