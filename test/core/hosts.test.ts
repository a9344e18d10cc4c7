import {
  type AmbientDatabase,
  type DatabaseOptions,
  defineDatabase,
  hasContext,
  newContext,
  openContext,
} from 'ambient-db'
import { pgAdapter } from 'ambient-db/pg'
import { Pool, type PoolClient } from 'pg'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { databaseGate, gate, until } from '../support/gate.ts'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'

type Main = AmbientDatabase<Pool, Pool>

/** Two databases of one server stand for two hosts. */
let east: TestDatabase
let west: TestDatabase
/** The pools that factories made, in order. */
let pools: Pool[] = []
const defined: Main[] = []

beforeAll(async () => {
  ;[east, west] = await Promise.all([createDatabase(), createDatabase()])
  for (const { witness } of [east, west]) await witness.rows('create table notes (id int primary key)')
})
afterAll(() => Promise.all([east.drop(), west.drop()]))
beforeEach(() => Promise.all([east, west].map(({ witness }) => witness.rows('truncate notes'))))
afterEach(async () => {
  await Promise.all(defined.splice(0).map((each) => each.shutdown().catch(() => {})))
  pools = []
})

function keep(main: Main): Main {
  defined.push(main)
  return main
}

/** A database with the two hosts `east` and `west`. */
function define(options: Partial<DatabaseOptions<Pool, Pool, PoolClient>> = {}): Main {
  const urls: Record<string, string> = { east: east.url, west: west.url }
  const adapter = pgAdapter((host) => {
    if (!urls[host]) throw new Error(`There is no host '${host}'.`)
    const pool = new Pool({ connectionString: urls[host], application_name: host })
    pools.push(pool)
    return pool
  })
  return keep(defineDatabase({ name: 'main', host: 'east', adapter, ...options }))
}

function insert(main: Main, id: number): Promise<unknown> {
  return main.db.query('insert into notes (id) values ($1)', [id])
}

async function ids({ witness }: TestDatabase): Promise<number[]> {
  return (await witness.rows<{ id: number }>('select id from notes order by id')).map(({ id }) => id)
}

describe('the engine', () => {
  it('D1 is created by the first session, once, also under concurrent first use', async () => {
    const creating = gate()
    const seen: boolean[] = []
    let made = 0
    const adapter = pgAdapter(async () => {
      made++
      seen.push(hasContext())
      await creating.passed
      seen.push(hasContext())
      return new Pool({ connectionString: east.url })
    })
    const main = keep(defineDatabase({ name: 'main', adapter }))
    const context = openContext()
    context.run(() => main.session())
    await context.settle('commit')
    expect(made).toBe(0)
    const work = Promise.all([1, 2, 3].map((id) => newContext(() => insert(main, id))))
    await until(() => made > 0)
    const engine = main.connect()
    creating.open()
    await work
    expect(await engine).toBe(await main.connect())
    expect(made).toBe(1)
    expect(seen).toEqual([false, false])
    expect(await ids(east)).toEqual([1, 2, 3])
  })

  it('D1 is tried again after it could not be created', async () => {
    const failure = new Error('not yet')
    let attempts = 0
    const adapter = pgAdapter(() => {
      if (++attempts === 1) throw failure
      return new Pool({ connectionString: east.url })
    })
    const main = keep(defineDatabase({ name: 'main', adapter }))
    await newContext(async () => {
      await expect(insert(main, 1)).rejects.toBe(failure)
      expect(main.session().inTransaction).toBe(false)
      await insert(main, 2)
    })
    expect(attempts).toBe(2)
    expect(await ids(east)).toEqual([2])
  })

  it('AMBIENT_HOST_MISSING tells a factory that asks for a host where none is configured', async () => {
    const adapter = pgAdapter((host) => new Pool({ host }))
    const main = keep(defineDatabase({ name: 'main', adapter }))
    const missing = { code: 'AMBIENT_HOST_MISSING', database: 'main', message: expect.stringContaining('`host`') }
    await expect(newContext(() => insert(main, 1))).rejects.toMatchObject(missing)
    await expect(main.connect()).rejects.toMatchObject(missing)
  })
})

