import { newContext } from 'ambient-db'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { gate, until } from '../support/gate.ts'
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
const aborted = { code: 'AMBIENT_TRANSACTION_ABORTED', database: 'main' }
const closed = { code: 'AMBIENT_SESSION_CLOSED', database: 'main' }

/** The first words of what was sent. */
function verbs(): string[] {
  return subject.sent.map((text) => text.split(' ')[0]!)
}

function pid(db = main.db): Promise<number> {
  return db.query<{ pid: number }>('select pg_backend_pid() as pid').then(({ rows }) => rows[0]!.pid)
}

describe('a transaction that failed', () => {
  it('S4 refuses statements unsent and rejects commit with the first error, until a rollback', async () => {
    await newContext(async () => {
      await note('a')
      const first = await fail().catch((error: unknown) => error)
      expect(first).toMatchObject({ code: '42P01' })
      const before = subject.sent.length
      await expect(note('b')).rejects.toMatchObject({ ...aborted, cause: first })
      await expect(main.commit()).rejects.toMatchObject({ ...aborted, cause: first })
      await expect(main.begin()).rejects.toMatchObject({ ...aborted, cause: first })
      await expect(main.commit()).rejects.toMatchObject({ ...aborted, cause: first })
      await expect(main.closeSession('commit')).rejects.toMatchObject({ ...aborted, cause: first })
      expect(subject.sent).toHaveLength(before)
      expect(main.session().inTransaction).toBe(true)
      await main.rollback()
      expect(main.session().inTransaction).toBe(false)
      await note('c')
    })
    expect(await notes()).toEqual(['c'])
  })

  it('S4 rejects at the end of the context with the first error as cause', async () => {
    let first: unknown
    const work = newContext(async () => {
      await note('a')
      first = await fail().catch((error: unknown) => error)
    })
    const error = await work.catch((thrown: unknown) => thrown)
    expect(error).toMatchObject({ ...aborted, cause: first, outcome: 'rolled-back' })
    expect(await notes()).toEqual([])
  })

  it('S4 names the first of several errors', async () => {
    await newContext(async () => {
      const results = await Promise.allSettled([fail(), main.db.query('select 1 / 0'), note('a')])
      expect(results.map(({ status }) => status)).toEqual(['rejected', 'rejected', 'rejected'])
      await expect(main.commit()).rejects.toMatchObject({ ...aborted, cause: { code: '42P01' } })
      await main.rollback()
    })
  })

  it('S4 dooms only the block of the savepoint in which an error was swallowed', async () => {
    await newContext(async () => {
      await note('a')
      let first: unknown
      const nested = main.session().savepoint(async () => {
        await note('b')
        first = await fail().catch((error: unknown) => error)
        await expect(note('c')).rejects.toMatchObject({ ...aborted, cause: first })
      })
      const error = await nested.catch((thrown: unknown) => thrown)
      expect(error).toMatchObject({ ...aborted, cause: first })
      await note('d')
    })
    expect(await notes()).toEqual(['a', 'd'])
  })

  it('S4 a failure that left its savepoint does not doom what surrounds it', async () => {
    await newContext(async () => {
      await main.atomic(async () => {
        await note('a')
        await main
          .session()
          .savepoint(async () => {
            await note('b')
            await fail()
          })
          .catch(() => {})
        await note('c')
      })
    })
    expect(await notes()).toEqual(['a', 'c'])
  })

  it('S4 an error that never reached the server dooms nothing', async () => {
    await newContext(async () => {
      await note('a')
      await expect(main.db.query(undefined as unknown as string)).rejects.toThrow()
      await note('b')
    })
    expect(await notes()).toEqual(['a', 'b'])
  })

  it('S10 tells of a COMMIT that was hidden in SQL', async () => {
    const work = newContext(async () => {
      await note('a')
      await main.db.query('select 1; commit')
      await expect(note('b')).rejects.toMatchObject({ ...aborted, outcome: 'unknown' })
      await expect(note('b')).rejects.toThrow('earlier work may be committed')
    })
    await expect(work).rejects.toMatchObject({ ...aborted, outcome: 'unknown' })
    expect(await notes()).toEqual(['a'])
  })
})

