import { writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type AmbientDatabase, type AmbientErrorCode, defineDatabase, isAmbientError, newContext } from 'ambient-db'
import { postgresJsAdapter } from 'ambient-db/postgres-js'
import { sandbox } from 'ambient-db/testing'
import postgres, { type Sql } from 'postgres'
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { databaseGate, gate, until } from '../support/gate.ts'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'
import { startProxy, type WireProxy } from '../support/proxy.ts'

let database: TestDatabase
let wire: WireProxy
beforeAll(async () => {
  database = await createDatabase()
  await database.witness.rows('create table notes (id int primary key, long_text text)')
  wire = await startProxy(database.url)
})
beforeEach(() => database.witness.rows('truncate notes'))
afterAll(async () => {
  await wire.close()
  await database.drop()
})

const planned = new Error('planned')
const ids = async () =>
  (await database.witness.rows<{ id: number }>('select id from notes order by id')).map(({ id }) => id)
const refused = (promise: PromiseLike<unknown>, code: AmbientErrorCode) =>
  expect(Promise.resolve(promise)).rejects.toSatisfy((error) => isAmbientError(error, code))

/** Runs `work` with a database over an engine with these options. */
async function using(
  options: postgres.Options<Record<string, postgres.PostgresType>>,
  work: (main: AmbientDatabase<Sql, Sql>) => Promise<unknown>,
): Promise<void> {
  const main = defineDatabase({
    name: 'main',
    adapter: postgresJsAdapter(() => postgres(wire.url, { backoff: false, ...options }) as unknown as Sql),
  })
  await work(main)
  await main.shutdown()
}