describe('beforeSession', () => {
  it("D2 runs before each session's first connection, outside any context, once for concurrent sessions", async () => {
    const running = gate()
    const seen: boolean[] = []
    const main = define({
      beforeSession: async (database) => {
        expect(database).toBe(main)
        seen.push(hasContext())
        expect(pools.length).toBe(seen.length === 1 ? 0 : 1)
        await running.passed
      },
    })
    await newContext(async () => {
      main.session() // is free: nothing runs
    })
    expect(seen).toEqual([])
    const both = Promise.all([newContext(() => insert(main, 1)), newContext(() => insert(main, 2))])
    await until(() => seen.length > 0)
    running.open()
    await both
    expect(seen).toEqual([false])
    await newContext(async () => {
      await insert(main, 3)
      await main.commit()
      await insert(main, 4) // the same session
      expect(seen).toEqual([false, false])
      await main.closeSession('commit')
      await insert(main, 5)
    })
    expect(seen).toEqual([false, false, false])
    await main.newSession(async (session) => {
      await session.db.query('select 1')
    })
    expect(seen).toHaveLength(4)
    expect(await ids(east)).toEqual([1, 2, 3, 4, 5])
  })

  it('D2 may change the host that its session connects to', async () => {
    const main = define({ beforeSession: (database) => database.changeHost('west') })
    await newContext(() => insert(main, 1))
    expect(main.host).toBe('west')
    expect(await ids(west)).toEqual([1])
    expect(await ids(east)).toEqual([])
  })

  it('D2 may set the host that was missing', async () => {
    const adapter = pgAdapter((host) => new Pool({ connectionString: host === 'east' ? east.url : '' }))
    const main = keep(
      defineDatabase({ name: 'main', adapter, beforeSession: (database) => database.changeHost('east') }),
    )
    await newContext(() => insert(main, 1))
    expect(await ids(east)).toEqual([1])
  })

  it('D2 refuses the own database inside it, in a context or not, rather than waiting for itself', async () => {
    const refused = { code: 'AMBIENT_BEFORE_SESSION', database: 'main' }
    const seen: unknown[] = []
    const main: Main = define({
      beforeSession: async () => {
        for (const act of [
          () => insert(main, 2),
          () => newContext(() => insert(main, 2)),
          () => main.newSession((session) => session.db.query('select 1')),
          () => main.atomic(() => insert(main, 2)),
        ]) {
          seen.push(await act().catch((error) => error))
        }
        await main.connect().then((pool) => pool.query('insert into notes (id) values (3)'))
      },
    })
    await newContext(() => insert(main, 1))
    expect(seen).toEqual(Array(4).fill(expect.objectContaining(refused)))
    expect(await ids(east)).toEqual([1, 3])
  })

  it('D2 may use another database', async () => {
    const hosts = define({ name: 'hosts', host: 'west' })
    const main = define({
      beforeSession: async () => {
        await newContext(() => insert(hosts, 1))
        await hosts.newSession((session) => session.db.query('insert into notes (id) values (2)'))
      },
    })
    await newContext(() => insert(main, 3))
    expect([await ids(east), await ids(west)]).toEqual([[3], [1, 2]])
  })

  it('D2 fails the statement when it fails, and runs again for the next one', async () => {
    const failure = new Error('no host is up')
    let runs = 0
    const main = define({
      beforeSession: () => {
        if (++runs === 1) throw failure
      },
    })
    await newContext(async () => {
      await expect(insert(main, 1)).rejects.toBe(failure)
      expect(main.session().inTransaction).toBe(false)
      expect(pools).toEqual([])
      await insert(main, 2)
    })
    expect(runs).toBe(2)
    expect(await ids(east)).toEqual([2])
  })
})

