import { type AmbientDatabase, hasContext, newContext } from 'ambient-db'
import { kyselyHandle } from 'ambient-db/kysely'
import { PostgresDialect } from 'kysely'
import type { Pool } from 'pg'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it, vi } from 'vitest'
import { gate } from '../support/gate.ts'
import { createSubject, type Subject } from '../support/subject.ts'

let subject: Subject
let main: Subject['main']
let note: Subject['note']
let notes: Subject['notes']
let fail: Subject['fail']

beforeAll(async () => {
  subject = await createSubject()
  ;({ main, note, notes, fail } = subject)
})
afterAll(() => subject.close())
beforeEach(() => subject.clear())
afterEach(() => expect(subject.overlapping).toEqual([]))

const boom = new Error('boom')

/** Every way in which a transaction commits; the hooks are registered by `register` inside it. */
const commitPaths: [string, (db: AmbientDatabase<Pool, Pool>, register: () => void) => Promise<unknown>][] = [
  [
    'commit()',
    (db, register) =>
      newContext(async () => {
        await put(db, 'work')
        register()
        await db.commit()
      }),
  ],
  [
    'closeSession("commit")',
    (db, register) =>
      newContext(async () => {
        await put(db, 'work')
        register()
        await db.closeSession('commit')
      }),
  ],
  [
    'the end of a context',
    (db, register) =>
      newContext(async () => {
        await put(db, 'work')
        register()
      }),
  ],
  [
    'atomic',
    (db, register) =>
      newContext(() =>
        db.atomic(async () => {
          await put(db, 'work')
          register()
        }),
      ),
  ],
  [
    'atomic over an open transaction',
    (db, register) =>
      newContext(async () => {
        await put(db, 'work')
        register()
        await db.atomic(() => undefined)
      }),
  ],
  [
    'atomic with append',
    (db, register) =>
      newContext(async () => {
        register()
        await put(db, 'work')
        await db.atomic(() => undefined, { current: 'append' })
      }),
  ],
  [
    'a savepoint with nothing open',
    (db, register) =>
      newContext(() =>
        db.session().savepoint(async () => {
          await put(db, 'work')
          register()
        }),
      ),
  ],
  [
    'an inner block',
    (db, register) =>
      newContext(() =>
        db.atomic(async () => {
          await db.atomic(async () => {
            await put(db, 'work')
            register()
          })
        }),
      ),
  ],
  [
    'atomic in an autocommit context',
    (db, register) =>
      newContext(
        () =>
          db.atomic(async () => {
            await put(db, 'work')
            register()
          }),
        { transaction: 'autocommit' },
      ),
  ],
  [
    'a native transaction in an autocommit context',
    (db, register) => {
      const kysely = kyselyHandle<{ notes: { text: string } }>(db, (pool) => new PostgresDialect({ pool }))
      const work = () =>
        kysely.transaction().execute(async (transaction) => {
          await transaction.insertInto('notes').values({ text: 'work' }).execute()
          register()
        })
      return newContext(work, { transaction: 'autocommit' })
    },
  ],
  [
    'a native transaction in a context',
    (db, register) => {
      const kysely = kyselyHandle<{ notes: { text: string } }>(db, (pool) => new PostgresDialect({ pool }))
      const work = () =>
        kysely.transaction().execute(async (transaction) => {
          await transaction.insertInto('notes').values({ text: 'work' }).execute()
          register()
        })
      return newContext(work)
    },
  ],
]

function put(db: AmbientDatabase<Pool, Pool>, text: string): Promise<unknown> {
  return db.db.query('insert into notes values ($1)', [text])
}

/** A database with hooks of its own, which note their calls. */
function withHooks() {
  const calls: string[] = []
  const database = subject.define({
    hooks: {
      afterBegin: () => calls.push('afterBegin'),
      beforeCommit: () => calls.push('beforeCommit'),
      afterCommit: () => calls.push('afterCommit'),
      afterRollback: () => calls.push('afterRollback'),
    },
  })
  return { database, calls }
}