describe('order', () => {
  it('S8 runs statements one at a time in the order in which they are issued', async () => {
    await newContext(async () => {
      const order: number[] = []
      await Promise.all(
        [0.03, 0.01, 0].map(async (seconds, index) => {
          await main.db.query(`select ${index}, pg_sleep($1)`, [seconds])
          order.push(index)
        }),
      )
      expect(order).toEqual([0, 1, 2])
    })
    expect(subject.sent.filter((text) => text.includes('pg_sleep')).map((text) => text[7])).toEqual(['0', '1', '2'])
    expect(verbs().filter((verb) => verb === 'BEGIN')).toHaveLength(1)
  })

  it('S8 counts a statement as issued before the commit that follows it', async () => {
    await newContext(async () => {
      const query = note('a')
      const commit = main.commit()
      const next = note('b')
      await Promise.all([query, commit, next])
      expect(await notes()).toEqual(['a'])
      await main.rollback()
    })
    expect(verbs()).toEqual(['BEGIN', 'insert', 'COMMIT', 'BEGIN', 'insert', 'ROLLBACK'])
  })

  it('S8 keeps the order of statements, commits, rollbacks and blocks that nobody awaits in between', async () => {
    await newContext(async () => {
      await Promise.all([
        note('a'),
        main.commit(),
        note('b'),
        main.rollback(),
        main.atomic(() => note('c')),
        note('d'),
        main.closeSession('commit'),
      ])
      expect(await notes()).toEqual(['a', 'c', 'd'])
    })
  })

  it('S8 counts statements as issued before the end of the context that follows them', async () => {
    await newContext(async () => {
      void note('a')
      void note('b')
    })
    expect(await notes()).toEqual(['a', 'b'])
  })
})

describe('close', () => {
  it('S6 refuses with a transaction open, unless told how it ends', async () => {
    await newContext(async () => {
      await note('a')
      const session = main.session()
      await expect(main.closeSession()).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_OPEN', database: 'main' })
      expect(session.closed).toBe(false)
      await note('b')
      await main.closeSession('commit')
      expect(session.closed).toBe(true)
      expect(await notes()).toEqual(['a', 'b'])
      await note('c')
      await main.closeSession('rollback')
    })
    expect(await notes()).toEqual(['a', 'b'])
  })

  it('S6 lets what was issued finish, and refuses what comes after', async () => {
    await newContext(async () => {
      const session = main.session()
      const before = note('a')
      const closing = main.closeSession('commit')
      const after = session.db.query("insert into notes values ('late')")
      await before
      await closing
      await expect(after).rejects.toMatchObject(closed)
      expect(await notes()).toEqual(['a'])
    })
  })

  it('S6 the session object is dead afterwards, in every branch, and the next session is a new one', async () => {
    await newContext(async () => {
      const session = main.session()
      const go = gate()
      const branch = go.passed.then(() => session.db.query("insert into notes values ('late')"))
      await note('a')
      await session.close('commit')
      const before = subject.sent.length
      go.open()
      await expect(branch).rejects.toMatchObject(closed)
      await expect(session.begin()).rejects.toMatchObject(closed)
      await expect(session.commit()).rejects.toMatchObject(closed)
      await expect(session.rollback()).rejects.toMatchObject(closed)
      await expect(session.savepoint(() => 1)).rejects.toMatchObject(closed)
      expect(() => session.beforeCommit(() => {})).toThrow(expect.objectContaining(closed))
      expect(() => session.afterCommit(() => {})).toThrow(expect.objectContaining(closed))
      expect(subject.sent).toHaveLength(before)
      expect(session.inTransaction).toBe(false)
      expect(main.session()).not.toBe(session)
      await note('b')
    })
    expect(await notes()).toEqual(['a', 'b'])
  })

  it('S6 is harmless when called again', async () => {
    await newContext(async () => {
      const session = main.session()
      await note('a')
      await session.close('rollback')
      await session.close()
      await session.close('commit')
    })
    expect(await notes()).toEqual([])
  })

  it('S6 needs no outcome when nothing is open, and gives the connection back with an outcome', async () => {
    await newContext(async () => {
      await main.closeSession()
      await note('a')
      await main.commit()
      await main.closeSession()
      await note('b')
      await main.closeSession('rollback')
      expect(await subject.openTransactions()).toBe(0)
    })
    expect(await notes()).toEqual(['a'])
  })

  it('S6 a session that failed closes with a rollback', async () => {
    await newContext(async () => {
      await fail().catch(() => {})
      await expect(main.closeSession()).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_OPEN' })
      await main.closeSession('rollback')
      await note('a')
    })
    expect(await notes()).toEqual(['a'])
  })

  it('S6 disposal rolls back what is open', async () => {
    await newContext(async () => {
      let disposed: ReturnType<typeof main.session>
      {
        await using session = main.session()
        disposed = session
        await session.db.query("insert into notes values ('lost')")
      }
      expect(disposed.closed).toBe(true)
      expect(await notes()).toEqual([])
      {
        await using session = main.session()
        expect(session).not.toBe(disposed)
        await session.db.query("insert into notes values ('kept')")
        await session.commit()
      }
    })
    expect(await notes()).toEqual(['kept'])
  })
})