describe('changeHost', () => {
  it('D3 does nothing for the same host', async () => {
    const main = define()
    await newContext(() => insert(main, 1))
    await main.changeHost('east')
    expect(pools).toHaveLength(1)
    expect(pools[0]?.ended).toBe(false)
  })

  it('D3 sends new transactions to the new host while those under way finish on the old one, then closes it', async () => {
    const main = define()
    const under = newContext(async () => {
      await insert(main, 1)
      await main.changeHost('west')
      expect(main.host).toBe('west')
      await newContext(() => insert(main, 2))
      expect((pools[0] as Pool & { ending: boolean }).ending).toBe(false) // not in the types of pg
      await insert(main, 3)
      expect(await ids(east)).toEqual([])
      await main.commit()
      await insert(main, 4) // a new transaction of the same session
    })
    await under
    expect([await ids(east), await ids(west)]).toEqual([
      [1, 3],
      [2, 4],
    ])
    await until(() => pools[0]?.ended === true)
    await until(async () => (await east.backends()).length === 0, 'the old host to be left')
    expect(pools.map(({ ended }) => ended)).toEqual([true, false])
  })

  it('D3 keeps the old host when the new engine cannot be made', async () => {
    const main = define()
    await newContext(() => insert(main, 1))
    await expect(main.changeHost('nowhere')).rejects.toThrow("There is no host 'nowhere'.")
    expect(main.host).toBe('east')
    await newContext(() => insert(main, 2))
    expect(await ids(east)).toEqual([1, 2])
    expect(pools).toHaveLength(1)
  })

  it('D3 makes one engine for a host that is asked for many times at once', async () => {
    const main = define()
    await newContext(() => insert(main, 1))
    await Promise.all([main.changeHost('west'), main.changeHost('west'), main.changeHost('west')])
    expect(pools).toHaveLength(2)
    await newContext(() => insert(main, 2))
    expect(await ids(west)).toEqual([2])
    expect((main.db as Pool).totalCount).toBe(1)
  })

  it('D3 warns when the old engine cannot be closed, without what could hold a password', async () => {
    class Stubborn extends Pool {
      override async end(): Promise<void> {
        await super.end()
        throw new Error(`not closed: ${east.url}`)
      }
    }
    const adapter = pgAdapter(() => new Stubborn({ connectionString: east.url }))
    const main = defineDatabase({ name: 'main', host: 'east', adapter })
    const warnings: string[] = []
    const listen = ({ message }: Error) => warnings.push(message)
    process.on('warning', listen)
    await newContext(() => insert(main, 1))
    await main.changeHost('west')
    await until(() => warnings.length > 0, 'the warning')
    process.off('warning', listen)
    expect(warnings).toEqual(['ambient-db: closing an old engine failed: Error'])
    expect(main.host).toBe('west')
    await expect(main.shutdown()).rejects.toThrow('not closed')
  })

  it('D3 ends with the host that was asked for last', async () => {
    const main = define()
    await newContext(() => insert(main, 1))
    await Promise.all([main.changeHost('west'), main.changeHost('east')])
    expect(main.host).toBe('east')
    await newContext(() => insert(main, 2))
    expect([await ids(east), await ids(west)]).toEqual([[1, 2], []])
  })
})

