import { DatabaseSync } from 'node:sqlite'
import { type AmbientSession, contextSignal, defineDatabase, newContext } from 'ambient-db'
import { kyselyAdapter } from 'ambient-db/kysely'
import { pgAdapter } from 'ambient-db/pg'
import { CompiledQuery, SqliteDialect } from 'kysely'
import { Pool } from 'pg'
import { describe, expect, it } from 'vitest'
import { runChild, sourceUrl } from '../support/child.ts'
import { gate, until } from '../support/gate.ts'
import { forKysely } from '../support/sqlite.ts'
import { failure, useWire } from './wire.ts'

const wire = useWire()
type Main = ReturnType<typeof wire.define>

const forever = () => new Promise<never>(() => {})
const insert = (main: Main, id: number) => main.db.query('insert into t values ($1)', [id])
const sleeping = 'select pg_sleep(60)'

/** No connection is in a transaction, none is missing, and each of them works. */
async function expectIdle(main: Main): Promise<void> {
  const pool = await main.connect()
  expect([pool.totalCount - pool.idleCount, pool.waitingCount]).toEqual([0, 0])
  for (const { transactionStart } of await wire.backends()) expect(transactionStart).toBeNull()
}

function sent(text: string): string[] {
  return wire.proxy.traffic.labels.filter((label) => label.startsWith('> ') && label.includes(text))
}

describe('hooks before the first statement', () => {
  it('D2 S2 gives a `beforeSession` up that does not end within acquireTimeout; the session tries again', async () => {
    let runs = 0
    const main = wire.define({ acquireTimeout: 1000, beforeSession: () => (++runs === 1 ? forever() : undefined) })
    await newContext(async () => {
      const both = await Promise.all([failure(insert(main, 1)), failure(newContext(() => insert(main, 2)))])
      for (const error of both) {
        expect(error).toMatchObject({ code: 'AMBIENT_ACQUIRE_TIMEOUT', database: 'main', statusCode: 503 })
        expect(error.message).toContain('Its `beforeSession` did not end within 1000 ms.')
      }
      expect(main.session().inTransaction).toBe(false)
      await insert(main, 3)
    })
    expect([runs, await wire.ids()]).toEqual([2, [3]])
    await expectIdle(main)
  })

  it('K1 S2 gives an `afterBegin` hook up that does not end within acquireTimeout, and rolls back', async () => {
    let runs = 0
    const go = gate()
    const late: Promise<Error>[] = []
    const afterBegin = async (session: AmbientSession<Pool>) => {
      if (++runs > 1) return
      const first = session.db.query(sleeping)
      const second = session.db.query('select 2')
      late.push(failure(first), failure(second))
      await go.passed
      late.push(failure(session.db.query('select 3')))
    }
    const main = wire.define({
      acquireTimeout: 1000,
      hooks: { afterBegin: (session) => afterBegin(session as AmbientSession<Pool>) },
    })
    await newContext(async () => {
      const error = await failure(insert(main, 1))
      expect(error).toMatchObject({ code: 'AMBIENT_ACQUIRE_TIMEOUT', database: 'main', statusCode: 503 })
      expect(error.message).toContain('Its afterBegin hook did not end within 1000 ms.')
      expect(main.session().inTransaction).toBe(false)
      await expectIdle(main)
      await insert(main, 2)
      go.open()
      await until(() => late.length === 3)
    })
    const [running, queued, later] = await Promise.all(late)
    expect(running).toMatchObject({ code: '57014' })
    expect([queued, later]).toMatchObject(Array(2).fill({ code: 'AMBIENT_BLOCK_ENDED', database: 'main' }))
    expect([sent('select 2'), sent('select 3')]).toEqual([[], []])
    expect(await wire.ids()).toEqual([2])
  })
})