describe('begin', () => {
  it('S2 opens a transaction before the first statement, with options', async () => {
    await newContext(async () => {
      await main.begin({ isolationLevel: 'serializable', readOnly: true, deferrable: false })
      expect(main.session().inTransaction).toBe(true)
      expect(subject.sent).toEqual(['BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY NOT DEFERRABLE'])
      await expect(note('a')).rejects.toMatchObject({ code: '25006' })
      await main.rollback()
      await note('b')
    })
    expect(await notes()).toEqual(['b'])
  })

  it('S2 does nothing when a transaction is open, and concurrent calls share one', async () => {
    await newContext(async () => {
      await Promise.all([main.begin(), main.session().begin(), note('a')])
      await main.begin()
    })
    expect(verbs()).toEqual(['BEGIN', 'insert', 'COMMIT'])
  })

  it('S2 opens the savepoint of the block that it is called in', async () => {
    await newContext(async () => {
      await note('a')
      await main.session().savepoint(() => main.begin())
    })
    expect(verbs()).toEqual(['BEGIN', 'insert', 'SAVEPOINT', 'RELEASE', 'COMMIT'])
  })

  it('S2 a failed opening leaves the session idle, and the next statement tries again', async () => {
    let broken = true
    const database = subject.define({
      beforeSession: () => {
        if (broken) throw boom
      },
    })
    await newContext(async () => {
      await expect(database.begin({ isolationLevel: 'serializable' })).rejects.toBe(boom)
      expect(database.session().inTransaction).toBe(false)
      broken = false
      await database.db.query("insert into notes values ('a')")
    })
    expect(await notes()).toEqual(['a'])
    expect(verbs()).toEqual(['BEGIN', 'insert', 'COMMIT'])
    broken = true
    await newContext(
      async () => {
        await expect(database.begin()).rejects.toBe(boom)
        broken = false
        await database.db.query("insert into notes values ('b')")
        expect(await notes()).toEqual(['a', 'b'])
      },
      { transaction: 'autocommit' },
    )
  })
})

describe('savepoint', () => {
  it('A1 session.savepoint keeps its work on return and undoes it on a throw', async () => {
    await newContext(async () => {
      const { savepoint } = main.session()
      await note('a')
      expect(await savepoint(() => note('b').then(() => 'result'))).toBe('result')
      const throwing = savepoint(async () => {
        await note('c')
        throw boom
      })
      await expect(throwing).rejects.toBe(boom)
      await savepoint(() =>
        savepoint(async () => {
          await note('d')
          await savepoint(() => note('e').then(() => Promise.reject(boom))).catch(() => {})
        }),
      )
      expect(await notes()).toEqual([])
    })
    expect(await notes()).toEqual(['a', 'b', 'd'])
  })

  it('A7 session.savepoint with nothing open begins and commits', async () => {
    await newContext(async () => {
      await main.session().savepoint(() => note('a'))
      expect(await notes()).toEqual(['a'])
    })
    expect(verbs()).toEqual(['BEGIN', 'insert', 'COMMIT'])
  })

  it('A1 sends nothing for one without statements', async () => {
    await newContext(async () => {
      await note('a')
      await main.session().savepoint(() => undefined)
    })
    expect(verbs()).toEqual(['BEGIN', 'insert', 'COMMIT'])
  })
})

