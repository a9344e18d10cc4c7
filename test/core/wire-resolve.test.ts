import { setTimeout as sleep } from 'node:timers/promises'
import { inspect } from 'node:util'
import { type AmbientDatabase, type AmbientError, defineDatabase, isAmbientError, newContext } from 'ambient-db'
import { pgAdapter } from 'ambient-db/pg'
import { Pool } from 'pg'
import Cursor from 'pg-cursor'
import { afterEach, describe, expect, it } from 'vitest'
import { databaseGate, gate, until } from '../support/gate.ts'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'
import { postgresPassword } from '../support/postgres-server.ts'
import type { Match } from '../support/proxy.ts'
import { failure, useWire, type WireOptions } from './wire.ts'

const wire = useWire()
const question = /^> [QP] select concat_ws/

function define({ pool, ...options }: WireOptions = {}, pipeline = false) {
  const config = { max: 1, ...pool, pipeline } as NonNullable<WireOptions['pool']> // the types of pg lack it
  return wire.define({ resolvable: true, settleTimeout: 200, ...options, pool: config })
}

type Main = ReturnType<typeof define>

function insert(main: Main, id = 1): Promise<unknown> {
  return main.db.query('insert into t values ($1)', [id])
}

async function insertByCursor(main: Main): Promise<void> {
  const cursor = main.db.query(new Cursor('insert into t values (1) returning id'))
  await cursor.read(1)
  await cursor.close()
}

/** What a unit is told whose connection is cut at a message around COMMIT. */
async function loseCommit(main: Main, message: Match = '< C COMMIT', work = () => insert(main)): Promise<AmbientError> {
  wire.proxy.at(message, 'reset')
  return unknown(newContext(work))
}

async function unknown(work: Promise<unknown>): Promise<AmbientError> {
  const error = await failure(work)
  if (isAmbientError(error, 'AMBIENT_COMMIT_UNKNOWN')) return error
  throw new Error('It was to say that nothing is known.', { cause: error })
}

/** The SQL that was sent, in order, the question under a name of its own. */
function sql(): string[] {
  return wire.proxy.traffic.labels.flatMap((label) => {
    const [, text] = /^> [QP] (.*)$/s.exec(label) ?? []
    return text === undefined ? [] : question.test(label) ? '(question)' : text
  })
}