describe('hooks before COMMIT', () => {
  const paths: Record<string, (main: Main, register: () => void) => Promise<unknown>> = {
    'at the end of a context': (main, register) =>
      newContext(async () => {
        await insert(main, 1)
        register()
      }),
    'by `commit()`': (main, register) =>
      newContext(async () => {
        await insert(main, 1)
        register()
        await main.commit()
      }),
    'of a block': (main, register) =>
      newContext(() =>
        main.atomic(async () => {
          await insert(main, 1)
          register()
        }),
      ),
    'of a session beside': (main, register) =>
      main.newSession(async (session) => {
        await session.db.query('insert into t values (1)')
        session.beforeCommit(() => {}) // one that ends
        register()
        await session.commit()
      }),
  }

  for (const [path, commit] of Object.entries(paths)) {
    it(`K1 C4 a hook that does not end within settleTimeout vetoes: ${path}`, async () => {
      const main = wire.define({
        settleTimeout: 1000,
        hooks: { beforeCommit: (session) => hook(session as AmbientSession<Pool>) },
      })
      const go = gate()
      const late: Promise<Error>[] = []
      let hang = false
      const hook = async ({ db }: AmbientSession<Pool>) => {
        if (!hang) return
        late.push(failure(db.query(sleeping)), failure(db.query('select 2')))
        await go.passed
        late.push(failure(db.query('select 3')))
      }
      const error = await failure(
        commit(main, () => {
          hang = true
        }),
      )
      hang = false
      expect(error).toMatchObject({ code: 'AMBIENT_SETTLE_TIMEOUT', database: 'main', outcome: 'rolled-back' })
      expect(error.message).toContain('Its beforeCommit hook did not end within 1000 ms.')
      expect(error.cleanupErrors).toBeUndefined()
      await expectIdle(main)
      go.open()
      await until(() => late.length === 3)
      const [running, queued, later] = await Promise.all(late)
      expect(running).toMatchObject({ code: '57014' })
      for (const each of [queued, later])
        expect(each).toMatchObject({ code: expect.stringMatching(/_(BLOCK|CONTEXT)_ENDED$|_SESSION_CLOSED$/) })
      expect([sent('select 2'), sent('select 3')]).toEqual([[], []])
      expect(await wire.ids()).toEqual([])
    })
  }

  it('K1 names the hook, and the session goes on', async () => {
    const main = wire.define({ settleTimeout: 1000 })
    await newContext(async () => {
      await insert(main, 1)
      main.beforeCommit(function audit() {
        return forever()
      })
      expect((await failure(main.commit())).message).toContain("Its beforeCommit hook 'audit' did not end")
      await insert(main, 2)
    })
    expect(await wire.ids()).toEqual([2])
  })

  it('K1 S7 does not say rolled-back of a hook that took too long where the server did not', async () => {
    const main = wire.define({ settleTimeout: 1000 })
    wire.proxy.at('> Q ROLLBACK', 'stall')
    const error = await failure(
      newContext(async () => {
        await insert(main, 1)
        main.beforeCommit(forever)
      }),
    )
    expect([error.code, error.outcome]).toEqual(['AMBIENT_SETTLE_TIMEOUT', undefined])
    expect((await main.connect()).totalCount).toBe(0)
  })

  it('A3 K1 a hook that its block has left behind cancels nothing of what comes after the block', async () => {
    const main = wire.define({ settleTimeout: 1000 })
    await newContext(async () => {
      const block = main.atomic(
        async () => {
          await insert(main, 1)
          main.beforeCommit(forever)
        },
        { timeout: 200 },
      )
      expect(await failure(block)).toMatchObject({ code: 'AMBIENT_TIMEOUT', outcome: 'rolled-back' })
      await insert(main, 2)
      await main.db.query('select pg_sleep(2)') // past the bound of the hook
    })
    expect(await wire.ids()).toEqual([2])
  })
})

