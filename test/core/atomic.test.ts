import { type CurrentTransaction, newContext } from 'ambient-db'
import Cursor from 'pg-cursor'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest'
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
const aborted = { code: 'AMBIENT_TRANSACTION_ABORTED' }
const undefinedTable = { code: '42P01' }

/** Runs `work`, which must fail; gives its error. */
async function failure(work: () => Promise<unknown>): Promise<unknown> {
  const result = await work().catch((error: unknown) => ({ error }))
  expect(result).toHaveProperty('error')
  return (result as { error: unknown }).error
}

describe('with nothing open', () => {
  const owning: (CurrentTransaction | undefined)[] = [undefined, 'commit', 'rollback', 'append', 'raise', 'savepoint']
  for (const current of owning) {
    it(`A1 begins and commits with \`current: ${current}\``, async () => {
      await newContext(async () => {
        const result = await main.atomic(
          async () => {
            await note('a')
            expect(await notes()).toEqual([])
            return 'result'
          },
          { current },
        )
        expect(result).toBe('result')
        expect(main.session().inTransaction).toBe(false)
        expect(await notes()).toEqual(['a'])
      })
      expect(subject.sent).toEqual(['BEGIN', expect.stringContaining('insert'), 'COMMIT'])
    })

    it(`A1 undoes a block that throws with \`current: ${current}\``, async () => {
      await newContext(async () => {
        const thrown = await failure(() =>
          main.atomic(
            async () => {
              await note('a')
              throw boom
            },
            { current },
          ),
        )
        expect(thrown).toBe(boom)
        expect(main.session().inTransaction).toBe(false)
        await note('b')
      })
      expect(await notes()).toEqual(['b'])
    })
  }

  it('A7 leaves the transaction of a joining block open', async () => {
    await newContext(async () => {
      await main.atomic(() => note('a'), { current: 'join' })
      expect(main.session().inTransaction).toBe(true)
      await note('b')
      expect(await notes()).toEqual([])
      await main.commit()
      expect(await notes()).toEqual(['a', 'b'])
    })
  })

  it('A1 dooms the transaction of a joining block that throws', async () => {
    const error = await failure(() =>
      newContext(async () => {
        const joining = main.atomic(
          async () => {
            await note('a')
            throw boom
          },
          { current: 'join' },
        )
        expect(await failure(() => joining)).toBe(boom)
      }),
    )
    expect(error).toMatchObject({ ...aborted, cause: boom, outcome: 'rolled-back' })
    expect(await notes()).toEqual([])
  })

  it('A1 sends nothing for a block without statements', async () => {
    await newContext(async () => {
      await main.atomic(() => 1)
      await main.atomic(() => main.atomic(() => 2))
    })
    expect(subject.sent).toEqual([])
  })

  it('A1 takes work that is not async, and rejects with what it throws', async () => {
    await newContext(async () => {
      expect(await main.atomic(() => 1)).toBe(1)
      const throwing = main.atomic(() => {
        throw boom
      })
      await expect(throwing).rejects.toBe(boom)
    })
  })
})

