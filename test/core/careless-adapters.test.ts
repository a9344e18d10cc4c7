import { type AmbientDatabase, type DatabaseOptions, defineDatabase, newContext } from 'ambient-db'
import { pgAdapter } from 'ambient-db/pg'
import { Pool, type PoolClient } from 'pg'
import { afterEach, describe, expect, it } from 'vitest'
import type { Adapter, Statements } from '../../src/adapter.ts'
import { until } from '../support/gate.ts'
import { failure, useWire } from './wire.ts'

type RawAdapter = Adapter<Statements<PoolClient>, Pool, PoolClient>

const wire = useWire()
const defined: AmbientDatabase<unknown, Pool>[] = []
afterEach(async () => {
  await Promise.all(defined.splice(0).map(({ shutdown }) => shutdown()))
})

/** A database whose handle is what every handle is built on, over `pg`; `careless` is what its adapter does less well. */
function define(
  careless: (adapter: RawAdapter) => Partial<RawAdapter> = () => ({}),
  options: Partial<DatabaseOptions<Statements<PoolClient>, Pool, PoolClient>> = {},
): AmbientDatabase<Statements<PoolClient>, Pool> {
  const pool = () => new Pool({ connectionString: wire.proxy.url, application_name: 'app', max: 1 })
  const adapter: RawAdapter = { ...pgAdapter(pool), createHandle: (statements) => statements }
  const main = defineDatabase({ name: 'main', ...options, adapter: { ...adapter, ...careless(adapter) } })
  defined.push(main)
  return main
}

function insert(main: AmbientDatabase<Statements<PoolClient>, Pool>, id: number): Promise<unknown> {
  return main.db.run((client) => client.query('insert into t values ($1)', [id]))
}

/** Fails, and resolves all the same, when the server has said what the transaction has come to. */
async function swallowing(client: PoolClient): Promise<void> {
  await client.query('select 1/0').catch(() => {})
  await client.query('select 1').catch(() => {})
}

async function expectFree(main: AmbientDatabase<unknown, Pool>): Promise<void> {
  const pool = await main.connect()
  await until(() => pool.idleCount === pool.totalCount, 'the connection to come back')
  const open = async () => (await wire.backends()).filter(({ transactionStart }) => transactionStart !== null)
  await until(async () => (await open()).length === 0, 'the server to have no transaction open')
}

describe('a handle', () => {
  it('S4 cannot hide that a statement failed where the driver tells the status', async () => {
    const main = define()
    const error = await failure(
      newContext(async () => {
        await insert(main, 1)
        await main.db.run(swallowing)
        expect(await failure(insert(main, 2))).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED' })
      }),
    )
    expect(error).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', outcome: 'rolled-back', cause: undefined })
    expect(wire.proxy.traffic.labels).not.toContain('> Q COMMIT')
    await expectFree(main)
  })

  it('S4 dooms only its savepoint by such a statement', async () => {
    const main = define()
    await newContext(async () => {
      await insert(main, 1)
      const block = main.atomic(
        async () => {
          await main.db.run(swallowing)
        },
        { current: 'savepoint' },
      )
      expect(await failure(block)).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED' })
      await insert(main, 2)
    })
    expect(await wire.ids()).toEqual([1, 2])
  })

  it('S4 does not doom the transaction by a statement that throws before it sends anything', async () => {
    const main = define()
    const slip = new Error('a slip')
    await newContext(async () => {
      await insert(main, 1)
      const unsent = main.db.run(() => {
        throw slip
      })
      expect(await failure(unsent)).toBe(slip)
      await insert(main, 2)
    })
    expect(await wire.ids()).toEqual([1, 2])
  })

  it('S4 dooms the transaction by a statement that rejects with what no server can have said', async () => {
    const main = define()
    const doubt = new Error('no answer, perhaps')
    const error = await failure(
      newContext(async () => {
        await insert(main, 1)
        await main.db.run(() => Promise.reject(doubt)).catch(() => {})
      }),
    )
    expect(error).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', outcome: 'rolled-back' })
    expect(error.cause).toBe(doubt)
    expect(await wire.ids()).toEqual([])
    await expectFree(main)
  })

  it('A4 cannot make, undo or release savepoints of a block that has not begun, nor those that it does not know', async () => {
    const main = define()
    await newContext(async () => {
      await insert(main, 1)
      const block = main.db.createBlock()
      for (const [act, label] of [
        [block.savepoint, 'SAVEPOINT'],
        [block.rollbackTo, 'ROLLBACK TO SAVEPOINT'],
        [block.releaseSavepoint, 'RELEASE SAVEPOINT'],
      ] as const) {
        expect(await failure(act.call(block, 'a'))).toMatchObject({
          code: 'AMBIENT_TRANSACTION_CONTROL',
          database: 'main',
          message: expect.stringContaining(`: ${label} was sent without a transaction on its client.`),
        })
      }
      await block.begin()
      for (const act of [block.rollbackTo, block.releaseSavepoint]) {
        expect(await failure(act.call(block, 'a'))).toMatchObject({
          code: 'AMBIENT_INVALID_ARGUMENT',
          database: 'main',
          message: expect.stringContaining("There is no savepoint 'a'."),
        })
      }
      await block.commit()
    })
    expect(await wire.ids()).toEqual([1])
    expect(wire.proxy.traffic.labels.filter((label) => label.startsWith('> Q SAVEPOINT'))).toEqual([])
  })

  it('K2 runs hooks of a block that they name after the COMMIT of the session, and drops those of one that was rolled back', async () => {
    const main = define()
    const calls: string[] = []
    await newContext(async () => {
      const { db } = main.session()
      for (const handle of [main.db, db]) {
        for (const way of ['commit', 'rollback'] as const) {
          const block = handle.createBlock()
          await block.begin()
          handle.afterCommit(() => calls.push(way), block)
          await block[way]()
          block.release()
          expect(() => handle.afterCommit(() => calls.push('late'), block)).toThrow(
            expect.objectContaining({ code: 'AMBIENT_BLOCK_ENDED' }),
          )
        }
      }
      main.db.afterCommit(() => calls.push('outside'))
      await insert(main, 1)
      expect(calls).toEqual([])
    })
    expect(calls).toEqual(['commit', 'commit', 'outside'])
    await newContext(async () => {
      main.db.afterCommit(() => calls.push('rolled back'))
      throw new Error('planned')
    }).catch(() => {})
    expect(calls).toHaveLength(3)
    expect(() => main.db.afterCommit(() => {})).toThrow(expect.objectContaining({ code: 'AMBIENT_NO_CONTEXT' }))
  })

  it.each(['returns', 'throws'])(
    'S9 gives the connection back when the stream that it opened cannot be destroyed, and the work %s',
    async (how) => {
      const main = define()
      const boom = new Error('destroying it failed')
      const mine = new Error('mine')
      const error = await failure(
        newContext(async () => {
          await insert(main, 1)
          await main.db.openStream(() => {
            throw boom
          })
          if (how === 'throws') throw mine
        }),
      )
      if (how === 'throws') expect(error).toBe(mine)
      else expect(error).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', cause: boom })
      await expectFree(main)
      expect(await wire.ids()).toEqual([])
    },
  )
})

