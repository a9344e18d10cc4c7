import { defineDatabase, isAmbientError, newContext } from 'ambient-db'
import { drizzleAdapter, drizzleHandle } from 'ambient-db/drizzle'
import { kyselyHandle } from 'ambient-db/kysely'
import { pgAdapter } from 'ambient-db/pg'
import { asc, DrizzleQueryError, eq, gt, sql, TransactionRollbackError } from 'drizzle-orm'
import { drizzle, NodePgDatabase } from 'drizzle-orm/node-postgres'
import { pgTable, serial, text } from 'drizzle-orm/pg-core'
import { PostgresDialect } from 'kysely'
import { Pool } from 'pg'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { gate, until } from '../support/gate.ts'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'
import { startProxy, type WireProxy } from '../support/proxy.ts'

const notes = pgTable('notes', { id: serial().primaryKey(), text: text() })
const planned = new Error('planned')

let database: TestDatabase
let wire: WireProxy
let pool: Pool
let built = 0

const main = defineDatabase({
  name: 'main',
  adapter: drizzleAdapter(
    pgAdapter(() => pool),
    (client) => {
      built++
      return drizzle({ client })
    },
  ),
})
const { db } = main

// At import, when there is neither a session nor an engine.
const byText = db
  .select({ id: notes.id })
  .from(notes)
  .where(eq(notes.text, sql.placeholder('text')))
  .prepare('by_text')
const insertNote = db
  .insert(notes)
  .values({ text: sql.placeholder('text') })
  .prepare('insert_note')

type Handle = Pick<typeof db, 'insert' | 'execute'>

const note = async (value: string, handle: Handle = db) => {
  await handle.insert(notes).values({ text: value })
}
const texts = async () => {
  const rows = await database.witness.rows<{ text: string }>('select text from notes order by id')
  return rows.map((row) => row.text)
}
const transactionId = async (handle: Handle = db) => {
  const { rows } = await handle.execute<{ id: string }>(sql`select pg_current_xact_id()::text as id`)
  return rows[0]?.id
}
const settings = async (handle: Handle = db) => {
  const { rows } = await handle.execute<{ level: string; readonly: string }>(
    sql`select current_setting('transaction_isolation') as level, current_setting('transaction_read_only') as readonly`,
  )
  return rows[0]
}
const count = (pattern: RegExp) => wire.traffic.labels.filter((label) => pattern.test(label)).length

beforeAll(async () => {
  database = await createDatabase()
  await database.witness.rows('create table notes (id serial primary key, text text unique)')
  wire = await startProxy(database.url)
  pool = new Pool({ connectionString: wire.url, max: 5 })
})
beforeEach(() => database.witness.rows('truncate notes'))
afterEach(() => expect(pool.idleCount).toBe(pool.totalCount))
afterAll(async () => {
  await main.shutdown()
  await wire.close()
  await database.drop()
})

