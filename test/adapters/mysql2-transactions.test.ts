import type { Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { type AmbientError, type DatabaseOptions, defineDatabase, newContext } from 'ambient-db'
import { mysql2Adapter } from 'ambient-db/mysql2'
import type { PoolConnection } from 'mysql2'
import { createPool, type Pool, type PoolOptions } from 'mysql2/promise'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { failure } from '../core/wire.ts'
import { gate, mysqlGate, until } from '../support/gate.ts'
import { createMysqlDatabase, type MysqlDatabase } from '../support/mysql.ts'
import { startProxy, type WireProxy } from '../support/proxy.ts'
import { MysqlPoolProbe } from './mysql-support.ts'

let database: MysqlDatabase
let proxy: WireProxy
let probes: MysqlPoolProbe[] = []
/** The connections of the pools, and their sockets. */
let raw: PoolConnection[] = []
const sockets = () => raw.map((connection) => (connection as unknown as { stream: Socket }).stream)
let ends: (() => Promise<void>)[] = []
const unexpected: unknown[] = []
const onUnexpected = (error: unknown) => unexpected.push(error)

type Options = Partial<Omit<DatabaseOptions<Pool, Pool, never>, 'adapter'>> & { pool?: PoolOptions }

function define({ pool, ...options }: Options = {}) {
  const adapter = mysql2Adapter(() => {
    const made = createPool({ uri: proxy.url, connectionLimit: 2, ...pool })
    probes.push(new MysqlPoolProbe(undefined, made))
    made.pool.on('connection', (connection) => raw.push(connection))
    return made
  })
  const main = defineDatabase({ name: 'main', adapter, ...options } as DatabaseOptions<Pool, Pool, never>)
  ends.push(main.shutdown)
  return main
}

const insert = (main: { readonly db: Pool }, id: number) => main.db.query('insert into t (id) values (?)', [id])
const update = (main: { readonly db: Pool }, id: number) => main.db.query('update t set n = n + 1 where id = ?', [id])

async function ids(): Promise<number[]> {
  const rows = await database.witness.rows<{ id: number }>('select id from t order by id')
  return rows.map(({ id }) => id)
}

const statements = () =>
  proxy.traffic.labels.filter((label) => label.startsWith('> Query')).map((label) => label.slice('> Query '.length))

/** Two transactions that lock a row each and then want the other's; the server ends one of them. */
function crossed(main: ReturnType<typeof define>, unit: (work: () => Promise<void>) => Promise<unknown>) {
  const both = gate()
  let inside = 0
  const one = (mine: number, other: number) =>
    unit(async () => {
      await update(main, mine)
      if (++inside === 2) both.open()
      await both.passed
      await update(main, other)
    })
  return Promise.allSettled([one(1, 2), one(2, 1)])
}

beforeAll(async () => {
  database = await createMysqlDatabase()
  const { rows } = database.witness
  await rows('create table t (id int primary key, n int not null default 0)')
  await rows('create table untransacted (id int primary key) engine = MyISAM')
  await rows('create procedure harmless() insert into t (id) values (90)')
  await rows('create procedure committing() begin insert into t (id) values (91); commit; end')
  await rows("create procedure failing() begin commit; signal sqlstate '45000'; end")
  await rows("create procedure conflicting() begin commit; signal sqlstate '40001'; end")
  await rows("create procedure restarting() begin commit; start transaction; signal sqlstate '45000'; end")
  await rows('create procedure beginning() begin start transaction; insert into t (id) values (92); end')
  process.on('uncaughtExceptionMonitor', onUnexpected)
  process.on('unhandledRejection', onUnexpected)
})
afterAll(async () => {
  process.off('uncaughtExceptionMonitor', onUnexpected)
  process.off('unhandledRejection', onUnexpected)
  await database.drop()
})
beforeEach(async () => {
  await database.witness.rows('truncate t')
  await database.witness.rows('truncate untransacted')
  proxy = await startProxy(database.url)
})
afterEach(async () => {
  expect(probes.map(({ busy }) => busy)).toEqual(probes.map(() => 0))
  await proxy.close()
  await Promise.all(ends.map((end) => end()))
  ends = []
  probes = []
  raw = []
  expect(unexpected.splice(0)).toEqual([])
})

describe('a deadlock', () => {
  beforeEach(() => database.witness.rows('insert into t (id) values (1), (2)'))

  it('S4 has ended the transaction, so whoever swallows it can neither go on nor commit', async () => {
    const main = define()
    const refusals: unknown[] = []
    const unit = (work: () => Promise<void>) =>
      newContext(async () => {
        await work().catch(async (error) => {
          expect(error).toMatchObject({ errno: 1213 })
          refusals.push(await failure(insert(main, 3)))
        })
      })
    const results = await crossed(main, unit)
    const [rejected] = results.filter(({ status }) => status === 'rejected') as PromiseRejectedResult[]
    expect(results.map(({ status }) => status).sort()).toEqual(['fulfilled', 'rejected'])
    expect(rejected?.reason).toMatchObject({
      code: 'AMBIENT_TRANSACTION_ABORTED',
      outcome: 'rolled-back',
      cause: { errno: 1213 },
    })
    expect(refusals).toMatchObject([{ code: 'AMBIENT_TRANSACTION_ABORTED', cause: { errno: 1213 } }])
    expect(await ids()).toEqual([1, 2])
    expect(await database.witness.rows('select sum(n) as n from t')).toEqual([{ n: '2' }])
  })

  it('A5 is run again by `retry`, and everything is there once', async () => {
    const main = define()
    const results = await crossed(main, (work) => newContext(() => main.atomic(work, { retry: { attempts: 3 } })))
    expect(results.map(({ status }) => status)).toEqual(['fulfilled', 'fulfilled'])
    expect(await database.witness.rows('select n from t')).toEqual([{ n: 2 }, { n: 2 }])
  })
})

describe('a lock wait that takes too long', () => {
  const impatient = { pool: { connectionLimit: 2 } }
  const shortWait = (main: { readonly db: Pool }) => main.db.query('set innodb_lock_wait_timeout = 1')

  it('S4 undoes its statement alone: the rest commits', async () => {
    const main = define(impatient)
    const holder = await mysqlGate(database)
    await newContext(async () => {
      await shortWait(main)
      await insert(main, 1)
      expect(await failure(main.db.query(holder.sql))).toMatchObject({ errno: 1205 })
      await insert(main, 2)
    })
    await holder.open()
    expect(await ids()).toEqual([1, 2])
  })

  it('A5 is run again by `retry`', async () => {
    const main = define(impatient)
    const holder = await mysqlGate(database)
    let attempts = 0
    await newContext(() =>
      main.atomic(
        async () => {
          await shortWait(main)
          await insert(main, ++attempts)
          if (attempts === 2) await holder.open()
          await main.db.query(holder.sql)
        },
        { retry: { attempts: 2 } },
      ),
    )
    expect(await ids()).toEqual([2])
  })
})

describe('SQL that commits by itself (S10)', () => {
  const ways: [name: string, sql: string, ids: number[]][] = [
    ['DDL', 'create or replace table other (id int)', [1]],
    ['a statement that commits and answers with rows', 'analyze table t', [1]],
    ['a procedure that commits', 'call committing()', [1, 91]],
    ['a procedure that begins a transaction', 'call beginning()', [1]],
    ['a comment that is executed', '/*!40000 start transaction */', [1]],
    ['a comment that is executed and commits', '/*! commit */', [1]],
    ['dynamic SQL', "execute immediate 'start transaction'", [1]],
    ['a compound statement', 'begin not atomic start transaction; end', [1]],
    ['locks', 'lock tables t write', [1]],
  ]

  it.each(ways)('is noticed: %s', async (_, sql, there) => {
    const main = define()
    let hooks = 0
    const error = await failure(
      newContext(async () => {
        main.afterRollback(() => hooks++)
        main.afterCommit(() => hooks++)
        await insert(main, 1)
        await main.db.query(sql)
        const refused = await failure(insert(main, 2))
        expect(refused).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', outcome: 'unknown' })
        expect(refused.message).toMatch(/earlier work may be committed/)
      }),
    )
    expect(error).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', outcome: 'unknown' })
    expect(hooks).toBe(0)
    expect(await ids()).toEqual(there)
    await newContext(() => insert(main, 99))
    expect(await ids()).toEqual([...there, 99])
  })

  it.each([
    ['DDL', 'create table t (id int)', 1050],
    ['a procedure', 'call failing()', 1644],
    ['a procedure that looks like a conflict', 'call conflicting()', 1644],
    ['a procedure that begins another transaction', 'call restarting()', 1644],
  ])('is noticed where it fails: %s', async (_, sql, errno) => {
    const main = define()
    const thrown: AmbientError & { cleanupErrors?: unknown } = (await failure(
      newContext(async () => {
        await insert(main, 1)
        await main.db.query(sql)
      }),
    )) as never
    expect(thrown).toMatchObject({ errno })
    expect(thrown.cleanupErrors).toMatchObject([{ code: 'AMBIENT_TRANSACTION_ABORTED', outcome: 'unknown' }])
    const swallowed = newContext(async () => {
      await insert(main, 2)
      expect(await failure(main.db.query(sql))).toMatchObject({ errno })
      await main.rollback()
    })
    await expect(swallowed).rejects.toMatchObject({ outcome: 'unknown', cause: { errno } })
    expect(await ids()).toEqual([1, 2])
  })

  it('is noticed in the middle of several statements, which begin another transaction', async () => {
    const main = define({ pool: { multipleStatements: true } })
    for (const sql of ['select 1; commit; begin', 'select 1; start transaction; insert into t (id) values (9)']) {
      const error = await failure(
        newContext(async () => {
          await insert(main, 1)
          await main.db.query(sql)
        }),
      )
      expect(error).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', outcome: 'unknown' })
      expect(await ids()).toEqual([1])
      await database.witness.rows('truncate t')
    }
  })

  it('is told from procedures and comments that do nothing of the kind', async () => {
    const main = define({ pool: { multipleStatements: true } })
    await newContext(async () => {
      await insert(main, 1)
      await main.db.query('/* why */ call harmless()')
      await main.db.query('select /*! 1 */ as n; select 2')
      await main.db.query('create temporary table mine (id int)')
      expect((await failure(main.db.query('call missing()'))) as unknown).toMatchObject({ errno: 1305 })
      await insert(main, 2)
    })
    expect(await ids()).toEqual([1, 2, 90])
  })

  it('leaves no transaction open on the connection of a context without transactions', async () => {
    const main = define({ pool: { multipleStatements: true, connectionLimit: 1 }, transaction: 'autocommit' })
    for (const sql of ['insert into t (id) values (1); begin; insert into t (id) values (2)', 'set autocommit = 0']) {
      const left = newContext(async () => {
        await main.db.query(sql)
        await insert(main, 3)
      })
      await expect(left).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_CONTROL' })
    }
    expect(await ids()).toEqual([1])
  })
})

describe('what MySQL cannot undo', () => {
  const write = (main: { readonly db: Pool }) => main.db.query('insert into untransacted values (1)')
  const unknown = { code: 'AMBIENT_TRANSACTION_ABORTED', outcome: 'unknown' }

  it('S4 is not said to be rolled back: tables without transactions', async () => {
    const main = define()
    let hooks = 0
    const error = await failure(
      newContext(async () => {
        main.afterRollback(() => hooks++)
        await write(main)
        throw new Error('mine')
      }),
    )
    expect(error).toMatchObject({ message: 'mine', cleanupErrors: [unknown] })
    expect(String((error as { cleanupErrors?: unknown[] }).cleanupErrors)).toMatch(/Not everything was rolled back/)
    expect(hooks).toBe(0)
    expect(await database.witness.rows('select * from untransacted')).toEqual([{ id: 1 }])
    expect(probes[0]?.open).toBe(1)
  })

  it('S4 makes a rollback by hand reject, and the rollback of a block fail the transaction', async () => {
    const main = define()
    await newContext(async () => {
      await write(main)
      await expect(main.rollback()).rejects.toMatchObject(unknown)
      await insert(main, 1)
    })
    await database.witness.rows('truncate untransacted')
    const outer = newContext(async () => {
      await insert(main, 2)
      await main
        .session()
        .savepoint(async () => {
          await write(main)
          throw new Error('mine')
        })
        .catch(() => {})
    })
    await expect(outer).rejects.toMatchObject(unknown)
    expect(await ids()).toEqual([1])
  })
})

describe('connections', () => {
  it('S1 S2 cost nothing until the first statement, and three round trips for one insert', async () => {
    const main = define()
    await newContext(async () => {
      main.session()
      await main.commit()
    })
    expect(proxy.traffic.connections).toBe(0)
    await newContext(() => insert(main, 1))
    proxy.reset()
    await newContext(() => insert(main, 2))
    expect(proxy.traffic.roundTrips).toBe(3)
    expect(statements()).toEqual(['BEGIN', 'insert into t (id) values (2)', 'COMMIT'])
  })

  it('S7 are not pooled while a transaction is open, whatever COMMIT begins', async () => {
    const main = define()
    await newContext(async () => {
      await insert(main, 1)
      await main.db.query('set completion_type = 1') // COMMIT AND CHAIN
    })
    expect(await ids()).toEqual([1])
    expect(probes[0]?.open).toBe(0)
    await newContext(() => insert(main, 2))
    expect(await ids()).toEqual([1, 2])
  })

  it.each([1290, 1836])('S7 are not pooled when their server has become read-only (%s)', async (errno) => {
    const main = define()
    const readOnly = () => main.db.query(`signal sqlstate 'HY000' set mysql_errno = ${errno}`)
    await expect(newContext(readOnly)).rejects.toMatchObject({ errno })
    expect(probes[0]?.open).toBe(0)
    await newContext(() => insert(main, 1))
    expect(await ids()).toEqual([1])
  })

  it('S7 C8 stay usable when a statement is cancelled: it is killed, they are not', async () => {
    const main = define({ pool: { connectionLimit: 1 } })
    const held = await mysqlGate(database)
    const controller = new AbortController()
    const work = newContext(
      async () => {
        await insert(main, 1)
        await main.db.query(held.sql)
      },
      { signal: controller.signal },
    )
    work.catch(() => {})
    await until(held.waiting, 'the statement to wait')
    const [backend] = await database.backends()
    controller.abort()
    await expect(work).rejects.toMatchObject({ code: 'AMBIENT_ABORTED' })
    expect(await held.waiting()).toBe(false)
    expect(proxy.traffic.labels).toContain(`> Query KILL QUERY ${backend?.id}`)
    await held.open()
    await newContext(() => insert(main, 2))
    expect(await ids()).toEqual([2])
    await until(async () => (await database.backends()).length === 1, 'the connection of the kill to end')
    expect((await database.backends())[0]?.id).toBe(backend?.id)
  })

  it('S7 C8 are destroyed where a statement cannot be cancelled, and its promise settles', async () => {
    const main = define({ pool: { connectionLimit: 1, connectTimeout: 2000 } })
    const held = await mysqlGate(database)
    const controller = new AbortController()
    let statement: Promise<unknown> = Promise.resolve()
    const work = newContext(
      async () => {
        await insert(main, 1)
        statement = main.db.query(held.sql)
        await statement
      },
      { signal: controller.signal },
    )
    work.catch(() => {})
    await until(held.waiting, 'the statement to wait')
    proxy.at('> Query KILL', 'stall')
    controller.abort()
    await expect(work).rejects.toMatchObject({ code: 'AMBIENT_ABORTED' })
    await expect(statement).rejects.toThrow('could not be cancelled')
    expect(probes[0]?.open).toBe(0)
    expect(sockets().map(({ destroyed }) => destroyed)).toEqual([true])
    await until(() => proxy.open === 1, 'the request to end') // the statement still runs, behind the proxy
    await held.open()
    await newContext(() => insert(main, 2))
    expect(await ids()).toEqual([2])
  })

  it('S5 S7 do not take a statement without an answer for one that failed: a timeout of the driver', async () => {
    const main = define()
    const held = await mysqlGate(database)
    const work = newContext(async () => {
      await insert(main, 1)
      const late = main.db.query({ sql: held.sql, timeout: 50 })
      expect(await failure(late)).toMatchObject({ code: 'PROTOCOL_SEQUENCE_TIMEOUT' })
      await insert(main, 2)
    })
    await expect(work).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED' })
    expect(await held.waiting()).toBe(false)
    await held.open()
    expect(await ids()).toEqual([])
  })

  it('S5 a COMMIT whose connection is killed before its answer is unknown', async () => {
    const main = define()
    const hold = gate()
    const trap = proxy.at('> Query COMMIT', hold)
    const work = newContext(() => insert(main, 1))
    work.catch(() => {})
    await trap.caught
    for (const { id } of await database.backends()) await database.kill(id)
    await until(() => proxy.open === 0, 'the connection to end')
    hold.open()
    await expect(work).rejects.toMatchObject({ code: 'AMBIENT_COMMIT_UNKNOWN', outcome: 'unknown' })
    expect(await ids()).toEqual([])
  })

  it.each([
    [1053, '08S01', 'Server shutdown in progress'],
    [1927, '70100', 'Connection was killed'],
    [1159, '08S01', 'Got timeout reading communication packets'],
  ])('S5 a COMMIT that is answered by the farewell of the server (%s) is unknown', async (errno, state, message) => {
    const main = define()
    const farewell = (sequence: number) => {
      const body = Buffer.concat([Buffer.from([0xff, errno & 0xff, errno >> 8]), Buffer.from(`#${state}${message}`)])
      return Buffer.concat([Buffer.from([body.length, 0, 0, sequence]), body])
    }
    proxy.at('< OK COMMIT', ({ bytes }) => farewell(bytes[3] as number))
    await expect(newContext(() => insert(main, 1))).rejects.toMatchObject({
      code: 'AMBIENT_COMMIT_UNKNOWN',
      cause: { errno },
    })
    expect(await ids()).toEqual([1])
    expect(probes[0]?.open).toBe(0)
  })

  it('S5 a COMMIT that mysql2 does not send any more is none', async () => {
    const main = define()
    const work = newContext(async () => {
      await insert(main, 1)
      const [connection] = raw
      connection?.destroy()
    })
    await expect(work).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED' })
    expect(await ids()).toEqual([])
  })

  it('S4 keeps the error of a statement whose question behind it was refused, and commits nothing', async () => {
    const main = define()
    proxy.at('> Query DO 0', ({ bytes }) => Buffer.from(bytes.toString('latin1').replace('DO', 'DU'), 'latin1'))
    const work = newContext(async () => {
      await insert(main, 1)
      expect(await failure(insert(main, 1))).toMatchObject({ errno: 1062 })
    })
    await expect(work).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', cause: { errno: 1064 } })
    expect(await ids()).toEqual([])
  })

  it('S4 a lost question after a failed statement is a lost connection, not a rollback', async () => {
    const main = define()
    proxy.at('> Query DO 0', 'reset')
    const work = newContext(async () => {
      await insert(main, 1)
      await insert(main, 1).catch(() => {})
    })
    const error = await failure(work)
    expect(error).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED' })
    expect(error.message).not.toMatch(/engine rolled the transaction back/)
    expect(await ids()).toEqual([])
  })
})

describe('settings (A7)', () => {
  const isolation = `select trx_isolation_level as level, trx_is_read_only as readOnly
    from information_schema.innodb_trx where trx_mysql_thread_id in (?)`

  /** What the server says of the transaction that is open on the only connection. */
  async function settings(main: { readonly db: Pool }): Promise<unknown> {
    await main.db.query('select * from t lock in share mode')
    const connections = (await database.backends()).map(({ id }) => id)
    for (;;) {
      const [found] = await database.witness.rows(isolation, [connections])
      if (found) return found
      await sleep(150) // MySQL shows what it showed before to whoever asks again within 100 ms
    }
  }

  it.each([
    ['read uncommitted', 'READ UNCOMMITTED'],
    ['read committed', 'READ COMMITTED'],
    ['repeatable read', 'REPEATABLE READ'],
    ['serializable', 'SERIALIZABLE'],
  ] as const)('begin with %s', async (isolationLevel, level) => {
    const main = define()
    const options = { transaction: { isolationLevel } }
    expect(await newContext(() => settings(main), options)).toMatchObject({ level })
    expect(statements().slice(0, 2)).toEqual([`SET TRANSACTION ISOLATION LEVEL ${level}`, 'BEGIN'])
  })

  it('begin read-only, where nothing can be written, and nothing of it stays', async () => {
    const main = define({ pool: { connectionLimit: 1 } })
    const readOnly = { transaction: { readOnly: true, isolationLevel: 'serializable' } as const }
    await expect(newContext(() => insert(main, 1), readOnly)).rejects.toMatchObject({ errno: 1792 })
    expect(await newContext(() => settings(main))).toEqual({ level: 'REPEATABLE READ', readOnly: 0 })
    await newContext(() => insert(main, 2), { transaction: { readOnly: false } })
    expect(statements()).toContain('START TRANSACTION READ WRITE')
    expect(await ids()).toEqual([2])
  })

  it('leave nothing behind where BEGIN fails after them', async () => {
    const main = define({ pool: { connectionLimit: 1 } })
    proxy.at('> Query BEGIN', ({ bytes }) => Buffer.from(bytes.toString('latin1').replace('BEGIN', 'BEGUN'), 'latin1'))
    const strict = { transaction: { isolationLevel: 'serializable' } as const }
    await expect(newContext(() => insert(main, 1), strict)).rejects.toMatchObject({ errno: 1064 })
    expect(await newContext(() => settings(main))).toMatchObject({ level: 'REPEATABLE READ' })
    expect(proxy.traffic.connections).toBe(1)
  })

  it('refuse `deferrable`', async () => {
    const main = define()
    const work = newContext(() => insert(main, 1), { transaction: { deferrable: true } })
    await expect(work).rejects.toMatchObject({ code: 'AMBIENT_UNSUPPORTED' })
  })
})