describe('beforeCommit', () => {
  for (const [path, run] of commitPaths) {
    it(`K1 runs inside the transaction before COMMIT: ${path}`, async () => {
      await run(main, () =>
        main.beforeCommit(async () => {
          expect(await notes()).toEqual([])
          await note('hook')
        }),
      )
      expect(await notes()).toEqual(['hook', 'work'])
      expect(subject.sent.filter((text) => text === 'BEGIN')).toHaveLength(1)
    })

    it(`K1 vetoes by a throw and rolls back: ${path}`, async () => {
      const rolledBack = vi.fn()
      const committed = vi.fn()
      const running = run(main, () => {
        main.afterRollback(rolledBack)
        main.afterCommit(committed)
        main.beforeCommit(async () => {
          await note('hook')
          throw boom
        })
      })
      await expect(running).rejects.toBe(boom)
      expect(await notes()).toEqual([])
      expect(rolledBack).toHaveBeenCalledOnce()
      expect(committed).not.toHaveBeenCalled()
      expect(await subject.openTransactions()).toBe(0)
    })
  }

  it('K1 runs for the session of newSession', async () => {
    await main.newSession(async (session) => {
      session.beforeCommit(() => session.db.query("insert into notes values ('hook')"))
      await session.db.query("insert into notes values ('work')")
    })
    expect(await notes()).toEqual(['hook', 'work'])
    const vetoed = main.newSession(async (session) => {
      await session.db.query("insert into notes values ('vetoed')")
      session.beforeCommit(() => Promise.reject(boom))
    })
    await expect(vetoed).rejects.toBe(boom)
    expect(await notes()).toEqual(['hook', 'work'])
  })

  it('K1 runs after the join', async () => {
    await newContext(async () => {
      await main.atomic(async () => {
        main.beforeCommit(async () => {
          const { rows } = await main.db.query('select text from notes order by text')
          expect(rows).toEqual([{ text: 'a' }, { text: 'b' }])
        })
        void note('a').then(() => note('b'))
      })
    })
    expect(await notes()).toEqual(['a', 'b'])
  })

  it('K1 runs in the order of registration, also those that a hook registers, once each', async () => {
    const calls: string[] = []
    await newContext(async () => {
      await note('a')
      main.beforeCommit(() => {
        calls.push('first')
        main.beforeCommit(() => calls.push('registered by the first'))
      })
      await main.session().savepoint(async () => {
        await note('b')
        main.beforeCommit(() => calls.push('in a savepoint'))
      })
      main.beforeCommit(() => calls.push('last'))
      await main.commit()
      await note('c')
    })
    expect(calls).toEqual(['first', 'in a savepoint', 'last', 'registered by the first'])
  })

  it('K1 stops at the first veto', async () => {
    const second = vi.fn()
    await newContext(async () => {
      await note('a')
      main.beforeCommit(() => Promise.reject(boom))
      main.beforeCommit(second)
      await expect(main.commit()).rejects.toBe(boom)
      expect(main.session().inTransaction).toBe(false)
      await note('b')
    })
    expect(second).not.toHaveBeenCalled()
    expect(await notes()).toEqual(['b'])
  })

  it('K1 owns the session like a block: other branches wait, and what would end the transaction is refused', async () => {
    await newContext(async () => {
      const inside = { began: gate(), goOn: gate() }
      await note('a')
      main.beforeCommit(async () => {
        await expect(main.commit()).rejects.toMatchObject({ code: 'AMBIENT_ATOMIC_NESTING' })
        await expect(main.rollback()).rejects.toMatchObject({ code: 'AMBIENT_ATOMIC_NESTING' })
        await expect(main.atomic(() => 1, { current: 'commit' })).rejects.toMatchObject({
          code: 'AMBIENT_ATOMIC_NESTING',
        })
        await main.atomic(() => note('nested'))
        inside.began.open()
        await inside.goOn.passed
        await note('hook')
      })
      const committing = main.commit()
      await inside.began.passed
      const sibling = note('sibling')
      inside.goOn.open()
      await committing
      expect(await notes()).toEqual(['a', 'hook', 'nested'])
      await sibling
    })
    expect(await notes()).toEqual(['a', 'hook', 'nested', 'sibling'])
  })

  it('A6 refuses what an afterBegin hook does late', async () => {
    const late = gate()
    let laterOn: Promise<unknown> | undefined
    const own = subject.define({
      hooks: {
        afterBegin: ({ db }) => {
          laterOn ??= late.passed.then(() => db.query("insert into notes values ('late')"))
        },
      },
    })
    await newContext(async () => {
      await own.db.query("insert into notes values ('a')")
      late.open()
      await expect(laterOn).rejects.toMatchObject({
        code: 'AMBIENT_BLOCK_ENDED',
        message: expect.stringContaining('AfterBegin hook has ended.'),
      })
    })
    expect(await notes()).toEqual(['a'])
  })

  it('K1 A6 joins what the hook did not await, and refuses what it does late', async () => {
    const late = gate()
    let laterOn: Promise<unknown> | undefined
    await newContext(async () => {
      await note('a')
      main.beforeCommit(() => {
        void note('b')
        laterOn = late.passed.then(() => note('late'))
      })
      await main.commit()
      expect(await notes()).toEqual(['a', 'b'])
      late.open()
      await expect(laterOn).rejects.toMatchObject({
        code: 'AMBIENT_BLOCK_ENDED',
        message: expect.stringContaining('BeforeCommit hook has ended.'),
      })
    })
    expect(await notes()).toEqual(['a', 'b'])
  })

  it('K1 rolls back when a statement fails that the hook did not await', async () => {
    await newContext(async () => {
      await note('a')
      main.beforeCommit(() => void fail())
      await expect(main.commit()).rejects.toThrow('missing')
      expect(main.session().inTransaction).toBe(false)
    })
    expect(await notes()).toEqual([])
  })

  it('S4 K1 leaves the transaction failed when a statement fails that the hook swallowed, and runs no further hook', async () => {
    const calls: string[] = []
    const aborted = { code: 'AMBIENT_TRANSACTION_ABORTED', cause: expect.objectContaining({ code: '42P01' }) }
    for (const commit of [main.commit, () => main.closeSession('commit'), () => main.atomic(() => {})]) {
      const work = newContext(async () => {
        await note('lost')
        main.beforeCommit(() => fail().catch(() => {}))
        main.beforeCommit(() => calls.push('next'))
        await expect(commit()).rejects.toMatchObject(aborted)
        await expect(note('refused')).rejects.toMatchObject(aborted)
      })
      await expect(work).rejects.toMatchObject(aborted)
    }
    expect(calls).toEqual([])
    expect(await notes()).toEqual([])
  })

  it.each(['commit', 'rollback'] as const)(
    'K1 attaches a hook that comes during a %s to the next transaction',
    async (end) => {
      const calls: string[] = []
      await newContext(async () => {
        await note('first')
        subject.sent.length = 0
        const ending = main[end]()
        while (!subject.sent.some((text) => text.toLowerCase() === end)) await Promise.resolve() // it can't be answered yet
        main.beforeCommit(() => calls.push('before'))
        main.afterCommit(() => calls.push('after'))
        main.afterRollback(() => calls.push('rolled back'))
        await ending
        expect(calls).toEqual([])
        await note('second')
      })
      expect(calls).toEqual(['before', 'after'])
      expect(await notes()).toEqual(end === 'commit' ? ['first', 'second'] : ['second'])
    },
  )

  it('K1 runs a hook that comes between a commit() and its COMMIT', async () => {
    for (let turns = 0; turns < 10; turns++) {
      const calls: string[] = []
      await newContext(async () => {
        await note('lost')
        const committing = main.commit()
        for (let count = 0; count < turns; count++) await Promise.resolve()
        main.beforeCommit(() => calls.push('hook'))
        await committing
        await note('found')
      })
      expect(calls).toEqual(['hook'])
      expect(await notes()).toEqual(['found', 'lost'])
      await subject.clear()
    }
  })

  it('K1 attaches a hook that is registered while idle to the next transaction', async () => {
    const calls: string[] = []
    await newContext(async () => {
      main.beforeCommit(() => calls.push('before'))
      main.afterCommit(() => calls.push('after'))
      await main.commit()
      await main.rollback()
      expect(calls).toEqual([])
      await note('a')
      await main.commit()
      expect(calls).toEqual(['before', 'after'])
      await note('b')
    })
    expect(calls).toEqual(['before', 'after'])
  })

  it('K1 runs a hook that is registered while idle at the end of the context, if there is no transaction', async () => {
    const calls: string[] = []
    await newContext(async () => {
      main.beforeCommit(async () => {
        calls.push('before')
        await note('hook')
      })
      main.afterCommit(() => calls.push('after'))
      main.afterRollback(() => calls.push('rolled back'))
    })
    expect(calls).toEqual(['before', 'after'])
    expect(await notes()).toEqual(['hook'])
    const failing = newContext(async () => {
      main.beforeCommit(() => calls.push('never'))
      main.afterRollback(() => calls.push('rolled back'))
      throw boom
    })
    await expect(failing).rejects.toBe(boom)
    expect(calls).toEqual(['before', 'after', 'rolled back'])
  })

  it('K1 lets a hook at the end of a context veto, use the session, and open one of another database', async () => {
    const other = subject.define({ name: 'other' })
    await newContext(async () => {
      await note('a')
      main.beforeCommit(async () => {
        await put(other, 'other')
        other.beforeCommit(() => put(other, 'hook of the other'))
      })
    })
    expect(await notes()).toEqual(['a', 'hook of the other', 'other'])
  })

  it('K1 drops a hook of a savepoint that was rolled back', async () => {
    const hook = vi.fn()
    await newContext(async () => {
      await main.atomic(async () => {
        await note('a')
        const inner = main.atomic(async () => {
          await note('b')
          main.beforeCommit(hook)
          throw boom
        })
        await expect(inner).rejects.toBe(boom)
      })
    })
    expect(hook).not.toHaveBeenCalled()
  })

  it('K1 does not run at a rollback', async () => {
    const hook = vi.fn()
    await newContext(async () => {
      await note('a')
      main.beforeCommit(hook)
      await main.rollback()
      await main
        .atomic(async () => {
          await note('b')
          main.beforeCommit(hook)
          throw boom
        })
        .catch(() => {})
    })
    expect(hook).not.toHaveBeenCalled()
  })

  it('C4 keeps late blocks of every kind out while the hooks of the end run', async () => {
    for (const current of [undefined, 'commit', 'rollback', 'append', 'raise', 'savepoint', 'join'] as const) {
      await subject.clear()
      const late = gate()
      let branch: Promise<unknown> | undefined
      await newContext(async () => {
        await note('a')
        const block = () => main.atomic(() => note('late'), { current })
        branch = late.passed.then(block).catch((error: unknown) => error)
        main.beforeCommit(async () => {
          late.open()
          await branch
          await note('b')
        })
      })
      expect(await branch).toMatchObject({ code: 'AMBIENT_CONTEXT_ENDED' })
      expect(await notes()).toEqual(['a', 'b'])
      expect(subject.sent.filter((text) => !text.startsWith('insert'))).toEqual(['BEGIN', 'COMMIT'])
    }
  })
})