describe('an adapter', () => {
  it('S5 that notices a lost connection only when it sends COMMIT is not told that the outcome is unknown', async () => {
    const main = define((adapter) => ({ acquire: (pool) => adapter.acquire(pool, () => {}) }))
    const error = await failure(
      newContext(async () => {
        await insert(main, 1)
        const [backend] = await wire.backends()
        await wire.kill(backend!.pid)
        await until(() => wire.proxy.open === 0, 'the end of the connection')
      }),
    )
    expect(error).toMatchObject({
      code: 'AMBIENT_TRANSACTION_ABORTED',
      message: expect.stringContaining('The connection was lost before COMMIT was sent.'),
      cause: { message: expect.stringContaining('not queryable') },
    })
    expect(wire.proxy.traffic.labels).not.toContain('> Q COMMIT')
    expect(await wire.ids()).toEqual([])
    await expectFree(main)
  })

  it('S7 whose `release` fails changes no outcome, and the failure is a warning without its message', async () => {
    const main = define((adapter) => ({
      release(pool, client, broken) {
        void adapter.release(pool, client, broken)
        throw Object.assign(new Error(wire.proxy.url), { code: 'E_RELEASE' })
      },
    }))
    await newContext(() => insert(main, 1))
    await newContext(() => insert(main, 2))
    expect(await wire.ids()).toEqual([1, 2])
    await until(() => wire.warnings.length === 2, 'the warnings')
    expect(wire.warnings).toEqual(Array(2).fill('ambient-db: giving a connection back failed: E_RELEASE'))
  })

  it('C8 whose `cancel` fails has the connection destroyed, and nothing is committed', async () => {
    const main = define(() => ({ cancel: () => Promise.reject(new Error('no way')) }))
    const abort = new AbortController()
    const work = failure(
      newContext(() => main.db.run((client) => client.query('select pg_sleep(600)')), { signal: abort.signal }),
    )
    const sleeping = async () => (await wire.backends()).find(({ query }) => query === 'select pg_sleep(600)')
    await until(async () => (await sleeping())?.state === 'active', 'the statement to run')
    abort.abort()
    expect(await work).toMatchObject({ code: 'AMBIENT_ABORTED', outcome: undefined })
    expect((await main.connect()).totalCount).toBe(0)
    const backend = await sleeping()
    await wire.kill(backend!.pid) // the server would notice only at the end of the statement
    await expectFree(main)
  })
})