describe('the ambient sql', () => {
  const main = defineDatabase({ name: 'main', adapter: postgresJsAdapter(() => postgres(database.url)) })
  const sql = main.db
  afterAll(() => main.shutdown())

  it('takes templates, helpers and fragments, which run only as a part of others', async () => {
    const rows = [
      { id: 1, long_text: 'one' },
      { id: 2, long_text: 'two' },
    ]
    await newContext(async () => {
      const { count, command } = await sql`insert into ${sql('notes')} ${sql(rows, 'id', 'long_text')}`
      expect([count, command]).toEqual([2, 'INSERT'])
      const fails = sql`or missing`
      const known = (min: number) => sql`id >= ${min}`
      const where = sql`where ${known(1)} ${[sql`and id in ${sql([2, 3])}`, sql`and true`]}`
      expect(await sql`select ${sql(['id', 'long_text'])} from notes ${where}`).toEqual([rows[1]])
      await sql`update notes set ${sql({ long_text: sql`upper(long_text)` } as never)} where id = ${1}`
      await sql`insert into notes ${sql([{ id: 3, long_text: sql`lower('THREE')` }] as never)}`
      expect((await sql`select long_text from notes order by id`.values()).flat()).toEqual(['ONE', 'two', 'three'])
      expect(Object.prototype.toString.call(fails)).toBe('[object Query]')
      const table = sql.unsafe('notes')
      expect(await sql`select count(*)::int as n from ${table}`).toEqual([{ n: 3 }])
    })
  })

  it('runs a query when it is awaited or executed, once', async () => {
    await newContext(async () => {
      sql`insert into notes values (1)`
      const once = sql`insert into notes values (2)`
      await once
      await once.then((rows) => rows)
      sql`insert into notes values (3)`.execute()
      const failure = await sql`select missing`.catch((error: unknown) => error)
      expect(failure).toBeInstanceOf(sql.PostgresError)
      await main.rollback()
      await sql`insert into notes values (4)`.finally(() => {})
    })
    expect(await ids()).toEqual([4])
  })

  it('says in the stack of an error where the query stands', async () => {
    const error: unknown = await newContext(() => sql`select missing from notes`).catch((thrown: unknown) => thrown)
    expect((error as Error).stack).toContain('postgres-js-facade.test.ts')
  })

  it('has the other forms of results', async () => {
    await newContext(async () => {
      expect(await sql`select 1 as a, 'x' as b`.values()).toEqual([[1, 'x']])
      expect((await sql`select 'x'`.raw())[0]?.[0]).toEqual(Buffer.from('x'))
      const several = (await sql`select 1 as a; select 2 as b`.simple()) as unknown
      expect(several).toEqual([[{ a: 1 }], [{ b: 2 }]])
      expect((await sql`select ${1}::int as a`.describe()).columns).toMatchObject([{ name: 'a' }])
      const seen: unknown[] = []
      await sql`select generate_series(1, 3) as n`.forEach(({ n }) => {
        seen.push(n)
        main.session() // in the context
      })
      expect(seen).toEqual([1, 2, 3])
      expect(await sql.unsafe('select $1::int as a, $2 as b', [1, 'x'])).toEqual([{ a: 1, b: 'x' }])
    })
  })

  it('has typed values, also before there is an engine, with what the engine makes of them', async () => {
    const point = {
      to: 600,
      from: [600],
      serialize: ([x, y]: number[]) => `(${x},${y})`,
      parse: (text: string) => text.slice(1, -1).split(',').map(Number),
    }
    await using({ types: { point }, transform: postgres.camel, fetch_types: true }, async ({ db }) => {
      const types = db.types as unknown as { point(value: number[]): never }
      await newContext(async () => {
        expect(await db`select ${types.point([1, 2])} as a_point`).toEqual([{ aPoint: [1, 2] }])
        expect(await db`select ${db.json({ a: [1] })} as j, ${db.array([1, 2])}::int[] as a`).toEqual([
          { j: { a: [1] }, a: [1, 2] },
        ])
        expect(await db`select ${db.typed('7', 23)} as n`).toEqual([{ n: 7 }])
        await db`insert into notes ${db({ id: 1, longText: 'camel' } as never)}`
        expect(await db`select ${db('longText')} from notes`).toEqual([{ longText: 'camel' }])
      })
    })
  })

  it('reads SQL from a file, and refuses transaction control there too', async () => {
    const path = join(tmpdir(), `ambient-db-${process.pid}.sql`)
    await writeFile(path, 'insert into notes values ($1)')
    await newContext(() => sql.file(path, [1]))
    await writeFile(path, 'commit')
    await refused(
      newContext(() => sql.file(path)),
      'AMBIENT_TRANSACTION_CONTROL',
    )
    expect(await ids()).toEqual([1])
  })

  it('sends notifications with the transaction, and leaves listening to the engine', async () => {
    const engine = await main.connect()
    const heard: string[] = []
    const { unlisten } = await engine.listen('news', (payload) => void heard.push(payload))
    await newContext(async () => {
      await sql.notify('news', 'lost')
      throw planned
    }).catch(() => {})
    await newContext(() => sql.notify('news', 'kept').then(() => {}))
    await until(() => heard.length > 0, 'the notification')
    expect(heard).toEqual(['kept'])
    await unlisten()
  })

  it('refuses what is not of a session', async () => {
    for (const name of ['listen', 'subscribe', 'largeObject', 'end', 'close'] as const) {
      await refused(
        (sql as unknown as Record<string, () => Promise<unknown>>)[name]?.() as never,
        'AMBIENT_UNSUPPORTED',
      )
    }
    await newContext(async () => {
      await refused(sql`copy notes to stdout`, 'AMBIENT_UNSUPPORTED')
      await refused(sql`copy notes from stdin`.writable(), 'AMBIENT_UNSUPPORTED')
      await refused(sql`copy notes to stdout`.readable(), 'AMBIENT_UNSUPPORTED')
      const control = [sql`commit`, sql.unsafe('rollback'), sql`${sql`begin`}`, sql`savepoint ${sql('a')}`]
      for (const query of control) await refused(query, 'AMBIENT_TRANSACTION_CONTROL')
      await refused(
        sql`commit`.cursor(() => {}),
        'AMBIENT_TRANSACTION_CONTROL',
      )
      await refused(
        sql.begin((tx) => tx.prepare('a')),
        'AMBIENT_UNSUPPORTED',
      )
    })
    expect('then' in sql).toBe(false)
  })

  it('has the options and parameters of the engine, when there is one', async () => {
    await newContext(() => sql`select 1`)
    const engine = await main.connect()
    expect(sql.options.database).toBe(engine.options.database)
    expect(sql.parameters).toBe(engine.parameters)
    expect(
      await using({}, async ({ db }) => expect([db.options.max, db.parameters]).toEqual([undefined, {}])),
    ).toBeUndefined()
  })

  it('A4 gives begin and savepoint their forms', async () => {
    await newContext(async () => {
      const [one, two] = await sql.begin('read write', (tx) => [
        tx`insert into notes values (1) returning id`,
        tx`insert into notes values (2) returning id`,
      ])
      expect([one, two]).toEqual([[{ id: 1 }], [{ id: 2 }]])
      await sql.begin(async (tx) => {
        await tx`insert into notes values (3)`
        await tx
          .savepoint('named', async (inner) => {
            await inner`insert into notes values (4)`
            throw planned
          })
          .catch(() => {})
        await tx.savepoint((inner) => inner`insert into notes values (5)`)
      })
      await refused(
        sql.begin('isolation level serializable', async () => {}),
        'AMBIENT_TRANSACTION_OPTIONS',
      )
      await refused(
        sql.begin('; drop table notes', async () => {}),
        'AMBIENT_TRANSACTION_CONTROL',
      )
    })
    expect(await ids()).toEqual([1, 2, 3, 5])
  })

  it('A4 takes transaction control on what reserve() gives', async () => {
    await newContext(async () => {
      const reserved = await sql.reserve()
      const begun = await reserved`begin`
      expect([begun.command, begun.count]).toEqual(['BEGIN', null])
      await reserved`insert into notes values (1)`
      await reserved`savepoint ${reserved('a')}`
      await reserved`insert into notes values (2)`
      await reserved`rollback to ${reserved('a')}`
      await reserved.unsafe('commit')
      await reserved`insert into notes values (3)`
      reserved.release()
      await refused(reserved`select 1`, 'AMBIENT_BLOCK_ENDED')
    })
    expect(await ids()).toEqual([1, 3])
  })

  it('S4 goes on after a value that could not be sent', async () => {
    await newContext(async () => {
      await sql`insert into notes values (1)`
      const unsendable = () => sql`insert into notes values (${undefined as never})`
      const failures = await Promise.allSettled([unsendable(), unsendable()])
      expect(failures.map((each) => (each as { reason?: { code: string } }).reason?.code)).toEqual([
        'UNDEFINED_VALUE',
        'UNDEFINED_VALUE',
      ])
      await sql`insert into notes values (${2})`
      const circular: { self?: unknown } = {}
      circular.self = circular
      await expect(sql`select ${sql.json(circular as never)}::jsonb`).rejects.toThrow(TypeError)
      await sql`insert into notes values (${3})`
    })
    expect(await ids()).toEqual([1, 2, 3])
  })

  it('S10 notices SQL that ends the transaction, whatever follows it', async () => {
    for (const [text, committed] of [
      ['insert into notes values (1); commit', [1]],
      ['insert into notes values (2); commit; begin', [1, 2]],
      ['insert into notes values (3); commit; select missing', [1, 2, 3]],
      ['insert into notes values (4); commit; begin; select missing', [1, 2, 3, 4]],
      ['insert into notes values (5); rollback; begin', [1, 2, 3, 4]],
      ['/* /* */ */ commit', [1, 2, 3, 4]],
    ] as const) {
      const unit = newContext(async () => {
        await sql`select 1`
        await sql.unsafe(text).catch(() => {})
        await sql`insert into notes values (100)`
      })
      const error = await unit.catch((thrown: unknown) => thrown)
      expect(error, text).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', outcome: 'unknown' })
      expect(await ids()).toEqual(committed)
    }
  })

  it('S10 lets several statements pass which end nothing, or only what they began', async () => {
    const text = `savepoint a; insert into notes values (1); rollback to a; insert into notes values (2);
      do $$ begin perform 1; end $$; prepare p as select 1; deallocate p`
    await newContext(async () => {
      await sql.unsafe(text)
      const lost = sql.unsafe('insert into notes values (3); select missing; commit')
      await expect(main.atomic(() => lost)).rejects.toThrow('missing')
      await sql`insert into notes values (4)`
    })
    expect(await ids()).toEqual([2, 4])
  })

  it('goes on in a sandbox after a statement that failed without a transaction', async () => {
    await using({ max: 2 }, async (other) => {
      const box = sandbox(other)
      await box.begin()
      const alone = { transaction: 'autocommit' } as const
      await newContext(() => other.db`insert into notes values (1)`, alone)
      await expect(newContext(() => other.db`select missing`, alone)).rejects.toThrow('missing')
      expect(await newContext(() => other.db`select id from notes`, alone)).toEqual([{ id: 1 }])
      await box.rollback()
    })
    expect(await ids()).toEqual([])
  })

  it('rolls back what SQL began in a context without transactions, and left open', async () => {
    const alone = (text: string) => newContext(() => sql.unsafe(text), { transaction: 'autocommit' })
    await refused(alone('select 1; begin; insert into notes values (1)'), 'AMBIENT_TRANSACTION_CONTROL')
    await refused(alone('/* /* */ */ begin'), 'AMBIENT_TRANSACTION_CONTROL')
    await alone('begin; insert into notes values (2); commit')
    await alone('select 1; begin; insert into notes values (3); commit')
    await alone('select 1; begin; insert into notes values (4); rollback')
    await expect(alone('select 1; begin; insert into notes values (5); select missing')).rejects.toThrow('missing')
    await newContext(() => sql`insert into notes values (6)`)
    expect(await ids()).toEqual([2, 3, 6])
  })
})