describe('afterCommit and afterRollback', () => {
  for (const [path, run] of commitPaths) {
    it(`K2 run after COMMIT, with the connection gone back: ${path}`, async () => {
      const single = subject.define({ pool: { max: 1 }, acquireTimeout: 2000 })
      const calls: string[] = []
      await run(single, () => {
        single.afterRollback(() => calls.push('rolled back'))
        single.afterCommit(async () => {
          calls.push(...(await notes()))
          expect(await subject.openTransactions()).toBe(0)
          await put(single, 'hook') // by the only connection
        })
      })
      expect(calls).toEqual(['work'])
      expect(await notes()).toEqual(['hook', 'work'])
    })
  }

  it('K2 afterRollback runs after every way of rolling back, with the connection gone back', async () => {
    const single = subject.define({ pool: { max: 1 }, acquireTimeout: 2000 })
    const calls: string[] = []
    const work = async (name: string) => {
      await put(single, name)
      single.afterCommit(() => calls.push(`${name} committed`))
      single.afterRollback(async () => {
        await single.db.query('select 1')
        calls.push(name)
      })
    }
    const thrown = async (name: string) => {
      await work(name)
      throw boom
    }
    await newContext(async () => {
      await work('rollback()')
      await single.rollback()
      await work('close')
      await single.closeSession('rollback')
      await single.atomic(() => thrown('atomic')).catch(() => {})
      await work('current')
      await single.atomic(() => 1, { current: 'rollback' })
    })
    await newContext(() => thrown('context')).catch(() => {})
    await single
      .newSession(async (session) => {
        session.afterRollback(() => calls.push('newSession'))
        throw boom
      })
      .catch(() => {})
    expect(calls).toEqual(['rollback()', 'close', 'atomic', 'current', 'context', 'newSession'])
    expect(await notes()).toEqual([])
  })

  it('K2 run in a context of their own, which is settled', async () => {
    await newContext(async () => {
      const session = main.session()
      await main.atomic(async () => {
        await note('a')
        main.afterCommit(async () => {
          expect(hasContext()).toBe(true)
          expect(main.session()).not.toBe(session)
          await note('hook')
          await main.commit()
          await note('settled')
        })
      })
      expect(await notes()).toEqual(['a', 'hook', 'settled'])
    })
  })

  it('K2 run in the order of registration, one after the other, awaited, all of them', async () => {
    const errors: unknown[] = []
    const reporting = subject.define({ onHookError: (error) => errors.push(error) })
    const calls: string[] = []
    const first = gate()
    await newContext(async () => {
      reporting.afterCommit(async () => {
        first.open()
        await put(reporting, 'hook')
        calls.push('first')
      })
      reporting.afterCommit(() => {
        calls.push('failing')
        throw boom
      })
      await put(reporting, 'a')
      const branch = { began: gate(), goOn: gate() }
      const block = reporting.session().savepoint(async () => {
        await put(reporting, 'b')
        reporting.afterCommit(() => calls.push('third'))
        branch.began.open()
        await branch.goOn.passed
      })
      await branch.began.passed
      reporting.afterCommit(() => calls.push('fourth'))
      branch.goOn.open()
      await block
      reporting.afterCommit(() => calls.push('last'))
      await reporting.commit()
      expect(calls).toEqual(['first', 'failing', 'third', 'fourth', 'last'])
    })
    expect(errors).toEqual([boom])
  })

  it('K2 run at the end of a context after all databases have settled, in the order of registration', async () => {
    const other = subject.define({ name: 'other' })
    const calls: string[] = []
    await newContext(async () => {
      other.afterCommit(async () => calls.push(`other: ${await notes()}`))
      main.afterCommit(async () => calls.push(`main: ${await notes()}`))
      other.afterCommit(async () => calls.push(`other again: ${await notes()}`))
      await note('a')
      await put(other, 'b')
    })
    expect(calls).toEqual(['other: a,b', 'main: a,b', 'other again: a,b'])
  })

  it('K2 a failure never changes the outcome, and goes to onHookError', async () => {
    const errors: unknown[] = []
    const reporting = subject.define({
      onHookError: (error) => {
        errors.push(error)
        throw new Error('thrown by onHookError itself')
      },
    })
    const warned = new Promise<Error>((resolve) => process.once('warning', resolve))
    const result = await newContext(async () => {
      await put(reporting, 'a')
      reporting.afterCommit(() => Promise.reject(boom))
      return 'result'
    })
    expect(result).toBe('result')
    expect(errors).toEqual([boom])
    expect((await warned).message).toContain('thrown by onHookError itself')
    expect(await notes()).toEqual(['a'])
    const failing = newContext(async () => {
      await put(reporting, 'b')
      reporting.afterRollback(() => Promise.reject(boom))
      throw new Error('the first')
    })
    await expect(failing).rejects.toThrow('the first')
    expect(errors).toEqual([boom, boom])
  })

  it('K2 a failure is a process warning by default', async () => {
    const warned = new Promise<Error>((resolve) => process.once('warning', resolve))
    await newContext(() =>
      main.atomic(async () => {
        await note('a')
        main.afterCommit(() => Promise.reject(boom))
      }),
    )
    const warning = await warned
    expect(warning.name).toBe('AmbientHookWarning')
    expect(warning.message).toContain("database 'main'")
    expect(warning.message).toContain('boom')
  })

  it('K2 drops the hooks of a savepoint that was rolled back, and keeps those of one that was not', async () => {
    const calls: string[] = []
    await newContext(async () => {
      await main.atomic(async () => {
        await note('a')
        main.afterCommit(() => calls.push('outer'))
        await main.atomic(async () => {
          await note('b')
          main.afterCommit(() => calls.push('kept'))
          main.afterRollback(() => calls.push('outer rolled back'))
        })
        const inner = main.atomic(async () => {
          await note('c')
          main.afterCommit(() => calls.push('dropped'))
          main.afterRollback(() => calls.push('dropped too'))
          throw boom
        })
        await expect(inner).rejects.toBe(boom)
      })
    })
    expect(calls).toEqual(['outer', 'kept'])
  })

  it('K2 drops the hooks of a leased client that rolled back to a savepoint', async () => {
    const calls: string[] = []
    const kysely = kyselyHandle<{ notes: { text: string } }>(main, (pool) => new PostgresDialect({ pool }))
    await newContext(async () => {
      const inner = kysely.transaction().execute(async () => {
        await note('a')
        main.afterCommit(() => calls.push('dropped'))
        throw boom
      })
      await expect(inner).rejects.toBe(boom)
      await kysely.transaction().execute(async () => {
        await note('b')
        main.afterCommit(() => calls.push('kept'))
      })
    })
    expect(calls).toEqual(['kept'])
  })

  it('K2 afterRollback runs after a COMMIT that the server refused', async () => {
    const calls: string[] = []
    await subject.database.witness.rows('create table if not exists parents (id int primary key)')
    await subject.database.witness.rows(
      'create table if not exists children (parent int references parents deferrable initially deferred)',
    )
    const work = newContext(async () => {
      main.afterCommit(() => calls.push('committed'))
      main.afterRollback(() => calls.push('rolled back'))
      await main.db.query('insert into children values (1)')
    })
    await expect(work).rejects.toMatchObject({ code: '23503' })
    expect(calls).toEqual(['rolled back'])
  })

  it('K2 neither runs when the outcome is unknown', async () => {
    const { database, calls } = withHooks()
    await subject.database.witness.rows('create table if not exists suicides (id int)')
    await subject.database.witness.rows(`
      create or replace function end_backend() returns trigger language plpgsql as
      $$ begin perform pg_terminate_backend(pg_backend_pid()); return null; end $$`)
    await subject.database.witness.rows(`
      create or replace function kill() returns void language sql as 'insert into suicides values (1)'`)
    await subject.database.witness.rows(`
      create constraint trigger at_commit after insert on suicides deferrable initially deferred
      for each row execute function end_backend()`)
    const unknown = { code: 'AMBIENT_COMMIT_UNKNOWN' }
    const work = async () => {
      database.afterCommit(() => calls.push('committed'))
      database.afterRollback(() => calls.push('rolled back'))
      await database.db.query('select kill()')
    }
    await expect(newContext(work)).rejects.toMatchObject(unknown)
    await newContext(() => expect(database.atomic(work)).rejects.toMatchObject(unknown))
    await newContext(async () => {
      await work()
      await expect(database.commit()).rejects.toMatchObject(unknown)
    })
    expect(calls.filter((call) => call !== 'afterBegin' && call !== 'beforeCommit')).toEqual([])
  })

  it('K2 S10 neither runs when the transaction was ended behind the back of the session', async () => {
    const calls: string[] = []
    await newContext(async () => {
      await note('a')
      main.afterCommit(() => calls.push('committed'))
      main.afterRollback(() => calls.push('rolled back'))
      // Several statements in one text, which no check of the text refuses.
      await main.db.query("insert into notes values ('b'); commit")
      await expect(main.commit()).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', outcome: 'unknown' })
      await main.rollback()
    })
    expect(calls).toEqual([])
    expect(await notes()).toEqual(['a', 'b'])
  })

  it('K2 does not run for a hook that is registered in an ended block or context', async () => {
    let register = () => {}
    await newContext(async () => {
      await main.atomic(() => {
        const scoped = main.session()
        register = () => scoped.afterCommit(() => {})
      })
    })
    expect(register).toThrow(expect.objectContaining({ code: 'AMBIENT_CONTEXT_ENDED' }))
  })

  it('K2 run once the session is free again, and not at the end of a block inside the one that ended the transaction', async () => {
    for (const current of ['commit', 'rollback'] as const) {
      const order: string[] = []
      await newContext(async () => {
        await note(current)
        main.afterCommit(() => order.push('after commit'))
        main.afterRollback(() => order.push('after rollback'))
        const block = async () => {
          await main.atomic(() => main.db.query('select 1'))
          order.push('inner block over')
        }
        await main.atomic(block, { current })
        order.push('block over')
      })
      expect(order).toEqual(['inner block over', `after ${current}`, 'block over'])
    }
  })

  it('A3 K1 K2 belong to the work of the branch that registers them, and not to the block of another', async () => {
    for (const retry of [undefined, { attempts: 2 }]) {
      for (const outcome of ['commits', 'throws'] as const) {
        await subject.clear()
        const order: string[] = []
        const [began, registered] = [gate(), gate()]
        let attempts = 0
        const block = async () => {
          await note('block')
          began.open()
          await registered.passed
          if (retry && ++attempts === 1) throw Object.assign(boom, { severity: 'ERROR', code: '40001' })
          if (outcome === 'throws') throw boom
          order.push('block ends')
        }
        const branch = async () => {
          await began.passed
          main.beforeCommit(() => order.push('before commit'))
          main.afterCommit(() => order.push('after commit'))
          main.afterRollback(() => order.push('after rollback'))
          registered.open()
          await note('branch')
          order.push('branch ends')
        }
        await newContext(() => Promise.allSettled([main.atomic(block, { retry }), branch()]))
        const ends = outcome === 'throws' ? [] : ['block ends']
        expect(order).toEqual([...ends, 'branch ends', 'before commit', 'after commit'])
        expect(await notes()).toEqual(outcome === 'throws' ? ['branch'] : ['block', 'branch'])
      }
    }
  })

  it('C4 K2 run afterRollback of what stands outside a block when the context ends in the middle of it', async () => {
    const order: string[] = []
    const began = gate()
    const forgotten = gate()
    const work = newContext(async () => {
      const block = async () => {
        main.afterRollback(() => order.push('block'))
        began.open()
        await forgotten.passed
      }
      main.atomic(block).catch(() => order.push('block refused'))
      await began.passed
      main.afterRollback(() => order.push('branch'))
      throw boom
    })
    await expect(work).rejects.toBe(boom)
    expect(order).toEqual(['block', 'branch'])
    forgotten.open()
  })
})

