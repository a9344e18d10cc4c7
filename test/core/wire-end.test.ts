import { defineDatabase, isAmbientError, newContext } from 'ambient-db'
import { pgAdapter } from 'ambient-db/pg'
import { Pool } from 'pg'
import { describe, expect, it } from 'vitest'
import { gate, until } from '../support/gate.ts'
import { failure, useWire } from './wire.ts'

type Main = ReturnType<typeof wire.define>

const wire = useWire()

/** Commits sent so far. */
function commits(): number {
  return wire.proxy.traffic.labels.filter((label) => label === '> Q COMMIT').length
}

/** Statements are still possible on a pool of `max` connections, on all of them at once. */
async function expectFullPool(pool: Pool, max: number): Promise<void> {
  const clients = await Promise.all(Array.from({ length: max }, () => pool.connect()))
  for (const client of clients) {
    expect((await client.query('select 1 as n')).rows).toEqual([{ n: 1 }])
    expect(client.getTransactionStatus()).toBe('I')
    client.release()
  }
}

describe('S4', () => {
  it('S4 refuses statements unsent and rejects the commit after the connection was lost', async () => {
    const main = wire.define()
    const error = await failure(
      newContext(async () => {
        await main.db.query('insert into t values (1)')
        const [backend] = await wire.backends()
        await wire.kill(backend!.pid)
        await until(() => wire.proxy.open === 0, 'the end of the connection')
        await until(async () => isAmbientError(await failure(main.db.query('select 1'))), 'the loss to be known')
        wire.proxy.reset()
        expect(await failure(main.db.query('insert into t values (2)'))).toMatchObject({
          code: 'AMBIENT_TRANSACTION_ABORTED',
          cause: { code: '57P01' },
        })
        expect(await failure(main.commit())).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED' })
        expect(wire.proxy.traffic.sent).toBe(0)
      }),
    )
    expect(error).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', database: 'main', cause: { code: '57P01' } })
    expect(commits()).toBe(0)
    expect(await wire.ids()).toEqual([])
  })

  it('S4 opens a new transaction on another connection once the lost one was rolled back', async () => {
    const main = wire.define({ pool: { max: 1 } })
    await newContext(async () => {
      await main.db.query('insert into t values (1)')
      wire.proxy.at('> Q insert', 'reset')
      expect(await failure(main.db.query('insert into t values (2)'))).toMatchObject({ code: 'ECONNRESET' })
      expect(await failure(main.db.query('insert into t values (3)'))).toMatchObject({
        code: 'AMBIENT_TRANSACTION_ABORTED',
        cause: { code: 'ECONNRESET' },
      })
      await main.rollback()
      await main.db.query('insert into t values (4)')
    })
    expect(await wire.ids()).toEqual([4])
  })

  it('S4 does not let a savepoint hide that the connection was lost', async () => {
    const main = wire.define()
    const error = await failure(
      newContext(async () => {
        await main.db.query('insert into t values (1)')
        await main
          .session()
          .savepoint(async () => {
            wire.proxy.at('> Q insert', 'reset')
            await main.db.query('insert into t values (2)')
          })
          .catch(() => {})
      }),
    )
    expect(error).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', cause: { code: 'ECONNRESET' } })
    expect(commits()).toBe(0)
  })

  it('S4 rejects with the first error when a failed statement was swallowed', async () => {
    const main = wire.define()
    const error = await failure(
      newContext(async () => {
        await main.db.query('insert into t values (1)')
        await main.db.query('insert into t values (1)').catch(() => {})
        await main.db.query('select 1').catch(() => {})
      }),
    )
    expect(error).toMatchObject({
      code: 'AMBIENT_TRANSACTION_ABORTED',
      outcome: 'rolled-back',
      cause: { code: '23505' },
    })
    expect(wire.proxy.traffic.labels).not.toContain('> Q select 1')
    expect(await wire.ids()).toEqual([])
  })

  it('S4 rejects when the server answered COMMIT with ROLLBACK', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const text = Buffer.from('ROLLBACK\0')
    wire.proxy.at('> Q COMMIT', () => Buffer.concat([Buffer.from([0x51, 0, 0, 0, text.length + 4]), text]))
    const hooks: string[] = []
    const error = await failure(
      newContext(async () => {
        main.afterCommit(() => hooks.push('commit'))
        main.afterRollback(() => hooks.push('rollback'))
        await main.db.query('insert into t values (1)')
      }),
    )
    expect(error).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', outcome: 'rolled-back' })
    expect(hooks).toEqual(['rollback'])
    expect(await wire.ids()).toEqual([])
    await expectFullPool(await main.connect(), 1)
  })

  it('C6 says which outcome is unknown when the answer to a later COMMIT is lost', async () => {
    const [one, two, three] = ['one', 'two', 'three'].map((name) => wire.define({ name })) as [Main, Main, Main]
    const hooks: string[] = []
    wire.proxy.at('< C COMMIT', ({ bytes }) => bytes)
    wire.proxy.at('< C COMMIT', 'reset')
    const work = newContext(async () => {
      for (const [id, main] of [one, two, three].entries()) {
        main.afterCommit(() => hooks.push(`${main.name} committed`))
        main.afterRollback(() => hooks.push(`${main.name} rolled back`))
        await main.db.query('insert into t values ($1)', [id])
      }
    })
    expect(await failure(work)).toMatchObject({
      code: 'AMBIENT_PARTIAL_COMMIT',
      outcome: 'partial',
      message: expect.stringMatching(/Committed: 'one'\. Not committed: 'three', 'two'\./),
      databases: { committed: ['one'], rolledBack: ['three'], unknown: ['two'] },
      cause: { code: 'AMBIENT_COMMIT_UNKNOWN', database: 'two' },
    })
    expect(hooks).toEqual(['one committed', 'three rolled back'])
    expect(await wire.ids()).toEqual([0, 1])
  })

  it('S4 loses no pool slot when the connection is lost between two COMMITs', async () => {
    const [one, two] = [wire.define({ name: 'one' }), wire.define({ name: 'two', pool: { max: 1 } })]
    const hold = gate()
    const work = newContext(async () => {
      await two.db.query('insert into t values (2)')
      const [backend] = await wire.backends()
      await one.db.query('insert into t values (1)')
      const held = wire.proxy.at('< C COMMIT', hold)
      void held.caught.then(async () => {
        await wire.kill(backend!.pid)
        await until(() => wire.proxy.open === 1, 'the end of the connection')
        await new Promise((resolve) => setImmediate(resolve))
        hold.open()
      })
    })
    expect(await failure(work)).toMatchObject({
      code: 'AMBIENT_PARTIAL_COMMIT',
      databases: { committed: ['one'], rolledBack: ['two'], unknown: [] },
    })
    expect(await wire.ids()).toEqual([1])
    await expectFullPool(await two.connect(), 1)
  })
})