describe('with a transaction open', () => {
  it('A1 commits what is open and starts a new one by default', async () => {
    await newContext(async () => {
      await note('a')
      const error = await failure(() =>
        main.atomic(async () => {
          expect(await notes()).toEqual(['a'])
          await note('b')
          throw boom
        }),
      )
      expect(error).toBe(boom)
      expect(await notes()).toEqual(['a'])
      await main.atomic(() => note('c'))
      expect(await notes()).toEqual(['a', 'c'])
    })
  })

  it('A1 rolls back what is open and starts a new one with `rollback`', async () => {
    await newContext(async () => {
      await note('a')
      await main.atomic(() => note('b'), { current: 'rollback' })
      expect(await notes()).toEqual(['b'])
      await note('c')
      await failure(() => main.atomic(() => Promise.reject(boom), { current: 'rollback' }))
    })
    expect(await notes()).toEqual(['b'])
  })

  it('A1 goes on in it and commits it with `append`', async () => {
    await newContext(async () => {
      await note('a')
      await main.atomic(() => note('b'), { current: 'append' })
      expect(await notes()).toEqual(['a', 'b'])
      expect(main.session().inTransaction).toBe(false)
    })
    expect(subject.sent.filter((text) => text === 'BEGIN')).toHaveLength(1)
  })

  it('A1 rolls all of it back when an appending block throws', async () => {
    await newContext(async () => {
      await note('a')
      const block = async () => {
        await note('b')
        throw boom
      }
      expect(await failure(() => main.atomic(block, { current: 'append' }))).toBe(boom)
      await note('c')
    })
    expect(await notes()).toEqual(['c'])
  })

  it('A1 refuses with `raise`, and leaves it as it is', async () => {
    await newContext(async () => {
      await note('a')
      let ran = false
      const block = () => {
        ran = true
      }
      await expect(main.atomic(block, { current: 'raise' })).rejects.toMatchObject({
        code: 'AMBIENT_TRANSACTION_OPEN',
        database: 'main',
      })
      expect(ran).toBe(false)
      await note('b')
    })
    expect(await notes()).toEqual(['a', 'b'])
  })

  it('A1 nests in it with `savepoint`', async () => {
    await newContext(async () => {
      await note('a')
      await main.atomic(() => note('b'), { current: 'savepoint' })
      expect(await notes()).toEqual([])
      const block = async () => {
        await note('c')
        throw boom
      }
      expect(await failure(() => main.atomic(block, { current: 'savepoint' }))).toBe(boom)
      await note('d')
    })
    expect(await notes()).toEqual(['a', 'b', 'd'])
  })

  it('A1 takes part in it with `join`, and only the outside ends it', async () => {
    await newContext(async () => {
      await note('a')
      await main.atomic(() => note('b'), { current: 'join' })
      expect(await notes()).toEqual([])
      await main.rollback()
      await main.atomic(() => note('c'), { current: 'join' })
    })
    expect(await notes()).toEqual(['c'])
    expect(subject.sent.filter((text) => text.includes('SAVEPOINT'))).toEqual([])
  })

  it('A1 dooms it when a joining block throws, until a rollback', async () => {
    await newContext(async () => {
      await note('a')
      expect(await failure(() => main.atomic(() => Promise.reject(boom), { current: 'join' }))).toBe(boom)
      const before = subject.sent.length
      await expect(note('b')).rejects.toMatchObject({ ...aborted, cause: boom })
      await expect(main.commit()).rejects.toMatchObject({ ...aborted, cause: boom })
      await expect(main.commit()).rejects.toMatchObject({ ...aborted, cause: boom })
      expect(subject.sent).toHaveLength(before)
      await main.rollback()
      await note('c')
    })
    expect(await notes()).toEqual(['c'])
  })

  it('A1 dooms only the nearest enclosing block when a joining block throws', async () => {
    await newContext(async () => {
      await note('a')
      const nested = main.session().savepoint(async () => {
        await note('b')
        await failure(() => main.atomic(() => Promise.reject(boom), { current: 'join' }))
        await expect(note('c')).rejects.toMatchObject({ ...aborted, cause: boom })
      })
      await expect(nested).rejects.toMatchObject({ ...aborted, cause: boom })
      await note('d')
    })
    expect(await notes()).toEqual(['a', 'd'])
  })

  it('A1 dooms an enclosing block of its own when a joining block throws', async () => {
    await newContext(async () => {
      const outer = main.atomic(async () => {
        await note('a')
        await failure(() => main.atomic(() => Promise.reject(boom), { current: 'join' }))
      })
      await expect(outer).rejects.toMatchObject({ ...aborted, cause: boom })
      await main.atomic(() => note('b'))
    })
    expect(await notes()).toEqual(['b'])
  })

  it('A1 K1 dooms what a hook commits when a joining block throws in it, also before its first statement', async () => {
    const work = newContext(() => {
      main.beforeCommit(async () => {
        await failure(() => main.atomic(() => Promise.reject(boom), { current: 'join' }))
        await expect(note('a')).rejects.toMatchObject({ ...aborted, cause: boom })
      })
    })
    await expect(work).rejects.toMatchObject({ ...aborted, cause: boom })
    expect(await notes()).toEqual([])
  })

  it('A1 dooms nothing that comes later when nothing was open around joining blocks', async () => {
    await newContext(async () => {
      await main.atomic(
        async () => {
          await failure(() => main.atomic(() => Promise.reject(boom), { current: 'join' }))
          await expect(note('a')).rejects.toMatchObject({ ...aborted, cause: boom })
        },
        { current: 'join' },
      )
      await note('b')
    })
    expect(await notes()).toEqual(['b'])
  })
})

describe('with a transaction open and failed', () => {
  for (const current of [undefined, 'commit', 'append', 'savepoint', 'join'] as const) {
    it(`A1 refuses to run with \`current: ${current}\`, cause = the first error`, async () => {
      await newContext(async () => {
        await note('a')
        const first = await failure(fail)
        expect(first).toMatchObject(undefinedTable)
        let ran = false
        const block = async () => {
          ran = true
        }
        const before = subject.sent.length
        expect(await failure(() => main.atomic(block, { current }))).toMatchObject({ ...aborted, cause: first })
        expect(ran).toBe(false)
        expect(subject.sent).toHaveLength(before)
        await expect(main.commit()).rejects.toMatchObject({ ...aborted, cause: first })
        await main.rollback()
        await main.atomic(() => note('b'), { current })
      })
      expect(await notes()).toEqual(['b'])
    })
  }

  it('A1 rolls it back and starts a new one with `rollback`', async () => {
    await newContext(async () => {
      await note('a')
      await failure(fail)
      await main.atomic(() => note('b'), { current: 'rollback' })
      expect(await notes()).toEqual(['b'])
    })
  })

  it('A1 refuses with `raise`', async () => {
    await newContext(async () => {
      await failure(fail)
      await expect(main.atomic(() => 1, { current: 'raise' })).rejects.toMatchObject({
        code: 'AMBIENT_TRANSACTION_OPEN',
      })
      await main.rollback()
    })
  })
})

