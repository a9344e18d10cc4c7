import { once } from 'node:events'
import { defineDatabase, newContext } from 'ambient-db'
import { mysql2Adapter } from 'ambient-db/mysql2'
import type { PoolConnection as CallbackConnection, Pool as CallbackPool } from 'mysql2'
import { createPool, type Pool, type PoolConnection, type RowDataPacket } from 'mysql2/promise'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { gate, until } from '../support/gate.ts'
import { createMysqlDatabase, type MysqlDatabase } from '../support/mysql.ts'
import { startProxy, type WireProxy } from '../support/proxy.ts'
import { MysqlPoolProbe } from './mysql-support.ts'

let database: MysqlDatabase
let proxy: WireProxy
let pool: Pool
let probe: MysqlPoolProbe
const main = defineDatabase({ name: 'main', adapter: mysql2Adapter(() => pool) })
const { db } = main
const unsupported = { code: 'AMBIENT_UNSUPPORTED' }
const refused = { code: 'AMBIENT_TRANSACTION_CONTROL', database: 'main' }
const planned = new Error('planned')

const insert = 'insert into notes values (?)'
const note = (text: string, on: Pool | PoolConnection = db) => on.query(insert, [text])
const texts = async () => {
  const rows = await database.witness.rows<{ text: string }>('select text from notes order by text')
  return rows.map(({ text }) => text)
}
const statements = () => proxy.traffic.labels.filter((label) => /^> (?:Query|Execute)/.test(label))

/** What a function with a callback comes to. */
function called<Result>(act: (callback: (error: Error | null, result: Result) => void) => void): Promise<Result> {
  return new Promise((resolve, reject) => act((error, result) => (error ? reject(error) : resolve(result))))
}

beforeAll(async () => {
  database = await createMysqlDatabase()
  await database.witness.rows('create table notes (text varchar(20) primary key)')
  proxy = await startProxy(database.url)
  pool = createPool({ uri: proxy.url, connectionLimit: 5, timezone: '+05:00' })
  probe = new MysqlPoolProbe(undefined, pool)
})
beforeEach(async () => {
  await database.witness.rows('truncate notes')
  proxy.reset()
})
afterEach(() => expect(probe.busy).toBe(0))
afterAll(async () => {
  await main.shutdown()
  await until(() => proxy.open === 0, 'connections to end')
  await proxy.close()
  await database.drop()
})

describe('the pool', () => {
  it('is one of mysql2, with the configuration and the events of the real one', async () => {
    expect(db.constructor).toBe(pool.constructor)
    expect(db.pool.constructor).toBe(pool.pool.constructor)
    const own = createPool({ uri: database.url, connectionLimit: 3, timezone: 'Z' })
    const other = defineDatabase({ name: 'other', adapter: mysql2Adapter(() => own) })
    const events: string[] = []
    other.db.on('connection', () => events.push('connection'))
    other.db.on('acquire', () => events.push('acquire'))
    other.db.on('release', () => events.push('release'))
    await newContext(() => other.db.query('select 1'))
    expect(events).toEqual(['connection', 'acquire', 'release'])
    expect(other.db.pool.config.connectionLimit).toBe(3)
    expect(other.db.escape(new Date(0))).toBe("'1970-01-01 00:00:00.000'")
    expect(other.db.escapeId('a b')).toBe('`a b`')
    await other.shutdown()
  })

  it('cannot be ended, by promise or by callback', async () => {
    await expect(db.end()).rejects.toMatchObject(unsupported)
    await expect(called((callback) => db.pool.end(callback))).rejects.toMatchObject(unsupported)
    await newContext(() => note('one'))
    expect(await texts()).toEqual(['one'])
  })

  it('refuses transaction control, before a byte is sent', async () => {
    const control = ['BEGIN', 'commit', ' rollback;', 'SAVEPOINT a', 'start transaction read only', '# why\ncommit']
    await newContext(async () => {
      for (const text of [...control, 'commit and chain', 'savepoint `a`', '/* why */ commit release']) {
        await expect(db.query(text)).rejects.toMatchObject(refused)
        await expect(db.execute({ sql: text })).rejects.toMatchObject(refused)
      }
    })
    expect(statements()).toEqual([])
  })

  it('C2 refuses everything outside any context, the way it was asked', async () => {
    const noContext = { code: 'AMBIENT_NO_CONTEXT', database: 'main' }
    await expect(db.query('select 1')).rejects.toMatchObject(noContext)
    await expect(db.getConnection()).rejects.toMatchObject(noContext)
    await expect(called((callback) => db.pool.query('select 1', callback))).rejects.toMatchObject(noContext)
    await expect(called((callback) => db.pool.getConnection(callback))).rejects.toMatchObject(noContext)
    await expect(once(db.pool.query('select 1').stream(), 'data')).rejects.toMatchObject(noContext)
    expect(statements()).toEqual([])
  })

  it('survives idle connections that break', async () => {
    await newContext(() => note('one'))
    proxy.cut('reset')
    await until(() => probe.open === 0, 'the pool to notice')
    await newContext(() => note('two'))
    expect(await texts()).toEqual(['one', 'two'])
  })
})