describe('S5', () => {
  const ways = ['reset', 'end', 'stall'] as const
  const moments = [
    ['before the server gets it', '> Q COMMIT', []],
    ['after the server did it', '< C COMMIT', [1]],
  ] as const

  for (const how of ways) {
    it.each(moments)(`S5 says unknown when COMMIT is lost by ${how} %s`, async (_, message, rows) => {
      const main = wire.define({ pool: { max: 1 }, settleTimeout: 200 })
      const trap = wire.proxy.at(message, how)
      const hooks: string[] = []
      const error = await failure(
        newContext(async () => {
          main.afterCommit(() => hooks.push('commit'))
          main.afterRollback(() => hooks.push('rollback'))
          await main.db.query('insert into t values (1)')
        }),
      )
      expect(error).toMatchObject({
        code: 'AMBIENT_COMMIT_UNKNOWN',
        outcome: 'unknown',
        database: 'main',
        cause: expect.any(Error),
      })
      expect(trap.count).toBe(1)
      expect(commits()).toBe(1) // never retried
      expect(hooks).toEqual([])
      await until(async () => (await wire.backends()).length === 0, 'the connection to be destroyed')
      expect(await wire.ids()).toEqual(rows)
      await expectFullPool(await main.connect(), 1)
    })
  }

  it('S5 says unknown by hand and in a block, and goes on with a new transaction', async () => {
    const main = wire.define({ pool: { max: 1 } })
    wire.proxy.at('< C COMMIT', 'reset', { times: 2 })
    await newContext(async () => {
      await main.db.query('insert into t values (1)')
      expect(await failure(main.commit())).toMatchObject({ code: 'AMBIENT_COMMIT_UNKNOWN', outcome: 'unknown' })
      const block = main.atomic(() => main.db.query('insert into t values (2)'), { retry: { attempts: 3 } })
      expect(await failure(block)).toMatchObject({ code: 'AMBIENT_COMMIT_UNKNOWN', outcome: 'unknown' })
      await main.db.query('insert into t values (3)')
    })
    expect(await wire.ids()).toEqual([1, 2, 3])
    expect(commits()).toBe(3)
  })

  it('S5 says unknown when the server goes away at COMMIT with a FATAL of its own', async () => {
    const main = wire.define()
    const hold = gate()
    const trap = wire.proxy.at('> Q COMMIT', hold)
    const work = failure(newContext(() => main.db.query('insert into t values (1)')))
    await trap.caught
    const [backend] = await wire.backends()
    await wire.kill(backend!.pid)
    expect(await work).toMatchObject({ code: 'AMBIENT_COMMIT_UNKNOWN', cause: { code: '57P01' } })
    expect(await wire.ids()).toEqual([])
  })

  it('S5 passes the refusal of COMMIT by a deferred constraint through, with its SQLSTATE', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const hooks: string[] = []
    const error = await failure(
      newContext(async () => {
        main.afterCommit(() => hooks.push('commit'))
        main.afterRollback(() => hooks.push('rollback'))
        await main.db.query('insert into c values (1), (1)')
        await main.db.query('insert into t values (1)')
      }),
    )
    expect(error).toMatchObject({ name: 'error', code: '23505', severity: 'ERROR' })
    expect(isAmbientError(error)).toBe(false)
    expect(hooks).toEqual(['rollback'])
    expect(commits()).toBe(1)
    expect(await wire.ids()).toEqual([])
    await expectFullPool(await main.connect(), 1)
    expect(wire.proxy.traffic.connections).toBe(1) // shown clean by an answered ROLLBACK, so it was kept
  })

  it('S5 knows that nothing was committed when the backend was killed before COMMIT', async () => {
    const main = wire.define()
    const error = await failure(
      newContext(async () => {
        await main.db.query('insert into t values (1)')
        const [backend] = await wire.backends()
        await wire.kill(backend!.pid)
        await until(() => wire.proxy.open === 0, 'the end of the connection')
      }),
    )
    expect(error).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', cause: { code: '57P01' } })
    expect(commits()).toBe(0)
    expect(await wire.ids()).toEqual([])
  })
})