describe('resolve()', () => {
  const moments = [
    ['committed', 'its answer was lost', '< C COMMIT', [1]],
    ['rolled-back', 'it was lost on its way', '> Q COMMIT', []],
  ] as const
  const ways = ['reset', 'end', 'stall'] as const

  for (const pipeline of [false, true]) {
    for (const how of ways) {
      const title = `by ${how}${pipeline ? ', pipelined' : ''}`
      it.each(moments)(`S5 finds a COMMIT %s where %s ${title}`, async (outcome, _, message, rows) => {
        const main = define({}, pipeline)
        wire.proxy.at(message, how)
        const error = await unknown(newContext(() => insert(main)))
        expect(await error.resolve?.()).toBe(outcome)
        expect(await wire.ids()).toEqual(rows)
        expect(await error.resolve?.()).toBe(outcome)
        await until(() => wire.proxy.open === 0, 'the end of its connection')
      })
    }
  }

  it.each([
    ['commit()', (main: Main) => newContext(() => insert(main).then(main.commit))],
    ['closeSession()', (main: Main) => newContext(() => insert(main).then(() => main.closeSession('commit')))],
    ['atomic()', (main: Main) => newContext(() => main.atomic(() => insert(main)))],
    ['a block with a time limit', (main: Main) => newContext(() => main.atomic(() => insert(main), { timeout: 9999 }))],
    ['newSession()', (main: Main) => main.newSession(({ db }) => db.query('insert into t values (1)'))],
    ['a savepoint', (main: Main) => newContext(() => main.session().savepoint(() => insert(main)))],
    [
      'a savepoint that alone has written',
      (main: Main) =>
        newContext(async () => {
          await main.db.query('select 1')
          await main.session().savepoint(() => insert(main))
        }),
    ],
    [
      'a hook that alone has written',
      (main: Main) =>
        newContext(async () => {
          main.beforeCommit(() => insert(main))
          await main.db.query('select 1')
        }),
    ],
    ['a cursor that alone has written', (main: Main) => newContext(() => insertByCursor(main))],
  ])('S5 finds what was committed by %s', async (_, unit) => {
    const main = define()
    wire.proxy.at('< C COMMIT', 'reset')
    const error = await unknown(unit(main))
    expect(await error.resolve?.()).toBe('committed')
    expect(await wire.ids()).toEqual([1])
  })

  it.each([
    ['statement', insert],
    ['cursor', insertByCursor],
  ])('S5 finds what a hook of another database wrote after the question by a %s', async (_, write) => {
    const [one, two] = [define({ name: 'one' }), define({ name: 'two' })]
    wire.proxy.at('< C COMMIT', 'reset')
    const error = await unknown(
      newContext(async () => {
        two.beforeCommit(() => write(one))
        await one.db.query('select 1')
        await two.db.query('select 1')
      }),
    )
    expect(error.database).toBe('one')
    expect(sql().filter((text) => text === '(question)')).toHaveLength(3)
    expect(await error.resolve?.()).toBe('committed')
  })

  it('C6 is that of the cause of AMBIENT_PARTIAL_COMMIT', async () => {
    const [one, two] = [define({ name: 'one' }), define({ name: 'two' })]
    wire.proxy.at('< C COMMIT', ({ bytes }) => bytes)
    wire.proxy.at('< C COMMIT', 'reset')
    const error = await failure(newContext(() => Promise.all([insert(one, 1), insert(two, 2)])))
    expect(error).toMatchObject({ code: 'AMBIENT_PARTIAL_COMMIT', databases: { committed: ['one'], unknown: ['two'] } })
    expect('resolve' in error).toBe(false)
    expect(await (error.cause as AmbientError).resolve?.()).toBe('committed')
    expect(await wire.ids()).toEqual([1, 2])
  })

  it('S5 waits for a backend that is still committing though its client is gone, and then tells the truth', async () => {
    const main = define()
    await wire.database.witness.rows('create table held (ok boolean)')
    for (const ok of [true, false]) {
      const held = await databaseGate(wire.database.url)
      await wire.database.witness.rows(`
        drop function if exists hold cascade;
        create function hold() returns trigger language plpgsql as $$ begin
          perform (${held.sql}); if not new.ok then raise 'refused'; end if; return null; end $$;
        create constraint trigger held after insert on held initially deferred for each row execute function hold()`)
      wire.proxy.at('> Q COMMIT', 'reset', { when: 'after' })
      const error = await unknown(newContext(() => main.db.query('insert into held values ($1)', [ok])))
      expect(await error.resolve?.({ timeout: 300 })).toBe('unknown')
      const resolved = error.resolve?.()
      const first = await Promise.race([resolved, sleep(300, 'still waiting')])
      expect(first).toBe('still waiting')
      await held.open()
      expect(await resolved).toBe(ok ? 'committed' : 'rolled-back')
    }
    expect(await wire.database.witness.rows('select ok from held')).toEqual([{ ok: true }])
  })

  it.each(['reset', 'end', 'stall'] as const)(
    'S5 says unknown when the server stays away (%s), and the truth when it is back',
    async (how) => {
      const main = define()
      const error = await loseCommit(main)
      const away = wire.proxy.at('> startup', how, { times: Number.POSITIVE_INFINITY })
      const startedAt = performance.now()
      expect(await error.resolve?.({ timeout: 400 })).toBe('unknown')
      expect(performance.now() - startedAt).toBeLessThan(3000)
      expect(away.count).toBeGreaterThan(0)
      await until(() => wire.proxy.open === 0, 'the end of its connections')
      const resolved = error.resolve?.()
      const tries = away.count
      await until(() => away.count > tries, 'another try')
      away.remove()
      if (how === 'stall') wire.proxy.cut('reset')
      expect(await resolved).toBe('committed')
    },
  )

  it('S5 asks by a connection of its own: a full pool does not keep it waiting', async () => {
    const main = define()
    const error = await loseCommit(main)
    const leave = gate()
    const other = newContext(async () => {
      await main.db.query('select 1')
      await leave.passed
    })
    await until(async () => (await main.connect()).totalCount === 1, 'the pool to be full')
    expect(await error.resolve?.()).toBe('committed')
    expect((await main.connect()).totalCount).toBe(1)
    leave.open()
    await other
  })

  it('S5 changes nothing: the session goes on, no hook runs, and COMMIT is sent once', async () => {
    const hooks: string[] = []
    const main = define({ hooks: { afterCommit: () => hooks.push('all') } })
    await newContext(async () => {
      main.afterCommit(() => hooks.push('commit'))
      main.afterRollback(() => hooks.push('rollback'))
      await insert(main)
      wire.proxy.at('< C COMMIT', 'reset')
      const error = await unknown(main.commit())
      await insert(main, 2)
      const session = main.session()
      expect(await error.resolve?.()).toBe('committed')
      expect([main.session() === session, session.inTransaction]).toEqual([true, true])
      expect(hooks).toEqual([])
      await main.rollback()
    })
    expect(hooks).toEqual([])
    expect(sql().filter((text) => text === 'COMMIT')).toHaveLength(1)
    expect(await wire.ids()).toEqual([1])
  })

  it('D4 answers after shutdown(), by one transaction: a pooler may send what is alone to several servers', async () => {
    const main = define()
    const error = await loseCommit(main)
    await main.shutdown()
    wire.proxy.reset()
    expect(await error.resolve?.()).toBe('committed')
    expect(sql()[0]).toBe('begin')
    await until(() => wire.proxy.open === 0, 'the end of its connection')
  })

  it('is bounded by a number of milliseconds', async () => {
    const error = await loseCommit(define())
    for (const timeout of [Number.NaN, Number.POSITIVE_INFINITY, '5'] as number[]) {
      expect(await failure(error.resolve?.({ timeout }) as Promise<unknown>)).toMatchObject({
        code: 'AMBIENT_INVALID_ARGUMENT',
      })
    }
    for (const timeout of [0, -1]) expect(await error.resolve?.({ timeout })).toMatch(/^(?:unknown|committed)$/)
  })

  it('D5 is no part of what is shown or sent of the error, which holds no secret', async () => {
    const error = await loseCommit(define())
    expect(Object.keys(error)).not.toContain('resolve')
    expect(JSON.parse(JSON.stringify(error))).toMatchObject({ code: 'AMBIENT_COMMIT_UNKNOWN', outcome: 'unknown' })
    expect(structuredClone(error)).toMatchObject({ message: error.message })
    for (const text of [inspect(error, { depth: 20, showHidden: true }), JSON.stringify(error)]) {
      expect(text).not.toContain(postgresPassword)
    }
  })
})