describe('hooks of the database', () => {
  for (const [path, run] of commitPaths) {
    it(`K1 K2 run around every transaction: ${path}`, async () => {
      const { database, calls } = withHooks()
      await run(database, () => {
        database.beforeCommit(() => calls.push('own beforeCommit'))
        database.afterCommit(() => calls.push('own afterCommit'))
      })
      expect(calls).toEqual(['afterBegin', 'beforeCommit', 'own beforeCommit', 'afterCommit', 'own afterCommit'])
    })
  }

  it('K1 K2 run for each transaction of a session, and for newSession', async () => {
    const { database, calls } = withHooks()
    await newContext(async () => {
      await put(database, 'a')
      await database.commit()
      await put(database, 'b')
      await database.rollback()
    })
    expect(calls).toEqual(['afterBegin', 'beforeCommit', 'afterCommit', 'afterBegin', 'afterRollback'])
    calls.length = 0
    await database.newSession(({ db }) => db.query("insert into notes values ('c')"))
    expect(calls).toEqual(['afterBegin', 'beforeCommit', 'afterCommit'])
  })

  it('K1 do not run without a transaction', async () => {
    const { database, calls } = withHooks()
    await newContext(async () => {
      database.session()
      await database.commit()
      await database.atomic(() => 1)
    })
    await newContext(() => put(database, 'a'), { transaction: 'autocommit' })
    expect(calls).toEqual([])
  })

  it('K1 afterBegin runs inside the transaction before the first statement, once for concurrent ones', async () => {
    const database = subject.define({
      hooks: {
        afterBegin: ({ db }) => db.query("select set_config('app.tenant', 'seven', true)"),
      },
    })
    const tenant = () => database.db.query("select current_setting('app.tenant') as tenant").then(({ rows }) => rows)
    await newContext(async () => {
      expect(await Promise.all([tenant(), tenant()])).toEqual([[{ tenant: 'seven' }], [{ tenant: 'seven' }]])
      await database.commit()
      await database.atomic(async () => {
        expect(await database.atomic(tenant)).toEqual([{ tenant: 'seven' }])
      })
    })
    const control = subject.sent.map((text) => text.split(' ')[0])
    expect(control).toEqual([
      'BEGIN',
      'select',
      'select',
      'select',
      'COMMIT',
      'BEGIN',
      'select',
      'SAVEPOINT',
      'select',
      'RELEASE',
      'COMMIT',
    ])
  })

  it('K1 afterBegin may use the ambient handle', async () => {
    const database: AmbientDatabase<Pool, Pool> = subject.define({
      hooks: { afterBegin: () => database.db.query('set local statement_timeout = 1234') },
    })
    await newContext(async () => {
      const { rows } = await database.db.query('show statement_timeout')
      expect(rows).toEqual([{ statement_timeout: '1234ms' }])
    })
  })

  it('K1 a throw of afterBegin rolls back and leaves the session idle', async () => {
    let failing = true
    const database = subject.define({
      hooks: {
        afterBegin: () => {
          if (failing) throw boom
        },
      },
    })
    await newContext(async () => {
      await expect(put(database, 'a')).rejects.toBe(boom)
      expect(database.session().inTransaction).toBe(false)
      expect(await subject.openTransactions()).toBe(0)
      failing = false
      await put(database, 'b')
    })
    expect(await notes()).toEqual(['b'])
  })

  it('K1 a veto of beforeCommit rolls back', async () => {
    const calls: string[] = []
    const database = subject.define({
      hooks: {
        beforeCommit: async () => {
          expect(await subject.openTransactions()).toBe(1)
          throw boom
        },
        afterCommit: () => calls.push('committed'),
        afterRollback: () => calls.push('rolled back'),
      },
    })
    await expect(newContext(() => put(database, 'a'))).rejects.toBe(boom)
    await newContext(() => expect(database.atomic(() => put(database, 'a'))).rejects.toBe(boom))
    expect(await notes()).toEqual([])
    expect(calls).toEqual(['rolled back', 'rolled back'])
  })

  it('K1 beforeCommit writes into the transaction, whoever commits', async () => {
    const database = subject.define({
      hooks: { beforeCommit: ({ db }) => db.query("insert into notes values ('outbox')") },
    })
    await newContext(async () => {
      await put(database, 'a')
      await database.atomic(() => undefined, { current: 'append' })
      expect(await notes()).toEqual(['a', 'outbox'])
    })
  })
})
