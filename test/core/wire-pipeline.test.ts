import { newContext } from 'ambient-db'
import type { Pool } from 'pg'
import { describe, expect, it } from 'vitest'
import { gate, until } from '../support/gate.ts'
import type { Message } from '../support/proxy.ts'
import { failure, useWire, type WireOptions } from './wire.ts'

const wire = useWire()

function define(options: WireOptions = {}, pipeline = true) {
  const pool = { max: 1, ...options.pool, pipeline } as NonNullable<WireOptions['pool']> // the types of pg lack it
  return wire.define({ ...options, pool })
}

/** The SQL that was sent, in order. */
function sql(): string[] {
  return wire.proxy.traffic.labels.flatMap((label) => /^> [QP] (.*)$/s.exec(label)?.[1] ?? [])
}

/** A BEGIN that the server does not understand. */
function spoil({ bytes }: Message): Buffer {
  return Buffer.from(bytes.toString('latin1').replace('BEGIN', 'BEGUN'), 'latin1')
}

async function expectCleanPool(pool: Pool): Promise<void> {
  const client = await pool.connect()
  expect((await client.query('select 1 as n')).rows).toEqual([{ n: 1 }])
  expect(client.getTransactionStatus()).toBe('I')
  client.release()
}

describe('round trips', () => {
  it.each([
    ['waits', false, 3],
    ['pipelines', true, 2],
  ])('S8 a driver that %s needs %3$i round trips for one insert', async (_, pipeline, roundTrips) => {
    const main = define({}, pipeline)
    await newContext(() => main.db.query('select 1')) // so that the connection is there
    wire.proxy.reset()
    await newContext(() => main.db.query('insert into t values ($1)', [1]))
    expect(sql()).toEqual(['BEGIN', 'insert into t values ($1)', 'COMMIT'])
    expect(wire.proxy.traffic.roundTrips).toBe(roundTrips)
    expect(await wire.ids()).toEqual([1])
  })

  it('S8 sends the first statement without waiting for BEGIN', async () => {
    const main = define()
    const hold = gate()
    wire.proxy.at('< C BEGIN', hold)
    const sent = wire.proxy.at('> Q insert into t values (1)', ({ bytes }) => bytes)
    const work = newContext(() => main.db.query('insert into t values (1)'))
    await sent.caught
    hold.open()
    await work
    expect(await wire.ids()).toEqual([1])
  })

  it.each([
    ['settings', { transaction: { isolationLevel: 'serializable' } }, 'BEGIN ISOLATION LEVEL SERIALIZABLE'],
    ['an afterBegin hook', { hooks: { afterBegin: ({ db }) => db.query("set local app.tenant = '1'") } }, 'BEGIN'],
  ] as [string, WireOptions, string][])('S8 waits for BEGIN with %s', async (_, options, begin) => {
    const main = define(options)
    const trap = wire.proxy.at('> Q BEGIN', spoil)
    expect(await failure(newContext(() => main.db.query('insert into t values (1)')))).toMatchObject({ code: '42601' })
    expect(trap.count).toBe(1)
    expect(sql()[0]).toBe(begin)
    expect(sql()).not.toContain('insert into t values (1)')
    expect(await wire.ids()).toEqual([])
    await newContext(() => main.db.query('insert into t values (2)'))
    expect(await wire.ids()).toEqual([2])
  })

  it('S5 never sends COMMIT behind a statement that is not answered yet', async () => {
    const main = define()
    const hold = gate()
    const trap = wire.proxy.at('< C INSERT', hold)
    const work = newContext(() => {
      void main.db.query('insert into t values (1)').catch(() => {})
    })
    await trap.caught
    await until(() => sql().length >= 2, 'the insert')
    expect(sql()).toEqual(['BEGIN', 'insert into t values (1)'])
    hold.open()
    await work
    expect(sql()).toEqual(['BEGIN', 'insert into t values (1)', 'COMMIT'])
  })
})