describe('cursors of the ambient sql', () => {
  const numbers = (sql: Sql, last = 10) => sql<{ n: number }[]>`select generate_series(1, ${last}::int) as n`

  it('S9 read in batches, by a loop that may be left and by a callback that may close', async () => {
    await using({ max: 1 }, async (main) => {
      const sql = main.db
      await newContext(async () => {
        const sizes: number[] = []
        for await (const rows of numbers(sql).cursor(4)) sizes.push(rows.length)
        expect(sizes).toEqual([4, 4, 2])
        for await (const rows of numbers(sql).cursor(4)) {
          expect(rows.length).toBe(4)
          await refused(sql`select 1`, 'AMBIENT_STREAM_OPEN')
          break
        }
        await sql`select 1`
        const seen: number[] = []
        await numbers(sql).cursor(3, async (rows) => {
          await Promise.resolve()
          main.session() // in the context
          seen.push(...rows.map(({ n }) => n))
          return seen.length > 5 ? sql.CLOSE : undefined
        })
        expect(seen).toEqual([1, 2, 3, 4, 5, 6])
        const one: unknown[] = []
        await numbers(sql, 2).cursor((row) => void one.push(...row))
        expect(one).toEqual([{ n: 1 }, { n: 2 }])
        await expect(
          numbers(sql, 2).cursor(2, async () => {
            throw planned
          }),
        ).rejects.toBe(planned) // also of the last rows, which postgres.js does not wait for
        expect(await sql`select 1 as n`).toEqual([{ n: 1 }])
      })
    })
  })

  it('S9 wait for the callback of the last rows, and let others wait while they close', async () => {
    await using({ max: 1 }, async ({ db: sql }) => {
      await newContext(async () => {
        let read = 0
        await numbers(sql, 3).cursor(2, async (rows) => {
          const { witness } = database
          await witness.rows('select 1') // which takes longer than the end of the cursor
          await witness.rows('select 1')
          read += rows.length
        })
        expect(read).toBe(3)
        const reading = numbers(sql).cursor(2)[Symbol.asyncIterator]()
        await reading.next()
        await refused(sql`select 1`, 'AMBIENT_STREAM_OPEN')
        const left = reading.return?.()
        await new Promise((resolve) => process.nextTick(resolve))
        expect(await sql`select 1 as n`).toEqual([{ n: 1 }])
        await left
      })
    })
  })

  it('S9 reject when the connection is lost between two batches, and end neither early nor the process', async () => {
    let closed = false
    const onclose = () => {
      closed = true
    }
    await using({ max: 1, onclose }, async (main) => {
      const reading = newContext(
        async () => {
          for await (const _ of numbers(main.db).cursor(3)) {
            wire.cut('reset')
            await until(() => closed, 'the client to notice')
          }
        },
        { transaction: 'autocommit' },
      )
      await expect(reading).rejects.toMatchObject({ code: expect.stringMatching(/ECONNRESET|CONNECTION_CLOSED/) })
      await newContext(() => main.db`insert into notes values (1)`)
    })
    expect(await ids()).toEqual([1])
  })
})

