import { newContext } from 'ambient-db'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { gate } from '../support/gate.ts'
import { createSubject, type Subject } from '../support/subject.ts'

let subject: Subject
let main: Subject['main']
let note: Subject['note']
let notes: Subject['notes']
/** Blocks of this one may stand still for 40 ms only. */
let impatient: Subject['main']

beforeAll(async () => {
  subject = await createSubject()
  ;({ main, note, notes } = subject)
  impatient = subject.define({ blockTimeout: 40 })
})
afterAll(() => subject.close())
beforeEach(() => subject.clear())
afterEach(() => expect(subject.overlapping).toEqual([]))

const boom = new Error('boom')

/** A note through `impatient`. */
function put(text: string): Promise<unknown> {
  return impatient.db.query('insert into notes values ($1)', [text])
}

/** Keeps the database busy, and the caller waiting, for `seconds`. */
function busy(seconds: number): Promise<unknown> {
  return impatient.db.query('select pg_sleep($1)', [seconds])
}

function pid(): Promise<number> {
  return main.db.query<{ pid: number }>('select pg_backend_pid() as pid').then(({ rows }) => rows[0]!.pid)
}

describe('parallel blocks', () => {
  it('A3 runs parallel blocks one after the other, each with an outcome of its own', async () => {
    const order: string[] = []
    const block = (name: string, outcome?: Error) => () =>
      main.atomic(async () => {
        order.push(`${name} begins`)
        await note(`${name} 1`)
        await note(`${name} 2`)
        order.push(`${name} ends`)
        if (outcome) throw outcome
      })
    await newContext(async () => {
      const results = await Promise.allSettled([block('f')(), block('g', boom)(), block('h')()])
      expect(results.map(({ status }) => status)).toEqual(['fulfilled', 'rejected', 'fulfilled'])
      expect(await notes()).toEqual(['f 1', 'f 2', 'h 1', 'h 2'])
    })
    expect(order).toEqual(['f begins', 'f ends', 'g begins', 'g ends', 'h begins', 'h ends'])
    const insert = expect.stringContaining('insert')
    const transaction = (end: string) => ['BEGIN', insert, insert, end]
    expect(subject.sent).toEqual([...transaction('COMMIT'), ...transaction('ROLLBACK'), ...transaction('COMMIT')])
  })

  it('A3 runs parallel inner blocks as savepoints, one after the other', async () => {
    await newContext(async () => {
      await main.atomic(async () => {
        const inner = (name: string, outcome?: Error) =>
          main.atomic(async () => {
            await note(`${name} 1`)
            await note(`${name} 2`)
            if (outcome) throw outcome
          })
        const results = await Promise.allSettled([inner('f'), inner('g', boom), inner('h')])
        expect(results.map(({ status }) => status)).toEqual(['fulfilled', 'rejected', 'fulfilled'])
      })
    })
    expect(await notes()).toEqual(['f 1', 'f 2', 'h 1', 'h 2'])
  })

  it('A3 runs parallel joining and nesting blocks of an open transaction one after the other', async () => {
    await newContext(async () => {
      await note('a')
      const modes = ['join', 'savepoint', 'join', 'savepoint'] as const
      let inside = 0
      await Promise.all(
        modes.map((current, index) =>
          main.atomic(
            async () => {
              expect(++inside).toBe(1)
              await note(`${current} ${index}`)
              inside--
            },
            { current },
          ),
        ),
      )
    })
    expect(await notes()).toHaveLength(5)
  })

  it('A3 lets the statements of a block of many branches run in it', async () => {
    await newContext(async () => {
      const block = main.atomic(async () => {
        await Promise.all(['a', 'b', 'c'].map((text) => note(text)))
        throw boom
      })
      await expect(block).rejects.toBe(boom)
    })
    expect(await notes()).toEqual([])
  })

  it('A3 does not hold up other contexts and sessions', async () => {
    await newContext(async () => {
      await main.atomic(async () => {
        const own = await pid()
        expect(await newContext(pid)).not.toBe(own)
        const other = await main.newSession(async ({ db }) => {
          await db.query("insert into notes values ('beside')")
          return (await db.query<{ pid: number }>('select pg_backend_pid() as pid')).rows[0]!.pid
        })
        expect(other).not.toBe(own)
        expect(await notes()).toEqual(['beside'])
      })
    })
  })
})

