import { EventEmitter, once } from 'node:events'
import { cpSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { pathToFileURL } from 'node:url'
import {
  type AmbientDatabase,
  contextSignal,
  defineDatabase,
  detach,
  hasContext,
  isAmbientError,
  newContext,
  openContext,
} from 'ambient-db'
import { pgAdapter } from 'ambient-db/pg'
import { Pool } from 'pg'
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { runChild, sourceUrl } from '../support/child.ts'
import { databaseGate, gate } from '../support/gate.ts'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'

let database: TestDatabase
let main: AmbientDatabase<Pool, Pool>

beforeAll(async () => {
  database = await createDatabase()
  await database.witness.rows('create table notes (id int primary key, text text)')
  main = defineDatabase({ name: 'main', adapter: pgAdapter(() => new Pool({ connectionString: database.url })) })
})
afterAll(async () => {
  await main.shutdown()
  await database.drop()
})
beforeEach(() => database.witness.rows('truncate notes'))

function insert(id: number, db: Pool = main.db): Promise<unknown> {
  return db.query('insert into notes (id) values ($1)', [id])
}

/** The ids that are committed. */
async function ids(): Promise<number[]> {
  return (await database.witness.rows<{ id: number }>('select id from notes order by id')).map(({ id }) => id)
}

async function backend(): Promise<number> {
  return (await main.db.query<{ pid: number }>('select pg_backend_pid() as pid')).rows[0]!.pid
}

/** The number of connections that are in a transaction. */
async function inTransaction(): Promise<number> {
  return (await database.backends()).filter(({ transactionStart }) => transactionStart !== null).length
}

describe('one session', () => {
  it('C1 gives the same session in every child call', async () => {
    await newContext(async () => {
      const session = main.session()
      expect(main.session()).toBe(session)
      expect(await (async () => main.session())()).toBe(session)
      const pid = await backend()
      expect(await Promise.all([backend(), (async () => backend())()])).toEqual([pid, pid])
      const [inTimer] = await once(
        new (class extends EventEmitter {
          timer = setImmediate(() => this.emit('session', main.session()))
        })(),
        'session',
      )
      expect(inTimer).toBe(session)
      await insert(1)
      expect(await ids()).toEqual([])
    })
    expect(await ids()).toEqual([1])
  })

  it.each([{}, { timeout: 60_000 }])(
    'C1 begins a query that is sent when it is awaited inside its unit, with %o',
    async (options) => {
      /** Queries of some libraries are no promises. */
      const lazy = (id: number, db = main.db) =>
        // biome-ignore lint/suspicious/noThenProperty: what such a query is
        ({ then: (...callbacks: []) => insert(id, db).then(...callbacks) }) as unknown as Promise<unknown>
      await newContext(() => lazy(1), options)
      await newContext(() => main.atomic(() => lazy(2), options))
      await main.newSession(({ db }) => lazy(3, db))
      expect(await database.witness.rows('select id from notes order by id')).toEqual([{ id: 1 }, { id: 2 }, { id: 3 }])
    },
  )

  it('C1 gives concurrent contexts sessions, connections and outcomes of their own', async () => {
    const [wrote, looked] = [gate(), gate()]
    let [writers, lookers] = [0, 0]
    const work = async (id: number) => {
      await insert(id)
      if (++writers === 2) wrote.open()
      await wrote.passed
      const seen = await main.db.query<{ id: number }>('select id from notes')
      expect(seen.rows).toEqual([{ id }])
      if (++lookers === 2) looked.open()
      await looked.passed
      if (id === 2) throw new Error('the second one fails')
      return { session: main.session(), pid: await backend() }
    }
    const [first, second] = await Promise.allSettled([newContext(() => work(1)), newContext(() => work(2))])
    expect(first.status).toBe('fulfilled')
    expect(second).toMatchObject({ status: 'rejected', reason: { message: 'the second one fails' } })
    expect(await ids()).toEqual([1])
  })

  it('C1 keeps a session for each database', async () => {
    const other = defineDatabase({
      name: 'other',
      adapter: pgAdapter(() => new Pool({ connectionString: database.url })),
    })
    await newContext(async () => {
      expect(other.session()).not.toBe(main.session())
      await other.db.query('insert into notes (id) values (1)')
      await insert(2)
      expect(await inTransaction()).toBe(2)
    })
    expect(await ids()).toEqual([1, 2])
    await other.shutdown()
  })
})

describe('without a context', () => {
  const refused = { code: 'AMBIENT_NO_CONTEXT', database: 'main' }

  it('C2 refuses every way to the session, naming the database and the remedy', async () => {
    expect(() => main.session()).toThrow(/^Database 'main': .*newContext\(work\).*connect\(\)/)
    expect(() => main.beforeCommit(() => {})).toThrow(expect.objectContaining(refused))
    for (const act of [
      () => insert(1),
      () => main.begin(),
      () => main.atomic(() => insert(1)),
      () => main.commit(),
      () => main.rollback(),
      () => main.closeSession(),
      () => main.db.connect().then((client) => client.query('insert into notes (id) values (1)')),
    ]) {
      await expect(act()).rejects.toMatchObject(refused)
    }
    expect(await ids()).toEqual([])
  })

  it('C2 leaves the bare engine to whoever asks for it', async () => {
    const pool = await main.connect()
    await pool.query('insert into notes (id) values (1)')
    expect(await ids()).toEqual([1])
  })

  it('C2 takes detached work out of the context', async () => {
    await newContext(async () => {
      await insert(1)
      await expect(detach(() => insert(2))).rejects.toMatchObject(refused)
      expect(detach(hasContext)).toBe(false)
      await detach(() => newContext(() => insert(3)))
      expect(await ids()).toEqual([3])
    })
    expect(await ids()).toEqual([1, 3])
  })

  it('opens a session beside it with newSession', async () => {
    await main.newSession(async (session) => {
      await session.db.query('insert into notes (id) values (1)')
      expect(session.inTransaction).toBe(true)
      expect(hasContext()).toBe(false)
      await expect(insert(2)).rejects.toMatchObject(refused)
      expect(await ids()).toEqual([])
    })
    expect(await ids()).toEqual([1])
    const failure = new Error('no')
    const failing = main.newSession(async (session) => {
      await session.db.query('insert into notes (id) values (2)')
      throw failure
    })
    await expect(failing).rejects.toBe(failure)
    expect(await ids()).toEqual([1])
  })
})

describe('contexts inside contexts', () => {
  it('keeps the outcome of an inner context apart from the outer one', async () => {
    const failure = new Error('outer')
    const outer = newContext(async () => {
      const pid = await backend()
      await insert(1)
      await newContext(async () => {
        expect(await backend()).not.toBe(pid)
        await insert(2)
      })
      expect(await ids()).toEqual([2])
      await newContext(async () => {
        await insert(3)
        throw new Error('inner')
      }).catch(() => {})
      expect(await backend()).toBe(pid)
      throw failure
    })
    await expect(outer).rejects.toBe(failure)
    expect(await ids()).toEqual([2])
  })

  it('H8 settles each call of a batch by its own result, whatever becomes of the request around them', async () => {
    const began = [gate(), gate(), gate()]
    const failure = new Error('the second call')
    const call = (index: number) =>
      newContext(async () => {
        await insert(index)
        began[index]!.open()
        await Promise.all(began.map(({ passed }) => passed))
        if (index === 1) throw failure
      })
    const request = newContext(async () => {
      await insert(3)
      const ends = await Promise.allSettled([call(0), call(1), call(2)])
      expect(ends.map((end) => (end.status === 'rejected' ? end.reason : 'kept'))).toEqual(['kept', failure, 'kept'])
      expect(await ids()).toEqual([0, 2])
      throw new Error('the request')
    })
    await expect(request).rejects.toThrow('the request')
    expect(await ids()).toEqual([0, 2])
  })

  it('refuses late work of an inner context rather than giving it the session of the outer one', async () => {
    const ended = gate()
    await newContext(async () => {
      await insert(1)
      let late: Promise<unknown> = Promise.resolve()
      await newContext(async () => {
        await insert(2)
        late = (async () => {
          await ended.passed
          expect(hasContext()).toBe(false)
          await insert(3)
        })()
      })
      ended.open()
      await expect(late).rejects.toMatchObject({ code: 'AMBIENT_CONTEXT_ENDED' })
    })
    expect(await ids()).toEqual([1, 2])
  })

  it('lets newSession leave the context of its surroundings in force', async () => {
    await newContext(async () => {
      await insert(1)
      const outer = main.session()
      await main.newSession(async (session) => {
        expect(main.session()).toBe(outer)
        expect(session).not.toBe(outer)
        await session.db.query('insert into notes (id) values (2)')
        await insert(3)
        expect(hasContext()).toBe(true)
      })
      expect(await ids()).toEqual([2])
    })
    expect(await ids()).toEqual([1, 2, 3])
  })
})

describe('a context in the hand', () => {
  it('runs work several times in one session and ends when it is settled', async () => {
    const context = openContext()
    expect(context.state).toBe('open')
    const session = context.run(() => main.session())
    await context.run(() => insert(1))
    expect(context.run(() => main.session())).toBe(session)
    await context.run(() => insert(2))
    expect(context.run(hasContext)).toBe(true)
    expect(await ids()).toEqual([])
    const settled = context.settle('commit')
    expect(context.state).toBe('settling')
    expect(context.settle('rollback')).toBe(settled)
    await settled
    expect(context.state).toBe('committed')
    expect(await ids()).toEqual([1, 2])
    expect(context.run(hasContext)).toBe(false)
    await expect(context.run(() => insert(3))).rejects.toMatchObject({
      code: 'AMBIENT_CONTEXT_ENDED',
      database: 'main',
    })
  })

  it('rolls back without rejecting', async () => {
    const context = openContext()
    await context.run(() => insert(1))
    const reason = new Error('the client has gone')
    await context.settle('rollback', reason)
    expect(context.state).toBe('rolled-back')
    expect(await ids()).toEqual([])
    await expect(context.settle('commit')).rejects.toMatchObject({ code: 'AMBIENT_CONTEXT_ENDED' }) // never a lie
    expect(context.state).toBe('rolled-back')
    expect(await ids()).toEqual([])
  })

  it('rejects and says that it failed when it cannot commit', async () => {
    const context = openContext()
    await context.run(() => insert(1))
    await context.run(() => insert(1)).catch(() => {})
    const settled = context.settle('commit')
    await expect(settled).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', cause: { code: '23505' } })
    expect(context.state).toBe('failed')
    expect(await ids()).toEqual([])
    expect(await inTransaction()).toBe(0)
  })

  it('rejects a commit that comes after it was aborted', async () => {
    const controller = new AbortController()
    const context = openContext({ signal: controller.signal })
    await context.run(() => insert(1))
    const reasons: unknown[] = []
    context.signal.addEventListener('abort', () => reasons.push(context.signal.reason))
    controller.abort()
    await expect(context.settle('commit')).rejects.toMatchObject({ code: 'AMBIENT_ABORTED', outcome: 'rolled-back' })
    await context.settle('rollback') // the end that its user wants anyway
    expect(context.state).toBe('rolled-back')
    expect(reasons).toEqual([expect.objectContaining({ code: 'AMBIENT_ABORTED' })])
    expect(await ids()).toEqual([])
  })

  it('has a signal of its own that stays silent when the context ends well', async () => {
    const context = openContext()
    const { signal } = context
    await context.run(() => insert(1))
    await context.settle('commit')
    expect(signal.aborted).toBe(false)
    expect(context.signal).toBe(signal)
  })

  it('takes bound emitters into the context, wherever they emit', async () => {
    const context = openContext()
    const emitter = new EventEmitter()
    expect(context.bind(emitter)).toBe(emitter)
    const inserted = new Promise<unknown>((resolve) => emitter.on('note', (id: number) => resolve(insert(id))))
    expect(hasContext()).toBe(false)
    await newContext(async () => {
      emitter.emit('note', 1) // not in this context
      await inserted
    })
    expect(await ids()).toEqual([])
    await context.settle('commit')
    expect(await ids()).toEqual([1])
  })
})

describe('hasContext', () => {
  it('is true while the context takes work, the join and its hooks included', async () => {
    const seen: [string, boolean][] = []
    const wall = await databaseGate(database.url)
    const joined = gate()
    expect(hasContext()).toBe(false)
    const context = openContext()
    await context.run(async () => {
      seen.push(['work', hasContext()])
      main.beforeCommit(() => seen.push(['beforeCommit', hasContext()]))
      main.afterCommit(() => seen.push(['afterCommit', hasContext()]))
    })
    const late = context.run(async () => {
      await main.db.query(wall.sql)
      seen.push(['join', hasContext()])
      await insert(1)
      joined.open()
    })
    const settled = context.settle('commit')
    await wall.open()
    await Promise.all([late, joined.passed, settled])
    seen.push(['afterwards', context.run(hasContext)])
    expect(seen).toEqual([
      ['work', true],
      ['join', true],
      ['beforeCommit', true],
      ['afterCommit', true],
      ['afterwards', false],
    ])
    expect(await ids()).toEqual([1])
  })
})

describe('contextSignal', () => {
  it('C8 is the signal of the context around the code, and of the innermost one', async () => {
    const context = openContext()
    const inner = await context.run(async () => {
      expect(contextSignal()).toBe(context.signal)
      await main.atomic(() => expect(contextSignal()).toBe(context.signal), { timeout: 10_000 })
      await main.newSession(() => expect(contextSignal()).toBe(context.signal))
      return newContext(contextSignal)
    })
    expect(inner).not.toBe(context.signal)
    await context.settle('rollback')
    expect([context.signal.aborted, inner.aborted]).toEqual([false, false])
  })

  it('C8 fires when the context is aborted, and has fired for late work', async () => {
    const reasons: unknown[] = []
    const controller = new AbortController()
    const context = openContext({ signal: controller.signal })
    context.run(() =>
      contextSignal().addEventListener('abort', (event) => reasons.push((event.target as AbortSignal).reason)),
    )
    controller.abort()
    await expect(context.settle('commit')).rejects.toMatchObject({ code: 'AMBIENT_ABORTED' })
    expect(reasons).toEqual([expect.objectContaining({ code: 'AMBIENT_ABORTED' })])
    const late = openContext({ timeout: 1 })
    await expect(
      late.run(() => new Promise((_, reject) => contextSignal().addEventListener('abort', reject))),
    ).rejects.toBeInstanceOf(Event)
    await late.settle('rollback')
    expect(late.run(contextSignal).reason).toMatchObject({ code: 'AMBIENT_TIMEOUT' })
  })

  it('never fires outside of any context, and is new each time so that nothing gathers on it', () => {
    expect(contextSignal().aborted).toBe(false)
    expect(contextSignal()).not.toBe(contextSignal())
    expect(openContext().run(() => detach(contextSignal)).aborted).toBe(false)
  })
})

describe('an ended context', () => {
  it('C4 refuses late work of every kind, and never gives it another session', async () => {
    const context = openContext()
    const [session, client] = await context.run(async () => {
      await insert(1)
      return [main.session(), await main.db.connect()] as const
    })
    await context.settle('commit')
    const backends = await database.backends()
    const late = [
      () => insert(2),
      () => main.begin(),
      () => main.atomic(() => insert(2)),
      () => main.commit(),
      () => main.rollback(),
      () => client.query('insert into notes (id) values (2)'),
      () => session.db.query('insert into notes (id) values (2)'),
      () => session.commit(),
      () => session.savepoint(() => insert(2)),
    ]
    for (const act of late) {
      const error = await context.run(act as () => Promise<unknown>).then(
        () => expect.fail(`${act} was let in`),
        (error) => error,
      )
      expect(isAmbientError(error, 'AMBIENT_CONTEXT_ENDED'), `${act}: ${error}`).toBe(true)
    }
    await expect(newContext(() => session.db.query('select 1'))).rejects.toMatchObject({
      code: 'AMBIENT_CONTEXT_ENDED',
    })
    expect(await ids()).toEqual([1])
    expect((await database.backends()).map(({ query }) => query)).toEqual(backends.map(({ query }) => query))
  })

  it('C4 refuses late work inside a session beside it, and never gives it the session of a context around it', async () => {
    await newContext(async () => {
      const late = gate()
      let laterOn: Promise<unknown> = Promise.resolve()
      await newContext(() => {
        laterOn = late.passed.then(() => main.newSession(() => insert(2)))
      })
      await insert(1)
      late.open()
      await expect(laterOn).rejects.toMatchObject({ code: 'AMBIENT_CONTEXT_ENDED' })
    })
    expect(await ids()).toEqual([1])
  })
})

describe('two copies of the package', () => {
  const directories: string[] = []
  afterAll(() => {
    for (const directory of directories) rmSync(directory, { recursive: true, force: true })
  })

  /** Another copy of the sources, with `change` made to its `context.ts`. */
  function copySources(change: (text: string) => string = (text) => text): string {
    const directory = mkdtempSync(join(tmpdir(), 'ambient-db-copy-'))
    directories.push(directory)
    cpSync('src', join(directory, 'src'), { recursive: true })
    symlinkSync(resolve('node_modules'), join(directory, 'node_modules'))
    writeFileSync(join(directory, 'package.json'), '{ "type": "module" }')
    const file = join(directory, 'src/context.ts')
    writeFileSync(file, change(readFileSync(file, 'utf8')))
    return pathToFileURL(join(directory, 'src')).href
  }

  it('C7 share their contexts, their order and their errors', { timeout: 60_000 }, async () => {
    const { status, stdout, stderr } = await runChild(
      `
      const one = await import(${JSON.stringify(sourceUrl('src/index.ts'))})
      const two = await import(${JSON.stringify(`${copySources()}/index.ts`)})
      const { pgAdapter } = await import(${JSON.stringify(sourceUrl('src/adapters/pg.ts'))})
      const { Pool } = await import(${JSON.stringify(sourceUrl('node_modules/pg/esm/index.mjs'))})
      const adapter = (name) => pgAdapter(() => new Pool({ connectionString: process.env.TEST_URL, application_name: name }))
      const order = []
      const define = (copy, name) =>
        copy.defineDatabase({ name, adapter: adapter(name), hooks: { beforeCommit: () => order.push(name) } })
      const databases = [define(two, 'a'), define(one, 'b'), define(two, 'c')]
      const [a, b, c] = databases
      const ids = new Set()
      const seen = await one.newContext(async () => {
        for (const each of [c, b, a]) await each.db.query('insert into notes (id) values ($1)', [order.length + ids.add(each).size])
        return [two.hasContext(), a.session() === a.session(), two.detach(one.hasContext)]
      })
      const failure = await two.newContext(async () => {
        await b.db.query('insert into notes (id) values (10)')
        throw new Error('rolled back')
      }).catch((error) => error.message)
      const error = await b.db.query('select 1').catch((error) => error)
      console.log(JSON.stringify({
        different: one.newContext !== two.newContext,
        seen, order, failure,
        recognised: [one.isAmbientError(error, 'AMBIENT_NO_CONTEXT'), two.isAmbientError(error, 'AMBIENT_NO_CONTEXT'), error instanceof two.AmbientError],
      }))
      await Promise.all(databases.map((each) => each.shutdown()))
      `,
      { env: { TEST_URL: database.url } },
    )
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' })
    expect(JSON.parse(stdout)).toEqual({
      different: true,
      seen: [true, true, false],
      order: ['a', 'b', 'c'],
      failure: 'rolled back',
      recognised: [true, true, false],
    })
    expect(await ids()).toEqual([1, 2, 3])
  })

  it('C7 refuses a copy that speaks another protocol, and names both', { timeout: 60_000 }, async () => {
    const other = copySources((text) => text.replace('const protocol = 1', 'const protocol = 7'))
    const { status, stdout, stderr } = await runChild(`
      await import(${JSON.stringify(sourceUrl('src/index.ts'))})
      const error = await import(${JSON.stringify(`${other}/index.ts`)}).catch((error) => error)
      console.log(JSON.stringify({ code: error.code, message: error.message }))
    `)
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' })
    expect(JSON.parse(stdout)).toEqual({
      code: 'AMBIENT_PROTOCOL_MISMATCH',
      message: expect.stringMatching(/protocol 1\b.*\b7\b.*npm ls ambient-db/),
    })
  })
})