describe('the ambient handle is a whole Drizzle', () => {
  it('is an instance of its class, whose client is the pool of the session', () => {
    expect(db).toBeInstanceOf(NodePgDatabase)
    expect(db.$client).toBeInstanceOf(Pool)
    expect(db.$client).not.toBe(pool)
  })

  it('S1 compiles, and prepares, without an engine and a context', () => {
    const never = defineDatabase({
      name: 'never',
      adapter: drizzleAdapter(
        pgAdapter((): Pool => {
          throw planned
        }),
        (client) => drizzle({ client }),
      ),
    })
    const query = never.db.select().from(notes).where(eq(notes.id, 1))
    expect(query.toSQL()).toEqual({ sql: 'select "id", "text" from "notes" where "notes"."id" = $1', params: [1] })
    query.prepare('never')
  })

  it('S1 takes no connection and sends no byte before the first statement', async () => {
    wire.reset()
    const { totalCount } = pool
    await newContext(async () => {
      main.session()
      db.select().from(notes).prepare('unused')
      await Promise.all([newContext(() => {}), newContext(() => main.session().db)])
    })
    expect(wire.traffic).toMatchObject({ sent: 0, connections: 0 })
    expect(pool.totalCount).toBe(totalCount)
  })

  it('C2 refuses queries and transactions outside any context, by name and remedy', async () => {
    const refused = { name: 'AmbientError', code: 'AMBIENT_NO_CONTEXT', message: expect.stringContaining("'main'") }
    await expect(note('never')).rejects.toMatchObject(refused)
    await expect(byText.execute({ text: 'never' })).rejects.toMatchObject(refused)
    await expect(db.execute('select 1')).rejects.toMatchObject(refused)
    await expect(db.$count(notes)).rejects.toMatchObject(refused)
    await expect(db.transaction(async () => {})).rejects.toMatchObject(refused)
    expect(await texts()).toEqual([])
  })

  it('has `with`, `$count`, raw SQL, returning and upserts, in one transaction', async () => {
    await newContext(async () => {
      const id = await transactionId()
      const [one] = await db.insert(notes).values({ text: 'one' }).returning({ text: notes.text })
      expect(one).toEqual({ text: 'one' })
      await db
        .insert(notes)
        .values({ text: 'one' })
        .onConflictDoUpdate({ target: notes.text, set: { text: 'uno' } })
      await db.insert(notes).values([{ text: 'two' }, { text: 'three' }])
      await db.update(notes).set({ text: 'drei' }).where(eq(notes.text, 'three'))
      await db.delete(notes).where(eq(notes.text, 'two'))
      const all = db.$with('everything').as(db.select({ text: notes.text }).from(notes))
      expect(await db.with(all).select().from(all).orderBy(asc(all.text))).toEqual([{ text: 'drei' }, { text: 'uno' }])
      expect(await db.$count(notes, eq(notes.text, 'uno'))).toBe(1)
      expect((await db.execute(sql`select ${'a'}::text as a`)).rows).toEqual([{ a: 'a' }])
      expect(await transactionId()).toBe(id)
      expect(await texts()).toEqual([])
    })
    expect(await texts()).toEqual(['uno', 'drei'])
  })

  it('refuses SQL that begins or ends a transaction, before a byte is sent', async () => {
    await newContext(async () => {
      await note('kept')
      wire.reset()
      for (const control of ['begin', 'commit', 'rollback', 'savepoint a', 'start transaction']) {
        const refused = { code: 'AMBIENT_TRANSACTION_CONTROL' }
        await expect(db.execute(sql.raw(control))).rejects.toMatchObject(refused)
      }
      expect(wire.traffic.sent).toBe(0)
    })
    expect(await texts()).toEqual(['kept'])
  })
})

describe('statements that were prepared at import', () => {
  it('run in the session of whoever executes them, each in its own transaction', async () => {
    const [inserted, finish] = [gate(), gate()]
    const one = newContext(async () => {
      await insertNote.execute({ text: 'one' })
      inserted.open()
      await finish.passed
      expect(await byText.execute({ text: 'one' })).toHaveLength(1)
    })
    await inserted.passed
    await newContext(async () => {
      expect(await byText.execute({ text: 'one' })).toEqual([]) // not committed yet
      await insertNote.execute({ text: 'two' })
    })
    finish.open()
    await one
    expect(await texts()).toEqual(['one', 'two'])
  })

  it('are undone with their context', async () => {
    const work = newContext(async () => {
      await insertNote.execute({ text: 'one' })
      throw planned
    })
    await expect(work).rejects.toBe(planned)
    expect(await texts()).toEqual([])
  })

  it('join the native transaction, or the block, that they are executed in', async () => {
    await newContext(async () => {
      const fails = async () => {
        await insertNote.execute({ text: 'inner' })
        throw planned
      }
      await expect(db.transaction(fails)).rejects.toBe(planned)
      await expect(main.session().savepoint(fails)).rejects.toBe(planned)
      await insertNote.execute({ text: 'outer' })
    })
    expect(await texts()).toEqual(['outer'])
  })

  it('are prepared once on each connection', async () => {
    const own = new Pool({ connectionString: wire.url, max: 1 })
    const single = defineDatabase({
      name: 'single',
      adapter: drizzleAdapter(
        pgAdapter(() => own),
        (client) => drizzle({ client }),
      ),
    })
    const prepared = single.db.select().from(notes).where(gt(notes.id, 0)).prepare('once')
    wire.reset()
    for (const _ of [1, 2, 3]) await newContext(() => prepared.execute())
    expect(count(/^> P .*"notes"/)).toBe(1)
    expect(count(/^> Q COMMIT/)).toBe(3)
    await single.shutdown()
  })
})