describe('S7', () => {
  const ways = ['reset', 'end', 'stall'] as const

  it.each(ways)('S7 destroys a connection whose BEGIN got no answer (%s)', async (how) => {
    const main = wire.define({ pool: { max: 1 }, acquireTimeout: 200 })
    wire.proxy.at('< C BEGIN', how)
    const error = await failure(newContext(() => main.db.query('insert into t values (1)')))
    if (how === 'stall') expect(error).toMatchObject({ code: 'AMBIENT_ACQUIRE_TIMEOUT', statusCode: 503 })
    else expect(isAmbientError(error)).toBe(false)
    expect(wire.proxy.traffic.labels.filter((label) => label.startsWith('> Q'))).toEqual(['> Q BEGIN'])
    await until(async () => (await wire.backends()).length === 0, 'the connection to be destroyed')
    await expectFullPool(await main.connect(), 1)
    expect(wire.proxy.traffic.connections).toBe(2)
    expect(wire.warnings).toEqual([])
  })

  it('S7 keeps a connection whose BEGIN the server refused, once it is shown clean', async () => {
    const main = wire.define({ pool: { max: 1 } })
    wire.proxy.at('> Q BEGIN', ({ bytes }) => Buffer.from(bytes.toString().replace('BEGIN', 'BEGUN')))
    await newContext(async () => {
      expect(await failure(main.db.query('insert into t values (1)'))).toMatchObject({ code: '42601' })
      expect(main.session().inTransaction).toBe(false)
      await main.db.query('insert into t values (2)')
    })
    expect(await wire.ids()).toEqual([2])
    expect(wire.proxy.traffic.connections).toBe(1)
    expect(wire.proxy.traffic.labels.filter((label) => label.startsWith('> Q'))).toEqual([
      '> Q BEGIN',
      '> Q ROLLBACK',
      '> Q BEGIN',
      '> Q insert into t values (2)',
      '> Q COMMIT',
    ])
  })

  it.each([
    ['by hand', (main: Main) => main.begin({ isolationLevel: 'serializable', readOnly: true })],
    [
      'by a block',
      (main: Main) => main.atomic(() => main.db.query('select 1'), { isolationLevel: 'serializable', readOnly: true }),
    ],
  ])('A7 lets go of the options of a transaction that could not be begun %s', async (_, begin) => {
    const main = wire.define({ pool: { max: 1 } })
    wire.proxy.at('> Q BEGIN', ({ bytes }) => Buffer.from(bytes.toString().replace('BEGIN', 'BEGUN')))
    await newContext(
      async () => {
        expect(await failure(begin(main))).toMatchObject({ code: '42601' })
        await main.db.query('insert into t values (1)') // on its own
        await main.begin({ isolationLevel: 'repeatable read' })
        await main.db.query('insert into t values (2)')
      },
      { transaction: 'autocommit' },
    )
    expect(await wire.ids()).toEqual([1, 2])
    expect(wire.proxy.traffic.labels.filter((label) => label.startsWith('> Q'))).toEqual([
      '> Q BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY',
      '> Q ROLLBACK',
      '> Q insert into t values (1)',
      '> Q BEGIN ISOLATION LEVEL REPEATABLE READ',
      '> Q insert into t values (2)',
      '> Q COMMIT',
    ])
  })

  it.each(ways)('S7 destroys a connection whose ROLLBACK got no answer (%s), and keeps the error', async (how) => {
    const main = wire.define({ pool: { max: 1 }, settleTimeout: 200 })
    wire.proxy.at('> Q ROLLBACK', how)
    const mine = new Error('mine')
    const error = await failure(
      newContext(async () => {
        await main.db.query('insert into t values (1)')
        throw mine
      }),
    )
    expect(error).toBe(mine)
    expect(error.cleanupErrors).toEqual([expect.any(Error)])
    expect(Object.keys(error)).not.toContain('cleanupErrors')
    await expectFullPool(await main.connect(), 1)
    expect(wire.proxy.traffic.connections).toBe(2)
    await until(async () => (await wire.backends()).length === 1, 'the destroyed connection to end')
    expect(await wire.ids()).toEqual([])
  })

  it('S7 attaches nothing when clean-up succeeds, and keeps the connection', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const mine = new Error('mine')
    const error = await failure(
      newContext(async () => {
        await main.db.query('insert into t values (1)')
        throw mine
      }),
    )
    expect(error).toBe(mine)
    expect(error.cleanupErrors).toBeUndefined()
    await expectFullPool(await main.connect(), 1)
    expect(wire.proxy.traffic.connections).toBe(1)
  })

  it.each(ways)('S7 destroys a connection whose COMMIT got no answer (%s)', async (how) => {
    const main = wire.define({ pool: { max: 1 }, settleTimeout: 200 })
    wire.proxy.at('> Q COMMIT', how)
    await failure(newContext(() => main.db.query('insert into t values (1)')))
    await expectFullPool(await main.connect(), 1)
    expect(wire.proxy.traffic.connections).toBe(2)
    expect(wire.proxy.traffic.labels).not.toContain('> Q ROLLBACK')
    await until(async () => (await wire.backends()).length === 1, 'the destroyed connection to end')
  })

  it('S7 destroys a connection that refuses ROLLBACK', async () => {
    const main = wire.define({ pool: { max: 1 } })
    wire.proxy.at('> Q ROLLBACK', ({ bytes }) => Buffer.from(bytes.toString().replace('ROLLBACK', 'ROLLBANK')))
    const mine = new Error('mine')
    const error = await failure(
      newContext(async () => {
        await main.db.query('insert into t values (1)')
        throw mine
      }),
    )
    expect(error).toBe(mine)
    expect(error.cleanupErrors).toMatchObject([{ code: '42601' }])
    await expectFullPool(await main.connect(), 1)
    expect(wire.proxy.traffic.connections).toBe(2)
  })

  it('S7 keeps the server error of a refused COMMIT when the ROLLBACK behind it fails too', async () => {
    const main = wire.define({ pool: { max: 1 } })
    wire.proxy.at('> Q ROLLBACK', 'reset')
    const error = await failure(newContext(() => main.db.query('insert into c values (1), (1)')))
    expect(error).toMatchObject({ code: '23505', cleanupErrors: [{ code: 'ECONNRESET' }] })
    await expectFullPool(await main.connect(), 1)
  })

  it('S7 destroys a connection whose statement the driver gave up waiting for', async () => {
    const main = wire.define({ pool: { max: 1, query_timeout: 100 }, settleTimeout: 5000 })
    const startedAt = performance.now()
    const error = await failure(newContext(() => main.db.query('select pg_sleep(60)')))
    expect(error.message).toBe('Query read timeout')
    expect(performance.now() - startedAt).toBeLessThan(3000)
    await until(async () => (await wire.backends()).every(({ state }) => state === 'idle'), 'the statement to end')
    await expectFullPool(await main.connect(), 1)
    expect(wire.warnings).toEqual([])
  })
})

