import { channel, subscribe, unsubscribe } from 'node:diagnostics_channel'
import {
  type AmbientDatabase,
  type AmbientEvents,
  type DatabaseOptions,
  defineDatabase,
  newContext,
  openContext,
} from 'ambient-db'
import { pgAdapter } from 'ambient-db/pg'
import { Pool, type PoolClient, type PoolConfig } from 'pg'
import Cursor from 'pg-cursor'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it, vi } from 'vitest'
import { runChild, sourceUrl } from '../support/child.ts'
import { databaseGate, gate, until } from '../support/gate.ts'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'

type Main = AmbientDatabase<Pool, Pool>
/** A message of any channel. */
interface AnyEvent extends Omit<AmbientEvents['ambient-db:session'], 'type' | 'database'> {
  readonly type: AmbientEvents[keyof AmbientEvents]['type']
  readonly database?: string
}

const channels = ['ambient-db:context', 'ambient-db:session', 'ambient-db:transaction'] as const

let database: TestDatabase
const defined: Main[] = []

beforeAll(async () => {
  database = await createDatabase()
  await database.witness.rows(`
    create table notes (id int primary key);
    create table slow (key int);
    create function wait_at_commit() returns trigger language plpgsql as
      $$ begin perform pg_advisory_xact_lock_shared(new.key); return null; end $$;
    create constraint trigger slow_commit after insert on slow deferrable initially deferred
      for each row execute function wait_at_commit()`)
})
afterAll(() => database.drop())
beforeEach(() => database.witness.rows('truncate notes, slow'))
afterEach(async () => {
  await Promise.all(defined.splice(0).map((each) => each.shutdown()))
})

function define(options: Partial<DatabaseOptions<Pool, Pool, PoolClient>> = {}, pool: PoolConfig = {}): Main {
  const adapter = pgAdapter(
    () => new Pool({ connectionString: database.url, application_name: options.name ?? 'main', ...pool }),
  )
  const main = defineDatabase({ name: 'main', adapter, ...options })
  defined.push(main)
  return main
}

function insert(main: Main, id: number): Promise<unknown> {
  return main.db.query('insert into notes (id) values ($1)', [id])
}

/** What is published while `work` runs: the channel and type of each message, and the messages. */
async function record(work: () => Promise<unknown>): Promise<{ steps: string[]; events: AnyEvent[] }> {
  const steps: string[] = []
  const events: AnyEvent[] = []
  const listener = (message: unknown, name: string | symbol) => {
    const event = message as AnyEvent
    steps.push(`${String(name).replace('ambient-db:', '')} ${event.type}`)
    events.push(event)
  }
  for (const name of channels) subscribe(name, listener)
  try {
    await work()
  } finally {
    for (const name of channels) unsubscribe(name, listener)
  }
  return { steps, events }
}

