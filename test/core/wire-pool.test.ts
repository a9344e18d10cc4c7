import { newContext } from 'ambient-db'
import { describe, expect, it } from 'vitest'
import { gate, until } from '../support/gate.ts'
import { failure, useWire } from './wire.ts'

const wire = useWire()

/** Lets the next error arrive well before the status of the transaction that it leaves behind. */
function delayStatus(): void {
  const hold = gate()
  let turns = 0
  void wire.proxy
    .at('< Z', hold)
    .caught.then(() => until(() => ++turns > 50, 'some turns of the event loop'))
    .then(hold.open)
}

describe('S10', () => {
  it.each(['commit', 'COMMIT;', ' end ', 'begin', 'start transaction', 'rollback', 'ABORT', 'savepoint a'])(
    'S10 refuses `%s` unsent',
    async (text) => {
      const main = wire.define()
      await newContext(async () => {
        await main.db.query('insert into t values (1)')
        wire.proxy.reset()
        expect(await failure(main.db.query(text))).toMatchObject({ code: 'AMBIENT_TRANSACTION_CONTROL' })
        expect(await failure(main.db.query({ text }))).toMatchObject({ code: 'AMBIENT_TRANSACTION_CONTROL' })
        expect(wire.proxy.traffic.sent).toBe(0)
        await main.db.query('insert into t values (2)')
      })
      expect(await wire.ids()).toEqual([1, 2])
    },
  )

  it.each([
    ['in a text of several statements', 'insert into t values (2); commit'],
    ['behind a comment in a comment', '/* done /* nearly */ */ commit'],
    ['as a rollback', 'select 1; rollback'],
  ])('S10 detects a transaction that was ended %s', async (_, text) => {
    const main = wire.define({ pool: { max: 1 } })
    const hooks: string[] = []
    const error = await failure(
      newContext(async () => {
        main.afterCommit(() => hooks.push('commit'))
        main.afterRollback(() => hooks.push('rollback'))
        await main.db.query('insert into t values (1)')
        await main.db.query(text)
        const refused = await failure(main.db.query('insert into t values (3)'))
        expect(refused).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', outcome: 'unknown' })
        expect(refused.message).toContain('earlier work may be committed')
      }),
    )
    expect(error).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', outcome: 'unknown' })
    expect(error.message).toContain('earlier work may be committed')
    expect(hooks).toEqual([])
    expect(await wire.ids()).not.toContain(3)
    const pool = await main.connect()
    expect([pool.totalCount, pool.idleCount]).toEqual([1, 1])
  })

  it('S10 never calls work rolled back that a hidden COMMIT made durable before a statement failed', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const error = await failure(
      newContext(async () => {
        await main.db.query('insert into t values (1)')
        delayStatus()
        await main.db.query('insert into t values (2); commit; select * from missing').catch(() => {})
      }),
    )
    expect(await wire.ids()).toEqual([1, 2])
    expect(error).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', outcome: 'unknown' })
    expect(error.message).toContain('earlier work may be committed')
    expect(error.cause).toMatchObject({ code: '42P01' })
  })

  it('S10 leaves no transaction open that SQL began in a context without transactions', async () => {
    const main = wire.define({ pool: { max: 1 } })
    await newContext(
      async () => {
        expect(await failure(main.db.query('select 1; begin; insert into t values (1)'))).toMatchObject({
          code: 'AMBIENT_TRANSACTION_CONTROL',
        })
        delayStatus()
        await main.db.query('select 1; begin; select * from missing').catch(() => {})
      },
      { transaction: 'autocommit' },
    )
    const client = await (await main.connect()).connect()
    expect((await client.query('select 1 as n')).rows).toEqual([{ n: 1 }])
    expect(client.getTransactionStatus()).toBe('I')
    client.release()
    expect(await wire.ids()).toEqual([])
  })
})

describe('S11', () => {
  it('S11 bounds the wait for a connection, and says how many are held around it', async () => {
    const main = wire.define({ pool: { max: 2 }, acquireTimeout: 500 })
    await newContext(async () => {
      await main.db.query('insert into t values (1)')
      await main.newSession(async (session) => {
        await session.db.query('insert into t values (2)')
        const error = await failure(newContext(() => main.db.query('insert into t values (3)')))
        expect(error).toMatchObject({ code: 'AMBIENT_ACQUIRE_TIMEOUT', statusCode: 503, database: 'main' })
        expect(error.message).toMatch(/within 500 ms; this context and its parents hold 2 of them/)
      })
    })
    expect(await wire.ids()).toEqual([1, 2])
  })

  it('S11 counts only what its own context and parents hold', async () => {
    const main = wire.define({ pool: { max: 1 }, acquireTimeout: 500 })
    const [holding, release] = [gate(), gate()]
    const holder = newContext(async () => {
      await main.db.query('select 1')
      holding.open()
      await release.passed
    })
    await holding.passed
    const error = await failure(newContext(() => main.db.query('select 1')))
    expect(error.message).toMatch(/hold 0 of them/)
    release.open()
    await holder
  })

  it('S11 leaves the session idle, so that a later statement tries again', async () => {
    const main = wire.define({ pool: { max: 1 }, acquireTimeout: 500 })
    const [holding, release] = [gate(), gate()]
    const holder = newContext(async () => {
      await main.db.query('select 1')
      holding.open()
      await release.passed
    })
    await holding.passed
    await newContext(async () => {
      expect(await failure(main.db.query('insert into t values (1)'))).toMatchObject({
        code: 'AMBIENT_ACQUIRE_TIMEOUT',
      })
      expect(main.session().inTransaction).toBe(false)
      release.open()
      await holder
      await main.db.query('insert into t values (2)')
    })
    expect(await wire.ids()).toEqual([2])
  })

  it('S11 gives a connection back that comes after the wait was given up', async () => {
    const main = wire.define({ pool: { max: 1 }, acquireTimeout: 500 })
    const hold = gate()
    wire.proxy.at('< Z I', hold) // the greeting of a slow server
    expect(await failure(newContext(() => main.db.query('select 1')))).toMatchObject({
      code: 'AMBIENT_ACQUIRE_TIMEOUT',
    })
    hold.open()
    const pool = await main.connect()
    await until(() => pool.idleCount === 1, 'the late connection to be back')
    expect(wire.proxy.traffic.labels.filter((label) => label.startsWith('> Q'))).toEqual([])
    await newContext(() => main.db.query('insert into t values (1)'))
    expect(wire.proxy.traffic.connections).toBe(1)
    expect(await wire.ids()).toEqual([1])
  })

  it('S11 survives a late connection that failed', async () => {
    const main = wire.define({ pool: { max: 1 }, acquireTimeout: 500 })
    const hold = gate()
    wire.proxy.at('< Z I', hold)
    expect(await failure(newContext(() => main.db.query('select 1')))).toMatchObject({
      code: 'AMBIENT_ACQUIRE_TIMEOUT',
    })
    wire.proxy.cut('reset')
    await until(async () => (await main.connect()).totalCount === 0, 'the pool to notice')
    await newContext(() => main.db.query('insert into t values (1)'))
    expect(await wire.ids()).toEqual([1])
  })
})