it('S7 destroys the connection of a statement without a transaction that the driver gave up waiting for', async () => {
  const main = wire.define({ pool: { max: 1, query_timeout: 500 } })
  await newContext(
    async () => {
      expect((await failure(main.db.query('select pg_sleep(60)'))).message).toBe('Query read timeout')
      expect((await main.connect()).totalCount).toBe(0)
      await main.db.query('insert into t values (1)')
      expect(await failure(main.db.query('select * from missing'))).toMatchObject({ code: '42P01' })
      expect((await main.connect()).idleCount).toBe(1)
    },
    { transaction: 'autocommit' },
  )
  expect(await wire.ids()).toEqual([1])
  expect(wire.proxy.traffic.connections).toBe(2)
})

it('S7 survives an idle connection that dies in the pool', async () => {
  const main = wire.define({ pool: { max: 1 } })
  await newContext(() => main.db.query('insert into t values (1)'))
  wire.proxy.cut('reset')
  await until(async () => (await main.connect()).totalCount === 0, 'the pool to notice')
  await newContext(() => main.db.query('insert into t values (2)'))
  expect(await wire.ids()).toEqual([1, 2])
})

it('D5 names neither password nor connection string when a connection fails', async () => {
  const main = defineDatabase({
    name: 'main',
    adapter: pgAdapter(() => new Pool({ connectionString: wire.proxy.url })),
  })
  wire.proxy.at('> startup', 'reset')
  wire.proxy.at('< C COMMIT', 'reset')
  for (const attempt of [1, 2]) {
    const error = await failure(newContext(() => main.db.query(`insert into t values (${attempt})`)))
    const shown = [error.stack, error.cause, JSON.stringify(error)].map(String).join()
    expect(shown).not.toContain('not-to-be-shown')
  }
  await main.shutdown()
})