describe('native transactions', () => {
  it('A4 are savepoints: one that rolls back keeps the work around it', async () => {
    wire.reset()
    await newContext(async () => {
      const id = await transactionId()
      await note('before')
      const result = await db.transaction(async (tx) => {
        expect(await transactionId(tx)).toBe(id)
        await note('kept', tx)
        await note('helper')
        return 'result'
      })
      expect(result).toBe('result')
      const rolledBack = db.transaction(async (tx) => {
        await note('undone', tx)
        await note('undone helper')
        tx.rollback()
      })
      await expect(rolledBack).rejects.toBeInstanceOf(TransactionRollbackError)
      await note('after')
    })
    expect(await texts()).toEqual(['before', 'kept', 'helper', 'after'])
    expect([count(/^> Q BEGIN/), count(/^> Q COMMIT/)]).toEqual([1, 1])
  })

  it('A4 nest: an inner rollback keeps the outer work, an outer one undoes all', async () => {
    await newContext(async () => {
      await db.transaction(async (outer) => {
        await note('outer', outer)
        const inner = outer.transaction(async (tx) => {
          await note('inner', tx)
          await tx.transaction((innermost) => note('innermost', innermost))
          tx.rollback()
        })
        await expect(inner).rejects.toBeInstanceOf(TransactionRollbackError)
        await outer.transaction((tx) => note('kept', tx))
      })
      const undone = db.transaction(async (outer) => {
        await outer.transaction((tx) => note('undone', tx))
        throw planned
      })
      await expect(undone).rejects.toBe(planned)
    })
    expect(await texts()).toEqual(['outer', 'kept'])
  })

  it('A4 in parallel: each keeps or undoes its own work, nested ones too', async () => {
    await newContext(async () => {
      const [entered, finish] = [gate(), gate()]
      const fails = db.transaction(async (tx) => {
        await note('undone', tx)
        entered.open()
        await finish.passed
        throw planned
      })
      await entered.passed
      const beside = [note('beside'), db.transaction((tx) => note('other', tx))]
      finish.open()
      await expect(fails).rejects.toBe(planned)
      await Promise.all(beside)
      await db.transaction(async (outer) => {
        const results = await Promise.allSettled(
          ['a', 'b', 'c'].map((value) =>
            outer.transaction(async (tx) => {
              await note(`${value}1`, tx)
              await note(`${value}2`)
              if (value === 'b') throw planned
            }),
          ),
        )
        expect(results.map(({ status }) => status)).toEqual(['fulfilled', 'rejected', 'fulfilled'])
      })
    })
    expect(await texts()).toEqual(['beside', 'other', 'a1', 'a2', 'c1', 'c2'])
  })

  it('A4 hold what the outer transaction object is asked for inside an inner one', async () => {
    await newContext(() =>
      db.transaction(async (outer) => {
        const inner = outer.transaction(async () => {
          await note('undone', outer)
          throw planned
        })
        await expect(inner).rejects.toBe(planned)
        await note('kept', outer)
      }),
    )
    expect(await texts()).toEqual(['kept'])
  })

  it('A6 refuse what their async scope, or their transaction object, asks for after their end', async () => {
    const ended = gate()
    await newContext(async () => {
      let late: Promise<unknown> = Promise.resolve()
      const kept = await db.transaction(async (tx) => {
        late = ended.passed.then(() => note('late'))
        late.catch(() => {})
        return tx
      })
      ended.open()
      await expect(late).rejects.toMatchObject({ code: 'AMBIENT_BLOCK_ENDED' })
      await expect(note('later', kept)).rejects.toMatchObject({ code: 'AMBIENT_BLOCK_ENDED' })
      const transaction = kept.transaction((tx) => note('latest', tx))
      await expect(transaction).rejects.toMatchObject({ code: 'AMBIENT_BLOCK_ENDED' })
      await note('kept')
    })
    expect(await texts()).toEqual(['kept'])
  })

  it('A7 set the options of the transaction that they open', async () => {
    const options = { isolationLevel: 'serializable', accessMode: 'read only', deferrable: true } as const
    await newContext(async () => {
      expect(await db.transaction(settings, options)).toEqual({ level: 'serializable', readonly: 'on' })
    })
  })

  it('A7 agree with the transaction that is open, or are refused', async () => {
    await newContext(
      async () => {
        await transactionId()
        const equal = await db.transaction(settings, { isolationLevel: 'repeatable read' })
        expect(equal).toEqual({ level: 'repeatable read', readonly: 'off' })
        for (const options of [{ isolationLevel: 'serializable' }, { accessMode: 'read only' }] as const) {
          const refused = db.transaction(settings, options)
          await expect(refused).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_OPTIONS' })
        }
        await note('goes on')
      },
      { transaction: { isolationLevel: 'repeatable read' } },
    )
    expect(await texts()).toEqual(['goes on'])
  })

  it('A4 commit on their own in a context without transactions', async () => {
    await newContext(
      async () => {
        await db.transaction((tx) => note('committed', tx), { isolationLevel: 'serializable' })
        expect(await texts()).toEqual(['committed'])
        const rolledBack = db.transaction(async (tx) => {
          await note('undone', tx)
          throw planned
        })
        await expect(rolledBack).rejects.toBe(planned)
      },
      { transaction: 'autocommit' },
    )
    expect(await texts()).toEqual(['committed'])
  })

  it('S4 reject with the first error as cause if they swallowed one, and keep the work around them', async () => {
    await newContext(async () => {
      await note('outer')
      let swallowed: unknown
      const doomed = db.transaction(async (tx) => {
        await note('inner', tx)
        await note('inner', tx).catch((error) => {
          swallowed = error
        })
      })
      const error = await doomed.catch((thrown) => thrown)
      expect(error).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', cause: { code: '23505' } })
      expect(swallowed).toBeInstanceOf(DrizzleQueryError)
      expect((swallowed as DrizzleQueryError).cause).toBe(error.cause)
    })
    expect(await texts()).toEqual(['outer'])
  })
})

