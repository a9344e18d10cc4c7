import { getEventListeners } from 'node:events'
import { newContext, openContext } from 'ambient-db'
import Cursor from 'pg-cursor'
import QueryStream from 'pg-query-stream'
import { describe, expect, it, vi } from 'vitest'
import { gate, until } from '../support/gate.ts'
import { failure, useWire } from './wire.ts'

const wire = useWire()
const forever = 'select pg_sleep(600)'

/** Resolves when the server runs a statement that begins like this. */
function running(sql: string): Promise<void> {
  const runs = async () =>
    (await wire.backends()).some(({ state, query }) => state === 'active' && query.startsWith(sql))
  return until(runs, `the server to run ${sql}`)
}

function count(label: string): number {
  return wire.proxy.traffic.labels.filter((each) => each === label).length
}

/** The statement ended, nothing is open, the pool works and nothing was committed. */
async function expectNothingLeft(main: ReturnType<typeof wire.define>): Promise<void> {
  const busy = async () => (await wire.backends()).filter(({ state }) => state !== 'idle')
  await until(async () => (await busy()).length === 0, 'the server to be idle')
  expect(count('> Q COMMIT')).toBe(0)
  const pool = await main.connect()
  expect(pool.totalCount).toBe(pool.idleCount)
  expect(await wire.ids()).toEqual([])
  await newContext(() => main.db.query('insert into t values (99)'))
  expect(await wire.ids()).toEqual([99])
}

