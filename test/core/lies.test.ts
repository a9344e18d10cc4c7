import { newContext } from 'ambient-db'
import { describe, expect, it } from 'vitest'
import { gate } from '../support/gate.ts'
import { failure, useWire } from './wire.ts'

const wire = useWire()
const forever = () => new Promise<never>(() => {})

describe('C8 says rolled-back only of what the server has said it of', () => {
  it('C8 not of a session that was committed and closed before the deadline', async () => {
    const main = wire.define()
    const error = await failure(
      newContext(
        async () => {
          await main.db.query('insert into t values (1)')
          await main.closeSession('commit')
          await forever()
        },
        { timeout: 200 },
      ),
    )
    expect([error.code, error.outcome, await wire.ids()]).toEqual(['AMBIENT_TIMEOUT', undefined, [1]])
  })

  it('C8 not of statements without a transaction', async () => {
    const main = wire.define()
    const error = await failure(
      newContext(
        async () => {
          await main.db.query('insert into t values (1)')
          await forever()
        },
        { timeout: 200, transaction: 'autocommit' },
      ),
    )
    expect([error.code, error.outcome, await wire.ids()]).toEqual(['AMBIENT_TIMEOUT', undefined, [1]])
  })

  it('C8 not after a COMMIT by hand whose outcome is unknown', async () => {
    const main = wire.define()
    const error = await failure(
      newContext(
        async () => {
          await main.db.query('insert into t values (1)')
          wire.proxy.at('< C COMMIT', 'reset')
          await main.commit().catch(() => {})
          await forever()
        },
        { timeout: 200 },
      ),
    )
    expect([error.code, error.outcome, await wire.ids()]).toEqual(['AMBIENT_TIMEOUT', undefined, [1]])
  })

  it('C8 not while a ROLLBACK by hand is unanswered', async () => {
    const main = wire.define({ settleTimeout: 500 })
    const error = await failure(
      newContext(
        async () => {
          await main.db.query('insert into t values (1)')
          wire.proxy.at('> Q ROLLBACK', 'stall')
          await main.rollback()
        },
        { timeout: 200 },
      ),
    )
    expect([error.code, error.outcome]).toEqual(['AMBIENT_TIMEOUT', undefined])
  })

  it('C8 not by a unit that the error of another one passes', async () => {
    const main = wire.define()
    const error = await failure(
      newContext(async () => {
        await main.db.query('insert into t values (1)')
        await main.newSession(
          async (session) => {
            await session.db.query('insert into t values (2)')
            await session.commit()
            await forever()
          },
          { timeout: 200 },
        )
      }),
    )
    expect([error.code, error.outcome, await wire.ids()]).toEqual(['AMBIENT_TIMEOUT', undefined, [2]])
  })

  it('D4 not of one context for another at a shutdown', async () => {
    const main = wire.define({ settleTimeout: 200 })
    const begun = gate()
    const rolledBack = failure(
      newContext(async () => {
        await main.db.query('insert into t values (1)')
        begun.open()
        await forever()
      }, {}),
    )
    const committed = newContext(async () => {
      await main.db.query('insert into t values (2)')
      await main.commit()
      await main.db.query('insert into t values (3)')
      await begun.passed
      void main.shutdown()
      await new Promise((resolve) => setTimeout(resolve, 400))
    })
    const error = await failure(committed)
    expect([error.code, error.outcome, await wire.ids()]).toEqual(['AMBIENT_SHUT_DOWN', undefined, [2]])
    void rolledBack
  })
})

describe('S7', () => {
  it('S7 keeps the identity of an error that is frozen', async () => {
    const main = wire.define()
    let frozen: unknown
    const error = await failure(
      newContext(async () => {
        await main.db.query('insert into t values (1)')
        frozen = Object.freeze(await failure(main.closeSession()))
        throw frozen
      }),
    )
    expect(error).toBe(frozen)
    expect(await wire.ids()).toEqual([])
  })
})