describe('a context without transactions', () => {
  const autocommit = { transaction: 'autocommit' } as const

  it('S2 runs each statement on its own, straight from the pool', async () => {
    await newContext(async () => {
      await note('a')
      expect(await notes()).toEqual(['a'])
      expect(main.session().inTransaction).toBe(false)
      await expect(fail()).rejects.toMatchObject({ code: '42P01' })
      await note('b')
      expect(await subject.openTransactions()).toBe(0)
    }, autocommit)
    expect(verbs()).toEqual(['insert', 'select', 'insert'])
    expect(await notes()).toEqual(['a', 'b'])
  })

  it('S2 keeps what was done when the context throws', async () => {
    const work = newContext(async () => {
      await note('a')
      throw boom
    }, autocommit)
    await expect(work).rejects.toBe(boom)
    expect(await notes()).toEqual(['a'])
  })

  it('A1 opens a transaction for atomic, savepoint and begin, and only for them', async () => {
    await newContext(async () => {
      await main.atomic(async () => {
        await note('a')
        expect(await notes()).toEqual([])
      })
      await main
        .atomic(async () => {
          await note('lost')
          throw boom
        })
        .catch(() => {})
      await note('b')
      await main.session().savepoint(async () => {
        await note('c')
        expect(await notes()).toEqual(['a', 'b'])
      })
      await main.begin()
      await note('d')
      await main.rollback()
      await note('e')
      expect(await notes()).toEqual(['a', 'b', 'c', 'e'])
    }, autocommit)
    expect(verbs().filter((verb) => verb === 'BEGIN')).toHaveLength(4)
  })

  it('A7 a joining block leaves its transaction open until the end', async () => {
    await newContext(async () => {
      await main.atomic(() => note('a'), { current: 'join' })
      expect(main.session().inTransaction).toBe(true)
      await note('b')
      expect(await notes()).toEqual([])
    }, autocommit)
    expect(await notes()).toEqual(['a', 'b'])
  })

  it('S2 can be the default of a database, or of a session beside the context', async () => {
    const plain = subject.define(autocommit)
    await newContext(async () => {
      await plain.db.query("insert into notes values ('a')")
      expect(await notes()).toEqual(['a'])
    })
    await main.newSession(async ({ db }) => {
      await db.query("insert into notes values ('b')")
      expect(await notes()).toEqual(['a', 'b'])
    }, autocommit)
    await newContext(
      async () => {
        await plain.db.query("insert into notes values ('c')")
        expect(await notes()).toEqual(['a', 'b'])
      },
      { transaction: {} },
    )
  })
})

