import { newContext, openContext } from 'ambient-db'
import { expect, it } from 'vitest'
import { gate, until } from '../support/gate.ts'
import { failure, useWire } from './wire.ts'

const wire = useWire()

it('S1 costs no check-out and no byte when no statement runs', async () => {
  let made = 0
  let prepared = 0
  const main = wire.define({ beforeSession: () => prepared++, hooks: { beforeCommit: () => made++ } })
  await newContext(async () => {
    const session = main.session()
    expect(session.inTransaction).toBe(false)
    expect(main.session()).toBe(session)
    void session.db
    await main.commit()
    await main.rollback()
    await main.closeSession()
    main.session()
  })
  await main.newSession(() => {})
  await main.newSession(() => {}, { hold: true })
  const context = openContext()
  context.run(() => main.session())
  await context.settle('rollback')
  expect(wire.proxy.traffic).toEqual({ roundTrips: 0, sent: 0, received: 0, connections: 0, labels: [] })
  expect(await wire.backends()).toEqual([])
  expect([made, prepared]).toEqual([0, 0])
})

it('S1 sends nothing on a warm pool either', async () => {
  const main = wire.define()
  await newContext(() => main.db.query('select 1'))
  wire.proxy.reset()
  const pool = await main.connect()
  const checkedOut: unknown[] = []
  pool.on('acquire', (client) => checkedOut.push(client))
  await newContext(async () => {
    main.session()
    await main.closeSession('commit')
  })
  expect(checkedOut).toEqual([])
  expect(wire.proxy.traffic.sent).toBe(0)
})

it('S2 opens with the first statement: beforeSession, connection, BEGIN, statement', async () => {
  const order: string[] = []
  const main = wire.define({
    beforeSession: () => {
      order.push(`beforeSession with ${wire.proxy.traffic.connections} connections`)
    },
  })
  await newContext(async () => {
    const session = main.session()
    expect(wire.proxy.traffic.connections).toBe(0)
    await main.db.query('insert into t values (1)')
    expect(order).toEqual(['beforeSession with 0 connections'])
    expect(session.inTransaction).toBe(true)
    expect(sql()).toEqual(['BEGIN', 'insert into t values (1)'])
    const [backend] = await wire.backends()
    expect(backend).toMatchObject({ state: 'idle in transaction', query: 'insert into t values (1)' })
    expect(await wire.ids()).toEqual([])
  })
  expect(sql()).toEqual(['BEGIN', 'insert into t values (1)', 'COMMIT'])
  expect(await wire.ids()).toEqual([1])
  expect(await wire.backends()).toMatchObject([{ state: 'idle', transactionStart: null }])
})

it('S2 lets concurrent first statements share one BEGIN and one connection', async () => {
  const main = wire.define()
  await newContext(async () => {
    await Promise.all([1, 2, 3].map((id) => main.db.query(`insert into t values (${id})`)))
  })
  expect(sql()).toEqual(['BEGIN', ...[1, 2, 3].map((id) => `insert into t values (${id})`), 'COMMIT'])
  expect(wire.proxy.traffic.connections).toBe(1)
  expect(await wire.ids()).toEqual([1, 2, 3])
  expect(wire.warnings).toEqual([])
})

it('S2 leaves the session idle when beforeSession fails, and the next statement tries again', async () => {
  let fail = true
  const refusal = new Error('no secret yet')
  const main = wire.define({
    beforeSession: () => {
      if (fail) throw refusal
    },
  })
  await newContext(async () => {
    expect(await failure(main.db.query('insert into t values (1)'))).toBe(refusal)
    expect(main.session().inTransaction).toBe(false)
    expect(wire.proxy.traffic.connections).toBe(0)
    fail = false
    await main.db.query('insert into t values (2)')
  })
  expect(await wire.ids()).toEqual([2])
})

it('S2 leaves the session idle when no connection can be made, and the next statement tries again', async () => {
  const main = wire.define()
  wire.proxy.at('> startup', 'reset')
  await newContext(async () => {
    const errors = await Promise.all([
      failure(main.db.query('insert into t values (1)')),
      main.db.query('insert into t values (2)'), // behind it in the queue, so it tries again
    ])
    expect(errors[0]).toMatchObject({ code: 'ECONNRESET' })
    expect(main.session().inTransaction).toBe(true)
  })
  expect(await wire.ids()).toEqual([2])
})