describe('errors', () => {
  it('of the database are those of Drizzle, with the error of the driver as their cause', async () => {
    const work = newContext(async () => {
      await note('one')
      await note('one')
    })
    const error = await work.catch((thrown) => thrown)
    expect(error).toBeInstanceOf(DrizzleQueryError)
    expect(error).toMatchObject({ query: expect.stringContaining('insert into "notes"'), cause: { code: '23505' } })
    expect(await texts()).toEqual([])
  })

  it('S4 T1 that are swallowed make the commit fail, and are its cause', async () => {
    let swallowed: unknown
    const work = newContext(async () => {
      await note('one')
      await note('one').catch((error) => {
        swallowed = error.cause
      })
    })
    const error = await work.catch((thrown) => thrown)
    expect(error).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', outcome: 'rolled-back' })
    expect(error.cause).toBe(swallowed)
    expect(await texts()).toEqual([])
  })

  it('A5 that a conflict has caused make `atomic` try again, though Drizzle wraps them', async () => {
    await database.witness.rows("insert into notes (text) values ('0')")
    let attempts = 0
    await newContext(() =>
      main.atomic(
        async () => {
          attempts++
          await db.select().from(notes)
          if (attempts === 1) await database.witness.rows("update notes set text = '1'")
          await db.update(notes).set({ text: sql`${notes.text} || ${'!'}` })
        },
        { isolationLevel: 'serializable', retry: { attempts: 3 } },
      ),
    )
    expect(attempts).toBe(2)
    expect(await texts()).toEqual(['1!'])
  })

  it('A5 of a native transaction make it try again too', async () => {
    await database.witness.rows("insert into notes (text) values ('0')")
    let attempts = 0
    await newContext(() =>
      main.atomic(
        () =>
          db.transaction(async (tx) => {
            attempts++
            await tx.select().from(notes)
            if (attempts === 1) await database.witness.rows("update notes set text = '1'")
            await tx.update(notes).set({ text: sql`${notes.text} || ${'!'}` })
          }),
        { isolationLevel: 'repeatable read', retry: { attempts: 3 } },
      ),
    )
    expect([attempts, await texts()]).toEqual([2, ['1!']])
  })

  it('S10 say that SQL of the user has ended the transaction', async () => {
    const work = newContext(async () => {
      await note('one')
      await db.execute(sql.raw('select 1; commit'))
      await note('two')
    })
    await expect(work).rejects.toMatchObject({
      code: 'AMBIENT_TRANSACTION_ABORTED',
      outcome: 'unknown',
      message: expect.stringContaining('may be committed'),
    })
    expect(await texts()).toEqual(['one'])
  })

  it('S5 T3 of a lost COMMIT are unknown, and no uncaught exception', async () => {
    wire.at('< C COMMIT', 'reset')
    const error = await newContext(() => db.transaction((tx) => note('there', tx))).catch((thrown) => thrown)
    expect(isAmbientError(error, 'AMBIENT_COMMIT_UNKNOWN') && error.outcome).toBe('unknown')
    expect(await texts()).toEqual(['there'])
    await newContext(() => note('usable'))
  })

  it('S7 keep the error that was thrown in a transaction whose connection was lost', async () => {
    const work = newContext(() =>
      db.transaction((outer) =>
        outer.transaction(async (tx) => {
          await note('one', tx)
          const [backend] = await database.witness.rows<{ pid: number }>(
            "select pid from pg_stat_activity where datname = current_database() and state = 'idle in transaction'",
          )
          await database.witness.rows(`select pg_terminate_backend(${backend?.pid})`)
          const gone = async () => (await database.backends()).every(({ pid }) => pid !== backend?.pid)
          await until(gone, 'the backend to end')
          throw planned
        }),
      ),
    )
    await expect(work).rejects.toBe(planned)
    expect(await texts()).toEqual([])
    await newContext(() => note('usable'))
  })
})