describe('newSession', () => {
  it('commits on return and gives the result', async () => {
    const result = await main.newSession(async (session) => {
      await session.db.query("insert into notes values ('a')")
      expect(session.inTransaction).toBe(true)
      expect(await notes()).toEqual([])
      return 'result'
    })
    expect(result).toBe('result')
    expect(await notes()).toEqual(['a'])
  })

  it('rolls back on a throw, with that very error', async () => {
    const work = main.newSession(async ({ db }) => {
      await db.query("insert into notes values ('a')")
      throw boom
    })
    await expect(work).rejects.toBe(boom)
    expect(await notes()).toEqual([])
    expect(await subject.openTransactions()).toBe(0)
  })

  it('is beside the session of the context, with a connection and an outcome of its own', async () => {
    const work = newContext(async () => {
      await note('context')
      const own = await pid()
      await main.newSession(async (session) => {
        expect(session).not.toBe(main.session())
        expect(await pid(session.db)).not.toBe(own)
        expect(await pid()).toBe(own)
        await session.db.query("insert into notes values ('beside')")
        await note('context again')
      })
      expect(await notes()).toEqual(['beside'])
      throw boom
    })
    await expect(work).rejects.toBe(boom)
    expect(await notes()).toEqual(['beside'])
  })

  it('takes manual control inside', async () => {
    await main.newSession(async (session) => {
      const { db } = session
      await session.begin({ isolationLevel: 'repeatable read' })
      await db.query("insert into notes values ('a')")
      await session.commit()
      expect(await notes()).toEqual(['a'])
      await db.query("insert into notes values ('b')")
      await session.rollback()
      await session.savepoint(() => db.query("insert into notes values ('c')"))
      expect(await notes()).toEqual(['a', 'c'])
      await db.query("insert into notes values ('d')")
      await session.close('rollback')
      expect(session.closed).toBe(true)
    })
    expect(await notes()).toEqual(['a', 'c'])
  })

  it('S6 is dead after its work', async () => {
    const late = gate()
    let laterOn: Promise<unknown> | undefined
    const session = await main.newSession(async (own) => {
      laterOn = late.passed.then(() => own.db.query("insert into notes values ('late')"))
      await own.db.query("insert into notes values ('a')")
      return own
    })
    const before = subject.sent.length
    late.open()
    await expect(laterOn).rejects.toMatchObject(closed)
    await expect(session.db.query('select 1')).rejects.toMatchObject(closed)
    await expect(session.commit()).rejects.toMatchObject(closed)
    expect(session.closed).toBe(true)
    expect(subject.sent).toHaveLength(before)
  })

  it('S4 rejects when its transaction failed', async () => {
    let first: unknown
    const work = main.newSession(async ({ db }) => {
      await db.query("insert into notes values ('a')")
      first = await db.query('select * from missing').catch((error: unknown) => error)
    })
    const error = await work.catch((thrown: unknown) => thrown)
    expect(error).toMatchObject({ ...aborted, cause: first, outcome: 'rolled-back' })
    expect(await notes()).toEqual([])
  })

  it('C5 joins what nobody awaited', async () => {
    await main.newSession(({ db }) => {
      void db.query("insert into notes values ('a')")
    })
    expect(await notes()).toEqual(['a'])
    const failing = main.newSession(async ({ db }) => {
      await db.query("insert into notes values ('b')")
      void db.query('select * from missing')
    })
    await expect(failing).rejects.toMatchObject({ code: '42P01' })
    expect(await notes()).toEqual(['a'])
  })

  it('S3 pins one connection with `hold`, and destroys it at the end', async () => {
    let held = 0
    await main.newSession(
      async (session) => {
        held = await pid(session.db)
        await session.db.query("set application_name = 'held'")
        await session.commit()
        expect(await pid(session.db)).toBe(held)
        await session.rollback()
        await session.db.query("insert into notes values ('a')")
        const { rows } = await session.db.query('show application_name')
        expect(rows).toEqual([{ application_name: 'held' }])
      },
      { hold: true },
    )
    expect(await notes()).toEqual(['a'])
    await expect.poll(async () => (await subject.database.backends()).map(({ pid: each }) => each)).not.toContain(held)
  })

  it('S3 pins one connection with `hold` also without transactions', async () => {
    await main.newSession(
      async ({ db }) => {
        const held = await pid(db)
        await db.query('select pg_advisory_lock(42)')
        expect(await pid(db)).toBe(held)
        const { rows } = await db.query('select pg_advisory_unlock(42) as unlocked')
        expect(rows).toEqual([{ unlocked: true }])
      },
      { hold: true, transaction: 'autocommit' },
    )
    expect(verbs()).not.toContain('BEGIN')
  })

  it('S3 keeps no connection and no session state otherwise', async () => {
    const single = subject.define({ pool: { max: 1 }, acquireTimeout: 2000 })
    await single.newSession(async (session) => {
      await session.db.query("insert into notes values ('a')")
      await session.commit()
      await single.newSession(({ db }) => db.query("insert into notes values ('b')"))
    })
    expect(await notes()).toEqual(['a', 'b'])
  })

  it('disposes of it by the language too', async () => {
    await main.newSession(async (session) => {
      await using own = session
      await own.db.query("insert into notes values ('a')")
    })
    expect(await notes()).toEqual([])
  })

  it('C8 says of control by hand in a block of an aborted session that the session has ended', async () => {
    const controller = new AbortController()
    const refusals: unknown[] = []
    const over = gate()
    const work = main.newSession(
      (session) =>
        session.savepoint(async () => {
          controller.abort()
          await over.passed
          for (const act of [session.commit, session.rollback]) {
            refusals.push(await act().catch((error: unknown) => error))
          }
        }),
      { signal: controller.signal },
    )
    await expect(work).rejects.toMatchObject({ code: 'AMBIENT_ABORTED' })
    over.open()
    await until(() => refusals.length === 2)
    for (const refusal of refusals) expect(refusal).toMatchObject(closed)
  })
})