describe('resolve() cannot tell', () => {
  it.each([
    ['without the option', { resolvable: false }],
    ['without the option, which is the default', { resolvable: undefined }],
  ])('S5 %s, and asks nobody', async (_, options) => {
    const error = await loseCommit(define(options))
    const { connections } = wire.proxy.traffic
    expect(await error.resolve?.()).toBe('unknown')
    expect(wire.proxy.traffic.connections).toBe(connections)
    expect(await wire.ids()).toEqual([1])
  })

  it('S5 of a transaction so old that the server has forgotten it', async () => {
    const error = await loseCommit(define())
    const forgotten = Buffer.from([0x44, 0, 0, 0, 10, 0, 1, 0xff, 0xff, 0xff, 0xff]) // one column, null: what it says after a million more
    const trap = wire.proxy.at(
      ({ label, bytes }) => label === '< D' && bytes.includes('committed'),
      () => forgotten,
    )
    expect(await error.resolve?.()).toBe('unknown')
    expect(trap.count).toBe(1)
    expect(await error.resolve?.()).toBe('committed')
  })

  it('S5 of a transaction that has written nothing, which may have notified others all the same', async () => {
    const main = define()
    const listener = new Pool({ connectionString: wire.database.url, max: 1 })
    try {
      const client = await listener.connect()
      const heard: (string | undefined)[] = []
      client.on('notification', ({ payload }) => heard.push(payload))
      await client.query('listen news')
      const notify = (text: string) => () => main.db.query("select pg_notify('news', $1)", [text])
      const answers = [
        await loseCommit(main, '< C COMMIT', notify('kept')),
        await loseCommit(main, '> Q COMMIT', notify('lost')),
        await loseCommit(main, '< C COMMIT', () => main.db.query('select 1')),
      ].map((error) => error.resolve?.())
      expect(await Promise.all(answers)).toEqual(['unknown', 'unknown', 'unknown'])
      await client.query('select 1')
      expect(heard).toEqual(['kept'])
      client.release()
    } finally {
      await listener.end()
    }
  })
})