describe('shutdown', () => {
  const shutDown = { code: 'AMBIENT_SHUT_DOWN', database: 'main', statusCode: 503 }

  it('D4 refuses new work, lets transactions under way finish, then closes the engine', async () => {
    const main = define()
    const wall = await databaseGate(east.url)
    let closed: Promise<void> = Promise.resolve()
    const under = newContext(async () => {
      await insert(main, 1)
      closed = main.shutdown()
      expect(main.shutdown()).toBe(closed)
      await main.db.query(wall.sql)
      await insert(main, 2)
    })
    await until(async () => (await east.backends()).some(({ waitsFor }) => waitsFor === 'Lock'))
    await expect(newContext(() => insert(main, 3))).rejects.toMatchObject(shutDown)
    await expect(main.connect()).rejects.toMatchObject(shutDown)
    await expect(main.changeHost('west')).rejects.toMatchObject(shutDown)
    expect(pools[0]?.ended).toBe(false)
    await wall.open()
    await under
    await closed
    expect(pools[0]?.ended).toBe(true)
    await until(async () => (await east.backends()).length === 0, 'the host to be left')
    expect(await ids(east)).toEqual([1, 2])
    await main.shutdown()
    await expect(newContext(() => insert(main, 3))).rejects.toMatchObject(shutDown)
  })

  it('D4 does not run beforeSession for work that it refuses', async () => {
    let runs = 0
    const main = define({ beforeSession: () => runs++ })
    await main.shutdown()
    await expect(newContext(() => insert(main, 1))).rejects.toMatchObject(shutDown)
    expect([runs, pools]).toEqual([0, []])
  })

  it('D4 waits for the after-hooks of a transaction that was under way', async () => {
    const main = define()
    const [begun, hold, hook] = [gate(), gate(), gate()]
    const steps: string[] = []
    const work = newContext(async () => {
      await insert(main, 1)
      main.afterCommit(async () => {
        steps.push('hook')
        await hook.passed
        steps.push('hook ended')
      })
      begun.open()
      await hold.passed
    })
    await begun.passed
    const closed = main.shutdown().then(() => steps.push('closed'))
    hold.open()
    await until(() => steps.includes('hook'), 'the hook')
    for (let turn = 0; turn < 10; turn++) await new Promise((resolve) => setImmediate(resolve))
    expect(pools[0]?.ending).toBe(false)
    hook.open()
    await Promise.all([work, closed])
    expect(steps).toEqual(['hook', 'hook ended', 'closed'])
  })

  it('D4 waits for after-hooks under way', async () => {
    const main = define()
    const hook = gate()
    const hooks: string[] = []
    const work = newContext(async () => {
      await insert(main, 1)
      main.afterCommit(async () => {
        hooks.push('first')
        await hook.passed
      })
      main.afterCommit(() => hooks.push('second'))
    })
    await until(() => hooks.length === 1)
    let closed = false
    const closing = main.shutdown().then(() => {
      closed = true
    })
    for (let turn = 0; turn < 5; turn++) await new Promise((resolve) => setImmediate(resolve))
    expect([closed, pools[0]?.ended]).toEqual([false, false])
    hook.open()
    await closing
    expect(hooks).toEqual(['first', 'second'])
    await work
  })

  it('D4 waits for after-hooks of a transaction that was under way', async () => {
    const main = define()
    const other = define({ name: 'other', host: 'west' })
    const hook = gate()
    let ran = false
    let closing: Promise<void> = Promise.resolve()
    const work = newContext(async () => {
      await insert(main, 1)
      await insert(other, 1) // commits later than the database that is shut down
      closing = main.shutdown()
      main.afterCommit(async () => {
        await hook.passed
        ran = true
      })
    })
    await until(async () => (await ids(west)).length === 1)
    hook.open()
    await closing
    expect(ran).toBe(true)
    await work
  })

  it('D4 aborts what is still under way after settleTimeout, and says so', async () => {
    const main = define({ settleTimeout: 100 })
    const wall = await databaseGate(east.url)
    const never = gate()
    const [stuck, idle] = [
      newContext(async () => {
        await insert(main, 1)
        await main.db.query(wall.sql)
      }),
      newContext(async () => {
        await insert(main, 2)
        await never.passed
        return 'finished'
      }),
    ]
    for (const each of [stuck, idle]) each.catch(() => {})
    await until(async () => (await east.backends()).some(({ waitsFor }) => waitsFor === 'Lock'))
    await until(async () => (await east.backends()).some(({ state }) => state === 'idle in transaction'))
    await main.shutdown()
    expect(pools[0]?.ended).toBe(true)
    never.open()
    await expect(idle).rejects.toMatchObject({ ...shutDown, outcome: 'rolled-back' })
    await expect(stuck).rejects.toMatchObject({ code: '57014' })
    await wall.open()
    expect(await ids(east)).toEqual([])
  })

  it('D4 leaves contexts alone that have nothing to finish there', async () => {
    const main = define({ settleTimeout: 50 })
    const other = define({ name: 'other', host: 'west' })
    const never = gate()
    const stuck = newContext(async () => {
      await insert(main, 1)
      await never.passed
    })
    stuck.catch(() => {})
    await newContext(async () => {
      main.session()
      await insert(other, 2)
      await main.shutdown()
    })
    never.open()
    expect([await ids(east), await ids(west)]).toEqual([[], [2]])
  })

  it('D4 waits for transactions on a former host, too', async () => {
    const main = define()
    let closed = false
    let closing: Promise<void> = Promise.resolve()
    await newContext(async () => {
      await insert(main, 1)
      await main.changeHost('west')
      closing = main.shutdown().then(() => {
        closed = true
      })
      for (let turn = 0; turn < 5; turn++) await new Promise((resolve) => setImmediate(resolve))
      expect([closed, pools.map(({ ended }) => ended)]).toEqual([false, [false, false]])
      await insert(main, 2)
    })
    await closing
    expect(pools.map(({ ended }) => ended)).toEqual([true, true])
    expect(await ids(east)).toEqual([1, 2])
  })

  it('D4 closes the engine of a host that was being changed to', async () => {
    const [asked, making] = [gate(), gate()]
    const made: Pool[] = []
    const adapter = pgAdapter(async (host) => {
      if (host === 'west') {
        asked.open()
        await making.passed
      }
      const pool = new Pool({ connectionString: host === 'west' ? west.url : east.url })
      made.push(pool)
      return pool
    })
    const main = keep(defineDatabase({ name: 'main', host: 'east', adapter }))
    await newContext(() => insert(main, 1))
    const changing = main.changeHost('west')
    await asked.passed
    const refused = expect(changing).rejects.toMatchObject(shutDown)
    await main.shutdown()
    making.open()
    await refused
    expect(made.map(({ ended }) => ended)).toEqual([true, true])
  })

  it('D4 closes nothing where nothing was opened', async () => {
    const main = define()
    const { shutdown } = main
    await shutdown()
    expect(pools).toEqual([])
  })
})