describe('hooks after the end', () => {
  for (const when of ['afterCommit', 'afterRollback'] as const) {
    it(`K2 reports an \`${when}\` hook that does not end within settleTimeout, aborts its context, and runs the next one`, async () => {
      const errors: Error[] = []
      const steps: unknown[] = []
      const main = wire.define({ settleTimeout: 1000, onHookError: (error) => errors.push(error as Error) })
      const go = gate()
      const late: Promise<Error>[] = []
      let signal: AbortSignal | undefined
      const unit = newContext(async () => {
        await insert(main, 1)
        main[when](async function mail() {
          signal = contextSignal()
          await insert(main, 2)
          late.push(failure(main.db.query(sleeping)))
          await go.passed
          late.push(failure(insert(main, 3)))
        })
        main[when](() => steps.push(signal?.reason))
        if (when === 'afterRollback') throw new Error('of the work')
      })
      if (when === 'afterCommit') await unit
      else expect(await failure(unit)).toMatchObject({ message: 'of the work' })
      expect(errors).toMatchObject([{ code: 'AMBIENT_SETTLE_TIMEOUT', database: 'main', outcome: 'rolled-back' }])
      expect(errors[0]?.message).toContain(`Its ${when} hook 'mail' did not end within 1000 ms.`)
      expect(steps).toEqual(errors)
      await expectIdle(main)
      go.open()
      await until(() => late.length === 2)
      expect(await Promise.all(late)).toMatchObject([{ code: '57014' }, { code: 'AMBIENT_CONTEXT_ENDED' }])
      expect(await wire.ids()).toEqual(when === 'afterCommit' ? [1] : [])
    })
  }

  it('K2 S5 reports the unknown outcome of what an `afterCommit` hook has committed when it took too long', async () => {
    const errors: unknown[] = []
    const steps: string[] = []
    const main = wire.define({ settleTimeout: 1000, onHookError: (error) => errors.push(error) })
    await newContext(async () => {
      await insert(main, 1)
      main.afterCommit(async () => {
        await newContext(async () => {
          await insert(main, 2)
          await main.db.query('select pg_sleep(0.3)')
          wire.proxy.at('> Q COMMIT', 'stall')
        })
      })
      main.afterCommit(() => steps.push(`next, behind ${errors.length} errors`))
    })
    expect(errors).toMatchObject([{ code: 'AMBIENT_SETTLE_TIMEOUT' }, { code: 'AMBIENT_COMMIT_UNKNOWN' }])
    expect(steps).toEqual(['next, behind 2 errors'])
  })

  it('K2 bounds the hooks of the database as well', async () => {
    const errors: unknown[] = []
    const hooks = { afterCommit: forever, afterRollback: forever }
    const main = wire.define({ settleTimeout: 500, hooks, onHookError: (error) => errors.push(error) })
    await newContext(() => insert(main, 1))
    await failure(newContext(() => insert(main, 1))) // a duplicate
    expect(errors).toMatchObject([
      { code: 'AMBIENT_SETTLE_TIMEOUT', message: expect.stringContaining('Its afterCommit hook did not end') },
      { code: 'AMBIENT_SETTLE_TIMEOUT', message: expect.stringContaining('Its afterRollback hook did not end') },
    ])
  })
})

describe('the end of an engine', () => {
  it('D4 says what holds the engine open after settleTimeout, and closes it when that lets go', async () => {
    const pool = new Pool({ connectionString: wire.proxy.url, application_name: 'app' })
    const main = defineDatabase({ name: 'main', adapter: pgAdapter(() => pool), settleTimeout: 500 })
    await newContext(() => insert(main, 1))
    const client = await (await main.connect()).connect()
    const error = await failure(main.shutdown())
    expect(error).toMatchObject({ code: 'AMBIENT_SHUT_DOWN', database: 'main' })
    expect(error.message).toContain('The engine was not closed within 500 ms: no session holds a connection of it')
    expect(error.message).toContain('`connect()`')
    client.release()
    await until(() => pool.ended)
    expect(wire.warnings).toEqual([`ambient-db: the shutdown failed: ${error.message}`])
  })

  it('D4 says so of a factory that has not returned', async () => {
    const main = defineDatabase({ name: 'main', adapter: pgAdapter(forever), settleTimeout: 500 })
    void main.connect()
    const error = await failure(main.shutdown())
    expect(error).toMatchObject({ code: 'AMBIENT_SHUT_DOWN' })
    expect(error.message).toContain('its factory has not returned')
  })

  it('D4 is no unhandled rejection where nobody waits for it: the listener of a signal', async () => {
    const script = `
      import { defineDatabase, newContext } from ${JSON.stringify(sourceUrl('src/index.ts'))}
      import { pgAdapter } from ${JSON.stringify(sourceUrl('src/adapters/pg.ts'))}
      import { Pool } from ${JSON.stringify(sourceUrl('node_modules/pg/esm/index.mjs'))}
      const main = defineDatabase({
        name: 'main',
        adapter: pgAdapter(() => new Pool({ connectionString: process.env.TEST_URL })),
        settleTimeout: 100,
      })
      await (await main.connect()).connect() // and never gives it back
      process.once('SIGTERM', main.shutdown)
      process.once('SIGTERM', () => process.once('warning', ({ message }) => {
        console.log(message)
        setImmediate(() => setImmediate(() => process.exit())) // the rest of the shutdown
      }))
      process.kill(process.pid, 'SIGTERM')
    `
    const { status, stdout } = await runChild(script, { env: { TEST_URL: wire.database.url } })
    expect(stdout).toContain(
      "ambient-db: the shutdown failed: Database 'main': The engine was not closed within 100 ms",
    )
    expect(status).toBe(0)
  })

  it('D3 warns of an old engine that is not closed within settleTimeout, and shuts down all the same', async () => {
    const pools: Pool[] = []
    const adapter = pgAdapter((_host) => {
      pools.push(new Pool({ connectionString: wire.proxy.url, application_name: 'app' }))
      return pools.at(-1) as Pool
    })
    const main = defineDatabase({ name: 'main', host: 'one', adapter, settleTimeout: 500 })
    const client = await (await main.connect()).connect()
    await main.changeHost('two')
    await until(() => wire.warnings.length > 0)
    expect(wire.warnings).toEqual([expect.stringContaining('The engine was not closed within 500 ms')])
    await newContext(() => insert(main, 1))
    await main.shutdown()
    client.release()
    await until(() => pools.every(({ ended }) => ended))
  })

  it('D3 gives a new engine up that is not there within acquireTimeout: the old one stays, and another can be made', async () => {
    const making = gate()
    const pools: Pool[] = []
    const adapter = pgAdapter(async (host) => {
      if (host === 'slow') await making.passed
      pools.push(new Pool({ connectionString: wire.proxy.url, application_name: 'app' }))
      return pools.at(-1) as Pool
    })
    const main = defineDatabase({ name: 'main', host: 'one', adapter, acquireTimeout: 1000 })
    await newContext(() => insert(main, 1))
    const error = await failure(main.changeHost('slow'))
    expect(error).toMatchObject({ code: 'AMBIENT_ACQUIRE_TIMEOUT', database: 'main' })
    expect(main.host).toBe('one')
    await newContext(() => insert(main, 2))
    await main.changeHost('two')
    await newContext(() => insert(main, 3))
    making.open()
    await until(() => pools.length === 3 && pools[2]?.ended === true, 'the engine that came too late to be closed')
    await main.shutdown()
    expect([await wire.ids(), pools.map(({ ended }) => ended)]).toEqual([
      [1, 2, 3],
      [true, true, true],
    ])
  })
})