describe('C8 contexts', () => {
  it('C8 cancels the running statement on the server when the signal fires, and rolls back', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const abort = new AbortController()
    const reason = new Error('the client has gone')
    let statement: unknown
    const work = failure(
      newContext(
        async () => {
          await main.db.query('insert into t values (1)')
          await main.db.query(forever).catch((error) => {
            statement = error
            throw error
          })
        },
        { signal: abort.signal },
      ),
    )
    await running(forever)
    abort.abort(reason)
    expect(await work).toMatchObject({ code: 'AMBIENT_ABORTED', outcome: 'rolled-back', cause: reason })
    expect(statement).toMatchObject({ code: '57014' })
    expect(count('> cancel')).toBe(1)
    expect(count('> Q ROLLBACK')).toBe(1)
    expect(wire.proxy.traffic.connections).toBe(2) // the session's and the cancel request's
    await expectNothingLeft(main)
  })

  it('C8 cancels at the deadline', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const error = await failure(
      newContext(
        async () => {
          await main.db.query('insert into t values (1)')
          await main.db.query(forever)
        },
        { timeout: 500 },
      ),
    )
    expect(error).toMatchObject({ code: 'AMBIENT_TIMEOUT', outcome: 'rolled-back' })
    await expectNothingLeft(main)
  })

  it('C8 refuses what an aborted branch issues later', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const later = gate()
    const abort = new AbortController()
    let late: Promise<Error> | undefined
    const error = await failure(
      newContext(
        async () => {
          await main.db.query('insert into t values (1)')
          late = later.passed.then(() => failure(main.db.query('insert into t values (2)')))
          abort.abort()
          await later.passed
        },
        { signal: abort.signal },
      ),
    )
    expect(error).toMatchObject({ code: 'AMBIENT_ABORTED', outcome: 'rolled-back' })
    later.open()
    expect(await late).toMatchObject({ code: 'AMBIENT_CONTEXT_ENDED', cause: error })
    await expectNothingLeft(main)
  })

  it.each(['reset', 'stall'] as const)('C8 destroys the connection when the cancel request fails (%s)', async (how) => {
    const main = wire.define({ pool: { max: 1 } })
    wire.proxy.at('> cancel', how)
    const abort = new AbortController()
    const work = failure(
      newContext(
        async () => {
          await main.db.query('insert into t values (1)')
          await main.db.query(forever)
        },
        { signal: abort.signal },
      ),
    )
    await running(forever)
    abort.abort()
    const error = await work
    expect(error).toMatchObject({ code: 'AMBIENT_ABORTED' })
    expect(error.outcome).toBeUndefined() // the server did not say so
    const [backend] = (await wire.backends()).filter(({ state }) => state === 'active')
    if (backend) await wire.kill(backend.pid) // the server itself notices a lost client only at the end of its statement
    expect((await main.connect()).totalCount).toBe(0)
    await expectNothingLeft(main)
  })

  it('C8 cancels a statement that its first cancel request has overtaken', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const late = gate()
    const trap = wire.proxy.at(`> Q ${forever}`, late)
    const abort = new AbortController()
    const work = failure(
      newContext(
        async () => {
          await main.db.query('insert into t values (1)')
          await main.db.query(forever)
        },
        { signal: abort.signal },
      ),
    )
    await trap.caught
    abort.abort()
    await until(() => count('> cancel') === 1 && wire.proxy.open === 1, 'the cancel request to be dealt with')
    late.open()
    expect(await work).toMatchObject({ code: 'AMBIENT_ABORTED', outcome: 'rolled-back' })
    expect(count('> cancel')).toBeGreaterThan(1)
    await expectNothingLeft(main)
  })

  for (const pipeline of [false, true]) {
    it(`C8 says rolled-back also where the error comes a while before the status behind it${pipeline ? ', pipelined' : ''}`, async () => {
      const main = wire.define({ pool: { max: 1, pipeline } })
      const status = gate()
      const trap = wire.proxy.at('< E 57014', ({ bytes }) => {
        held = wire.proxy.at('< Z', status)
        return bytes
      })
      let held = trap
      const abort = new AbortController()
      const work = failure(newContext(() => main.db.query(forever), { signal: abort.signal }))
      await running(forever)
      abort.abort()
      await trap.caught
      await held.caught
      setTimeout(status.open, 100)
      const error = await work
      expect(error).toMatchObject({ code: 'AMBIENT_ABORTED', outcome: 'rolled-back' })
      expect(error.cleanupErrors).toBeUndefined()
      await expectNothingLeft(main)
    })
  }

  it('C8 destroys the connection when the statement does not heed the cancel request', async () => {
    const main = wire.define({ pool: { max: 1 } })
    wire.proxy.at('< E 57014', 'stall')
    const abort = new AbortController()
    const work = failure(newContext(() => main.db.query(forever), { signal: abort.signal }))
    await running(forever)
    abort.abort()
    const error = await work
    expect(error).toMatchObject({ code: 'AMBIENT_ABORTED' })
    expect(error.outcome).toBeUndefined()
    expect((await main.connect()).totalCount).toBe(0)
    await expectNothingLeft(main)
  })

  it('C8 awaits a COMMIT that was sent when the signal fires, and reports it', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const abort = new AbortController()
    const hold = gate()
    const trap = wire.proxy.at('< C COMMIT', hold)
    const hooks: string[] = []
    const work = newContext(
      async () => {
        main.afterCommit(() => hooks.push('commit'))
        main.afterRollback(() => hooks.push('rollback'))
        await main.db.query('insert into t values (1)')
        return 'done'
      },
      { signal: abort.signal },
    )
    await trap.caught
    abort.abort()
    hold.open()
    expect(await work).toBe('done')
    expect(hooks).toEqual(['commit'])
    expect(count('> cancel')).toBe(0)
    expect(await wire.ids()).toEqual([1])
  })

  it.each([
    ['commit()', (main: ReturnType<typeof wire.define>) => main.commit()],
    ["closeSession('commit')", (main: ReturnType<typeof wire.define>) => main.closeSession('commit')],
    ['a block', (main: ReturnType<typeof wire.define>) => main.atomic(() => {}, { current: 'append' })],
  ])('C8 sends no COMMIT for %s that was called right before the signal fired', async (_, commit) => {
    const main = wire.define({ pool: { max: 1 } })
    const abort = new AbortController()
    let committing: Promise<unknown> = Promise.resolve()
    const work = newContext(
      async () => {
        await main.db.query('insert into t values (1)')
        committing = failure(commit(main))
        abort.abort()
        await committing
      },
      { signal: abort.signal },
    )
    expect(await failure(work)).toMatchObject({ code: 'AMBIENT_ABORTED', outcome: 'rolled-back' })
    expect(await committing).toMatchObject({ code: 'AMBIENT_CONTEXT_ENDED' })
    await expectNothingLeft(main)
  })

  it('C8 awaits a COMMIT that was sent by hand, neither cancels nor disowns it', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const abort = new AbortController()
    const hold = gate()
    const trap = wire.proxy.at('< C COMMIT', hold)
    const hooks: string[] = []
    let committed: Promise<unknown> | undefined
    const work = failure(
      newContext(
        async () => {
          main.afterCommit(() => hooks.push('commit'))
          main.afterRollback(() => hooks.push('rollback'))
          await main.db.query('insert into t values (1)')
          committed = main.commit().then(() => 'committed')
          await committed
          await main.db.query('insert into t values (2)')
        },
        { signal: abort.signal },
      ),
    )
    await trap.caught
    abort.abort()
    await until(() => abort.signal.aborted, 'the abort')
    await new Promise((resolve) => setImmediate(resolve))
    expect(count('> cancel')).toBe(0)
    hold.open()
    expect(await committed).toBe('committed')
    const error = await work
    expect(error).toMatchObject({ code: 'AMBIENT_ABORTED' })
    expect(count('> cancel')).toBe(0)
    expect(hooks).toEqual(['commit'])
    expect(await wire.ids()).toEqual([1])
    const pool = await main.connect()
    expect([pool.totalCount, pool.idleCount]).toEqual([1, 1])
  })

  it('C8 ends a context that waits for a connection, and gives the late one back', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const [holding, release] = [gate(), gate()]
    const holder = newContext(async () => {
      await main.db.query('select 1')
      holding.open()
      await release.passed
    })
    await holding.passed
    const error = await failure(newContext(() => main.db.query('insert into t values (1)'), { timeout: 30 }))
    expect(error).toMatchObject({ code: 'AMBIENT_TIMEOUT' })
    release.open()
    await holder
    await newContext(() => main.db.query('insert into t values (2)'))
    expect(await wire.ids()).toEqual([2])
  })

  it('C8 ends a context while BEGIN is unanswered', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const hold = gate()
    const trap = wire.proxy.at('< C BEGIN', hold)
    const abort = new AbortController()
    const work = failure(newContext(() => main.db.query('insert into t values (1)'), { signal: abort.signal }))
    await trap.caught
    abort.abort()
    const error = await work
    expect(error).toMatchObject({ code: 'AMBIENT_ABORTED' })
    expect(error.outcome).toBeUndefined() // the server did not say so
    hold.open()
    await expectNothingLeft(main)
    expect(wire.proxy.traffic.labels).not.toContain('> Q insert into t values (1)')
  })

  it('C8 sends no cancel request when nothing runs', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const abort = new AbortController()
    const idle = gate()
    const work = failure(
      newContext(
        async () => {
          const cursor = main.db.query(new Cursor('select 1'))
          await cursor.read(1)
          await cursor.close()
          await main.db.query('insert into t values (1)')
          await main.db.query(new QueryStream('select 1')).toArray()
          await main.db.query('select 1')
          idle.open()
          await gate().passed
        },
        { signal: abort.signal },
      ),
    )
    await idle.passed
    abort.abort()
    expect(await work).toMatchObject({ code: 'AMBIENT_ABORTED', outcome: 'rolled-back' })
    expect(count('> cancel')).toBe(0)
    expect(wire.proxy.traffic.connections).toBe(1)
    await expectNothingLeft(main)
  })

  it('C8 cancels a statement without a transaction, and cannot say that it was rolled back', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const abort = new AbortController()
    const work = failure(newContext(() => main.db.query(forever), { signal: abort.signal, transaction: 'autocommit' }))
    await running(forever)
    abort.abort()
    expect(await work).toMatchObject({ code: 'AMBIENT_ABORTED', outcome: undefined })
    expect(count('> cancel')).toBe(1)
    await expectNothingLeft(main)
  })

  it('C8 sends nothing without a transaction on a connection that comes after the end', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const [holding, release] = [gate(), gate()]
    const holder = newContext(async () => {
      await main.db.query('select 1')
      holding.open()
      await release.passed
    })
    await holding.passed
    const late = newContext(() => main.db.query('insert into t values (1)'), { timeout: 30, transaction: 'autocommit' })
    expect(await failure(late)).toMatchObject({ code: 'AMBIENT_TIMEOUT' })
    release.open()
    await holder
    await newContext(() => main.db.query('insert into t values (2)'))
    expect(await wire.ids()).toEqual([2])
    expect(wire.proxy.traffic.labels).not.toContain('> Q insert into t values (1)')
  })
  it.each(['statement', 'stream', 'savepoint', 'hook'] as const)(
    'C8 sends no first %s when the signal fires during its BEGIN',
    async (kind) => {
      const main = wire.define({ pool: { max: 1 } })
      const hold = gate()
      const trap = wire.proxy.at('< C BEGIN', hold)
      const abort = new AbortController()
      const first = (): Promise<unknown> => {
        if (kind === 'stream') return main.db.query(new QueryStream(forever)).toArray()
        if (kind === 'savepoint') return main.session().savepoint(() => main.db.query(forever))
        if (kind === 'statement') return main.db.query(forever)
        main.beforeCommit(() => main.db.query(forever))
        return Promise.resolve()
      }
      const work = failure(newContext(first, { signal: abort.signal }))
      await trap.caught
      abort.abort()
      await until(() => count('> cancel') === 1, 'the cancel request')
      hold.open()
      expect(await work).toMatchObject({ code: 'AMBIENT_ABORTED', outcome: 'rolled-back' })
      expect(wire.proxy.traffic.labels.filter((label) => label.includes(forever))).toEqual([])
      expect(count('> Q ROLLBACK')).toBe(1)
      await expectNothingLeft(main)
    },
  )

  it.each(['commit', 'append', 'savepoint'] as const)(
    'C8 sends no COMMIT of a block (%s) whose last statement is answered before the cancel request',
    async (current) => {
      const main = wire.define({ pool: { max: 1 } })
      const answer = gate()
      const trap = wire.proxy.at('< C INSERT', answer)
      wire.proxy.at('> cancel', answer)
      const abort = new AbortController()
      let block: Promise<unknown> = Promise.resolve()
      const work = failure(
        newContext(
          async () => {
            block = main.atomic(() => main.db.query('insert into t values (1)'), { current })
            await block
          },
          { signal: abort.signal },
        ),
      )
      await trap.caught
      abort.abort()
      answer.open()
      expect(await failure(block)).toMatchObject({ code: 'AMBIENT_CONTEXT_ENDED' })
      expect(await work).toMatchObject({ code: 'AMBIENT_ABORTED', outcome: 'rolled-back' })
      await expectNothingLeft(main)
    },
  )

  it.each([
    ['stream', (sql: string) => new QueryStream(sql)],
    ['cursor', (sql: string) => new Cursor(sql)],
  ] as const)('C8 cancels a %s that the server is still busy with', async (_, make) => {
    const main = wire.define({ pool: { max: 1 } })
    const abort = new AbortController()
    let seen: Promise<Error> | undefined
    const work = failure(
      newContext(
        async () => {
          await main.db.query('insert into t values (1)')
          const rows = main.db.query(make(forever) as Cursor)
          seen = rows instanceof QueryStream ? failure(rows.toArray()) : failure(rows.read(1))
          await seen
          await gate().passed
        },
        { signal: abort.signal },
      ),
    )
    await running(forever)
    abort.abort()
    expect(await work).toMatchObject({ code: 'AMBIENT_ABORTED', outcome: 'rolled-back' })
    expect(await seen).toBeInstanceOf(Error)
    expect(count('> cancel')).toBe(1)
    await expectNothingLeft(main)
  })

  it.each([
    ['stream', (sql: string) => new QueryStream(sql)],
    ['cursor', (sql: string) => new Cursor(sql)],
  ] as const)('C8 keeps a connection in step whose %s is cancelled before it is described', async (_, make) => {
    const main = wire.define({ pool: { max: 1 } })
    const abort = new AbortController()
    const description = gate()
    wire.proxy.at('< T', description)
    const work = failure(
      newContext(
        async () => {
          const rows = main.db.query(make(forever) as Cursor)
          await (rows instanceof QueryStream ? rows.toArray() : rows.read(1))
        },
        { signal: abort.signal },
      ),
    )
    await running(forever)
    abort.abort()
    await until(() => count('> cancel') === 1, 'the cancel request')
    description.open()
    expect(await work).toMatchObject({ code: 'AMBIENT_ABORTED' })
    await expectNothingLeft(main)
    expect(count('> S')).toBe(1)
  })

  it('C8 does nothing for a context that was aborted before it began', async () => {
    const main = wire.define()
    const work = newContext(() => main.db.query('insert into t values (1)'), { signal: AbortSignal.abort() })
    expect(await failure(work)).toMatchObject({ code: 'AMBIENT_ABORTED' })
    expect(wire.proxy.traffic.connections).toBe(0)
  })

  it('C8 rejects the settlement of a context that was aborted', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const abort = new AbortController()
    const context = openContext({ signal: abort.signal })
    await context.run(() => main.db.query('insert into t values (1)'))
    expect(context.signal.aborted).toBe(false)
    abort.abort()
    expect(context.signal.aborted).toBe(true)
    expect(await failure(context.settle('commit'))).toMatchObject({ code: 'AMBIENT_ABORTED', outcome: 'rolled-back' })
    await expectNothingLeft(main)
  })
})