describe('what is published', () => {
  it('O1 publishes every step of a context that commits, with ids, database and durations', async () => {
    const main = define()
    const { steps, events } = await record(() =>
      newContext(async () => {
        await insert(main, 1)
        await insert(main, 2)
      }),
    )
    expect(steps).toEqual([
      'context opened',
      'session opened',
      'session acquired',
      'transaction begun',
      'session statement',
      'session statement',
      'session released',
      'transaction committed',
      'session closed',
      'context committed',
    ])
    const [contextId, sessionId] = [events[0]?.contextId, events[1]?.sessionId]
    expect([typeof contextId, typeof sessionId]).toEqual(['number', 'number'])
    expect(contextId).not.toBe(sessionId)
    for (const event of events) expect(event.contextId).toBe(contextId)
    for (const event of events.slice(1, -1)) expect(event).toMatchObject({ sessionId, database: 'main' })
    for (const event of events) expect(event.error).toBeUndefined()
    const timed = events.filter((event) => event.duration !== undefined)
    expect(timed.map(({ type }) => type)).toEqual([
      'acquired',
      'begun',
      'statement',
      'statement',
      'released',
      'committed',
      'committed',
    ])
  })

  it('O1 measures in milliseconds: the wait for a connection, BEGIN, each statement, the whole', async () => {
    const main = define({}, { max: 1 })
    const wall = await databaseGate(database.url)
    const [holding, release] = [gate(), gate()]
    const holder = newContext(async () => {
      await insert(main, 1)
      holding.open()
      await release.passed
    })
    await holding.passed
    const times = { held: 0, waited: 0, locked: 0 }
    const started = performance.now()
    const { events } = await record(async () => {
      const waiting = newContext(() => main.db.query(wall.sql))
      await until(async () => (await main.connect()).waitingCount === 1)
      const before = performance.now()
      while (performance.now() - before < 20) await new Promise((resolve) => setImmediate(resolve))
      times.waited = performance.now() - before
      release.open()
      await holder
      await until(async () => (await database.backends()).some(({ waitsFor }) => waitsFor === 'Lock'))
      const locked = performance.now()
      while (performance.now() - locked < 20) await new Promise((resolve) => setImmediate(resolve))
      times.locked = performance.now() - locked
      await wall.open()
      await waiting
    })
    const whole = performance.now() - started
    const own = events.filter(({ contextId }) => contextId === events[0]?.contextId)
    const duration = (type: string) => own.filter((event) => event.type === type).at(-1)?.duration ?? Number.NaN
    expect(duration('acquired')).toBeGreaterThanOrEqual(times.waited)
    expect(duration('begun')).toBeLessThan(duration('acquired'))
    expect(duration('statement')).toBeGreaterThanOrEqual(times.locked)
    expect(duration('released')).toBeGreaterThanOrEqual(duration('statement'))
    expect(duration('committed')).toBeGreaterThanOrEqual(duration('acquired') + duration('statement'))
    expect(duration('committed')).toBeLessThanOrEqual(whole)
  })

  it('O1 publishes a rollback with its reason, and the statement that failed', async () => {
    const main = define()
    const failure = new Error('the work failed')
    const { steps, events } = await record(() =>
      newContext(async () => {
        await insert(main, 1)
        await insert(main, 1).catch(() => {})
        throw failure
      }).catch(() => {}),
    )
    expect(steps.slice(4)).toEqual([
      'session statement',
      'session statement',
      'transaction rolled-back',
      'session released',
      'session closed',
      'context rolled-back',
    ])
    expect(events[5]).toMatchObject({ error: { code: '23505' } })
    expect(events[6]?.error).toBe(failure)
    expect(events.at(-1)?.error).toBe(failure)
  })

  it('O1 publishes a context that could not commit as failed', async () => {
    const main = define()
    const { steps, events } = await record(() =>
      newContext(async () => {
        await insert(main, 1)
        await insert(main, 1).catch(() => {})
      }).catch(() => {}),
    )
    expect(steps.slice(-4)).toEqual(['transaction rolled-back', 'session released', 'session closed', 'context failed'])
    expect(events.at(-1)?.error).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED' })
  })

  it('O1 publishes an unknown outcome, and the connection that was destroyed for it', async () => {
    const main = define()
    const wall = await databaseGate(database.url)
    const { steps, events } = await record(async () => {
      const ending = newContext(async () => {
        await main.db.query('insert into slow values ($1)', [Number(/\d+/.exec(wall.sql)?.[0])])
      })
      ending.catch(() => {})
      await until(async () => (await database.backends()).some(({ query }) => query === 'COMMIT'))
      await database.witness.rows(`
        select pg_terminate_backend(pid) from pg_stat_activity
         where application_name = 'main' and datname = current_database()`)
      await expect(ending).rejects.toMatchObject({
        code: 'AMBIENT_COMMIT_UNKNOWN',
        outcome: 'unknown',
        database: 'main',
      })
    })
    await wall.open()
    expect(steps.slice(-4)).toEqual(['transaction unknown', 'session destroyed', 'session closed', 'context failed'])
    expect(events.at(-4)?.error).toMatchObject({ code: 'AMBIENT_COMMIT_UNKNOWN' })
    expect(events.at(-3)?.error).toBeInstanceOf(Error)
  })

  it('O1 publishes a wait for a connection that was in vain', async () => {
    const main = define({ acquireTimeout: 500 }, { max: 1 })
    const [holding, release] = [gate(), gate()]
    const holder = newContext(async () => {
      await insert(main, 1)
      holding.open()
      await release.passed
    })
    await holding.passed
    const { steps, events } = await record(() => newContext(() => insert(main, 2)).catch(() => {}))
    release.open()
    await holder
    expect(steps).toEqual([
      'context opened',
      'session opened',
      'session acquire-failed',
      'session closed',
      'context rolled-back',
    ])
    expect(events[2]).toMatchObject({ database: 'main', error: { code: 'AMBIENT_ACQUIRE_TIMEOUT', statusCode: 503 } })
    expect(events[2]?.duration).toBeGreaterThanOrEqual(490)
  })

  it('O1 publishes what was refused: by an ended context, a closed session, an ended block', async () => {
    const main = define()
    const { events } = await record(async () => {
      const context = openContext()
      const session = await context.run(async () => {
        const first = main.session()
        await first.close()
        await first.begin().catch(() => {})
        let late = () => Promise.resolve<unknown>(undefined)
        const ended = gate()
        let refused: Promise<unknown> = Promise.resolve()
        await main.atomic(async () => {
          late = () => insert(main, 1)
          refused = ended.passed.then(() => late()).catch(() => {})
        })
        ended.open()
        await refused
        return main.session()
      })
      await context.settle('commit')
      await context.run(() => insert(main, 2)).catch(() => {})
      await session.db.query('select 1').catch(() => {})
    })
    const refused = events.filter(({ type }) => type === 'refused')
    expect(refused.map(({ error }) => (error as { code?: string }).code)).toEqual([
      'AMBIENT_SESSION_CLOSED',
      'AMBIENT_BLOCK_ENDED',
      'AMBIENT_CONTEXT_ENDED',
      'AMBIENT_CONTEXT_ENDED',
    ])
    for (const event of refused) expect(event).toMatchObject({ database: 'main', contextId: events[0]?.contextId })
    expect(refused.map(({ sessionId }) => typeof sessionId)).toEqual(['number', 'number', 'undefined', 'number'])
  })

  it('O1 publishes hooks that failed', async () => {
    const failure = new Error('the hook failed')
    const reported: unknown[] = []
    const main = define({ onHookError: (error) => reported.push(error) })
    const { steps, events } = await record(() =>
      newContext(async () => {
        await insert(main, 1)
        main.afterCommit(() => {
          throw failure
        })
      }),
    )
    expect(steps.at(-1)).toBe('session hook-failed')
    expect(events.at(-1)).toMatchObject({ database: 'main', contextId: events[0]?.contextId })
    expect(events.at(-1)?.error).toBe(failure)
    expect(reported).toEqual([failure])
  })

  it('O1 publishes a cursor as a statement that ends when it is closed', async () => {
    const main = define()
    const { steps } = await record(() =>
      newContext(async () => {
        const cursor = main.db.query(new Cursor('select generate_series(1, 3) as n'))
        expect(await cursor.read(2)).toHaveLength(2)
        await cursor.close()
        await insert(main, 1)
      }),
    )
    expect(steps.filter((step) => step === 'session statement')).toHaveLength(2)
  })

  it('O1 tells a session beside the context by a context number of its own', async () => {
    const main = define()
    const { steps, events } = await record(() =>
      newContext(() => main.newSession((session) => session.db.query('select 1'))),
    )
    expect(steps.filter((step) => step.startsWith('context'))).toEqual([
      'context opened',
      'context opened',
      'context committed',
      'context committed',
    ])
    expect(new Set(events.map(({ contextId }) => contextId)).size).toBe(2)
  })

  it('O1 says nothing of the time before somebody listened', async () => {
    const context = openContext()
    const { events } = await record(() => context.settle('commit'))
    expect(events).toEqual([
      { type: 'committed', contextId: expect.any(Number), duration: undefined, error: undefined },
    ])
  })

  it('O1 publishes nothing and makes no message while nobody listens', async () => {
    const main = define()
    const spies = channels.map((name) => vi.spyOn(channel(name), 'publish'))
    await newContext(async () => {
      await insert(main, 1)
      main.afterCommit(() => {})
    })
    await newContext(() => insert(main, 1)).catch(() => {})
    for (const spy of spies) expect(spy).not.toHaveBeenCalled()
    vi.restoreAllMocks()
  })
})

