import { AsyncLocalStorage } from 'node:async_hooks'
import { once } from 'node:events'
import { Readable } from 'node:stream'
import { isAmbientError, newContext, openContext } from 'ambient-db'
import { type Pool, Query } from 'pg'
import Cursor from 'pg-cursor'
import QueryStream from 'pg-query-stream'
import { describe, expect, it } from 'vitest'
import { gate, until } from '../support/gate.ts'
import { failure, useWire } from './wire.ts'

type Main = ReturnType<typeof wire.define>

const wire = useWire()
const numbers = 'select n from generate_series(1, 1000) n'

function stream(sql = numbers, options = {}): QueryStream {
  return new QueryStream(sql, [], { batchSize: 10, highWaterMark: 10, ...options })
}

function isFree(pool: Pool): boolean {
  return pool.idleCount === pool.totalCount && pool.waitingCount === 0
}

describe('S9', () => {
  it('S9 reads a stream to its end inside the transaction, then goes on', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const seen: number[] = []
    await newContext(async () => {
      await main.db.query('insert into t values (1)')
      for await (const { n } of main.db.query(stream('select id + 9 as n from t union all select 11'))) seen.push(n)
      await main.db.query('insert into t values (2)')
    })
    expect(seen).toEqual([10, 11])
    expect(wire.proxy.traffic.labels.filter((label) => label.startsWith('> Q'))).toEqual([
      '> Q BEGIN',
      '> Q insert into t values (1)',
      '> Q insert into t values (2)',
      '> Q COMMIT',
    ])
    expect(await wire.ids()).toEqual([1, 2])
    expect(wire.warnings).toEqual([])
  })

  it('S9 reads a cursor in parts and closes it early', async () => {
    const main = wire.define({ pool: { max: 1 } })
    await newContext(async () => {
      const cursor = main.db.query(new Cursor<{ n: number }>(numbers))
      expect(await cursor.read(2)).toEqual([{ n: 1 }, { n: 2 }])
      const rows = await new Promise((resolve) => cursor.read(2, (_, read) => resolve(read)))
      expect(rows).toEqual([{ n: 3 }, { n: 4 }])
      await cursor.close()
      await main.db.query('insert into t values (1)')
    })
    expect(await wire.ids()).toEqual([1])
    expect(isFree(await main.connect())).toBe(true)
  })

  it.each(['stream', 'cursor'] as const)(
    'S9 closes a %s whose rows were asked for and not described yet',
    async (kind) => {
      const main = wire.define({ pool: { max: 1 } })
      const description = gate()
      wire.proxy.at('< T', description)
      const asked = () => until(() => wire.proxy.traffic.labels.some((label) => label.startsWith('> E')), 'the request')
      await newContext(async () => {
        if (kind === 'stream') {
          const rows = main.db.query(stream())
          rows.read()
          await asked()
          const closed = once(rows.destroy(), 'close')
          description.open()
          await closed
        } else {
          const cursor = main.db.query(new Cursor<{ n: number }>(numbers))
          const read = cursor.read(2)
          await asked()
          const closed = cursor.close()
          description.open()
          expect(await read).toEqual([{ n: 1 }, { n: 2 }])
          await closed
        }
        await main.db.query('insert into t values (1)')
      })
      expect(await wire.ids()).toEqual([1])
      expect(isFree(await main.connect())).toBe(true)
    },
  )

  it('S9 keeps a connection in step whose cursor is closed again in the callback of its last read', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const [rows, closing] = [gate(), gate()]
    wire.proxy.at('< D', rows)
    wire.proxy.at('< 3', closing)
    await newContext(async () => {
      const cursor = main.db.query(new Cursor(numbers))
      const read = gate()
      const closedAgain = new Promise<void>((resolve) => {
        cursor.read(2, () => {
          cursor.close(() => resolve())
          read.open()
        })
      })
      await until(() => wire.proxy.traffic.labels.some((label) => label.startsWith('> E')), 'the request for rows')
      const closed = cursor.close()
      rows.open()
      await read.passed
      closing.open()
      await Promise.all([closed, closedAgain])
      await main.db.query('insert into t values (1)')
    })
    expect(await wire.ids()).toEqual([1])
    expect(wire.proxy.traffic.labels.filter((label) => label === '> S')).toHaveLength(1)
  })

  it('S9 closes a cursor that was never read, and one that was closed at once', async () => {
    const main = wire.define({ pool: { max: 1 } })
    await newContext(async () => {
      const cursor = main.db.query(new Cursor(numbers))
      await cursor.close()
      await main.db.query('insert into t values (1)')
      const second = main.db.query(new Cursor(numbers))
      await second.read(1)
      await second.close()
      await second.close() // harmless
      await main.db.query('insert into t values (2)')
    })
    expect(await wire.ids()).toEqual([1, 2])
  })

  it('S9 answers a read that was waiting when its cursor was closed before its turn', async () => {
    const main = wire.define({ pool: { max: 1 } })
    await newContext(async () => {
      const cursor = main.db.query(new Cursor(numbers))
      const reading = cursor.read(1).catch(() => 'refused')
      await cursor.close()
      await Promise.race([reading, main.db.query('select 1')])
      await reading
    })
  })

  it('S9 refuses statements, blocks and commit while a stream is open, and never hangs', async () => {
    const main = wire.define({ pool: { max: 1 } })
    await newContext(async () => {
      await main.db.query('insert into t values (1)')
      const cursor = main.db.query(new Cursor(numbers))
      await cursor.read(1)
      wire.proxy.reset()
      const refused = { code: 'AMBIENT_STREAM_OPEN', database: 'main' }
      expect(await failure(main.db.query('select 1'))).toMatchObject(refused)
      expect(await failure(main.atomic(() => 1))).toMatchObject(refused)
      expect(await failure(main.session().savepoint(() => 1))).toMatchObject(refused)
      expect(await failure(main.commit())).toMatchObject(refused)
      expect(await failure(main.rollback())).toMatchObject(refused)
      expect(await failure(main.closeSession('commit'))).toMatchObject(refused)
      const second = main.db.query(new Cursor('select 2'))
      expect(await failure(second.read(1))).toMatchObject(refused)
      expect(wire.proxy.traffic.sent).toBe(0)
      await cursor.close()
      await main.db.query('insert into t values (2)')
    })
    expect(await wire.ids()).toEqual([1, 2])
  })

  it('S9 ends a stream that is left by `break`', async () => {
    const main = wire.define({ pool: { max: 1 } })
    await newContext(async () => {
      for await (const { n } of main.db.query(stream())) {
        if (n === 5) break
      }
      await main.db.query('insert into t values (1)')
    })
    expect(await wire.ids()).toEqual([1])
    expect(isFree(await main.connect())).toBe(true)
  })

  it('S9 rejects the commit with the error of a stream that failed', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const error = await failure(
      newContext(async () => {
        await main.db.query('insert into t values (1)')
        const failing = (async () => {
          for await (const _ of main.db.query(stream('select 1 / (500 - n) from generate_series(1, 1000) n')));
        })()
        expect(await failure(failing)).toMatchObject({ code: '22012' })
      }),
    )
    expect(error).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', cause: { code: '22012' } })
    expect(await wire.ids()).toEqual([])
    expect(isFree(await main.connect())).toBe(true)
    expect(wire.proxy.traffic.connections).toBe(1)
  })

  it('S9 notices a stream whose SQL is wrong, and a cursor', async () => {
    const main = wire.define({ pool: { max: 1 } })
    for (const read of [
      () => main.db.query(stream('select * from missing')).toArray(),
      () => main.db.query(new Cursor('select * from missing')).read(1),
    ]) {
      await newContext(async () => {
        expect(await failure(read())).toMatchObject({ code: '42P01' })
        await main.rollback()
        await main.db.query('insert into t values (1) on conflict do nothing')
      })
    }
    expect(await wire.ids()).toEqual([1])
  })

  it('S4 refuses a stream in a transaction that has failed, unsent', async () => {
    const main = wire.define({ pool: { max: 1 } })
    await newContext(async () => {
      await failure(main.db.query('select * from missing'))
      for (const read of [() => main.db.query(stream()).toArray(), () => main.db.query(new Cursor(numbers)).read(1)]) {
        expect(await failure(read())).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', cause: { code: '42P01' } })
      }
      await main.rollback()
    })
    expect(wire.proxy.traffic.labels.filter((label) => label.startsWith('> P'))).toEqual([])
  })

  it('S9 gives up a stream whose connection is lost, and the pool slot with it', async () => {
    const main = wire.define({ pool: { max: 1 } })
    wire.proxy.at('< s', 'reset')
    const error = await failure(
      newContext(async () => {
        for await (const _ of main.db.query(stream()));
      }),
    )
    expect(String(error)).toMatch(/ECONNRESET|Connection terminated unexpectedly/) // as the driver happens to notice it
    await newContext(() => main.db.query('insert into t values (1)'))
    expect(await wire.ids()).toEqual([1])
  })

  it('S9 destroys a stream that is open at the end of its context, commits, and gives the connection back', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const open = await newContext(async () => {
      await main.db.query('insert into t values (1)')
      const rows = main.db.query(stream())
      await once(rows, 'readable')
      return rows
    })
    expect(open.destroyed).toBe(true)
    expect(await wire.ids()).toEqual([1])
    expect(isFree(await main.connect())).toBe(true)
    const late = (async () => {
      for await (const _ of open);
    })()
    expect(await failure(late)).toMatchObject({ code: 'AMBIENT_STREAM_OPEN' })
  })

  it('S9 destroys a cursor at the end of its context; a later read is refused, not told that there are no more rows', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const open = await newContext(async () => {
      const cursor = main.db.query(new Cursor(numbers))
      await cursor.read(1)
      await main.db.query('insert into t values (1)').catch(() => {})
      return cursor
    })
    expect(isFree(await main.connect())).toBe(true)
    expect(await failure(open.read(1))).toMatchObject({ code: 'AMBIENT_STREAM_OPEN' })
    await open.close()
  })

  it('S9 destroys a stream that was issued and never had its turn', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const [rows, cursor] = await newContext(async () => {
      return [main.db.query(stream()), main.db.query(new Cursor(numbers))] as const
    })
    expect(isFree(await main.connect())).toBe(true)
    expect(isAmbientError(await failure(rows.toArray()))).toBe(true)
    expect(isAmbientError(await failure(cursor.read(1)))).toBe(true)
  })

  it('S9 destroys an open stream when its context throws, and keeps the error', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const mine = new Error('mine')
    const error = await failure(
      newContext(async () => {
        await main.db.query('insert into t values (1)')
        const rows = main.db.query(stream())
        await once(rows, 'readable')
        throw mine
      }),
    )
    expect(error).toBe(mine)
    expect(error.cleanupErrors).toBeUndefined()
    expect(await wire.ids()).toEqual([])
    expect(isFree(await main.connect())).toBe(true)
    expect(wire.proxy.traffic.connections).toBe(1)
    expect(wire.warnings).toEqual([])
  })

  it('S9 fails fast where somebody else reads the stream: a context that is settled by hand', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const context = openContext()
    const rows = await context.run(async () => {
      await main.db.query('insert into t values (1)')
      const open = main.db.query(stream())
      await once(open, 'readable')
      return open
    })
    expect(await failure(context.settle('commit'))).toMatchObject({
      code: 'AMBIENT_STREAM_OPEN',
      outcome: 'rolled-back',
    })
    expect(rows.destroyed).toBe(true)
    expect(await wire.ids()).toEqual([])
    expect(isFree(await main.connect())).toBe(true)
  })

  it('C4 refuses a stream that is opened while the hooks of its ending context run', async () => {
    const main = wire.define({ pool: { max: 1 } })
    await newContext(async () => {
      await main.db.query('insert into t values (1)')
      const ending = gate()
      const late = ending.passed.then(() => failure(main.db.query(stream()).toArray()))
      main.beforeCommit(async () => {
        ending.open()
        expect(await late).toMatchObject({ code: 'AMBIENT_CONTEXT_ENDED' })
      })
    })
    expect(await wire.ids()).toEqual([1])
  })

  it('S9 ends a stream at the end of its block', async () => {
    const main = wire.define({ pool: { max: 1 } })
    await newContext(async () => {
      const rows = await main.atomic(async () => {
        await main.db.query('insert into t values (1)')
        const open = main.db.query(stream())
        await once(open, 'readable')
        return open
      })
      expect(rows.destroyed).toBe(true)
      await main.db.query('insert into t values (2)')
    })
    expect(await wire.ids()).toEqual([1, 2])
  })

  it('S9 streams without a transaction too, and gives the connection back', async () => {
    const main = wire.define({ pool: { max: 1 } })
    await newContext(
      async () => {
        expect(await main.db.query(stream()).toArray()).toHaveLength(1000)
        for await (const _ of main.db.query(stream())) break
        const cursor = main.db.query(new Cursor(numbers))
        await cursor.read(1)
        await cursor.close()
        await main.db.query('insert into t values (1)')
      },
      { transaction: 'autocommit' },
    )
    expect(wire.proxy.traffic.labels).not.toContain('> Q BEGIN')
    expect(isFree(await main.connect())).toBe(true)
    expect(await wire.ids()).toEqual([1])
  })

  it('S9 keeps the connection of a stream without a transaction when the server refused it, and none that was cut', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const destroyed: unknown[] = []
    await newContext(
      async () => {
        expect(await failure(main.db.query(stream('select * from missing')).toArray())).toMatchObject({ code: '42P01' })
        expect(wire.proxy.traffic.connections).toBe(1)
        await main.db.query('insert into t values (1)')
        expect(wire.proxy.traffic.connections).toBe(1)
        const pool = await main.connect()
        pool.on('remove', (client) => destroyed.push(client))
        wire.proxy.at('< s', 'reset')
        expect(await failure(main.db.query(stream()).toArray())).toBeInstanceOf(Error)
        await until(() => destroyed.length === 1, 'the connection to be destroyed')
        await main.db.query('insert into t values (2)')
      },
      { transaction: 'autocommit' },
    )
    expect(wire.proxy.traffic.connections).toBe(2)
    expect(await wire.ids()).toEqual([1, 2])
  })

  it.each([
    ['stream', (main: Main) => main.db.query(stream()).toArray()],
    ['cursor', (main: Main) => main.db.query(new Cursor(numbers)).read(1)],
    ['query object', (main: Main) => once(main.db.query(new Query(numbers)), 'end')],
  ])('S9 ends a %s on a connection that was lost as it came', async (_, read) => {
    const main = wire.define({ pool: { max: 1 } })
    const goodbye = Buffer.from('SFATAL\0VFATAL\0C57P01\0Mterminating connection due to administrator command\0\0')
    const header = Buffer.alloc(5)
    header.write('E')
    header.writeInt32BE(goodbye.length + 4, 1)
    wire.proxy.at('< Z I', ({ bytes }) => Buffer.concat([bytes, header, goodbye]))
    await newContext(
      async () => {
        expect(await failure(read(main))).toMatchObject({ message: expect.stringContaining('not queryable') })
        await main.db.query('insert into t values (1)')
      },
      { transaction: 'autocommit' },
    )
    expect(await wire.ids()).toEqual([1])
    expect(wire.proxy.traffic.connections).toBe(2)
  })

  it('S9 refuses a cursor on a pipelined pool at once, and the session goes on', async () => {
    const main = wire.define({ pool: { max: 1, pipeline: true } as never })
    await newContext(async () => {
      expect(await failure(main.db.query(new Cursor(numbers)).read(1))).toMatchObject({ code: 'AMBIENT_UNSUPPORTED' })
      expect(await failure(main.db.query(stream()).toArray())).toMatchObject({ code: 'AMBIENT_UNSUPPORTED' })
      await main.db.query('insert into t values (1)')
    })
    expect(await wire.ids()).toEqual([1])
  })

  it('S9 runs a `pg.Query` and calls its callback', async () => {
    const main = wire.define({ pool: { max: 1 } })
    await newContext(async () => {
      const rows = await new Promise((resolve, reject) => {
        const done = (error: unknown, result: { rows: unknown[] }) => (error ? reject(error) : resolve(result.rows))
        void main.db.query(new Query('select 1 as n') as never, done as never)
      })
      expect(rows).toEqual([{ n: 1 }])
      const query = main.db.query(new Query('select 2 as n'))
      const [row] = await once(query, 'row')
      expect(row).toEqual({ n: 2 })
      await main.db.query('insert into t values (1)').catch(() => {})
    })
  })
})