describe('query.cancel()', () => {
  it('cancels what runs, refuses what waits, and reaches nothing else', async () => {
    const lock = await databaseGate(database.url)
    const waiting = "select 1 from pg_locks where locktype = 'advisory' and not granted"
    const asleep = "select 1 from pg_stat_activity where wait_event = 'PgSleep'"
    await using({ max: 1 }, async (main) => {
      const sql = main.db
      await newContext(async () => {
        const running = sql.unsafe(lock.sql).execute()
        const behind = sql`insert into notes values (1)`.execute()
        await until(async () => (await database.witness.rows(waiting)).length > 0, 'the statement at the gate')
        behind.cancel()
        const unsent = expect(behind).rejects.toMatchObject({ code: '57014' })
        await lock.open()
        await Promise.all([running, unsent])
        const block = main.atomic(async () => {
          const sleeping = sql`select pg_sleep(60)`.execute()
          await until(async () => (await database.witness.rows(asleep)).length > 0, 'the statement to sleep')
          sleeping.cancel()
          await expect(sleeping).rejects.toMatchObject({ code: '57014', severity: 'ERROR' })
          throw planned
        })
        await expect(block).rejects.toBe(planned)
        const request = gate()
        wire.at('> cancel', request)
        const second = await databaseGate(database.url)
        const quick = sql.unsafe(second.sql).execute()
        await until(async () => (await database.witness.rows(waiting)).length > 0, 'the statement at the gate')
        quick.cancel()
        const next = sql`select pg_sleep(0.1)`.execute()
        await second.open()
        await until(async () => (await database.witness.rows(waiting)).length === 0, 'the statement to end')
        request.open()
        await Promise.all([quick, next]) // the request that came late has met neither
        const never = sql`insert into notes values (2)`
        never.cancel()
        await expect(never).rejects.toMatchObject({ code: '57014' })
        await sql`insert into notes values (3)`
      })
    })
    expect(await ids()).toEqual([3])
  })
})

