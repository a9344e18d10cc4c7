import { type Adapter, defineDatabase, newContext, type Statements } from 'ambient-db'
import { pgAdapter } from 'ambient-db/pg'
import { sandbox } from 'ambient-db/testing'
import { Pool, type PoolClient } from 'pg'
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import type { UnitOfWork } from '../../src/adapter.ts'
import { gate } from '../support/gate.ts'
import { createSubject, type Subject } from '../support/subject.ts'

/** A library that keeps notes back. */
class Notes implements UnitOfWork {
  readonly kept: string[] = []
  cleared = 0
  readonly #statements: Statements<PoolClient>

  constructor(statements: Statements<PoolClient>) {
    this.#statements = statements
  }

  get pending(): boolean {
    return this.kept.length > 0
  }

  async flush(): Promise<void> {
    for (const text of this.kept.splice(0)) {
      await this.#statements.run((client) => client.query('insert into notes values ($1)', [text]))
    }
  }

  clear(): void {
    this.cleared++
    this.kept.length = 0
  }
}

/** Its handle. */
interface Handle {
  keep(text: string): void
  readonly unit: Notes
  /** Whether a call runs in a transaction. */
  transacted(): Promise<boolean>
  /** Two statements after a while. */
  slowly(pause: Promise<unknown>, ...texts: string[]): Promise<unknown>
}

let subject: Subject
const define = (unit: (statements: Statements<PoolClient>) => Notes = (statements) => new Notes(statements)) => {
  const driver = pgAdapter(() => new Pool({ connectionString: subject.database.url }))
  const adapter: Adapter<Handle, Pool, PoolClient> = {
    ...driver,
    createHandle: (statements) => ({
      get unit() {
        return statements.unitOfWork(unit)
      },
      keep: (text) => void statements.unitOfWork(unit).kept.push(text),
      slowly: (pause, ...texts) =>
        statements.enclose(async () => {
          await pause
          for (const text of texts) {
            await statements.run((client) => client.query('insert into notes values ($1)', [text]))
          }
        }),
      transacted: () => statements.enclose(async () => statements.createBlock().inTransaction),
    }),
  }
  return defineDatabase({ name: 'main', adapter })
}
let main: ReturnType<typeof define>
const planned = new Error('planned')

beforeAll(async () => {
  subject = await createSubject()
  main = define()
})
beforeEach(() => subject.clear())
afterAll(async () => {
  await main.shutdown()
  await subject.close()
})