describe('S9 C4 C8 opens no stream on a connection that goes back', () => {
  const boom = new Error('boom')
  for (const way of ['throws', 'is aborted'] as const) {
    for (const [where, message] of [
      ['a context', '< C BEGIN'],
      ['a block', '< C BEGIN'],
      ['a nested block', '< C SAVEPOINT'],
      ['a context without transactions', '< R'],
    ] as const) {
      it(`S9 C4 C8 when ${where} ${way} before the first answer`, async () => {
        const main = wire.define({ pool: { max: 1 } })
        const held = gate()
        const answer = wire.proxy.at(message, held)
        const controller = new AbortController()
        const work = async () => {
          main.db.query(stream()).on('error', () => {})
          await answer.caught
          if (way === 'throws') throw boom
          controller.abort()
          await new Promise(() => {})
        }
        const outer = async () => {
          await main.db.query('insert into t values (1)')
          await main.atomic(work)
        }
        const works = { 'a block': () => main.atomic(work), 'a nested block': () => main.atomic(outer) }
        const transaction = where === 'a context without transactions' ? ('autocommit' as const) : undefined
        const unit = newContext(works[where as keyof typeof works] ?? work, { signal: controller.signal, transaction })
        const error = failure(unit)
        await answer.caught
        held.open()
        if (way === 'throws') expect(await error).toBe(boom)
        else expect(await error).toMatchObject({ code: 'AMBIENT_ABORTED' })
        await newContext(() => main.db.query('insert into t values (2)'))
        expect(await wire.ids()).toEqual([2])
        expect(isFree(await main.connect())).toBe(true)
      })
    }
  }
})