describe('queries', () => {
  it('take every form that mysql2 takes', async () => {
    await newContext(async () => {
      expect((await db.query('select 1 as n'))[0]).toEqual([{ n: 1 }])
      expect((await db.query('select ? as n', [2]))[0]).toEqual([{ n: 2 }])
      expect((await db.query({ sql: 'select ? as n', values: [3], rowsAsArray: true }))[0]).toEqual([[3]])
      expect((await db.query({ sql: 'select :n as n', namedPlaceholders: true }, { n: 4 }))[0]).toEqual([{ n: 4 }])
      expect((await db.execute('select ? as n', [5]))[0]).toEqual([{ n: '5' }].map(() => ({ n: 5 })))
      const [header, fields] = await db.execute(insert, ['six'])
      expect(header).toMatchObject({ affectedRows: 1 })
      expect(fields).toBeUndefined()
      expect((await db.query<RowDataPacket[]>('select text from notes'))[1]).toMatchObject([{ name: 'text' }])
    })
    expect(await texts()).toEqual(['six'])
  })

  it('S4 take bad arguments for what they are: nothing was sent, and the transaction goes on', async () => {
    await newContext(async () => {
      await note('one')
      await expect(db.execute(insert, [undefined as never])).rejects.toThrow(TypeError)
      await note('two')
    })
    expect(await texts()).toEqual(['one', 'two'])
  })

  it('work by callback as well, in the async context of whoever asked (S12)', async () => {
    const callbacks: CallbackPool = db.pool
    let inner: unknown
    await newContext(async () => {
      await called((callback) => callbacks.query(insert, ['one'], callback))
      expect(await called((callback) => callbacks.execute('select text from notes', callback))).toEqual([
        { text: 'one' },
      ])
      await expect(called((callback) => callbacks.query('commit', callback))).rejects.toMatchObject(refused)
      await expect(called((callback) => callbacks.query(insert, ['one'], callback))).rejects.toMatchObject({
        errno: 1062,
      })
      const session = main.session()
      await called<void>((callback) =>
        callbacks.query('select 1', () => {
          inner = main.session() === session
          callback(null, undefined)
        }),
      )
    })
    expect(inner).toBe(true)
    expect(await texts()).toEqual(['one'])
  })

  it('share the session with a callback pool that was made from it, and with a promise pool again', async () => {
    await expect(
      newContext(async () => {
        await db.pool.promise().query(insert, ['one'])
        await note('two')
        throw planned
      }),
    ).rejects.toBe(planned)
    expect(statements()).toHaveLength(4)
    expect(await texts()).toEqual([])
  })
})