describe('a unit of work', () => {
  it('C1 S1 is one of each session, and costs nothing by itself', async () => {
    const first = await newContext(() => {
      expect(main.db.unit).toBe(main.session().db.unit)
      expect(main.session().inTransaction).toBe(false)
      return main.db.unit
    })
    await newContext(() => expect(main.db.unit).not.toBe(first))
    expect(() => main.db.unit).toThrow(expect.objectContaining({ code: 'AMBIENT_NO_CONTEXT' }))
  })

  it('C4 is flushed at the end of a context, and once only', async () => {
    await newContext(() => main.db.keep('a'))
    await expect(newContext(() => Promise.reject(main.db.keep('b') ?? planned))).rejects.toBe(planned)
    expect(await subject.notes()).toEqual(['a'])
  })

  it('C4 C6 rolls all back when its flush fails', async () => {
    const work = newContext(() => {
      main.db.keep('a')
      main.db.keep('a')
    })
    await expect(work).rejects.toMatchObject({ code: '23505' })
    expect(await subject.notes()).toEqual([])
  })

  it('S4 is flushed by commit(), and forgotten by rollback()', async () => {
    await newContext(async () => {
      main.db.keep('a')
      await main.commit()
      expect(await subject.notes()).toEqual(['a'])
      main.db.keep('b')
      await main.rollback()
      expect(main.db.unit.cleared).toBe(1)
    })
    expect(await subject.notes()).toEqual(['a'])
  })

  it('S4 K1 knows nothing from before a COMMIT that failed or was vetoed', async () => {
    await newContext(async () => {
      main.db.keep('a')
      main.beforeCommit(() => Promise.reject(planned))
      await expect(main.commit()).rejects.toBe(planned)
      expect(main.db.unit.cleared).toBe(1)
    })
    expect(await subject.notes()).toEqual([])
  })

  it('S6 counts as an open transaction', async () => {
    await newContext(async () => {
      main.db.keep('a')
      await expect(main.closeSession()).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_OPEN' })
      const raising = main.atomic(() => {}, { current: 'raise' })
      await expect(raising).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_OPEN' })
      await main.closeSession('commit')
      expect(await subject.notes()).toEqual(['a'])
      expect(main.db.unit.pending).toBe(false)
    })
  })

  it('S6 is refused where its session has ended', async () => {
    await newContext(async () => {
      const { db } = main.session()
      await main.closeSession()
      expect(() => db.keep('a')).toThrow(expect.objectContaining({ code: 'AMBIENT_SESSION_CLOSED' }))
    })
  })

  it('K1 is flushed before the hooks, and again behind them', async () => {
    await newContext(() => {
      main.db.keep('a')
      main.beforeCommit(async () => {
        expect(main.db.unit.pending).toBe(false)
        main.db.keep('b')
      })
    })
    expect(await subject.notes()).toEqual(['a', 'b'])
  })

  it.each(['commit', 'rollback', 'append', 'savepoint', 'join'] as const)(
    "A1 belongs to what surrounds a block with `current: '%s'`, or to the block itself",
    async (current) => {
      await newContext(async () => {
        main.db.keep('outer')
        await expect(
          main.atomic(
            () => {
              main.db.keep('inner')
              throw planned
            },
            { current },
          ),
        ).rejects.toBe(planned)
        if (current === 'join') await main.rollback()
      })
      expect(await subject.notes()).toEqual(['commit', 'savepoint'].includes(current) ? ['outer'] : [])
      await subject.clear()
      await newContext(async () => {
        await main.atomic(() => main.db.keep('inner'), { current })
        expect(main.db.unit.pending).toBe(false)
      })
      expect(await subject.notes()).toEqual(['inner'])
    },
  )

  it('A5 is empty at each attempt', async () => {
    let attempts = 0
    const conflict = Object.assign(new Error('conflict'), { severity: 'ERROR', code: '40001' })
    const work = () => {
      main.db.keep('a')
      if (++attempts === 1) throw conflict
    }
    await newContext(() => main.atomic(work, { retry: { attempts: 2 } }))
    expect(await subject.notes()).toEqual(['a'])
  })

  it('is flushed in a transaction where statements run on their own', async () => {
    await newContext(
      async () => {
        main.db.keep('a')
        main.db.keep('a')
        await expect(main.commit()).rejects.toMatchObject({ code: '23505' })
        expect(await subject.notes()).toEqual([])
        main.db.keep('b')
      },
      { transaction: 'autocommit' },
    )
    expect(await subject.notes()).toEqual(['b'])
  })

  it('is given up when its flushes come to no end', async () => {
    class Endless extends Notes {
      override async flush(): Promise<void> {
        await super.flush()
        this.kept.push(`${Math.random()}`)
      }
    }
    const endless = define((statements) => new Endless(statements))
    const work = newContext(() => endless.db.keep('a'))
    await expect(work).rejects.toMatchObject({ code: 'AMBIENT_SETTLE_TIMEOUT' })
    expect(await subject.notes()).toEqual([])
    await endless.shutdown()
  })

  it('works in a sandbox', async () => {
    const box = sandbox(main)
    await box.begin()
    await newContext(() => main.db.keep('a'))
    await newContext(async () => {
      main.db.keep('b')
      await main.rollback()
    })
    await expect(newContext(() => main.db.keep('a'))).rejects.toMatchObject({ code: '23505' })
    await box.rollback()
    expect(await subject.notes()).toEqual([])
  })
})

describe('a call that comes to its statements later', () => {
  it('S8 counts as issued from the start, and takes one turn', async () => {
    const pause = gate()
    const work = newContext(async () => {
      const first = main.db.slowly(pause.passed, 'a', 'b')
      const commit = main.commit()
      const later = main.db.slowly(Promise.resolve(), 'c')
      pause.open()
      await Promise.all([first, commit, later])
      throw planned
    })
    await expect(work).rejects.toBe(planned)
    expect(await subject.notes()).toEqual(['a', 'b'])
  })

  it('C4 C5 is joined at the end of its context, and part of its outcome', async () => {
    const pause = gate()
    const joined = newContext(() => void main.db.slowly(pause.passed, 'a'))
    pause.open()
    await joined
    await expect(newContext(() => void main.db.slowly(Promise.reject(planned)))).rejects.toBe(planned)
    const unawaited = newContext(() => void main.db.slowly(Promise.resolve(), 'b').catch(() => {}), {
      unawaited: 'error',
    })
    await expect(unawaited).rejects.toMatchObject({ code: 'AMBIENT_UNAWAITED_WORK' })
    expect(await subject.notes()).toEqual(['a'])
  })

  it('C4 is refused, and never called, behind the end of its context', async () => {
    let late: Promise<unknown> | undefined
    const pause = gate()
    await newContext(() => {
      late = pause.passed.then(() => main.db.slowly(Promise.resolve(), 'a'))
    })
    pause.open()
    await expect(late).rejects.toMatchObject({ code: 'AMBIENT_CONTEXT_ENDED' })
    expect(await subject.notes()).toEqual([])
  })

  it('S8 runs in a transaction only where there is one', async () => {
    await newContext(async () => {
      expect(await main.db.transacted()).toBe(true) // it is still to begin
    })
    await newContext(
      async () => {
        expect(await main.db.transacted()).toBe(false)
        await main.atomic(async () => {
          expect(await main.db.transacted()).toBe(true)
        })
        expect(await main.db.transacted()).toBe(false)
        await main.begin()
        expect(await main.db.transacted()).toBe(true)
        await main.commit()
      },
      { transaction: 'autocommit' },
    )
  })
})