it.each(['reset', 'end'] as const)(
  'S2 leaves the session idle when BEGIN is cut by %s, and the next statement tries again',
  async (how) => {
    const main = wire.define({ pool: { max: 1 } })
    wire.proxy.at('> Q BEGIN', how)
    await newContext(async () => {
      expect(await failure(main.db.query('insert into t values (1)'))).toMatchObject({
        message: how === 'reset' ? 'read ECONNRESET' : 'Connection terminated unexpectedly',
      })
      expect(main.session().inTransaction).toBe(false)
      await main.db.query('insert into t values (2)')
    })
    expect(await wire.ids()).toEqual([2])
    expect(wire.proxy.traffic.connections).toBe(2)
  },
)

it('S2 survives a server that greets and hangs up in one breath', async () => {
  const main = wire.define({ pool: { max: 1 } })
  const goodbye = Buffer.from('SFATAL\0VFATAL\0C57P01\0Mterminating connection due to administrator command\0\0')
  const header = Buffer.alloc(5)
  header.write('E')
  header.writeInt32BE(goodbye.length + 4, 1)
  wire.proxy.at('< Z I', ({ bytes }) => Buffer.concat([bytes, header, goodbye]))
  await newContext(async () => {
    expect(await failure(main.db.query('insert into t values (1)'))).toBeInstanceOf(Error)
    await main.db.query('insert into t values (2)')
  })
  expect(await wire.ids()).toEqual([2])
})

it('S3 holds a connection exactly while a transaction is open', async () => {
  const main = wire.define({ pool: { max: 1 } })
  const pool = await main.connect()
  const held = () => pool.totalCount - pool.idleCount
  await newContext(async () => {
    await main.db.query('insert into t values (1)')
    expect(held()).toBe(1)
    await main.commit()
    expect(held()).toBe(0)
    await newContext(() => main.db.query('insert into t values (2)')) // the only connection is free
    await main.begin()
    expect(held()).toBe(1)
    await main.rollback()
    expect(held()).toBe(0)
    await main.atomic(async () => {
      expect(held()).toBe(0) // a block is lazy too
      await main.db.query('insert into t values (3)')
      expect(held()).toBe(1)
    })
    expect(held()).toBe(0)
    await main.db.query('insert into t values (4)')
  })
  expect(held()).toBe(0)
  expect(await wire.ids()).toEqual([1, 2, 3, 4])
})

it('S3 gives the connection back before the context is seen to have ended', async () => {
  const main = wire.define({ pool: { max: 1 }, acquireTimeout: 1000 })
  for (const id of [1, 2, 3]) {
    await newContext(() => main.db.query(`insert into t values (${id})`))
    await newContext(async () => {
      await main.db.query(`insert into t values (${id + 10})`)
      throw new Error('no')
    }).catch(() => {})
  }
  expect(await wire.ids()).toEqual([1, 2, 3])
  expect(wire.proxy.traffic.connections).toBe(1)
})

it('S3 pins one connection with `hold`, and destroys it', async () => {
  const main = wire.define()
  const pids = new Set<number>()
  const pid = async (run: typeof main.db) => pids.add((await run.query('select pg_backend_pid() as pid')).rows[0].pid)
  await main.newSession(
    async ({ db, commit }) => {
      expect(wire.proxy.traffic.connections).toBe(0)
      await db.query('create temporary table kept (id int)')
      await pid(db)
      await commit()
      expect(await wire.backends()).toMatchObject([{ state: 'idle' }])
      await Promise.all([1, 2].map((id) => newContext(() => main.db.query(`insert into t values (${id})`))))
      await db.query('insert into kept values (1)')
      await pid(db)
    },
    { hold: true },
  )
  expect(pids.size).toBe(1)
  await until(async () => (await wire.backends()).every((each) => !pids.has(each.pid)), 'the pinned backend to end')
  expect((await main.connect()).totalCount).toBe((await wire.backends()).length)
})

it('S3 does not keep the connection of a `hold` session that ended while it waited for it', async () => {
  const main = wire.define({ pool: { max: 1 } })
  const [holding, release] = [gate(), gate()]
  const holder = newContext(async () => {
    await main.db.query('select 1')
    holding.open()
    await release.passed
  })
  await holding.passed
  const late = main.newSession((session) => session.db.query('insert into t values (1)'), { hold: true, timeout: 20 })
  expect(await failure(late)).toMatchObject({ code: 'AMBIENT_TIMEOUT' })
  release.open()
  await holder
  await newContext(() => main.db.query('insert into t values (2)'))
  expect(await wire.ids()).toEqual([2])
})

/** The SQL that was sent, in order. */
function sql(): string[] {
  return wire.proxy.traffic.labels.flatMap((label) => /^> [QP] (.*)$/s.exec(label)?.[1] ?? [])
}