describe('other branches', () => {
  it('A3 makes statements of other branches wait until the block has ended', async () => {
    await newContext(async () => {
      const inside = { began: gate(), goOn: gate() }
      const block = main.atomic(async () => {
        await note('block 1')
        inside.began.open()
        await inside.goOn.passed
        await note('block 2')
        throw boom
      })
      await inside.began.passed
      const sibling = note('sibling')
      const session = main.session().db.query("insert into notes values ('session')")
      inside.goOn.open()
      await expect(block).rejects.toBe(boom)
      await Promise.all([sibling, session])
    })
    expect(await notes()).toEqual(['session', 'sibling'])
    const end = subject.sent.indexOf('ROLLBACK')
    expect(subject.sent.slice(end)).toEqual([
      'ROLLBACK',
      'BEGIN',
      expect.stringContaining('insert'),
      expect.stringContaining('insert'),
      'COMMIT',
    ])
  })

  it('A3 makes commit, rollback, begin and close of other branches wait', async () => {
    await newContext(async () => {
      for (const act of ['commit', 'rollback', 'begin', 'closeSession'] as const) {
        const inside = { began: gate(), goOn: gate() }
        const order: string[] = []
        const block = main.atomic(async () => {
          await note(act)
          inside.began.open()
          await inside.goOn.passed
          await note(`${act} 2`)
          order.push('block')
        })
        await inside.began.passed
        const acted = main[act]().then(() => order.push(act))
        inside.goOn.open()
        await Promise.all([block, acted])
        expect(order).toEqual(['block', act])
        expect(await notes()).toEqual([act, `${act} 2`])
        await main.rollback()
        await subject.clear()
      }
    })
  })

  it('A3 makes a branch of an outer block wait for its inner block, and lets it go on in the outer one', async () => {
    await newContext(async () => {
      await main.atomic(async () => {
        const inside = { began: gate(), goOn: gate() }
        const inner = main.atomic(async () => {
          await note('inner')
          inside.began.open()
          await inside.goOn.passed
          throw boom
        })
        await inside.began.passed
        const outer = note('outer')
        inside.goOn.open()
        await expect(inner).rejects.toBe(boom)
        await outer
      })
    })
    expect(await notes()).toEqual(['outer'])
  })
})