it('C8 sends no COMMIT when the signal fires as soon as the end has begun', async () => {
  const main = wire.define({ pool: { max: 1 } })
  const abort = new AbortController()
  const context = openContext({ signal: abort.signal })
  await context.run(() => main.db.query('insert into t values (1)'))
  const settled = failure(context.settle('commit'))
  abort.abort()
  expect(await settled).toMatchObject({ code: 'AMBIENT_ABORTED', outcome: 'rolled-back' })
  await expectNothingLeft(main)
})

describe('C8 blocks', () => {
  it('C8 cancels the statement of a block at its deadline, and the session goes on', async () => {
    const main = wire.define({ pool: { max: 1 } })
    await newContext(async () => {
      const block = main.atomic(
        async () => {
          await main.db.query('insert into t values (1)')
          await main.db.query(forever)
        },
        { timeout: 500 },
      )
      expect(await failure(block)).toMatchObject({ code: 'AMBIENT_TIMEOUT' })
      expect(count('> cancel')).toBe(1)
      expect(count('> Q COMMIT')).toBe(0)
      await main.db.query('insert into t values (2)')
    })
    expect(await wire.ids()).toEqual([2])
    expect(wire.proxy.traffic.connections).toBe(2)
  })

  it('C8 cancels the statement of a nested block by its signal, and keeps the outer work', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const abort = new AbortController()
    const work = newContext(async () => {
      await main.atomic(async () => {
        await main.db.query('insert into t values (1)')
        const inner = main.atomic(
          async () => {
            await main.db.query('insert into t values (2)')
            await main.db.query(forever)
          },
          { signal: abort.signal },
        )
        expect(await failure(inner)).toMatchObject({ code: 'AMBIENT_ABORTED' })
        await main.db.query('insert into t values (3)')
      })
    })
    await running(forever)
    abort.abort()
    await work
    expect(await wire.ids()).toEqual([1, 3])
  })

  it.each(['commit', 'savepoint', 'join'] as const)(
    'C8 sends nothing of a block (%s) whose signal fires during BEGIN',
    async (current) => {
      const main = wire.define({ pool: { max: 1 } })
      const hold = gate()
      const trap = wire.proxy.at('< C BEGIN', hold)
      const abort = new AbortController()
      const work = failure(
        newContext(() => main.atomic(() => main.db.query(forever), { signal: abort.signal, current })),
      )
      await trap.caught
      abort.abort()
      await until(() => count('> cancel') === 1, 'the cancel request')
      hold.open()
      expect(await work).toMatchObject({ code: 'AMBIENT_ABORTED', outcome: 'rolled-back' })
      expect(wire.proxy.traffic.labels.filter((label) => label.includes(forever))).toEqual([])
      await expectNothingLeft(main)
    },
  )

  it('C8 awaits the COMMIT of a block that was sent when its signal fires', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const abort = new AbortController()
    const hold = gate()
    const trap = wire.proxy.at('< C COMMIT', hold)
    const work = newContext(() =>
      main.atomic(() => main.db.query('insert into t values (1)'), { signal: abort.signal }),
    )
    await trap.caught
    abort.abort()
    hold.open()
    await work
    expect(await wire.ids()).toEqual([1])
  })

  it('C8 ends a block that waits for its turn: it never runs, and the one before it goes on', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const abort = new AbortController()
    const [begun, hold] = [gate(), gate()]
    let ran = false
    await newContext(async () => {
      const first = main.atomic(async () => {
        await main.db.query('insert into t values (1)')
        begun.open()
        await hold.passed
      })
      await begun.passed
      const second = main.atomic(
        () => {
          ran = true
        },
        { signal: abort.signal },
      )
      abort.abort()
      expect(await failure(second)).toMatchObject({ code: 'AMBIENT_ABORTED' })
      hold.open()
      await first
      await main.db.query('insert into t values (2)')
    })
    expect(ran).toBe(false)
    expect(await wire.ids()).toEqual([1, 2])
  })

  it('A6 bounds the join of a block by `settleTimeout`: what is under way is cancelled, and the session goes on', async () => {
    const main = wire.define({ pool: { max: 1 }, settleTimeout: 1000 })
    await newContext(async () => {
      const block = main.atomic(async function careless() {
        await main.db.query('insert into t values (1)')
        void main.db.query(forever)
      })
      expect(await failure(block)).toMatchObject({
        code: 'AMBIENT_SETTLE_TIMEOUT',
        outcome: 'rolled-back',
        database: 'main',
        message: expect.stringContaining("still under way 1000 ms after atomic block 'careless' had ended"),
      })
      expect(count('> cancel')).toBe(1)
      await main.db.query('insert into t values (2)')
    })
    expect(await wire.ids()).toEqual([2])
  })

  it('C8 listens to a signal no longer than what it is for', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const { signal } = new AbortController()
    const listeners = () => getEventListeners(signal, 'abort').length
    await newContext(
      async () => {
        expect(listeners()).toBe(1)
        await main.atomic(
          async () => {
            expect(listeners()).toBe(2)
            await main.db.query('insert into t values (1)')
          },
          { signal },
        )
        expect(listeners()).toBe(1)
        await failure(main.atomic(() => main.db.query('select * from missing'), { signal }))
        expect(listeners()).toBe(1)
      },
      { signal },
    )
    expect(listeners()).toBe(0)
    await failure(newContext(() => main.db.query('select * from missing'), { signal }))
    await main.newSession((session) => session.db.query('select 1'), { signal })
    expect(listeners()).toBe(0)
  })

  it('C8 cancels what the beforeCommit hook of a block waits for, and sends no COMMIT', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const abort = new AbortController()
    await newContext(async () => {
      const block = failure(
        main.atomic(
          async () => {
            await main.db.query('insert into t values (1)')
            main.beforeCommit(() => main.db.query(forever))
          },
          { signal: abort.signal },
        ),
      )
      await running(forever)
      abort.abort()
      expect(await block).toMatchObject({ code: 'AMBIENT_ABORTED', outcome: 'rolled-back' })
      expect(count('> cancel')).toBe(1)
      await main.db.query('insert into t values (2)')
      await main.rollback()
    })
    await expectNothingLeft(main)
  })

  it('C8 ends a block that waits for its next attempt', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const abort = new AbortController()
    const failed = gate()
    const random = vi.spyOn(Math, 'random').mockReturnValue(1e6) // a pause of hours
    try {
      const block = async () => {
        await main.db.query("do $$ begin raise sqlstate '40001'; end $$").catch((error) => {
          failed.open()
          throw error
        })
      }
      const work = failure(newContext(() => main.atomic(block, { signal: abort.signal, retry: { attempts: 3 } })))
      await failed.passed
      await until(() => count('> Q ROLLBACK') === 1, 'the end of the attempt')
      abort.abort()
      expect(await work).toMatchObject({ code: 'AMBIENT_ABORTED', outcome: 'rolled-back' })
    } finally {
      random.mockRestore()
    }
    await expectNothingLeft(main)
  })

  it('C8 never retries a block that was aborted', async () => {
    const main = wire.define({ pool: { max: 1 } })
    let runs = 0
    const work = newContext(() =>
      main.atomic(
        async () => {
          runs++
          await main.db.query(forever)
        },
        { timeout: 50, retry: { attempts: 3 } },
      ),
    )
    expect(await failure(work)).toMatchObject({ code: 'AMBIENT_TIMEOUT' })
    expect(runs).toBe(1)
    await expectNothingLeft(main)
  })
})