describe('failures inside', () => {
  it('A1 rejects when a block swallowed the error of a statement', async () => {
    await newContext(async () => {
      let first: unknown
      const block = main.atomic(async () => {
        await note('a')
        first = await failure(fail)
      })
      expect(await failure(() => block)).toMatchObject({ ...aborted, cause: first, outcome: 'rolled-back' })
      await main.atomic(() => note('b'))
    })
    expect(await notes()).toEqual(['b'])
  })

  it('A1 rejects with the error of COMMIT itself, and the session is usable again', async () => {
    await subject.database.witness.rows('create table parents (id int primary key)')
    await subject.database.witness.rows(
      'create table children (parent int references parents deferrable initially deferred)',
    )
    await newContext(async () => {
      const block = main.atomic(() => main.db.query('insert into children values (1)'))
      await expect(block).rejects.toMatchObject({ code: '23503' })
      expect(main.session().inTransaction).toBe(false)
      await main.atomic(() => note('a'))
    })
    expect(await notes()).toEqual(['a'])
  })
})

describe('options', () => {
  const show = async (setting: string) => {
    const { rows } = await main.db.query<{ value: string }>('select current_setting($1) as value', [setting])
    return rows[0]!.value
  }

  it('A1 begins with the options of the block', async () => {
    await newContext(async () => {
      await main.atomic(
        async () => {
          expect(await show('transaction_isolation')).toBe('serializable')
          expect(await show('transaction_read_only')).toBe('on')
          expect(await show('transaction_deferrable')).toBe('on')
        },
        { isolationLevel: 'serializable', readOnly: true, deferrable: true },
      )
      expect(await show('transaction_isolation')).toBe('read committed')
    })
  })

  it('A7 refuses options that differ from those of the transaction that is open', async () => {
    await newContext(async () => {
      await main.begin({ isolationLevel: 'repeatable read' })
      for (const current of ['append', 'savepoint', 'join'] as const) {
        const differing = main.atomic(() => note('x'), { current, isolationLevel: 'serializable' })
        await expect(differing).rejects.toMatchObject({
          code: 'AMBIENT_TRANSACTION_OPTIONS',
          message: expect.stringMatching(
            /\{"isolationLevel":"repeatable read"\} is open, and .*"serializable".* was asked for/,
          ),
        })
        await main.atomic(() => note(current), { current, isolationLevel: 'repeatable read', readOnly: false })
        if (current === 'append') await main.begin({ isolationLevel: 'repeatable read' })
      }
      for (const differing of [{ readOnly: true }, { deferrable: true }]) {
        await expect(main.begin(differing)).rejects.toMatchObject({
          code: 'AMBIENT_TRANSACTION_OPTIONS',
          database: 'main',
        })
      }
      await main.begin({ readOnly: false, deferrable: false })
      await main.begin({ isolationLevel: 'repeatable read' })
    })
    expect(await notes()).toEqual(['append', 'join', 'savepoint'])
  })

  it('A7 holds inner blocks to the options of the outer one before anything is sent', async () => {
    await newContext(async () => {
      await main.atomic(
        async () => {
          const inner = main.atomic(() => note('a'), { isolationLevel: 'serializable' })
          await expect(inner).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_OPTIONS' })
          await main.atomic(() => note('b'), { isolationLevel: 'repeatable read' })
        },
        { isolationLevel: 'repeatable read' },
      )
    })
    expect(await notes()).toEqual(['b'])
    expect(subject.sent[0]).toBe('BEGIN ISOLATION LEVEL REPEATABLE READ')
  })

  it('A7 takes the options of a joining block for the transaction that it begins', async () => {
    await newContext(async () => {
      const level = await main.atomic(() => show('transaction_isolation'), {
        current: 'join',
        isolationLevel: 'serializable',
      })
      expect(level).toBe('serializable')
      expect(await show('transaction_isolation')).toBe('serializable')
      await main.commit()
      expect(await show('transaction_isolation')).toBe('read committed')
    })
  })

  it('A7 holds what is inside a joining block to its options, and lets go of them if nothing was opened', async () => {
    await newContext(async () => {
      const block = async () => {
        const inner = main.atomic(() => note('a'), { isolationLevel: 'serializable' })
        await expect(inner).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_OPTIONS' })
      }
      await main.atomic(block, { current: 'join', isolationLevel: 'repeatable read', readOnly: true })
      await main.begin({ isolationLevel: 'serializable' })
      expect(await show('transaction_isolation')).toBe('serializable')
      expect(await show('transaction_read_only')).toBe('off')
    })
  })

  it('A7 does not care about the options of a transaction that the block ends', async () => {
    await newContext(async () => {
      await main.begin({ readOnly: true })
      await main.atomic(() => note('a'), { isolationLevel: 'serializable' })
    })
    expect(await notes()).toEqual(['a'])
  })
})