describe('connections of postgres.js', () => {
  it('S7 S11 are not lost where connecting fails, nor waited for in vain', async () => {
    let closed = 0
    const onclose = () => {
      closed++
    }
    await using({ max: 2, fetch_types: false, onclose }, async (main) => {
      for (let round = 0; round < 3; round++) {
        const trap = wire.at('< R', 'reset', { times: 2 })
        const units = [1, 2, 3, 4].map((id) => newContext(() => main.db`insert into notes values (${round * 10 + id})`))
        const settled = await Promise.allSettled(units)
        expect(settled.filter(({ status }) => status === 'rejected').length).toBeLessThanOrEqual(2)
        trap.remove()
        await Promise.all([1, 2].map(() => newContext(() => main.db`select pg_sleep(0.01)`)))
        const engine = await main.connect()
        await Promise.all([engine`select pg_sleep(0.01)`, engine`select pg_sleep(0.01)`]) // nothing is under way
        closed = 0
        wire.cut('reset')
        await until(() => closed === 2, 'the client to notice')
      }
    })
  })

  it('S7 are noticed when they are cut idle in a transaction', async () => {
    let closed = false
    const onclose = () => {
      closed = true
    }
    await using({ max: 1, onclose }, async (main) => {
      const unit = newContext(async () => {
        await main.db`insert into notes values (1)`
        wire.cut('reset')
        await until(() => closed, 'the client to notice')
        await main.db`insert into notes values (2)`
      })
      await refused(unit, 'AMBIENT_TRANSACTION_ABORTED')
      await newContext(() => main.db`insert into notes values (3)`)
    })
    expect(await ids()).toEqual([3])
  })

  it('S5 leave nothing of a look-up whose server does not answer', async () => {
    const adapter = postgresJsAdapter(() => postgres(wire.url, { max: 1 }))
    const engine = await adapter.createEngine(undefined)
    const stalled = wire.at('< R', 'stall')
    const controller = new AbortController()
    const looking = adapter.lookUpTransaction?.(engine, '1 1 1', controller.signal)
    await stalled.caught
    controller.abort()
    await expect(looking).rejects.toThrow()
    await until(() => wire.open === 0, 'the end of its connection')
    await adapter.closeEngine(engine)
  })

  it('S7 send nothing once they are lost, which would end the process, and say so', async () => {
    let closed = false
    const onclose = () => {
      closed = true
    }
    const adapter = postgresJsAdapter(() => postgres(wire.url, { max: 1, onclose }))
    const engine = await adapter.createEngine(undefined)
    const lost: Error[] = []
    const connection = await adapter.acquire(engine, (error) => lost.push(error))
    await adapter.begin(connection, {})
    wire.cut('reset')
    await until(() => closed, 'the client to notice')
    expect(lost.length).toBe(1)
    for (const act of [adapter.begin, adapter.rollback, adapter.commit]) {
      const error = await act(connection, {}).catch((thrown: unknown) => thrown)
      expect(adapter.traits(error)).toMatchObject({ reply: 'unsent', lost: true })
    }
    await adapter.release(engine, connection)
    await adapter.closeEngine(engine)
  })

  it('A7 begin with the settings of the transaction', async () => {
    await using({ max: 1 }, async (main) => {
      const show = async (name: string) => Object.values((await main.db.unsafe(`show ${name}`))[0] ?? {})[0]
      const modes = async () => [
        await show('transaction_isolation'),
        await show('transaction_read_only'),
        await show('transaction_deferrable'),
      ]
      const transaction = { isolationLevel: 'serializable', readOnly: true, deferrable: true } as const
      expect(await newContext(modes, { transaction })).toEqual(['serializable', 'on', 'on'])
      expect(await newContext(modes)).toEqual(['read committed', 'off', 'off'])
    })
  })

  it('S4 rejects when the server answered COMMIT with ROLLBACK', async () => {
    await using({ max: 1 }, async (main) => {
      wire.at('< C COMMIT', () => Buffer.from('C\0\0\0\rROLLBACK\0', 'latin1'))
      const unit = newContext(() => main.db`insert into notes values (1)`)
      await expect(unit).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', outcome: 'rolled-back' })
    })
  })

  it('S4 S5 does not take just any answer to COMMIT for one', async () => {
    await using({ max: 1 }, async (main) => {
      wire.at('< C COMMIT', ({ bytes }) => Buffer.from(bytes.toString('latin1').replace('COMMIT', 'SELECT'), 'latin1'))
      await refused(
        newContext(() => main.db`insert into notes values (1)`),
        'AMBIENT_COMMIT_UNKNOWN',
      )
    })
    expect(await ids()).toEqual([1])
  })

  it('go from session to session, and to whoever uses the engine itself', async () => {
    await using({ max: 1 }, async (main) => {
      const engine = await main.connect()
      await newContext(() => main.db`select 1`)
      wire.reset()
      const order: string[] = []
      const units = Array.from({ length: 150 }, (_, index) => newContext(() => main.db`select ${index}::int`))
      const direct = engine`select 1`.then(() => order.push('direct'))
      await Promise.all([...units.map((unit) => unit.then(() => order.push('unit'))), direct])
      expect(wire.traffic.connections).toBe(0)
      expect(order.indexOf('direct')).toBeLessThan(130)
    })
    expect(wire.traffic.connections).toBe(0) // nor behind its end
    await until(() => wire.open === 0, 'the end of its connection')
  })

  it('S2 takes three round trips for a statement that is prepared', async () => {
    await using({ max: 1 }, async (main) => {
      const insert = (id: number) => newContext(() => main.db`insert into notes values (${id})`)
      await insert(1)
      await until(async () => (await main.connect())`select 1`.then(() => true), 'the connection to be back')
      wire.reset()
      await insert(2)
      const labels = wire.traffic.labels.map((label) => label[0]).join('') // those after COMMIT may be there or not
      expect(labels.match(/>+<+/g)?.slice(0, 3), String(wire.traffic.labels)).toEqual(['>><<<<', '>>><<<', '><<'])
    })
  })
})