describe('a shutdown that gives up', () => {
  const refused = { code: 'AMBIENT_SHUT_DOWN', database: 'main', statusCode: 503 }

  it('D4 S11 refuses a unit at once that still waits for a connection, and takes none that comes late', async () => {
    const pool = new Pool({ connectionString: wire.proxy.url, application_name: 'app', max: 1 })
    const main = defineDatabase({ name: 'main', adapter: pgAdapter(() => pool), settleTimeout: 500 })
    const client = await (await main.connect()).connect()
    const waiting = failure(newContext(() => insert(main, 1)))
    await until(() => pool.waitingCount === 1)
    const closing = failure(main.shutdown())
    expect(await waiting).toMatchObject({ ...refused, outcome: 'rolled-back' })
    expect(await closing).toMatchObject({ code: 'AMBIENT_SHUT_DOWN' })
    client.release()
    await until(() => wire.proxy.open === 0)
    expect(await wire.ids()).toEqual([])
  })

  it('D4 S11 also one whose connection is on its way', async () => {
    const pool = new Pool({ connectionString: wire.proxy.url, application_name: 'app', max: 1 })
    const main = defineDatabase({ name: 'main', adapter: pgAdapter(() => pool), settleTimeout: 500 })
    const greeting = gate()
    const trap = wire.proxy.at('> startup', greeting)
    const waiting = failure(newContext(() => insert(main, 1)))
    await trap.caught
    const closing = main.shutdown().catch(() => {})
    expect(await waiting).toMatchObject(refused)
    greeting.open()
    await closing
    await until(() => wire.proxy.open === 0)
    expect([await wire.ids(), sent('BEGIN')]).toEqual([[], []])
  })

  it('D4 S13 also one that waits for the only connection, whose holder is aborted', async () => {
    const file = new DatabaseSync(':memory:')
    const adapter = kyselyAdapter<unknown>(() => new SqliteDialect({ database: forKysely(file) }))
    const main = defineDatabase({ name: 'main', adapter, settleTimeout: 300 })
    const select = () => main.db.executeQuery(CompiledQuery.raw('select 1'))
    const held = gate()
    const holder = failure(
      newContext(
        async () => {
          await select()
          held.open()
          await forever()
        },
        { signal: new AbortController().signal },
      ),
    )
    await held.passed
    const waiting = failure(newContext(select))
    await main.shutdown()
    expect(await Promise.all([holder, waiting])).toMatchObject([refused, refused])
  })

  it('D4 D2 also one that waits for its `beforeSession`', async () => {
    const begun = gate()
    const main = defineDatabase({
      name: 'main',
      adapter: pgAdapter(() => new Pool({ connectionString: wire.proxy.url })),
      beforeSession: () => {
        begun.open()
        return forever()
      },
    })
    const waiting = failure(newContext(() => insert(main, 1)))
    await begun.passed
    await main.shutdown()
    expect(await waiting).toMatchObject(refused)
  })
})
