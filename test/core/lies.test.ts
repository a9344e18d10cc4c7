import { type AmbientDatabase, type DatabaseOptions, defineDatabase, newContext, openContext } from 'ambient-db'
import { kyselyAdapter } from 'ambient-db/kysely'
import { pgAdapter } from 'ambient-db/pg'
import { PostgresDialect } from 'kysely'
import { Pool, type PoolClient, Query } from 'pg'
import Cursor from 'pg-cursor'
import QueryStream from 'pg-query-stream'
import { describe, expect, it } from 'vitest'
import { gate, until } from '../support/gate.ts'
import { failure, useWire } from './wire.ts'

const wire = useWire()
const forever = () => new Promise<never>(() => {})
/** A signal that fires when a message like this is sent. */
const firesAt = (match: string): AbortSignal => {
  const controller = new AbortController()
  void wire.proxy.at(match, ({ bytes }) => bytes).caught.then(() => setTimeout(() => controller.abort(), 20))
  return controller.signal
}
const sleep = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms))

describe('C8 says rolled-back only of what the server has said it of', () => {
  it('C8 not of a session that was committed and closed before the deadline', async () => {
    const main = wire.define()
    const controller = new AbortController()
    const error = await failure(
      newContext(
        async () => {
          await main.db.query('insert into t values (1)')
          await main.closeSession('commit')
          controller.abort()
          await forever()
        },
        { signal: controller.signal },
      ),
    )
    expect([error.code, error.outcome, await wire.ids()]).toEqual(['AMBIENT_ABORTED', undefined, [1]])
  })

  it('C8 not of statements without a transaction', async () => {
    const main = wire.define()
    const controller = new AbortController()
    const error = await failure(
      newContext(
        async () => {
          await main.db.query('insert into t values (1)')
          controller.abort()
          await forever()
        },
        { signal: controller.signal, transaction: 'autocommit' },
      ),
    )
    expect([error.code, error.outcome, await wire.ids()]).toEqual(['AMBIENT_ABORTED', undefined, [1]])
  })

  it('C8 not of streams without a transaction', async () => {
    const main = wire.define()
    const controller = new AbortController()
    const error = await failure(
      newContext(
        async () => {
          await main.db.query(new Cursor('insert into t values (1) returning id')).read(1)
          controller.abort()
          await forever()
        },
        { signal: controller.signal, transaction: 'autocommit' },
      ),
    )
    expect([error.code, error.outcome, await wire.ids()]).toEqual(['AMBIENT_ABORTED', undefined, [1]])
  })

  it('C8 not after a COMMIT by hand whose outcome is unknown', async () => {
    const main = wire.define()
    const controller = new AbortController()
    const error = await failure(
      newContext(
        async () => {
          await main.db.query('insert into t values (1)')
          wire.proxy.at('< C COMMIT', 'reset')
          await main.commit().catch(() => {})
          controller.abort()
          await forever()
        },
        { signal: controller.signal },
      ),
    )
    expect([error.code, error.outcome, await wire.ids()]).toEqual(['AMBIENT_ABORTED', undefined, [1]])
  })

  it('C8 not while a ROLLBACK by hand is unanswered', async () => {
    const main = wire.define({ settleTimeout: 500 })
    const controller = new AbortController()
    const error = await failure(
      newContext(
        async () => {
          await main.db.query('insert into t values (1)')
          void wire.proxy.at('> Q ROLLBACK', 'stall').caught.then(() => controller.abort())
          await main.rollback()
        },
        { signal: controller.signal },
      ),
    )
    expect([error.code, error.outcome]).toEqual(['AMBIENT_ABORTED', undefined])
  })

  it('C8 not after a ROLLBACK by hand that got no answer', async () => {
    const main = wire.define()
    const controller = new AbortController()
    const error = await failure(
      newContext(
        async () => {
          await main.db.query('insert into t values (1)')
          wire.proxy.at('> Q ROLLBACK', 'reset')
          await main.rollback()
          controller.abort()
          await forever()
        },
        { signal: controller.signal },
      ),
    )
    expect([error.code, error.outcome]).toEqual(['AMBIENT_ABORTED', undefined])
  })

  it('A5 not by a block of which an attempt was rolled back without an answer', async () => {
    const main = wire.define()
    let attempts = 0
    const error = await failure(
      newContext(() =>
        main.atomic(
          async () => {
            if (++attempts === 2) return main.commit()
            await main.db.query('insert into t values (1)')
            wire.proxy.at('> Q ROLLBACK', 'reset')
            await main.db.query("do $$ begin raise sqlstate '40001'; end $$")
          },
          { retry: { attempts: 2 } },
        ),
      ),
    )
    expect([attempts, error.code, error.outcome]).toEqual([2, 'AMBIENT_ATOMIC_NESTING', undefined])
  })

  it('C8 not by a unit that the error of another one passes', async () => {
    const main = wire.define()
    const controller = new AbortController()
    const error = await failure(
      newContext(async () => {
        await main.db.query('insert into t values (1)')
        await main.newSession(
          async (session) => {
            await session.db.query('insert into t values (2)')
            await session.commit()
            controller.abort()
            await forever()
          },
          { signal: controller.signal },
        )
      }),
    )
    expect([error.code, error.outcome, await wire.ids()]).toEqual(['AMBIENT_ABORTED', undefined, [2]])
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
      await sleep(400)
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

describe('C4', () => {
  it('C4 lets a hook open nothing while its context is rolled back: no pool slot is lost', async () => {
    const main = wire.define({ name: 'main' })
    const other = wire.define({ name: 'other', pool: { max: 1 } })
    const seen: unknown[] = []
    wire.proxy.at('> Q ROLLBACK', { stall: 300 })
    const work = async () => {
      await main.db.query('insert into t values (1)')
      main.beforeCommit(async () => {
        await main.db.query('select pg_sleep(2)').catch(() => {})
        await other.db.query('insert into t values (2)').catch((error) => seen.push(error))
      })
    }
    expect(await failure(newContext(work, { signal: firesAt('> Q select pg_sleep') }))).toMatchObject({
      code: 'AMBIENT_ABORTED',
    })
    expect(seen).toMatchObject([{ code: 'AMBIENT_CONTEXT_ENDED', database: 'other' }])
    await newContext(() => other.db.query('insert into t values (3)'))
    expect(await wire.ids()).toEqual([3])
  })

  it('C4 takes nothing for an outcome that is none', async () => {
    const main = wire.define()
    const context = openContext()
    await context.run(() => main.db.query('insert into t values (1)'))
    expect(await failure(context.settle('COMMIT' as 'commit'))).toMatchObject({ code: 'AMBIENT_INVALID_ARGUMENT' })
    await context.settle('commit')
    expect(await wire.ids()).toEqual([1])
  })

  it('C4 refuses a hook that waits for the end which waits for the hook', async () => {
    const main = wire.define()
    const context = openContext()
    await context.run(async () => {
      await main.db.query('insert into t values (1)')
      main.beforeCommit(() => context.settle('commit'))
    })
    expect(await failure(context.settle('commit'))).toMatchObject({ code: 'AMBIENT_ATOMIC_NESTING' })
    expect([context.state, await wire.ids()]).toEqual(['failed', []])
  })
})

describe('C8 ends a block whose deadline passes in its hooks', () => {
  for (const [what, hook] of [
    ['take long', () => sleep(500)],
    ['never end', forever],
  ] as const) {
    it(`C8 if they ${what}: no COMMIT afterwards, and the session goes on`, async () => {
      const main = wire.define()
      await newContext(async () => {
        const block = main.atomic(
          async () => {
            await main.db.query('insert into t values (1)')
            main.beforeCommit(hook)
          },
          { timeout: 200 },
        )
        expect(await failure(block)).toMatchObject({ code: 'AMBIENT_TIMEOUT' })
        await main.db.query('insert into t values (2)')
      })
      expect(await wire.ids()).toEqual([2])
    })
  }

  it('C8 and cancels the statement of the hook', async () => {
    const main = wire.define()
    const error = await failure(
      newContext(() =>
        main.atomic(
          async () => {
            await main.db.query('insert into t values (1)')
            main.beforeCommit(() => main.db.query('select pg_sleep(10)'))
          },
          { timeout: 200 },
        ),
      ),
    )
    expect(error).toMatchObject({ code: 'AMBIENT_TIMEOUT' })
    expect(await wire.backends()).toMatchObject([{ transactionStart: null }])
  })
})

describe('C8 S7', () => {
  it('C8 S7 gives no connection back while a request to cancel is on its way to it', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const hold = gate()
    const request = wire.proxy.at('> cancel', hold)
    const options = { signal: firesAt('> Q select pg_sleep'), transaction: 'autocommit' } as const
    const aborted = failure(newContext(() => main.db.query('select pg_sleep(0.3)'), options))
    const next = request.caught.then(() => newContext(() => main.db.query('select pg_sleep(0.5)')))
    await request.caught
    await sleep(300) // the first statement has ended by itself
    hold.open()
    expect(await aborted).toMatchObject({ code: 'AMBIENT_ABORTED' })
    await next
  })
})

describe('C4 S7 leaves nothing open when it is aborted a moment after BEGIN', () => {
  const insert = 'insert into t values (1) returning id'
  const works: Record<string, (main: AmbientDatabase<Pool, Pool>) => Promise<unknown>> = {
    'by a statement': (main) => main.db.query(insert),
    'by statements of two branches': (main) => Promise.all([main.db.query(insert), main.db.query('select 1')]),
    'by a cursor': (main) => main.db.query(new Cursor(insert)).read(1),
    'by a stream': async (main) => {
      for await (const _ of main.db.query(new QueryStream(insert)));
    },
    'by hand': (main) => main.begin().then(() => main.db.query(insert)),
    'by a block': (main) => main.atomic(() => main.db.query(insert)),
    'by a savepoint': (main) => main.atomic(() => main.atomic(() => main.db.query(insert))),
    'by a native transaction': async (main) => {
      const client = await main.db.connect()
      await client.query('begin')
      await client.query(insert)
      await client.query('commit')
      client.release()
    },
  }
  const variants: Record<string, Partial<DatabaseOptions<Pool, Pool, PoolClient>> & { pipeline?: boolean }> = {
    '': {},
    ', with an afterBegin hook': { hooks: { afterBegin: (session) => (session.db as Pool).query('select 2') } },
    ', to be looked up': { resolvable: true },
    ', pipelined': { pipeline: true },
  }

  for (const [how, work] of Object.entries(works)) {
    for (const [variant, { pipeline = false, ...options }] of Object.entries(variants)) {
      if (pipeline && /cursor|stream/.test(how)) continue
      it(`C4 S7 ${how}${variant}`, async () => {
        const pool = new Pool({ connectionString: wire.proxy.url, application_name: 'app', max: 1, pipeline })
        const adapter = pgAdapter(() => pool)
        let onBegun = () => {}
        const begin: typeof adapter.begin = (client, settings) => {
          const answer = adapter.begin(client, settings)
          answer.then(onBegun, () => {})
          return answer
        }
        const main = defineDatabase({ name: 'main', adapter: { ...adapter, begin }, acquireTimeout: 5000, ...options })
        for (let moment = 0; moment <= 40; moment++) {
          const controller = new AbortController()
          onBegun = async () => {
            for (let passed = 0; passed < moment; passed++) await undefined
            controller.abort()
          }
          const unit = async () => {
            await work(main)
            await forever()
          }
          const error = await failure(newContext(unit, { signal: controller.signal }))
          onBegun = () => {}
          expect([moment, error.code, error.outcome, error.cleanupErrors]).toEqual([
            moment,
            'AMBIENT_ABORTED',
            'rolled-back',
            undefined,
          ])
          expect([moment, pool.totalCount, pool.idleCount, pool.waitingCount]).toEqual([moment, 1, 1, 0])
          expect(await wire.backends()).toMatchObject([{ transactionStart: null }])
        }
        expect(await wire.ids()).toEqual([])
        await newContext(() => main.db.query(insert))
        expect(await wire.ids()).toEqual([1])
        await main.shutdown()
      })
    }
  }
})

describe('S4', () => {
  it('S4 says committed what was, though the pool throws when the connection goes back', async () => {
    const adapter = pgAdapter(() => new Pool({ connectionString: wire.proxy.url }))
    const main = defineDatabase({
      name: 'main',
      adapter: {
        ...adapter,
        release(pool, client, broken) {
          void adapter.release(pool, client, broken)
          throw new Error('planned')
        },
      },
    })
    await newContext(() => main.db.query('insert into t values (1)'))
    expect(await wire.ids()).toEqual([1])
    await main.shutdown()
    expect(wire.warnings).toContainEqual(expect.stringContaining('giving a connection back failed'))
  })
})

describe('K2', () => {
  it('K2 leaves no unhandled rejection when onHookError is async and fails', async () => {
    const onHookError = (async () => {
      throw new Error('planned')
    }) as () => void
    const main = wire.define({ onHookError })
    await newContext(async () => {
      await main.db.query('insert into t values (1)')
      main.afterCommit(() => {
        throw new Error('of the hook')
      })
    })
    await sleep(20)
    expect(wire.warnings).toContainEqual(expect.stringContaining('planned'))
  })
})

describe('S9', () => {
  it('S9 ends no stream because of one before it that never had its turn', async () => {
    const main = wire.define()
    await newContext(async () => {
      await main.db.query('insert into t values (1)')
      const block = main.atomic(
        async () => {
          void main.db.query('select pg_sleep(0.1)').catch(() => {})
          void main.db
            .query(new Cursor('select * from t'))
            .read(1)
            .catch(() => {})
          throw new Error('planned')
        },
        { current: 'savepoint' },
      )
      expect(await failure(block)).toMatchObject({ message: 'planned' })
      const cursor = main.db.query(new Cursor('select * from t'))
      expect(await cursor.read(1)).toEqual([{ id: 1 }])
      await cursor.close()
    })
  })
})

describe('S10 finds out that SQL has ended the transaction', () => {
  const aborted = { code: 'AMBIENT_TRANSACTION_ABORTED', outcome: 'unknown' }

  for (const text of [
    'insert into t values (2); commit; begin',
    'select 1; commit and chain',
    'select 1; rollback; begin',
    'select 1; rollback and chain',
  ]) {
    it(`S10 though another one is open since: ${text}`, async () => {
      const main = wire.define()
      const work = async () => {
        await main.db.query('insert into t values (1)')
        await main.db.query(text)
      }
      expect(await failure(newContext(work))).toMatchObject(aborted)
    })
  }

  it('S10 and leaves savepoints alone that SQL makes and goes back to', async () => {
    const main = wire.define()
    await newContext(async () => {
      await main.db.query('insert into t values (1)')
      await main.db.query('savepoint mine; insert into t values (2); rollback to mine; release mine')
    })
    expect(await wire.ids()).toEqual([1])
  })

  it('S10 by a cursor', async () => {
    const main = wire.define()
    const work = async () => {
      await main.db.query('insert into t values (1)')
      await main.db.query(new Cursor('/* not a comment /* alone */ */ rollback')).read(1)
    }
    expect(await failure(newContext(work))).toMatchObject(aborted)
  })

  it('S10 and does not call it rolled back when it is rolled back by hand, but goes on', async () => {
    const main = wire.define()
    await newContext(async () => {
      await main.db.query('insert into t values (1)')
      await main.db.query('select 1; commit')
      expect(await failure(main.rollback())).toMatchObject(aborted)
      await main.db.query('insert into t values (2)')
      await main.db.query('select 1; commit')
      expect(await failure(main.closeSession('rollback'))).toMatchObject(aborted)
      await main.db.query('insert into t values (3)')
    })
    expect(await wire.ids()).toEqual([1, 2, 3])
  })

  it('S10 leaves no transaction open that SQL began after it had ended one, where there are none', async () => {
    const main = wire.define({ pool: { max: 1 }, transaction: 'autocommit' })
    const sneaky = 'begin; commit; begin; insert into t values (1)'
    expect(await failure(newContext(() => main.db.query(sneaky)))).toMatchObject({
      code: 'AMBIENT_TRANSACTION_CONTROL',
    })
    await newContext(() => main.db.query('insert into t values (2)'))
    expect(await wire.ids()).toEqual([2])
  })

  for (const text of ['/* x */ COMMIT', '-- x\nROLLBACK', ';COMMIT', '/**//* y **/ -- z\n ; commit and chain']) {
    it(`S10 or refuses it unsent: ${JSON.stringify(text)}`, async () => {
      const main = wire.define()
      const refused = { code: 'AMBIENT_TRANSACTION_CONTROL' }
      await newContext(async () => {
        await main.db.query('insert into t values (1)')
        expect(await failure(main.db.query(text))).toMatchObject(refused)
        expect(await failure(main.db.query(new Cursor(text)).read(1))).toMatchObject(refused)
        const query = main.db.query(new Query(text))
        expect(await new Promise((resolve) => query.once('error', resolve))).toMatchObject(refused)
      })
      expect(await wire.ids()).toEqual([1])
    })
  }

  it('S10 and says that what SQL began without a transaction is rolled back', async () => {
    const main = wire.define()
    const work = () => main.db.query('begin; insert into t values (1)')
    expect(await failure(newContext(work, { transaction: 'autocommit' }))).toMatchObject({
      code: 'AMBIENT_TRANSACTION_CONTROL',
    })
    expect(await wire.ids()).toEqual([])
    await newContext(() => main.db.query('begin; insert into t values (2); commit'), { transaction: 'autocommit' })
    expect(await wire.ids()).toEqual([2])
  })
})

describe('D1 D3 make an engine for each use of a dialect', () => {
  const dialectAdapter = () =>
    kyselyAdapter<{ t: { id: number } }>(
      (_host) => new PostgresDialect({ pool: new Pool({ connectionString: wire.proxy.url }) }),
    )

  it('D3 also for a host that is gone back to while work is under way on it', async () => {
    const main = defineDatabase({ name: 'main', host: 'a', adapter: dialectAdapter() })
    const insert = (id: number) => main.db.insertInto('t').values({ id }).execute()
    await newContext(async () => {
      await insert(1)
      await main.changeHost('b')
      await main.changeHost('a')
    })
    await until(() => wire.proxy.open === 0, 'the end of the old engine')
    await newContext(() => insert(2))
    await main.shutdown()
    expect(await wire.ids()).toEqual([1, 2])
  })

  it('D1 also for two databases with one adapter', async () => {
    const adapter = dialectAdapter()
    const one = defineDatabase({ name: 'one', host: 'a', adapter })
    const two = defineDatabase({ name: 'two', host: 'a', adapter })
    await newContext(() => one.db.insertInto('t').values({ id: 1 }).execute())
    await newContext(() => two.db.insertInto('t').values({ id: 2 }).execute())
    await one.shutdown()
    await newContext(() => two.db.insertInto('t').values({ id: 3 }).execute())
    await two.shutdown()
    expect(await wire.ids()).toEqual([1, 2, 3])
  })
})