describe('handles', () => {
  it('are built once for all contexts, and once for each session that is asked for its own', async () => {
    const before = built
    await Promise.all([newContext(() => note('one')), newContext(() => note('two'))])
    expect(built).toBe(before)
    await main.newSession(async (session) => {
      expect(session.db).toBe(session.db)
      await note('three', session.db)
      await session.db.transaction((tx) => note('four', tx))
      await session.rollback()
      await note('five', session.db)
    })
    expect(built).toBe(before + 1)
    expect((await texts()).sort()).toEqual(['five', 'one', 'two'])
  })

  it('of raw pg, Drizzle and Kysely over one driver share one transaction', async () => {
    const own = new Pool({ connectionString: wire.url })
    const driver = defineDatabase({ name: 'driver', adapter: pgAdapter(() => own) })
    const viaDrizzle = drizzleHandle(driver, (client) => drizzle({ client }))
    const viaKysely = kyselyHandle<{ notes: { text: string } }>(
      driver,
      (client) => new PostgresDialect({ pool: client }),
    )
    expect(viaDrizzle.$client).toBe(driver.db)
    const addByKysely = (value: string) => viaKysely.insertInto('notes').values({ text: value }).execute()
    wire.reset()
    await newContext(async () => {
      await driver.db.query("insert into notes (text) values ('pg')")
      await note('drizzle', viaDrizzle)
      await addByKysely('kysely')
      const inDrizzle = viaDrizzle.transaction(async (tx) => {
        await note('undone 1', tx)
        await addByKysely('undone 2')
        await driver.db.query("insert into notes (text) values ('undone 3')")
        throw planned
      })
      await expect(inDrizzle).rejects.toBe(planned)
      await viaKysely.transaction().execute(async () => {
        await note('drizzle in kysely', viaDrizzle)
        await viaDrizzle.transaction((tx) => note('drizzle transaction in kysely', tx))
      })
    })
    expect([count(/^> Q BEGIN/), count(/^> Q COMMIT/), wire.traffic.connections]).toEqual([1, 1, 1])
    expect(await texts()).toEqual(['pg', 'drizzle', 'kysely', 'drizzle in kysely', 'drizzle transaction in kysely'])
    await driver.shutdown()
  })
})