describe('code that waits for itself', () => {
  const busyError = { code: 'AMBIENT_SESSION_BUSY', database: 'main' }

  it('A3 refuses a statement outside that the block waits for, naming both, and the block goes on', async () => {
    await newContext(async () => {
      const go = gate()
      const outside = go.passed.then(() => put('outside'))
      await impatient.atomic(async function transfer() {
        await put('a')
        go.open()
        const error = await outside.catch((thrown: unknown) => thrown)
        expect(error).toMatchObject(busyError)
        expect((error as Error).message).toMatch(/A statement was refused: atomic block 'transfer' has had nothing/)
        await put('b')
      })
    })
    expect(await notes()).toEqual(['a', 'b'])
    expect(subject.sent.filter((text) => text.includes('insert'))).toHaveLength(2)
  })

  it('A3 refuses a commit or a block outside that the block waits for', async () => {
    await newContext(async () => {
      const acts: [string, () => Promise<unknown>][] = [
        ['Commit\\(\\)', () => impatient.commit()],
        ['Rollback\\(\\)', () => impatient.rollback()],
        ["Atomic block 'other'", () => impatient.atomic(async function other() {})],
      ]
      for (const [label, act] of acts) {
        const go = gate()
        const outside = go.passed.then(act)
        await impatient.atomic(async () => {
          await put(label)
          go.open()
          const error = await outside.catch((thrown: unknown) => thrown)
          expect(error).toMatchObject(busyError)
          expect((error as Error).message).toMatch(new RegExp(`${label} was refused: atomic block has had nothing`))
        })
      }
    })
    expect(await notes()).toHaveLength(3)
  })

  it('A3 refuses a statement of the outer block that the inner block waits for', async () => {
    await newContext(async () => {
      await impatient.atomic(async () => {
        const go = gate()
        const outside = go.passed.then(() => put('outside'))
        await impatient.atomic(async function inner() {
          await put('a')
          go.open()
          await expect(outside).rejects.toMatchObject(busyError)
          await expect(outside).rejects.toThrow("atomic block 'inner'")
        })
        await put('b')
      })
    })
    expect(await notes()).toEqual(['a', 'b'])
  })

  it('A3 refuses a statement that a beforeCommit hook waits for', async () => {
    await newContext(async () => {
      const go = gate()
      const outside = go.passed.then(() => put('outside'))
      await put('a')
      impatient.beforeCommit(async () => {
        go.open()
        await expect(outside).rejects.toMatchObject(busyError)
        await expect(outside).rejects.toThrow('commit()')
      })
      await impatient.commit()
    })
    expect(await notes()).toEqual(['a'])
  })

  it('A3 undoes the block when it does not catch the refusal', async () => {
    await newContext(async () => {
      const go = gate()
      const outside = go.passed.then(() => put('outside'))
      const block = impatient.atomic(async () => {
        await put('a')
        go.open()
        await outside
      })
      await expect(block).rejects.toMatchObject(busyError)
    })
    expect(await notes()).toEqual([])
  })

  it('A3 O2 shows where both were started while tracing, and not otherwise', async () => {
    const traced = subject.define({ blockTimeout: 40, trace: true })
    const messageOf = (db: Subject['main']) =>
      newContext(async () => {
        const go = gate()
        async function outsideStatement() {
          await go.passed
          await db.db.query('select 1')
        }
        const outside = outsideStatement().catch((error: Error) => error.message)
        return db.atomic(async function transfer() {
          await db.db.query('select 1')
          go.open()
          return outside
        })
      })
    const message = await messageOf(traced)
    expect(message).toMatch(/atomic block 'transfer' was started\n(?:\s+at .*\n)*\s+at .*nesting\.test\.ts/)
    expect(message).toMatch(/a statement was started\n(?:\s+at .*\n)*\s+at outsideStatement .*nesting\.test\.ts/)
    expect(await messageOf(impatient)).not.toContain('nesting.test.ts')
  })
})

describe('blockTimeout counts only while nothing is at the database', () => {
  /** Runs a block with something waiting outside of it; both must succeed. */
  async function withWaiter(db: Subject['main'], work: () => Promise<unknown>): Promise<void> {
    await newContext(async () => {
      const block = db.atomic(async () => {
        await work()
        await db.db.query("insert into notes values ('block')")
      })
      const waiter = db.db.query("insert into notes values ('waiter')")
      await Promise.all([block, waiter])
    })
    expect(await notes()).toEqual(['block', 'waiter'])
  }

  it('A3 bears a long running statement', () => withWaiter(impatient, () => busy(0.2)))

  it('A3 bears many short statements', () =>
    withWaiter(impatient, async () => {
      for (let count = 0; count < 10; count++) await busy(0.02)
    }))

  it('A3 bears a slow pool', async () => {
    const single = subject.define({ blockTimeout: 40, pool: { max: 1 } })
    const held = gate()
    const holder = newContext(async () => {
      await single.db.query('select 1')
      held.open()
      await single.db.query('select pg_sleep(0.2)')
    })
    await held.passed
    await withWaiter(single, async () => {})
    await holder
  })

  it('A3 bears a slow commit', async () => {
    await subject.database.witness.rows(`
      create or replace function slow() returns trigger language plpgsql as
      $$ begin perform pg_sleep(0.2); return null; end $$`)
    await subject.database.witness.rows('create table slow (id int)')
    await subject.database.witness.rows(`
      create constraint trigger slow after insert on slow deferrable initially deferred
      for each row execute function slow()`)
    await withWaiter(impatient, () => impatient.db.query('insert into slow values (1)'))
  })

  it('A3 counts from the last statement of the block', async () => {
    await newContext(async () => {
      const go = gate()
      const outside = go.passed.then(() => put('outside'))
      await impatient.atomic(async () => {
        go.open()
        await busy(0.1)
        const since = performance.now()
        await expect(outside).rejects.toMatchObject({ code: 'AMBIENT_SESSION_BUSY' })
        expect(performance.now() - since).toBeGreaterThan(30)
      })
    })
  })
})