describe('a connection of the session', () => {
  it('A4 has savepoints for transactions, by text and by method', async () => {
    await newContext(async () => {
      await note('before')
      const connection = await db.getConnection()
      for (const begin of [() => connection.beginTransaction(), () => connection.query('begin')]) {
        await begin()
        await note('undone', connection)
        await connection.rollback()
        await begin()
        await note(`kept${statements().length}`, connection)
        await connection.commit()
      }
      await connection.query('start transaction')
      await connection.query('savepoint `Inner`')
      await note('inner', connection)
      await connection.execute('rollback to savepoint `Inner`')
      await connection.query('release savepoint `Inner`')
      await connection.query('COMMIT')
      connection.release()
    })
    expect(await texts()).toEqual(['before', expect.stringMatching(/^kept/), expect.stringMatching(/^kept/)])
    expect(statements().filter((label) => /> Query (?:BEGIN|COMMIT)/.test(label))).toHaveLength(2)
  })

  it('A4 works by callback, as the connection behind that of a promise pool', async () => {
    await newContext(async () => {
      const connection = await called<CallbackConnection>((callback) => db.pool.getConnection(callback))
      await called<void>((callback) => connection.beginTransaction((error) => callback(error, undefined)))
      await called((callback) => connection.query(insert, ['undone'], callback))
      await called<void>((callback) => connection.rollback((error) => callback(error, undefined)))
      await called<void>((callback) => connection.ping((error: Error | null) => callback(error, undefined)))
      await connection.promise().query(insert, ['kept'])
      db.pool.releaseConnection(connection)
    })
    expect(await texts()).toEqual(['kept'])
  })

  it('A7 takes SET TRANSACTION for its next transaction, as Drizzle sends it', async () => {
    await newContext(
      async () => {
        const connection = await db.getConnection()
        const [header] = await connection.query('set transaction isolation level serializable')
        expect(header).toMatchObject({ affectedRows: 0, insertId: 0 }) // which Drizzle looks at
        await connection.query('start transaction read only')
        expect(statements()).toEqual([])
        await connection.query('select 1')
        await connection.commit()
        connection.release()
      },
      { transaction: { isolationLevel: 'serializable', readOnly: true } },
    )
    expect(statements().slice(0, 2)).toEqual([
      '> Query SET TRANSACTION ISOLATION LEVEL SERIALIZABLE',
      '> Query START TRANSACTION READ ONLY',
    ])
    const other = newContext(async () => {
      await note('one')
      const connection = await db.getConnection()
      await connection.query('SET TRANSACTION ISOLATION LEVEL READ COMMITTED')
      await connection.beginTransaction()
    })
    await expect(other).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_OPTIONS' })
  })

  it('rolls back what is open on it when it is released, however that is said', async () => {
    const ways: ((connection: PoolConnection) => unknown)[] = [
      (connection) => connection.release(),
      (connection) => connection.destroy(),
      (connection) => connection.end(),
      (connection) => db.releaseConnection(connection),
      (connection) => connection[Symbol.asyncDispose](),
    ]
    for (const release of ways) {
      await newContext(async () => {
        await note('kept')
        const connection = await db.getConnection()
        await connection.beginTransaction()
        await note('undone', connection)
        await release(connection)
        await note('after')
      })
      expect(await texts()).toEqual(['after', 'kept'])
      await database.witness.rows('truncate notes')
    }
  })

  it('refuses what would end the transaction or needs a socket', async () => {
    await newContext(async () => {
      const connection = await db.getConnection()
      await note('one', connection)
      await expect(connection.reset()).rejects.toMatchObject(unsupported)
      await expect(connection.changeUser({})).rejects.toMatchObject(unsupported)
      await expect(connection.prepare('select 1')).rejects.toMatchObject(unsupported)
      expect(() => connection.pause()).toThrow(expect.objectContaining(unsupported))
      await expect(connection.query('commit')).rejects.toMatchObject(refused)
      expect(connection.format('?', [new Date(0)])).toBe("'1970-01-01 05:00:00.000'")
      await connection.ping()
    })
    expect(await texts()).toEqual(['one'])
  })
})