describe('a pipelined BEGIN that fails', () => {
  it('S5 is never reported as success: the statement behind it has committed by itself', async () => {
    const main = define()
    wire.proxy.at('> Q BEGIN', spoil)
    const hooks: string[] = []
    const error = await failure(
      newContext(async () => {
        main.afterCommit(() => hooks.push('commit'))
        await main.db.query('insert into t values (1)')
      }),
    )
    expect(error).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', outcome: 'unknown', cause: { code: '42601' } })
    expect(sql()).not.toContain('COMMIT')
    expect(hooks).toEqual([])
    expect(await wire.ids()).toEqual([1]) // which is why the outcome is not called a rollback
    await expectCleanPool(await main.connect())
  })

  it('S5 is not hidden by code that swallows the error', async () => {
    const main = define()
    wire.proxy.at('> Q BEGIN', spoil)
    const error = await failure(
      newContext(async () => {
        await main.db.query('insert into t values (1)').catch(() => {})
        await main.db.query('insert into t values (2)').catch(() => {})
      }),
    )
    expect(error).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', outcome: 'unknown', cause: { code: '42601' } })
    expect(sql()).not.toContain('insert into t values (2)')
    expect(await wire.ids()).toEqual([1])
    await expectCleanPool(await main.connect())
  })

  it('S5 is not hidden by a statement that fails as well', async () => {
    const main = define()
    wire.proxy.at('> Q BEGIN', spoil)
    const error = await failure(
      newContext(async () => {
        await main.db.query('select * from missing').catch(() => {})
        await main.db.query('insert into t values (2)').catch(() => {})
      }),
    )
    expect(error).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED' })
    expect(await wire.ids()).toEqual([])
    await expectCleanPool(await main.connect())
  })

  it('S5 is noticed by a transaction that was begun by hand, at its commit', async () => {
    const main = define()
    wire.proxy.at('> Q BEGIN', spoil)
    await newContext(async () => {
      const error = await failure(
        (async () => {
          await main.begin()
          await main.commit()
        })(),
      )
      expect([error.code, (error.cause as { code?: string } | undefined)?.code]).toContain('42601')
      await main.rollback()
    })
    expect(sql()).not.toContain('COMMIT')
    const pool = await main.connect()
    expect([pool.totalCount, pool.idleCount]).toEqual([1, 1])
    await expectCleanPool(pool)
  })

  it('S5 is noticed by a block and its savepoints', async () => {
    const main = define()
    wire.proxy.at('> Q BEGIN', spoil)
    await newContext(async () => {
      const nested = main.atomic(() => main.atomic(() => main.db.query('insert into t values (1)')))
      expect(await failure(nested)).toMatchObject({ cause: { code: '42601' } })
    })
    expect(await wire.ids()).toEqual([])
    await expectCleanPool(await main.connect())
  })
})

describe('a lost connection', () => {
  it.each(['reset', 'end', 'stall'] as const)(
    'S7 destroys a connection whose COMMIT got no answer (%s)',
    async (how) => {
      const main = define({ settleTimeout: 200 })
      wire.proxy.at('> Q COMMIT', how)
      const error = await failure(newContext(() => main.db.query('insert into t values (1)')))
      expect(error).toMatchObject({ code: 'AMBIENT_COMMIT_UNKNOWN', outcome: 'unknown' })
      await until(async () => (await wire.backends()).length === 0, 'the connection to be destroyed')
      expect(await wire.ids()).toEqual([])
      await expectCleanPool(await main.connect())
    },
  )

  it.each(['reset', 'end', 'stall'] as const)(
    'S7 destroys a connection whose BEGIN got no answer (%s)',
    async (how) => {
      const main = define({ settleTimeout: 200, acquireTimeout: 200 })
      wire.proxy.at('> Q BEGIN', how)
      const work = newContext(() => main.db.query('insert into t values (1)'), { timeout: 1000 })
      expect(await failure(work)).toBeInstanceOf(Error)
      await until(async () => (await wire.backends()).length === 0, 'the connection to be destroyed')
      expect(await wire.ids()).toEqual([])
      await expectCleanPool(await main.connect())
    },
  )

  it('C8 cancels the running statement, and rolls back', async () => {
    const main = define()
    const abort = new AbortController()
    const work = failure(
      newContext(
        async () => {
          await main.db.query('insert into t values (1)')
          await main.db.query('select pg_sleep(600)')
        },
        { signal: abort.signal },
      ),
    )
    const sleeping = async () => (await wire.backends()).some(({ query }) => query === 'select pg_sleep(600)')
    await until(sleeping, 'the statement to run')
    abort.abort()
    expect(await work).toMatchObject({ code: 'AMBIENT_ABORTED', outcome: 'rolled-back' })
    expect(await wire.ids()).toEqual([])
    await expectCleanPool(await main.connect())
  })
})

it('S8 keeps the order of statements that are issued together', async () => {
  const main = define()
  await newContext(async () => {
    const statements = [1, 2, 3].map((id) => `insert into t values (${id})`)
    await Promise.all(statements.map((statement) => main.db.query(statement)))
    expect(sql()).toEqual(['BEGIN', ...statements])
  })
  expect(await wire.ids()).toEqual([1, 2, 3])
})