describe('inside another block', () => {
  it('A2 is a savepoint by default', async () => {
    await newContext(async () => {
      await main.atomic(async () => {
        await note('a')
        await main.atomic(() => note('b'))
        expect(
          await failure(() =>
            main.atomic(async () => {
              await note('c')
              throw boom
            }),
          ),
        ).toBe(boom)
        expect(await notes()).toEqual([])
      })
      expect(await notes()).toEqual(['a', 'b'])
    })
  })

  it('A2 loses the inner work with the outer block', async () => {
    await newContext(async () => {
      await failure(() =>
        main.atomic(async () => {
          await main.atomic(() => note('a'))
          throw boom
        }),
      )
    })
    expect(await notes()).toEqual([])
  })

  it('A2 refuses whatever would break the promise of the outer block, before anything is sent', async () => {
    const nesting = { code: 'AMBIENT_ATOMIC_NESTING', database: 'main' }
    await newContext(async () => {
      const session = main.session()
      await main.atomic(async () => {
        await note('a')
        const before = subject.sent.length
        for (const current of ['commit', 'rollback', 'append'] as const) {
          await expect(main.atomic(() => note('x'), { current })).rejects.toMatchObject(nesting)
        }
        await expect(main.commit()).rejects.toMatchObject(nesting)
        await expect(main.rollback()).rejects.toMatchObject(nesting)
        await expect(main.closeSession()).rejects.toMatchObject(nesting)
        await expect(main.closeSession('commit')).rejects.toMatchObject(nesting)
        await expect(session.commit()).rejects.toMatchObject(nesting)
        await expect(session.rollback()).rejects.toMatchObject(nesting)
        await expect(session.close('rollback')).rejects.toMatchObject(nesting)
        await expect(main.atomic(() => note('x'), { current: 'raise' })).rejects.toMatchObject({
          code: 'AMBIENT_TRANSACTION_OPEN',
        })
        expect(subject.sent).toHaveLength(before)
        await note('b')
      })
    })
    expect(await notes()).toEqual(['a', 'b'])
  })

  it('A2 refuses them also inside a savepoint, a joining block and a block without statements', async () => {
    const nesting = { code: 'AMBIENT_ATOMIC_NESTING' }
    const refuses = async () => {
      await expect(main.commit()).rejects.toMatchObject(nesting)
      await expect(main.atomic(() => 1, { current: 'commit' })).rejects.toMatchObject(nesting)
    }
    await newContext(async () => {
      await main.atomic(refuses)
      await main.atomic(refuses, { current: 'join' })
      await note('a')
      await main.session().savepoint(refuses)
      await main.atomic(refuses, { current: 'join' })
      await main.atomic(() => main.atomic(refuses))
    })
  })

  it('A2 leaves a new session or context inside a block its own master', async () => {
    await newContext(async () => {
      await failure(() =>
        main.atomic(async () => {
          await note('a')
          await newContext(async () => {
            await note('b')
            await main.commit()
          })
          await main.newSession(async (session) => {
            await session.db.query("insert into notes values ('c')")
            await session.commit()
          })
          throw boom
        }),
      )
    })
    expect(await notes()).toEqual(['b', 'c'])
  })
})