describe('streams', () => {
  it('S9 of a connection that is ended are read by nobody, and the session goes on', async () => {
    const large = "select repeat('x', 50000) as text from seq_1_to_300" // so that there is a rest
    await newContext(async () => {
      for (const end of ['end', 'destroy'] as const) {
        const connection = await called<CallbackConnection>((callback) => db.pool.getConnection(callback))
        const stream = connection.query(large).stream({ highWaterMark: 1 })
        await once(stream, 'data')
        stream.pause()
        await expect(note('refused')).rejects.toMatchObject({ code: 'AMBIENT_STREAM_OPEN' })
        connection[end]()
        await note(end)
        expect(stream.destroyed).toBe(true)
      }
    })
    expect(await texts()).toEqual(['destroy', 'end'])
  })

  const numbers = 'select seq as n from seq_1_to_1000'

  it('S9 emit rows and fields as those of mysql2, with back-pressure', async () => {
    await newContext(async () => {
      const query = db.pool.query(numbers)
      const stream = query.stream({ highWaterMark: 2 })
      const [fields] = await once(stream, 'fields')
      expect(fields).toMatchObject([{ name: 'n' }])
      let sum = 0
      for await (const { n } of stream) sum += n
      expect(sum).toBe(500_500)
      await note('after')
    })
    expect(await texts()).toEqual(['after'])
  })

  it('S9 give rows by events alone as well', async () => {
    const rows: unknown[] = []
    await newContext(async () => {
      const query = db.pool.query(numbers)
      query.on('result', (row) => rows.push(row))
      await once(query, 'end')
    })
    expect(rows).toHaveLength(1000)
  })

  it('S12 run in the async context of whoever asked', async () => {
    await newContext(() => note('opened here'))
    await newContext(async () => {
      const session = main.session()
      const seen = new Set<unknown>()
      const stream = db.pool.query(numbers).stream()
      stream.on('data', () => seen.add(main.session()))
      await once(stream, 'end')
      const query = db.pool.query(numbers)
      query.on('result', () => seen.add(main.session()))
      await once(query, 'end')
      expect([...seen]).toEqual([session])
    })
  })

  it('S9 free the session when their reader has left, once the rest has come', async () => {
    const large = "select seq as n, repeat('x', 50000) from seq_1_to_300" // so that there is a rest
    await newContext(async () => {
      for await (const { n } of db.pool.query(large).stream({ highWaterMark: 1 })) {
        if (n === 3) break
      }
      await note('after')
    })
    expect(await texts()).toEqual(['after'])
  })

  it('S9 fail with the error of the server, which the transaction survives', async () => {
    await newContext(async () => {
      await note('one')
      const stream = db.pool.query('select * from missing').stream()
      await expect(once(stream, 'data')).rejects.toMatchObject({ errno: 1146 })
      await note('two')
    })
    expect(await texts()).toEqual(['one', 'two'])
  })

  it('S9 fail when their connection is lost, rather than wait for ever', async () => {
    const large = "select repeat('x', 60000) as text from seq_1_to_1000000" // the rest is still to come when one is there
    for (const how of ['reset', 'end'] as const) {
      const work = newContext(async () => {
        await note('one')
        const rows = db.pool.query(large).stream({ highWaterMark: 1 })[Symbol.asyncIterator]()
        await rows.next()
        proxy.cut(how)
        while (!(await rows.next()).done);
      })
      await expect(work).rejects.toThrow(/ECONNRESET|closed the connection|lost/)
    }
    expect(await texts()).toEqual([])
  })

  it('S9 end no process when the session ends them and nobody listens', async () => {
    await newContext(async () => {
      await note('one')
      await once(db.pool.query(numbers).stream({ highWaterMark: 1 }), 'readable')
    })
    expect(await texts()).toEqual(['one'])
  })

  it('S9 keep the options of the pool, also in its first query', async () => {
    const own = createPool({ uri: database.url, rowsAsArray: true })
    const other = defineDatabase({ name: 'other', adapter: mysql2Adapter(() => own) })
    await newContext(async () => {
      for await (const row of other.db.pool.query('select 1').stream()) expect(row).toEqual([1])
    })
    await other.shutdown()
  })

  it('refuse transaction control, and rows of `execute`', async () => {
    await newContext(async () => {
      const control = db.pool.query('commit').stream()
      await expect(once(control, 'data')).rejects.toMatchObject(refused)
      const connection = await db.getConnection()
      const callbacks = connection.connection as unknown as CallbackConnection
      await expect(once(callbacks.execute('select 1').stream(), 'data')).rejects.toMatchObject(unsupported)
      await note('one')
    })
    expect(await texts()).toEqual(['one'])
  })

  it('S9 end the context that is left with one open, on the server too', async () => {
    const settled = gate()
    let failure: unknown
    const slow = "select sleep(0.01), repeat('x', 50000) from seq_1_to_1000000"
    const work = newContext(
      async () => {
        await note('one')
        const stream = db.pool.query(slow).stream({ highWaterMark: 1 })
        stream.on('error', (error) => {
          failure = error
          settled.open()
        })
        await once(stream, 'readable')
      },
      { timeout: 1000 },
    )
    await expect(work).rejects.toMatchObject({ code: 'AMBIENT_TIMEOUT' }) // the rest would take hours
    await settled.passed
    expect(failure).toMatchObject({ code: 'AMBIENT_STREAM_OPEN' })
    await until(async () => (await database.backends()).every(({ command }) => command === 'Sleep'), 'the end of it')
  })
})
