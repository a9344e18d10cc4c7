import { newContext } from 'ambient-db'
import { describe, expect, it } from 'vitest'
import { until } from '../support/gate.ts'
import type { Message } from '../support/proxy.ts'
import { failure, useWire } from './wire.ts'

const wire = useWire()
const mine = new Error('mine')

/** Puts a typing error into the SQL of a message: the server refuses it. */
const misspelt = ({ bytes }: Message) =>
  Buffer.from(bytes.toString('latin1').replace('SAVEPOINT', 'SAFEPOINT'), 'latin1')

/** What was sent as a simple query, without the names of savepoints. */
function sent(): string[] {
  return wire.proxy.traffic.labels
    .filter((label) => label.startsWith('> Q'))
    .map((label) => label.slice('> Q '.length).replace(/ ambient_\d+$/, ''))
}

/** The pool has its one connection again, and it is clean. */
async function expectUsable(main: ReturnType<typeof wire.define>, connections: number): Promise<void> {
  await newContext(() => main.db.query('insert into t values (99)'))
  expect(await wire.ids()).toEqual([99])
  expect(wire.proxy.traffic.connections).toBe(connections)
  await until(async () => (await wire.backends()).length === 1, 'what was destroyed to end')
}

describe('a savepoint that cannot be made', () => {
  it('S4 dooms what surrounds it when the server refuses it', async () => {
    const main = wire.define({ pool: { max: 1 } })
    wire.proxy.at('> Q SAVEPOINT', misspelt)
    let first: unknown
    const error = await failure(
      newContext(async () => {
        await main.db.query('insert into t values (1)')
        first = await failure(main.atomic(() => main.db.query('insert into t values (2)'), { current: 'savepoint' }))
        const next = await failure(main.db.query('insert into t values (3)'))
        expect(next).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED' })
        expect(next.cause).toBe(first)
      }),
    )
    expect(first).toMatchObject({ code: '42601' })
    expect(error).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', outcome: 'rolled-back' })
    expect(error.cause).toBe(first)
    expect(sent()).toEqual(['BEGIN', 'insert into t values (1)', 'SAVEPOINT', 'ROLLBACK'])
    await expectUsable(main, 1)
  })

  it.each(['reset', 'end', 'stall'] as const)(
    'S7 leaves the transaction to a new connection when it is lost by %s',
    async (how) => {
      const main = wire.define({ pool: { max: 1, query_timeout: 1000 } })
      wire.proxy.at('> Q SAVEPOINT', how)
      let first: unknown
      const error = await failure(
        newContext(async () => {
          await main.db.query('insert into t values (1)')
          first = await failure(main.atomic(() => main.db.query('insert into t values (2)'), { current: 'savepoint' }))
          await main.db.query('insert into t values (3)')
        }),
      )
      expect(error).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED' })
      expect(error.cause).toBe(first)
      expect(sent()).toEqual(['BEGIN', 'insert into t values (1)', 'SAVEPOINT'])
      await expectUsable(main, how === 'stall' ? 3 : 2) // where it was stalled, a cancel request was a connection of its own
    },
  )
})

describe('a savepoint that cannot be released', () => {
  it('S4 dooms what surrounds it when the server refuses it', async () => {
    const main = wire.define({ pool: { max: 1 } })
    wire.proxy.at('> Q RELEASE', misspelt)
    let first: unknown
    const hooks: string[] = []
    const error = await failure(
      newContext(async () => {
        await main.db.query('insert into t values (1)')
        first = await failure(
          main.atomic(
            async () => {
              main.afterCommit(() => hooks.push('commit'))
              await main.db.query('insert into t values (2)')
            },
            { current: 'savepoint' },
          ),
        )
      }),
    )
    expect(first).toMatchObject({ code: '42601' })
    expect(error).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', outcome: 'rolled-back' })
    expect(error.cause).toBe(first)
    expect(hooks).toEqual([])
    expect(sent()).not.toContain('COMMIT')
    await expectUsable(main, 1)
  })

  it.each(['reset', 'end'] as const)('S4 is not taken for kept when the answer is lost by %s', async (how) => {
    const main = wire.define({ pool: { max: 1 } })
    wire.proxy.at('< C RELEASE', how)
    let first: unknown
    const error = await failure(
      newContext(async () => {
        await main.db.query('insert into t values (1)')
        first = await failure(main.atomic(() => main.db.query('insert into t values (2)'), { current: 'savepoint' }))
      }),
    )
    expect(error).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED' })
    expect(error.cause).toBe(first)
    expect(sent()).not.toContain('COMMIT')
    await expectUsable(main, 2)
  })
})

describe('a savepoint that cannot be undone', () => {
  it.each(['> Q ROLLBACK TO', '> Q RELEASE'])(
    'S4 dooms the transaction when the server refuses %s',
    async (message) => {
      const main = wire.define({ pool: { max: 1 } })
      wire.proxy.at(message, misspelt)
      const error = await failure(
        newContext(async () => {
          await main.db.query('insert into t values (1)')
          const block = main.atomic(
            async () => {
              await main.db.query('insert into t values (2)')
              throw mine
            },
            { current: 'savepoint' },
          )
          expect(await failure(block)).toBe(mine)
          await main.db.query('insert into t values (3)')
        }),
      )
      expect(error).toMatchObject({
        code: 'AMBIENT_TRANSACTION_ABORTED',
        message: expect.stringContaining('Rolling back to a savepoint failed.'),
        cause: { code: '42601' },
      })
      expect(sent()).not.toContain('insert into t values (3)')
      expect(sent().at(-1)).toBe('ROLLBACK')
      await expectUsable(main, 1)
    },
  )

  it('S7 destroys the connection when no answer comes: a ROLLBACK would not overtake it', async () => {
    const main = wire.define({ pool: { max: 1 }, settleTimeout: 1000 })
    wire.proxy.at('> Q ROLLBACK TO', 'stall')
    const error = await failure(
      newContext(async () => {
        await main.db.query('insert into t values (1)')
        const block = main.atomic(
          async () => {
            await main.db.query('insert into t values (2)')
            throw mine
          },
          { current: 'savepoint' },
        )
        expect(await failure(block)).toBe(mine)
        await main.db.query('insert into t values (3)')
      }),
    )
    expect(error).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED' })
    expect(sent()).toEqual([
      'BEGIN',
      'insert into t values (1)',
      'SAVEPOINT',
      'insert into t values (2)',
      'ROLLBACK TO SAVEPOINT',
    ])
    await expectUsable(main, 2)
  })
})