describe('retry', () => {
  const serializable = { isolationLevel: 'serializable' } as const

  /** Two serializable transactions that read all and write: the one that commits last must fail. */
  async function conflict(rival: string): Promise<void> {
    await main.db.query('select count(*) from notes')
    await main.newSession(
      async ({ db }) => {
        await db.query('select count(*) from notes')
        await db.query('insert into notes values ($1)', [rival])
      },
      { transaction: serializable },
    )
  }

  it('A5 runs the whole block again after a serialization failure', async () => {
    let attempts = 0
    const block = async () => {
      if (++attempts === 1) await conflict('rival')
      await note(`attempt ${attempts}`)
      return attempts
    }
    const result = await newContext(() => main.atomic(block, { ...serializable, retry: { attempts: 3 } }))
    expect(result).toBe(2)
    expect(await notes()).toEqual(['attempt 2', 'rival'])
    expect(subject.sent.filter((text) => text === 'BEGIN ISOLATION LEVEL SERIALIZABLE')).toHaveLength(3)
  })

  it('A5 gives up after the last attempt with the error of the server', async () => {
    let attempts = 0
    const block = async () => {
      await conflict(`rival ${++attempts}`)
      await note(`attempt ${attempts}`)
    }
    const running = newContext(() => main.atomic(block, { ...serializable, retry: { attempts: 2 } }))
    await expect(running).rejects.toMatchObject({ code: '40001' })
    expect(attempts).toBe(2)
    expect(await notes()).toEqual(['rival 1', 'rival 2'])
  })

  it('A5 runs once unless told otherwise', async () => {
    let attempts = 0
    const block = async () => {
      await conflict(`rival ${++attempts}`)
      await note('a')
    }
    await expect(newContext(() => main.atomic(block, serializable))).rejects.toMatchObject({ code: '40001' })
    expect(attempts).toBe(1)
  })

  it('A5 runs again after a serialization failure that the block swallowed or wrapped', async () => {
    for (const handle of [() => {}, (cause: unknown) => Promise.reject(new Error('wrapped', { cause }))]) {
      await subject.clear()
      let attempts = 0
      const block = async () => {
        await main.db.query('select 1')
        if (++attempts === 1) {
          await main.db.query("do $$ begin raise 'conflict' using errcode = '40001'; end $$").catch(handle)
        } else {
          await note('second')
        }
      }
      await newContext(() => main.atomic(block, { retry: { attempts: 2 } }))
      expect(await notes()).toEqual(['second'])
    }
  })

  it('A5 runs again after a deadlock', async () => {
    await subject.database.witness.rows(`alter database ${subject.database.name} set deadlock_timeout = '10ms'`)
    await subject.database.witness.rows("insert into notes values ('one'), ('two')")
    const lock = (text: string) => main.db.query('select from notes where text = $1 for update', [text])
    const locked = { one: gate(), two: gate() }
    let attempts = 0
    const block = (first: 'one' | 'two', second: 'one' | 'two') => async () => {
      attempts++
      await lock(first)
      locked[first].open()
      await locked[second].passed
      await lock(second)
      await note(`${first} then ${second}`)
    }
    const run = (first: 'one' | 'two', second: 'one' | 'two') =>
      newContext(() => main.atomic(block(first, second), { retry: { attempts: 2 } }))
    await Promise.all([run('one', 'two'), run('two', 'one')])
    expect(attempts).toBe(3)
    expect(await notes()).toEqual(['one', 'one then two', 'two', 'two then one'])
  })

  it('A5 drops the hooks of a failed attempt, and keeps those from before the block', async () => {
    const calls: string[] = []
    let attempts = 0
    await newContext(async () => {
      main.beforeCommit(() => calls.push('before, from outside'))
      main.afterCommit(() => calls.push('after, from outside'))
      const block = async () => {
        const attempt = ++attempts
        main.beforeCommit(() => calls.push(`before ${attempt}`))
        main.afterCommit(() => calls.push(`after ${attempt}`))
        main.afterRollback(() => calls.push(`rolled back ${attempt}`))
        if (attempt === 1) await conflict('rival')
        await note(`attempt ${attempt}`)
      }
      await main.atomic(block, { ...serializable, retry: { attempts: 2 } })
    })
    expect(calls.filter((call) => !call.endsWith(' 1'))).toEqual([
      'before, from outside',
      'before 2',
      'after, from outside',
      'after 2',
    ])
    expect(calls).not.toContain('after 1')
    expect(calls).not.toContain('rolled back 1')
  })

  it('A5 drops the hooks of an attempt that failed at COMMIT', async () => {
    const calls: string[] = []
    let attempts = 0
    await newContext(async () => {
      const block = async () => {
        const attempt = ++attempts
        main.afterRollback(() => calls.push(`rolled back ${attempt}`))
        main.afterCommit(() => calls.push(`after ${attempt}`))
        await main.db.query('select count(*) from notes')
        await note(`attempt ${attempt}`)
        if (attempt > 1) return
        await main.newSession(
          async ({ db }) => {
            await db.query('select count(*) from notes')
            await db.query("insert into notes values ('rival')")
          },
          { transaction: serializable },
        )
      }
      await main.atomic(block, { ...serializable, retry: { attempts: 2 } })
    })
    expect(attempts).toBe(2)
    expect(calls).toEqual(['after 2'])
  })

  it('A5 lets `current` act once', async () => {
    const calls: string[] = []
    let attempts = 0
    await newContext(async () => {
      await note('earlier')
      main.afterCommit(() => calls.push('earlier committed'))
      const block = async () => {
        if (++attempts === 1) await conflict('rival')
        await note('block')
      }
      await main.atomic(block, { ...serializable, retry: { attempts: 2 } })
    })
    expect(attempts).toBe(2)
    expect(calls).toEqual(['earlier committed'])
    expect(await notes()).toEqual(['block', 'earlier', 'rival'])
  })

  it('A5 runs once where the block does not own the transaction', async () => {
    const conflicting = async () => {
      await main.db.query("do $$ begin raise 'conflict' using errcode = '40001'; end $$")
    }
    for (const current of ['append', 'savepoint', 'join'] as const) {
      let attempts = 0
      await newContext(async () => {
        await note(current)
        const block = main.atomic(
          () => {
            attempts++
            return conflicting()
          },
          { current, retry: { attempts: 3 } },
        )
        await expect(block).rejects.toMatchObject({ code: '40001' })
        await main.rollback()
      })
      expect(attempts).toBe(1)
    }
    let attempts = 0
    const inner = () => {
      attempts++
      return conflicting()
    }
    const running = newContext(() => main.atomic(() => main.atomic(inner, { retry: { attempts: 3 } })))
    await expect(running).rejects.toMatchObject({ code: '40001' })
    expect(attempts).toBe(1)
  })

  it('A5 runs once after an error of another kind', async () => {
    let attempts = 0
    const block = async () => {
      attempts++
      await fail()
    }
    const running = newContext(() => main.atomic(block, { retry: { attempts: 3 } }))
    await expect(running).rejects.toMatchObject(undefinedTable)
    expect(attempts).toBe(1)
  })

  it('A5 never runs again after an unknown outcome', async () => {
    let attempts = 0
    const block = async () => {
      attempts++
      await note('a')
      // COMMIT runs this trigger, and the backend ends itself in the middle of it.
      await main.db.query('insert into suicides values (1)')
    }
    await subject.database.witness.rows('create table suicides (id int)')
    await subject.database.witness.rows(`
      create function end_backend() returns trigger language plpgsql as
      $$ begin perform pg_terminate_backend(pg_backend_pid()); return null; end $$`)
    await subject.database.witness.rows(`
      create constraint trigger at_commit after insert on suicides deferrable initially deferred
      for each row execute function end_backend()`)
    const running = newContext(() => main.atomic(block, { retry: { attempts: 3 } }))
    await expect(running).rejects.toMatchObject({ code: 'AMBIENT_COMMIT_UNKNOWN', outcome: 'unknown' })
    expect(attempts).toBe(1)
  })

  it('A5 never runs again after a partial commit, whatever its cause', async () => {
    const [first, second] = [subject.define({ name: 'first' }), subject.define({ name: 'second' })]
    await subject.database.witness.rows('create table conflicts (id int)')
    await subject.database.witness.rows(`
      create function conflict() returns trigger language plpgsql as
      $$ begin raise 'conflict' using errcode = '40001'; end $$`)
    await subject.database.witness.rows(`
      create constraint trigger at_commit after insert on conflicts deferrable initially deferred
      for each row execute function conflict()`)
    let attempts = 0
    const block = () =>
      newContext(async () => {
        attempts++
        await first.db.query("insert into notes values ('first')")
        await second.db.query('insert into conflicts values (1)')
      })
    const running = newContext(() => main.atomic(block, { retry: { attempts: 3 } }))
    await expect(running).rejects.toMatchObject({ code: 'AMBIENT_PARTIAL_COMMIT', cause: { code: '40001' } })
    expect(attempts).toBe(1)
    expect(await notes()).toEqual(['first'])
  })

  it('A5 refuses late statements of a failed attempt', async () => {
    const late = gate()
    const laterOn: Promise<unknown>[] = []
    let attempts = 0
    const block = async () => {
      if (++attempts === 1) {
        laterOn.push(late.passed.then(() => note('late')).catch((error: unknown) => error))
        await main.db.query("do $$ begin raise 'conflict' using errcode = '40001'; end $$")
      }
      late.open()
      expect(await laterOn[0]).toMatchObject({ code: 'AMBIENT_BLOCK_ENDED' })
      await note('second')
    }
    await newContext(() => main.atomic(block, { retry: { attempts: 2 } }))
    expect(await notes()).toEqual(['second'])
  })
})