describe('the question', () => {
  /** Round trips and statements of a unit on a pool that is connected. */
  async function cost(main: Main, unit: () => Promise<unknown>): Promise<{ roundTrips: number; sent: string[] }> {
    await newContext(() => main.db.query('select 1'))
    wire.proxy.reset()
    await unit()
    return { roundTrips: wire.proxy.traffic.roundTrips, sent: sql() }
  }
  const text = 'insert into t values ($1)'

  it.each([
    [3, 'without the option', false, false, ['BEGIN', text, 'COMMIT']],
    [2, 'without the option, pipelined', false, true, ['BEGIN', text, 'COMMIT']],
    [4, 'with the option', true, false, ['BEGIN', text, '(question)', 'COMMIT']],
    [
      2,
      'with the option, pipelined: it travels with the statement',
      true,
      true,
      ['BEGIN', text, '(question)', 'COMMIT'],
    ],
  ] as const)('S8 makes one insert cost %i round trips %s', async (roundTrips, _, resolvable, pipeline, sent) => {
    const main = define({ resolvable }, pipeline)
    expect(await cost(main, () => newContext(() => insert(main)))).toEqual({ roundTrips, sent })
  })

  it.each([false, true])('S8 is not put by a read-only transaction (pipelined: %s)', async (pipeline) => {
    const main = define({ transaction: { readOnly: true } }, pipeline)
    const select = () => newContext(() => main.db.query('select 1'))
    expect(await cost(main, select)).toEqual({ roundTrips: 3, sent: ['BEGIN READ ONLY', 'select 1', 'COMMIT'] })
  })

  it.each([false, true])('S8 gives no id to a transaction that only reads (pipelined: %s)', async (pipeline) => {
    const main = define({}, pipeline)
    const id = async () => (await wire.database.witness.rows('select pg_current_xact_id()::text as id'))[0]?.id
    const asked = pipeline ? ['(question)', '(question)'] : ['(question)']
    // The ids are those of the whole server, of which other tests may take some meanwhile: it is shown as soon as none did.
    let taken: number
    let attempts = 0
    do {
      const before = Number(await id())
      const { sent } = await cost(main, () => newContext(() => main.db.query('select 1')))
      expect(sent).toEqual(['BEGIN', 'select 1', ...asked, 'COMMIT'])
      taken = Number(await id()) - before
    } while (taken > 1 && ++attempts < 100)
    expect(taken).toBe(1) // by the witness
  })

  it('S8 is not put again once the transaction has an id, nor by statements without a transaction', async () => {
    const main = define({}, true)
    const two = () => newContext(() => insert(main, 2).then(() => insert(main, 3)))
    expect((await cost(main, two)).sent).toEqual(['BEGIN', text, '(question)', text, 'COMMIT'])
    const alone = () => newContext(() => insert(main, 4), { transaction: 'autocommit' })
    expect((await cost(main, alone)).sent).toEqual([text])
  })

  it('S5 is answered before anything else is sent, also where it is pipelined', async () => {
    const main = define({ settleTimeout: 10_000 }, true)
    const hold = gate()
    const answer = wire.proxy.at('< T', hold) // of the question, behind the answer to the statement
    const work = newContext(async () => {
      await insert(main)
      await insert(main, 2)
    })
    await answer.caught
    await wire.ids()
    expect(sql()).toEqual(['BEGIN', text, '(question)'])
    hold.open()
    await work
    expect(sql()).toEqual(['BEGIN', text, '(question)', text, 'COMMIT'])
  })

  it.each([
    ['reset', false],
    ['reset', true],
    ['stall', false],
  ] as const)('S4 rolls back when the connection is lost at it (%s, pipelined: %s)', async (how, pipeline) => {
    const main = define({}, pipeline)
    const hooks: string[] = []
    wire.proxy.at(pipeline ? '< D' : question, how) // what it is answered with, behind the answer to the statement
    const unit = newContext(async () => {
      main.afterCommit(() => hooks.push('commit'))
      main.afterRollback(() => hooks.push('rollback'))
      await insert(main)
    })
    const error = await failure(unit)
    expect(error).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', cause: expect.any(Error) })
    const { cleanupErrors = [] } = error as { cleanupErrors?: unknown[] }
    if (how === 'stall') expect(cleanupErrors[0]).toBe(error.cause) // nothing more is asked of that connection
    expect(sql()).not.toContain('COMMIT')
    expect(hooks).toEqual(['rollback'])
    expect(await wire.ids()).toEqual([])
    await newContext(() => main.db.query('select 1'))
  })

  it('S4 rolls back when the server refuses it', async () => {
    const main = define()
    wire.proxy.at(question, ({ bytes }) =>
      Buffer.from(bytes.toString('latin1').replace('concat_ws', 'concat_xx'), 'latin1'),
    )
    expect(await failure(newContext(() => insert(main)))).toMatchObject({
      code: 'AMBIENT_TRANSACTION_ABORTED',
      outcome: 'rolled-back',
      message: expect.stringContaining('`resolvable`'),
      cause: { code: '42883' },
    })
    expect(sql()).toEqual(['BEGIN', text, '(question)', 'ROLLBACK'])
    expect(await wire.ids()).toEqual([])
    await newContext(() => insert(main))
    expect(await wire.ids()).toEqual([1])
    expect(wire.proxy.traffic.connections).toBe(1)
  })

  it('A5 is part of what is run again after a conflict, which any statement may be told of', async () => {
    const main = define()
    const conflict = Buffer.from("do $$ begin raise sqlstate '40001'; end $$\0")
    const header = Buffer.from([0x51, 0, 0, 0, conflict.length + 4])
    wire.proxy.at(question, () => Buffer.concat([header, conflict]))
    let attempts = 0
    await newContext(() => main.atomic(() => insert(main, ++attempts), { retry: { attempts: 2 } }))
    expect(await wire.ids()).toEqual([2])
  })

  it('C6 is put to all databases before the first of them commits', async () => {
    const [one, two] = [define({ name: 'one' }), define({ name: 'two' })]
    let asked = 0
    wire.proxy.at(({ label }) => question.test(label) && ++asked === 2, 'reset')
    const error = await failure(newContext(() => Promise.all([insert(one, 1), insert(two, 2)])))
    expect(error).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', database: 'two' })
    expect(sql()).not.toContain('COMMIT')
    expect(await wire.ids()).toEqual([])
  })

  it.each(['context', 'block'])(
    'C8 sends no COMMIT when the signal of the %s fires while it is under way',
    async (what) => {
      const main = define()
      const controller = new AbortController()
      const { signal } = controller
      const trap = wire.proxy.at(question, { stall: 50 })
      void trap.caught.then(() => controller.abort())
      const unit =
        what === 'context'
          ? newContext(() => insert(main), { signal })
          : newContext(() => main.atomic(() => insert(main), { signal }))
      expect(await failure(unit)).toMatchObject({ code: 'AMBIENT_ABORTED' })
      expect(sql()).not.toContain('COMMIT')
      expect(await wire.ids()).toEqual([])
      await newContext(() => main.db.query('select 1'))
    },
  )

  it('S8 of a statement that failed is no failure of its own', async () => {
    const main = define({}, true)
    await newContext(async () => {
      await main.db.query('select 1')
      await main
        .session()
        .savepoint(() => main.db.query('select * from missing'))
        .catch(() => {})
      await insert(main)
      wire.proxy.at('< C COMMIT', 'reset')
      const error = await unknown(main.commit())
      expect(await error.resolve?.()).toBe('committed')
    })
    expect(wire.warnings).toEqual([])
  })
})

describe('the host that is asked', () => {
  let west: TestDatabase | undefined
  const defined: AmbientDatabase<unknown, unknown>[] = []
  afterEach(async () => {
    await Promise.all(defined.splice(0).map(({ shutdown }) => shutdown()))
    await west?.drop()
  })

  it('D3 is the one where COMMIT was sent, also once its engine is closed', async () => {
    west = await createDatabase()
    const urls: Record<string, string> = { east: wire.proxy.url, west: west.url }
    const pools: Pool[] = []
    const adapter = pgAdapter((host) => {
      const pool = new Pool({ connectionString: urls[host] })
      pools.push(pool)
      return pool
    })
    const main = defineDatabase({ name: 'main', host: 'east', resolvable: true, adapter })
    defined.push(main)
    const error = await loseCommit(main)
    await main.changeHost('west')
    await until(() => pools[0]?.ended === true, 'the old engine to be closed')
    const { connections } = wire.proxy.traffic
    expect(await error.resolve?.()).toBe('committed')
    expect(wire.proxy.traffic.connections).toBe(connections + 1)
    expect(pools[1]?.totalCount).toBe(0)
  })
})