describe('S9 A6 ends a stream with its block', () => {
  it('S9 A6 also if another one was refused while it waited for its first answer', async () => {
    const main = wire.define({ pool: { max: 1 } })
    const held = gate()
    const answer = wire.proxy.at('< C BEGIN', held)
    await newContext(async () => {
      const refused: Promise<unknown>[] = []
      const open = () => {
        const rows = main.db.query(stream())
        rows.resume()
        refused.push(once(rows, 'error').then(([error]) => error.code))
      }
      const block = failure(
        main.atomic(
          async () => {
            open()
            await answer.caught
            queueMicrotask(() => process.nextTick(open))
            throw new Error('boom')
          },
          { current: 'join' },
        ),
      )
      await answer.caught
      await new Promise((resolve) => setImmediate(resolve))
      held.open()
      await block
      expect(await Promise.all(refused)).toEqual(['AMBIENT_BLOCK_ENDED', expect.stringMatching(/^AMBIENT_/)])
      await main.rollback()
      await main.db.query('insert into t values (1)')
    })
    expect(await wire.ids()).toEqual([1])
    expect(isFree(await main.connect())).toBe(true)
  })
})

describe('S12', () => {
  /** A database whose only socket was opened by another context than the one that then uses it. */
  async function warm(how: 'session' | 'raw') {
    const main = wire.define({ pool: { max: 1 } })
    const who = new AsyncLocalStorage<string>()
    await who.run('opener', () =>
      newContext(async () => {
        if (how === 'session') await main.db.query('select 1')
        else await (await main.connect()).query('select 1') // the raw pool, inside a context
      }),
    )
    const context = openContext()
    const inContext = () => [main.session(), who.getStore()]
    const expected = () => context.run(() => [main.session(), 'user'])
    const run = <Result>(work: () => Result) => context.run(() => who.run('user', work))
    return { main, context, run, inContext, expected }
  }

  it.each(['session', 'raw'] as const)('S12 calls callbacks in their own context (socket by %s)', async (how) => {
    const { main, context, run, inContext, expected } = await warm(how)
    const seen: unknown[] = []
    await run(
      () =>
        new Promise<void>((resolve) => {
          void main.db.query('select 1', () => {
            seen.push(inContext())
            main.db.query('select $1::int', [1], () => {
              seen.push(inContext())
              resolve()
            })
          })
        }),
    )
    expect(seen).toEqual([expected(), expected()])
    await context.settle('rollback')
  })

  it.each(['session', 'raw'] as const)(
    'S12 calls what streams and cursors call in its own context (socket by %s)',
    async (how) => {
      const { main, context, run, inContext, expected } = await warm(how)
      const seen: Record<string, unknown> = {}
      await run(async () => {
        const rows = main.db.query(stream('select 1 as n'))
        rows.on('data', () => {
          seen.data = inContext()
        })
        rows.on('end', () => {
          seen.end = inContext()
        })
        await once(rows, 'close')
        const piped = Readable.from([1])
        piped.resume()
        const cursor = main.db.query(new Cursor('select 1 as n'))
        await new Promise<void>((resolve) => {
          cursor.read(1, () => {
            seen.read = inContext()
            resolve()
          })
        })
        await new Promise<void>((resolve) => {
          cursor.close(() => {
            seen.close = inContext()
            resolve()
          })
        })
        await new Promise<void>((resolve) => {
          const done = () => {
            seen.query = inContext()
            resolve()
          }
          main.db.query(new Query('select 1', done as never))
        })
        await new Promise<void>((resolve) => {
          const query = main.db.query(new Query('select 1'))
          query.on('row', () => {
            seen.row = inContext()
          })
          query.on('end', () => resolve())
        })
      })
      for (const key of ['data', 'end', 'read', 'close', 'query', 'row'])
        expect([key, seen[key]]).toEqual([key, expected()])
      await context.settle('rollback')
    },
  )

  it('S12 tells notices in the context of their statement', async () => {
    const { main, context, run, inContext, expected } = await warm('raw')
    const seen: unknown[] = []
    await run(async () => {
      const client = await main.db.connect()
      client.on('notice', ({ message }) => seen.push([message, ...inContext()]))
      await client.query("do $$ begin raise notice 'mine'; end $$")
      client.release()
      await main.db.query("do $$ begin raise notice 'not mine'; end $$")
    })
    expect(seen).toEqual([['mine', ...expected()]])
    await context.settle('rollback')
  })

  it('S12 makes the pool outside any context', async () => {
    const who = new AsyncLocalStorage<string>()
    const main = wire.define()
    let inside: unknown = 'not called'
    await newContext(async () => {
      await main.db.query('select 1')
      const pool = await main.connect()
      pool.on('acquire', () => {
        inside = (() => {
          try {
            return main.session()
          } catch (error) {
            return (error as { code: string }).code
          }
        })()
      })
    })
    await who.run('user', () => newContext(() => main.db.query('select 1')))
    expect(inside).toBe('AMBIENT_NO_CONTEXT')
    await until(async () => isFree(await main.connect()), 'the pool to be free')
  })
})