describe('the end of a block', () => {
  const ended = { code: 'AMBIENT_BLOCK_ENDED', database: 'main' }

  it('A6 refuses late statements of its scope, before anything is sent', async () => {
    await newContext(async () => {
      const late = gate()
      let laterOn: Promise<unknown>[] = []
      await main.atomic(async () => {
        const later = (act: () => unknown) =>
          late.passed.then(act).then(
            () => 'went through',
            (error: unknown) => error,
          )
        laterOn = [
          later(() => note('late')),
          later(() => main.session().db.query("insert into notes values ('late')")),
          later(() => main.atomic(() => note('late'))),
          later(() => main.atomic(() => note('late'), { current: 'join' })),
          later(() => main.session().savepoint(() => note('late'))),
          later(() => main.begin()),
          later(() => main.commit()),
          later(() => main.rollback()),
          later(() => main.afterCommit(() => {})),
        ]
        await note('a')
      })
      await note('b')
      const before = subject.sent.length
      late.open()
      for (const error of await Promise.all(laterOn)) expect(error).toMatchObject(ended)
      expect(subject.sent).toHaveLength(before)
    })
    expect(await notes()).toEqual(['a', 'b'])
  })

  it('A6 S6 refuses them also when its session was closed, and another one follows', async () => {
    await newContext(async () => {
      const late = gate()
      let laterOn: Promise<unknown>[] = []
      await main.atomic(async function transfer() {
        laterOn = [
          () => note('late'),
          () => main.atomic(() => note('late')),
          () => main.atomic(() => note('late'), { current: 'join' }),
          () => main.begin(),
          () => main.commit(),
          () => main.closeSession('commit'),
          () => main.db.query(new Cursor('select 1')).read(1),
          () => main.db.connect().then((client) => client.query('begin')),
          () => main.afterCommit(() => {}),
        ].map((act) => late.passed.then(act).catch((error: unknown) => error))
        await note('a')
      })
      await main.closeSession('commit')
      await note('b')
      const before = subject.sent.length
      late.open()
      for (const error of await Promise.all(laterOn)) {
        expect(error).toMatchObject({ ...ended, message: expect.stringMatching(/Atomic block 'transfer' has ended/) })
      }
      expect(subject.sent).toHaveLength(before)
    })
    expect(await notes()).toEqual(['a', 'b'])
  })

  it('A6 refuses late statements of an inner block, which never reach the outer one', async () => {
    await newContext(async () => {
      await main.atomic(async () => {
        const late = gate()
        let laterOn: Promise<unknown> | undefined
        await main.atomic(async () => {
          laterOn = late.passed.then(() => note('late'))
          await note('a')
        })
        late.open()
        await expect(laterOn).rejects.toMatchObject(ended)
        await note('b')
      })
    })
    expect(await notes()).toEqual(['a', 'b'])
  })

  it('A6 refuses late statements of a joining block, which never reach the transaction', async () => {
    for (const nested of [false, true]) {
      await subject.clear()
      const work = async () => {
        const late = gate()
        let laterOn: Promise<unknown> | undefined
        await note('a')
        await main.atomic(
          () => {
            laterOn = late.passed.then(() => note('late'))
          },
          { current: 'join' },
        )
        late.open()
        await expect(laterOn).rejects.toMatchObject(ended)
        await note('b')
      }
      await newContext(() => (nested ? main.atomic(work) : work()))
      expect(await notes()).toEqual(['a', 'b'])
    }
  })

  it('A6 refuses unsent what a joining block has waiting for a connection when it throws', async () => {
    const narrow = subject.define({ pool: { max: 1 } })
    const pool = await narrow.connect()
    for (const undo of [true, false]) {
      await subject.clear()
      const client = await pool.connect()
      await newContext(async () => {
        let first: Promise<unknown> | undefined
        const joining = narrow.atomic(
          () => {
            first = narrow.db.query("insert into notes values ('a')")
            first.catch(() => {})
            throw boom
          },
          { current: 'join' },
        )
        expect(await failure(() => joining)).toBe(boom)
        if (undo) await narrow.rollback()
        client.release()
        await expect(first).rejects.toMatchObject(ended)
        await narrow.db.query("insert into notes values ('b')")
      })
      expect(await notes()).toEqual(['b'])
    }
  })

  it('A6 refuses hooks of an inner block that was cut off', async () => {
    await newContext(async () => {
      const inner = { began: gate(), goOn: gate() }
      let zombie: Promise<unknown> | undefined
      const outer = main.atomic(async () => {
        await note('a')
        zombie = main.atomic(async () => {
          inner.began.open()
          await inner.goOn.passed
          expect(() => main.afterCommit(() => {})).toThrow(expect.objectContaining(ended))
        })
        zombie.catch(() => {})
        await inner.began.passed
        throw boom
      })
      await expect(outer).rejects.toBe(boom)
      inner.goOn.open()
      await expect(zombie).rejects.toMatchObject(ended)
    })
  })

  it('A6 lets an inner block that was cut off undo nothing beside the savepoint around it, which cannot be kept', async () => {
    for (let ticks = 0; ticks < 40; ticks++) {
      await subject.clear()
      await newContext(async () => {
        await note('a')
        const work = async () => {
          const giveUp = new AbortController()
          const inner = async () => {
            await note('undone')
            giveUp.abort()
            for (let tick = 0; tick < ticks; tick++) await undefined
          }
          const joining = main.atomic(() => main.atomic(inner), { current: 'join', signal: giveUp.signal })
          await expect(joining).rejects.toMatchObject({ code: 'AMBIENT_ABORTED' })
        }
        await expect(main.atomic(work, { current: 'savepoint' })).rejects.toMatchObject(aborted)
        await note('b')
      })
      expect(await notes()).toEqual(['a', 'b'])
    }
  })

  it('A6 refuses late statements of its scope also when the session that it was in was closed meanwhile', async () => {
    await newContext(async () => {
      const late = gate()
      let laterOn: Promise<unknown>[] = []
      await main.atomic(async () => {
        const later = (act: () => unknown) => late.passed.then(act).catch((error: unknown) => error)
        laterOn = [
          later(() => note('late')),
          later(() => main.session().db.query("insert into notes values ('late')")),
          later(() => main.atomic(() => note('late'))),
          later(() => main.newSession(() => note('late'))),
          later(() => main.commit()),
          later(() => main.afterCommit(() => {})),
        ]
      })
      await main.closeSession()
      late.open()
      for (const refused of laterOn) expect(await refused).toMatchObject(ended)
      await note('a')
    })
    expect(await notes()).toEqual(['a'])
  })

  it('A6 lets new contexts and sessions of its late code through', async () => {
    await newContext(async () => {
      const late = gate()
      let laterOn: Promise<unknown> | undefined
      await main.atomic(async () => {
        laterOn = late.passed.then(() => newContext(() => note('late')))
        await note('a')
      })
      late.open()
      await laterOn
      expect(await notes()).toEqual(['a', 'late'])
    })
  })

  it('A6 joins statements and inner blocks that nobody awaited, and what follows from them', async () => {
    await newContext(async () => {
      await main.atomic(async () => {
        void note('a')
        void note('b').then(() => note('c'))
        void main.atomic(async () => {
          await note('d')
          await note('e')
        })
      })
      expect(await notes()).toEqual(['a', 'b', 'c', 'd', 'e'])
    })
  })

  it('A6 rolls back when a statement fails that nobody awaited', async () => {
    await newContext(async () => {
      const block = main.atomic(async () => {
        await note('a')
        void note('lost')
        void fail()
      })
      await expect(block).rejects.toMatchObject(undefinedTable)
      await note('b')
    })
    expect(await notes()).toEqual(['b'])
  })

  it('A6 rolls back when an inner block fails that nobody awaited', async () => {
    await newContext(async () => {
      const block = main.atomic(async () => {
        await note('a')
        void main.atomic(async () => {
          await note('b')
          throw boom
        })
      })
      await expect(block).rejects.toBe(boom)
    })
    expect(await notes()).toEqual([])
  })

  it('A6 rolls back when a block fails that nobody awaited and that began during the join', async () => {
    await newContext(async () => {
      const block = main.atomic(async () => {
        await note('a')
        void note('b').then(() => {
          void main.atomic(async () => {
            await note('c')
            throw boom
          })
        })
      })
      await expect(block).rejects.toBe(boom)
    })
    expect(await notes()).toEqual([])
  })

  it('A6 joins in savepoints too', async () => {
    await newContext(async () => {
      await main.atomic(async () => {
        await main.atomic(async () => {
          void note('a').then(() => note('b'))
        })
        const failing = main.atomic(async () => {
          await note('c')
          void fail()
        })
        await expect(failing).rejects.toMatchObject(undefinedTable)
        await note('d')
      })
    })
    expect(await notes()).toEqual(['a', 'b', 'd'])
  })

  it('A6 refuses what a branch goes on with after its sibling has thrown', async () => {
    await newContext(async () => {
      const threw = gate()
      let outcome: Promise<unknown> | undefined
      const a = async () => {
        await note('a')
        throw boom
      }
      const b = async () => {
        await note('b')
        await threw.passed
        await note('late')
      }
      const block = main.atomic(() => {
        outcome = b().catch((error: unknown) => error)
        return Promise.all([a(), outcome])
      })
      await expect(block).rejects.toBe(boom)
      await note('c')
      const before = subject.sent.length
      threw.open()
      expect(await outcome).toMatchObject(ended)
      expect(subject.sent).toHaveLength(before)
    })
    expect(await notes()).toEqual(['c'])
  })

  it('A6 leaves no unhandled rejection of what nobody awaited when it throws', async () => {
    const throwing = async () => {
      const inner = gate()
      void main.atomic(async () => {
        await note('a')
        void note('b')
        void note('c')
        inner.open()
      })
      void note('d')
      void main.atomic(() => note('e'))
      await inner.passed
      throw boom
    }
    await newContext(async () => {
      await expect(main.atomic(throwing)).rejects.toBe(boom)
      await note('outer')
      await expect(main.session().savepoint(throwing)).rejects.toBe(boom)
    })
    expect(await notes()).toEqual(['outer'])
    await expect(newContext(throwing)).rejects.toBe(boom)
    const beside = main.newSession(async ({ db, savepoint }) => {
      void db.query("insert into notes values ('e')")
      void savepoint(() => db.query("insert into notes values ('f')"))
      throw boom
    })
    await expect(beside).rejects.toBe(boom)
    expect(await notes()).toEqual(['outer'])
  })

  it('A6 undoes statements of a branch that was under way when its sibling threw', async () => {
    await newContext(async () => {
      await note('before')
      await main.session().savepoint(async () => {
        const block = main.atomic(async () => {
          const running = [note('a'), note('b'), note('c')].map((each) => each.catch((error: unknown) => error))
          await running[0]
          throw Object.assign(boom, { running })
        })
        await expect(block).rejects.toBe(boom)
        await note('after')
      })
    })
    expect(await notes()).toEqual(['after', 'before'])
  })

  it('A6 undoes a branch whose first statement was opening the transaction when its sibling threw', async () => {
    for (const nested of [false, true]) {
      await subject.clear()
      await newContext(async () => {
        let branch: Promise<unknown> | undefined
        const block = () =>
          main.atomic(async () => {
            branch = note('lost').catch((error: unknown) => error)
            throw boom
          })
        const act = async () => {
          await expect(block()).rejects.toBe(boom)
          await note('kept')
          await branch
        }
        await (nested ? main.atomic(act) : act())
      })
      expect(await notes()).toEqual(['kept'])
      expect(await subject.openTransactions()).toBe(0)
    }
  })

  it('A6 sends nothing for a branch that waited for a connection when its sibling threw', async () => {
    const single = subject.define({ pool: { max: 1 } })
    const held = { began: gate(), goOn: gate() }
    const holder = newContext(async () => {
      await single.db.query('select 1')
      held.began.open()
      await held.goOn.passed
    })
    await held.began.passed
    let branch: Promise<unknown> | undefined
    const work = newContext(() =>
      single.atomic(async () => {
        branch = single.db.query("insert into notes values ('lost')").catch((error: unknown) => error)
        throw boom
      }),
    )
    await expect(work).rejects.toBe(boom)
    held.goOn.open()
    await holder
    expect(await branch).toMatchObject(ended)
    await newContext(() => single.db.query("insert into notes values ('kept')"))
    expect(await notes()).toEqual(['kept'])
    expect(subject.sent.map((text) => text.split(' ')[0])).toEqual([
      'BEGIN',
      'select',
      'COMMIT',
      'BEGIN',
      'insert',
      'COMMIT',
    ])
  })

  it('A6 keeps the outer work when a block throws while an inner block is still running', async () => {
    for (const point of ['statement', 'idle'] as const) {
      await subject.clear()
      await newContext(async () => {
        const inner = { began: gate(), goOn: gate() }
        let zombie: Promise<unknown> | undefined
        await main.atomic(async () => {
          await note('outer')
          const middle = main.atomic(async () => {
            await note('middle')
            zombie = main
              .atomic(async () => {
                await note('inner')
                inner.began.open()
                if (point === 'idle') await inner.goOn.passed
                await note('inner again')
              })
              .catch((error: unknown) => error)
            await inner.began.passed
            throw boom
          })
          await expect(middle).rejects.toBe(boom)
          await note('later')
          inner.goOn.open()
          expect(await zombie).toMatchObject(ended)
          await note('last')
        })
      })
      expect(await notes()).toEqual(['last', 'later', 'outer'])
    }
  })

  it('A6 sends nothing on a connection that went back when an inner block ends late', async () => {
    const single = subject.define({ pool: { max: 1 } })
    const put = (text: string) => single.db.query('insert into notes values ($1)', [text])
    await newContext(async () => {
      const inner = { began: gate(), goOn: gate() }
      let zombie: Promise<unknown> | undefined
      const outer = single.atomic(async () => {
        await put('a')
        zombie = single
          .atomic(async () => {
            await put('b')
            inner.began.open()
            await inner.goOn.passed
          })
          .catch((error: unknown) => error)
        await inner.began.passed
        throw boom
      })
      await expect(outer).rejects.toBe(boom)
      await newContext(async () => {
        await put('c')
        await single.session().savepoint(async () => {
          await put('d')
          inner.goOn.open()
          await zombie
          await put('e')
        })
      })
    })
    expect(await notes()).toEqual(['c', 'd', 'e'])
  })
})