describe('where it happened', () => {
  /** This file, with the line of the function that `name` marks. */
  const here = /\n\s+at .*events\.test\.ts:\d+/

  async function lateStatement(main: Main): Promise<Error> {
    const context = openContext()
    await context.run(() => insert(main, 1))
    async function endsTheContext() {
      await context.settle('rollback')
    }
    await endsTheContext()
    return context
      .run(() => insert(main, 2))
      .then(
        () => expect.fail('it was let in'),
        (error) => error,
      )
  }

  it('O2 says where the context of a late statement ended, and where that statement was', async () => {
    const error = await lateStatement(define({ trace: true }))
    expect(error.message).toMatch(/It was ended\n(?:.*\n)*?.*endsTheContext.*events\.test\.ts/)
    expect(error.stack).toMatch(/lateStatement/)
  })

  it('O2 says so for a session and for a block as well', async () => {
    const main = define({ trace: true })
    await newContext(async () => {
      const session = main.session()
      async function closesIt() {
        await session.close()
      }
      await closesIt()
      await expect(session.begin()).rejects.toThrow(/It was closed\n(?:.*\n)*?.*closesIt.*events\.test\.ts/)
      let refused: Promise<unknown> = Promise.resolve()
      const ended = gate()
      async function startsTheBlock() {
        await main.atomic(async () => {
          refused = ended.passed.then(() => insert(main, 1))
        })
      }
      await startsTheBlock()
      ended.open()
      await expect(refused).rejects.toThrow(/atomic block was started\n(?:.*\n)*?.*startsTheBlock.*events\.test\.ts/)
    })
  })

  it('O2 says where a transaction was begun that is still open', async () => {
    const main = define({ trace: true })
    await newContext(async () => {
      async function writesFirst() {
        await insert(main, 1)
      }
      await writesFirst()
      await expect(main.closeSession()).rejects.toThrow(/It was begun\n(?:.*\n)*?.*writesFirst.*events\.test\.ts/)
      const raising = main.atomic(async () => {}, { current: 'raise' })
      await expect(raising).rejects.toThrow(/It was begun\n(?:.*\n)*?.*writesFirst.*events\.test\.ts/)
    })
  })

  it('O2 says where the block is that others wait for, and where they wait', async () => {
    const main = define({ trace: true, blockTimeout: 50 })
    await newContext(async () => {
      let waiting: Promise<unknown> = Promise.resolve()
      const [inside, over] = [gate(), gate()]
      async function waitsInVain() {
        await inside.passed
        await insert(main, 1)
      }
      async function ownsTheSession() {
        await main.atomic(async () => {
          inside.open()
          await over.passed
        })
      }
      const block = ownsTheSession()
      waiting = waitsInVain()
      const error: Error = await waiting.then(
        () => expect.fail('it was let in'),
        (thrown) => thrown,
      )
      over.open()
      await block
      expect(error).toMatchObject({ code: 'AMBIENT_SESSION_BUSY', database: 'main' })
      expect(error.message).toMatch(/atomic block was started\n(?:.*\n)*?.*ownsTheSession.*events\.test\.ts/)
      expect(error.message).toMatch(/a statement was started\n(?:.*\n)*?.*waitsInVain.*events\.test\.ts/)
    })
  })

  it('O2 captures no stacks unless asked to', async () => {
    const error = await lateStatement(define())
    expect(error.message).not.toMatch(here)
    const main = define({ blockTimeout: 20 })
    await newContext(async () => {
      await insert(main, 1)
      await expect(main.closeSession()).rejects.not.toThrow(here)
    }).catch(() => {})
  })

  it('O2 is switched on by AMBIENT_DB_TRACE=1', { timeout: 60_000 }, async () => {
    const script = `
      import { defineDatabase, newContext, openContext } from ${JSON.stringify(sourceUrl('src/index.ts'))}
      import { pgAdapter } from ${JSON.stringify(sourceUrl('src/adapters/pg.ts'))}
      import { Pool } from ${JSON.stringify(sourceUrl('node_modules/pg/esm/index.mjs'))}
      const main = defineDatabase({ name: 'main', adapter: pgAdapter(() => new Pool({ connectionString: process.env.TEST_URL })) })
      const context = openContext()
      context.run(() => main.session())
      async function endsTheContext() { await context.settle('commit') }
      await endsTheContext()
      console.log((await context.run(() => main.begin()).catch((error) => error)).message)
      await newContext(async () => {
        async function writesFirst() { await main.db.query('select 1') }
        await writesFirst()
        console.log((await main.closeSession().catch((error) => error)).message)
      })
      await main.shutdown()
    `
    const env = { TEST_URL: database.url }
    const on = await runChild(script, { env: { ...env, AMBIENT_DB_TRACE: '1' } })
    expect(on.stdout).toMatch(/It was ended\n(?:.*\n)*?.*endsTheContext/)
    expect(on.stdout).toMatch(/It was begun\n *at writesFirst/) // no frame of the package before it
    const off = await runChild(script, { env: { ...env, AMBIENT_DB_TRACE: '' } })
    expect(off.stdout).toMatch(/^Database 'main': The context has ended\. Await/)
  })
})
