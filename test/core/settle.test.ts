import { type AmbientDatabase, type DatabaseOptions, defineDatabase, newContext, openContext } from 'ambient-db'
import { pgAdapter } from 'ambient-db/pg'
import { Pool, type PoolClient, type PoolConfig } from 'pg'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { databaseGate, gate, until } from '../support/gate.ts'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'

type Main = AmbientDatabase<Pool, Pool>

let database: TestDatabase
const defined: Main[] = []

beforeAll(async () => {
  database = await createDatabase()
  await database.witness.rows(`
    create table notes (id int primary key, text text);
    create table threads (id int primary key);
    create table replies (thread int references threads deferrable initially deferred);
    create table slow (key int);
    create function wait_at_commit() returns trigger language plpgsql as
      $$ begin perform pg_advisory_xact_lock_shared(new.key); return null; end $$;
    create constraint trigger slow_commit after insert on slow deferrable initially deferred
      for each row execute function wait_at_commit()`)
})
afterAll(() => database.drop())
beforeEach(() => database.witness.rows('truncate notes, replies, slow, threads'))
afterEach(async () => {
  await Promise.all(defined.splice(0).map((each) => each.shutdown()))
})

function define(
  options: Partial<DatabaseOptions<Pool, Pool, PoolClient>> = {},
  pool: PoolConfig = {},
  name = options.name ?? 'main',
): Main {
  const adapter = pgAdapter(() => new Pool({ connectionString: database.url, application_name: name, ...pool }))
  const main = defineDatabase({ name, adapter, ...options })
  defined.push(main)
  return main
}

function insert(main: Main, id: number): Promise<unknown> {
  return main.db.query('insert into notes (id) values ($1)', [id])
}

/** Makes COMMIT fail. */
function insertOrphan(main: Main): Promise<unknown> {
  return main.db.query('insert into replies (thread) values (404)')
}

/** The ids that are committed. */
async function ids(): Promise<number[]> {
  return (await database.witness.rows<{ id: number }>('select id from notes order by id')).map(({ id }) => id)
}

async function backendOf(name: string) {
  return (await database.backends()).find(({ applicationName }) => applicationName === name)
}

async function kill(name: string): Promise<void> {
  await database.witness.rows(
    'select pg_terminate_backend(pid) from pg_stat_activity where application_name = $1 and datname = current_database()',
    [name],
  )
}

/** Connections of `main` that are not back in its pool. */
async function checkedOut(main: Main): Promise<number> {
  const pool = await main.connect()
  return pool.totalCount - pool.idleCount
}

async function failureOf(promise: Promise<unknown>): Promise<Error & { code?: string; cleanupErrors?: unknown[] }> {
  return promise.then(
    () => expect.fail('it resolved'),
    (error) => error,
  )
}

describe('the end of work that returns', () => {
  it('C4 joins statements under way and lets in what their branches issue next, also on other databases', async () => {
    const main = define()
    const other = define({ name: 'other' })
    const wall = await databaseGate(database.url)
    const branch = async () => {
      await main.db.query(wall.sql)
      await insert(main, 1)
      await insert(other, 2)
      await main.atomic(async () => {
        await insert(main, 3)
        await new Promise((resolve) => setImmediate(resolve))
        await insert(main, 4)
      })
      await insert(main, 5)
    }
    const ending = newContext(() => {
      void branch()
      return 'done'
    })
    await until(async () => (await backendOf('main'))?.waitsFor === 'Lock')
    await wall.open()
    expect(await ending).toBe('done')
    expect(await ids()).toEqual([1, 2, 3, 4, 5])
  })

  it('C4 commits nothing before all is quiet', async () => {
    const main = define()
    const other = define({ name: 'other' })
    const wall = await databaseGate(database.url)
    let settled = false
    const ending = newContext(async () => {
      await insert(other, 1)
      void main.db.query(wall.sql)
    }).finally(() => {
      settled = true
    })
    await until(async () => (await backendOf('main'))?.waitsFor === 'Lock')
    expect([settled, await ids()]).toEqual([false, []])
    await wall.open()
    await ending
    expect(await ids()).toEqual([1])
  })

  it('C4 refuses what comes after the join before a byte is sent', async () => {
    const main = define()
    const committing = await databaseGate(database.url)
    const ended = gate()
    let late: Promise<unknown> = Promise.resolve()
    const ending = newContext(async () => {
      await insert(main, 1)
      await main.db.query('insert into slow (key) values ($1)', [Number(/\d+/.exec(committing.sql)?.[0])])
      late = ended.passed.then(() => insert(main, 2))
    })
    await until(async () => (await backendOf('main'))?.query === 'COMMIT')
    ended.open()
    await expect(late).rejects.toMatchObject({ code: 'AMBIENT_CONTEXT_ENDED', database: 'main' })
    expect((await backendOf('main'))?.query).toBe('COMMIT')
    await committing.open()
    await ending
    expect(await ids()).toEqual([1])
    expect(await checkedOut(main)).toBe(0)
  })

  it('C4 bounds the join by settleTimeout, stops what is at the server and rolls back', async () => {
    const main = define({ settleTimeout: 1000 })
    const wall = await databaseGate(database.url)
    let late: Promise<unknown> = Promise.resolve()
    const ending = newContext(async () => {
      await insert(main, 1)
      late = main.db.query(wall.sql)
      late.catch(() => {})
    })
    await expect(ending).rejects.toMatchObject({
      code: 'AMBIENT_SETTLE_TIMEOUT',
      message: expect.stringContaining("'main'"),
      outcome: 'rolled-back',
    })
    await expect(late).rejects.toMatchObject({ code: '57014' })
    expect(await checkedOut(main)).toBe(0)
    await wall.open()
    expect(await ids()).toEqual([])
  })

  it('C4 bounds the join of a block whose code never ends', async () => {
    const main = define({ settleTimeout: 100 })
    const never = gate()
    let block: Promise<unknown> = Promise.resolve()
    const ending = newContext(async () => {
      block = main.atomic(async () => {
        await insert(main, 1)
        await never.passed
        await insert(main, 2)
      })
      block.catch(() => {})
    })
    await expect(ending).rejects.toMatchObject({ code: 'AMBIENT_SETTLE_TIMEOUT' })
    expect(await checkedOut(main)).toBe(0)
    never.open()
    await expect(block).rejects.toMatchObject({ code: expect.stringMatching(/^AMBIENT_(CONTEXT|BLOCK)_ENDED$/) })
    expect(await ids()).toEqual([])
  })

  it.each(['commit', 'rollback', 'append', 'savepoint', 'join'] as const)(
    'C4 refuses a block with `current: %s` that comes while the hooks of the end run, and commits all the same',
    async (current) => {
      const main = define()
      const inHook = gate()
      let late: Promise<unknown> = Promise.resolve()
      await newContext(async () => {
        await insert(main, 1)
        late = inHook.passed
          .then(() => main.atomic(() => insert(main, 2), { current }))
          .catch((error: unknown) => error)
        main.beforeCommit(async () => {
          inHook.open()
          await insert(main, 3)
        })
      })
      expect(await late).toMatchObject({ code: 'AMBIENT_CONTEXT_ENDED' })
      expect(await ids()).toEqual([1, 3])
    },
  )

  it('C4 runs the after-hooks when everything is closed', async () => {
    const main = define({}, { max: 1 })
    const seen: unknown[] = []
    await newContext(async () => {
      await insert(main, 1)
      main.afterCommit(async () => {
        seen.push(await checkedOut(main), await ids())
        await insert(main, 2) // in a context of its own
      })
    })
    expect(seen).toEqual([0, [1]])
    expect(await ids()).toEqual([1, 2])
  })

  it('K1 gives beforeCommit hooks the session of their own context, not that of its surroundings', async () => {
    const main = define()
    await newContext(async () => {
      await insert(main, 1)
      await newContext(async () => {
        await insert(main, 2)
        main.beforeCommit(() => insert(main, 3))
      })
      expect(await ids()).toEqual([2, 3])
      await main.rollback()
    })
    expect(await ids()).toEqual([2, 3])
  })

  it('C4 fences the end of a context that runs inside a hook of another', async () => {
    const main = define()
    const committing = await databaseGate(database.url)
    const ended = gate()
    let late: Promise<unknown> = Promise.resolve()
    const outer = newContext(async () => {
      await insert(main, 1)
      main.beforeCommit(() =>
        newContext(async () => {
          await main.db.query('set application_name = inner_one')
          await main.db.query('insert into slow (key) values ($1)', [Number(/\d+/.exec(committing.sql)?.[0])])
          late = ended.passed.then(() => insert(main, 2))
        }),
      )
    })
    await until(async () => (await backendOf('inner_one'))?.query === 'COMMIT')
    ended.open()
    await expect(late).rejects.toMatchObject({ code: 'AMBIENT_CONTEXT_ENDED' })
    await committing.open()
    await outer
    expect(await ids()).toEqual([1])
  })
})

describe('the end of work that throws', () => {
  const failure = new Error('the work failed')

  it('C4 fences at once: queued and later statements of sibling branches never reach the server', async () => {
    const main = define()
    const wall = await databaseGate(database.url)
    const failed = gate()
    const late: Promise<unknown>[] = []
    const ending = newContext(async () => {
      await insert(main, 1)
      late.push(main.db.query(wall.sql), insert(main, 2))
      late.push(failed.passed.then(() => insert(main, 3)))
      for (const each of late) each.catch(() => {})
      throw failure
    })
    ending.catch(() => {})
    await until(async () => (await backendOf('main'))?.waitsFor === 'Lock')
    failed.open()
    await expect(late[1]).rejects.toMatchObject({ code: 'AMBIENT_CONTEXT_ENDED' })
    await expect(late[2]).rejects.toMatchObject({ code: 'AMBIENT_CONTEXT_ENDED' })
    expect((await backendOf('main'))?.query).toBe(wall.sql) // what is under way is awaited
    await wall.open()
    await expect(ending).rejects.toBe(failure)
    await expect(late[0]).resolves.toBeDefined()
    expect((await backendOf('main'))?.query).toBe('ROLLBACK')
    expect(await ids()).toEqual([])
    expect(await checkedOut(main)).toBe(0)
  })

  it('C4 fences sessions that have nothing under way as well', async () => {
    const one = define({ name: 'one' })
    const two = define({ name: 'two' })
    const wall = await databaseGate(database.url)
    const failed = gate()
    let late: Promise<unknown> = Promise.resolve()
    const ending = newContext(async () => {
      await insert(one, 1)
      two.db.query(wall.sql).catch(() => {})
      late = failed.passed.then(() => insert(one, 2))
      late.catch(() => {})
      await until(async () => (await backendOf('two'))?.waitsFor === 'Lock')
      throw failure
    })
    ending.catch(() => {})
    await until(async () => (await backendOf('one'))?.query === 'ROLLBACK')
    failed.open() // `one` is rolled back, `two` keeps the context from its end
    await expect(late).rejects.toMatchObject({ code: 'AMBIENT_CONTEXT_ENDED', database: 'one' })
    expect((await backendOf('one'))?.query).toBe('ROLLBACK')
    await wall.open()
    await expect(ending).rejects.toBe(failure)
    expect(await ids()).toEqual([])
  })

  it('C4 lets a block that is under way go no further', async () => {
    const main = define()
    const inside = gate()
    const failed = gate()
    let block: Promise<unknown> = Promise.resolve()
    const ending = newContext(async () => {
      block = main.atomic(async () => {
        await insert(main, 1)
        inside.open()
        await failed.passed
        await insert(main, 2)
      })
      block.catch(() => {})
      await inside.passed
      throw failure
    })
    await expect(ending).rejects.toBe(failure)
    failed.open()
    await expect(block).rejects.toMatchObject({ code: expect.stringMatching(/^AMBIENT_(CONTEXT|BLOCK)_ENDED$/) })
    expect(await ids()).toEqual([])
    expect(await checkedOut(main)).toBe(0)
  })

  it.each([
    ['a block', 'commit'],
    ['a block that goes on in an open transaction', 'append'],
    ['a savepoint', 'savepoint'],
  ] as const)('C4 A1 %s that was rolled back with its context does not resolve', async (_, current) => {
    const main = define()
    const inside = gate()
    const failed = gate()
    let block: Promise<unknown> = Promise.resolve()
    const ending = newContext(async () => {
      if (current !== 'commit') await insert(main, 1)
      const work = async () => {
        await insert(main, 2)
        inside.open()
        await failed.passed
      }
      block = main.atomic(work, { current })
      block.catch(() => {})
      await inside.passed
      throw failure
    })
    await expect(ending).rejects.toBe(failure)
    failed.open()
    await expect(block).rejects.toMatchObject({ code: expect.stringMatching(/^AMBIENT_(CONTEXT|BLOCK)_ENDED$/) })
    expect(await ids()).toEqual([])
  })

  it('C4 sends nothing on a connection that comes when its context has ended', async () => {
    const main = define({}, { max: 1 })
    const holding = gate()
    const release = gate()
    const holder = newContext(async () => {
      await insert(main, 1)
      holding.open()
      await release.passed
    })
    await holding.passed
    let late: Promise<unknown> = Promise.resolve()
    const ending = newContext(async () => {
      late = insert(main, 2)
      late.catch(() => {})
      throw failure
    })
    await expect(ending).rejects.toBe(failure)
    release.open()
    await holder
    await expect(late).rejects.toMatchObject({ code: /^AMBIENT_/ })
    await until(async () => (await checkedOut(main)) === 0)
    expect(await ids()).toEqual([1])
    await newContext(() => insert(main, 3))
    expect(await ids()).toEqual([1, 3])
  })

  it('C4 leaves a connection alone that it has given back, though an afterBegin hook still ran on it', async () => {
    const begun = gate()
    const go = gate()
    let first = true
    const afterBegin = async () => {
      if (!first) return
      first = false
      begun.open()
      await go.passed
    }
    const main = define({ hooks: { afterBegin } }, { max: 1 })
    let late: Promise<unknown> = Promise.resolve()
    const ending = newContext(async () => {
      late = insert(main, 1)
      late.catch(() => {})
      await begun.passed
      throw failure
    })
    await expect(ending).rejects.toBe(failure)
    await newContext(async () => {
      await insert(main, 2)
      go.open()
      await late.catch(() => {})
      await insert(main, 3)
      expect(await ids()).toEqual([])
    })
    await expect(late).rejects.toMatchObject({ code: /^AMBIENT_/ })
    expect(await ids()).toEqual([2, 3])
  })

  it('C4 rolls back every database though one cannot, and throws the first error with the second attached', async () => {
    const [one, two, three] = ['one', 'two', 'three'].map((name) => define({ name })) as [Main, Main, Main]
    const ending = newContext(async () => {
      await Promise.all([insert(one, 1), insert(two, 2), insert(three, 3)])
      await kill('two')
      await until(async () => (await backendOf('two')) === undefined)
      throw failure
    })
    const thrown = await failureOf(ending)
    expect(thrown).toBe(failure)
    expect(thrown.cleanupErrors).toHaveLength(1)
    expect(await Promise.all([one, two, three].map(checkedOut))).toEqual([0, 0, 0])
    expect((await backendOf('one'))?.query).toBe('ROLLBACK')
    expect((await backendOf('three'))?.query).toBe('ROLLBACK')
    expect(await ids()).toEqual([])
  })

  it('C4 runs afterRollback hooks only, and throws whatever was thrown, be it no error at all', async () => {
    const main = define()
    const seen: string[] = []
    const ending = newContext(async () => {
      await insert(main, 1)
      main.beforeCommit(() => seen.push('beforeCommit'))
      main.afterCommit(() => seen.push('afterCommit'))
      main.afterRollback(() => seen.push('afterRollback'))
      await Promise.reject() // no error at all
    })
    expect(
      await ending.then(
        () => 'resolved',
        (error) => [error],
      ),
    ).toEqual([undefined])
    expect(seen).toEqual(['afterRollback'])
    expect(await ids()).toEqual([])
  })
})

describe('work that nobody awaited', () => {
  it('C5 rolls back and rejects with the failure of a statement that nobody awaited', async () => {
    const main = define()
    const other = define({ name: 'other' })
    const ending = newContext(async () => {
      await insert(other, 1)
      await insert(main, 2)
      void insert(main, 2)
    })
    await expect(ending).rejects.toMatchObject({ code: '23505' })
    expect(await ids()).toEqual([])
  })

  it('C5 counts the failure of a block that nobody awaited, though its savepoint undid it', async () => {
    const main = define()
    const failure = new Error('the block failed')
    const context = openContext()
    await context.run(() => insert(main, 1))
    context.run(() => {
      const fail = async () => {
        await insert(main, 2)
        throw failure
      }
      void main.atomic(fail, { current: 'savepoint' })
    })
    await expect(context.settle('commit')).rejects.toBe(failure)
    expect(await ids()).toEqual([])
  })

  it('C5 commits with work that was handled before the end', async () => {
    const main = define()
    await newContext(async () => {
      await insert(main, 1)
      const failing = () => Promise.reject(new Error('handled'))
      await main.atomic(failing, { current: 'savepoint' }).catch(() => {})
    })
    expect(await ids()).toEqual([1])
  })

  it("C5 takes unawaited work for an error with `unawaited: 'error'`", async () => {
    const main = define()
    const sloppy = newContext(
      async () => {
        await insert(main, 1)
        void insert(main, 2)
      },
      { unawaited: 'error' },
    )
    await expect(sloppy).rejects.toMatchObject({
      code: 'AMBIENT_UNAWAITED_WORK',
      outcome: 'rolled-back',
      message: expect.stringMatching(/^Statements were still under way when the work returned\. Await/),
    })
    expect(await ids()).toEqual([])
    await newContext(() => insert(main, 3), { unawaited: 'error' })
    expect(await ids()).toEqual([3])
  })

  it("C5 prefers the failure itself with `unawaited: 'error'`", async () => {
    const main = define()
    const sloppy = newContext(
      async () => {
        await insert(main, 1)
        void insert(main, 1)
      },
      { unawaited: 'error' },
    )
    await expect(sloppy).rejects.toMatchObject({ code: '23505' })
    expect(await ids()).toEqual([])
  })
})

describe('several databases', () => {
  /** Three databases, and what they tell of their hooks and commits. */
  function three() {
    const seen: string[] = []
    const hooks = (name: string) => ({
      beforeCommit: () => seen.push(`${name} beforeCommit`),
      afterCommit: () => seen.push(`${name} afterCommit`),
      afterRollback: () => seen.push(`${name} afterRollback`),
    })
    const [one, two, last] = ['one', 'two', 'three'].map((name) => define({ name, hooks: hooks(name) })) as [
      Main,
      Main,
      Main,
    ]
    return { seen, one, two, last }
  }

  it('C6 runs all hooks, then commits in the order of definition, whatever was used first', async () => {
    const { seen, one, two, last } = three()
    const committing = await databaseGate(database.url)
    const key = Number(/\d+/.exec(committing.sql)?.[0])
    const ending = newContext(async () => {
      await insert(last, 3)
      await insert(two, 2)
      await two.db.query('insert into slow (key) values ($1)', [key])
      await insert(one, 1)
    })
    await until(async () => (await backendOf('two'))?.query === 'COMMIT')
    expect(seen).toEqual(['one beforeCommit', 'two beforeCommit', 'three beforeCommit'])
    expect(await ids()).toEqual([1])
    expect((await backendOf('three'))?.state).toBe('idle in transaction')
    await committing.open()
    await ending
    expect(await ids()).toEqual([1, 2, 3])
    expect(seen.slice(3)).toEqual(['one afterCommit', 'two afterCommit', 'three afterCommit'])
  })

  it('C6 lets a hook of one database write to another', async () => {
    const { one, two, last } = three()
    await newContext(async () => {
      await insert(last, 3)
      last.beforeCommit(async () => {
        await insert(one, 1) // has had no session yet
        one.beforeCommit(() => insert(two, 2))
      })
    })
    expect(await ids()).toEqual([1, 2, 3])
  })

  it('C6 rolls back all when a hook of one vetoes', async () => {
    const { seen, one, two } = three()
    const veto = new Error('no')
    const ending = newContext(async () => {
      await insert(one, 1)
      await insert(two, 2)
      two.beforeCommit(() => {
        throw veto
      })
    })
    await expect(ending).rejects.toBe(veto)
    expect(await ids()).toEqual([])
    expect(seen).toEqual(['one beforeCommit', 'two beforeCommit', 'one afterRollback', 'two afterRollback'])
  })

  it('C6 rolls back the rest when the first COMMIT fails, and rejects with that very error', async () => {
    const { seen, one, two, last } = three()
    const ending = newContext(async () => {
      await insert(two, 2)
      await insert(last, 3)
      await insertOrphan(one)
    })
    await expect(ending).rejects.toMatchObject({ code: '23503' })
    expect(await ids()).toEqual([])
    expect((await backendOf('two'))?.query).toBe('ROLLBACK')
    expect((await backendOf('three'))?.query).toBe('ROLLBACK')
    expect(await Promise.all([one, two, last].map(checkedOut))).toEqual([0, 0, 0])
    expect(seen.filter((each) => each.includes('after'))).toEqual([
      'one afterRollback',
      'two afterRollback',
      'three afterRollback',
    ])
  })

  it('C6 says which databases committed and which did not when a later COMMIT fails', async () => {
    const { seen, one, two, last } = three()
    const ending = newContext(async () => {
      await insert(one, 1)
      await insertOrphan(two)
      await insert(last, 3)
    })
    await expect(ending).rejects.toMatchObject({
      code: 'AMBIENT_PARTIAL_COMMIT',
      outcome: 'partial',
      cause: { code: '23503' },
      databases: { committed: ['one'], rolledBack: ['two', 'three'], unknown: [] },
      message: expect.stringMatching(/'one'.*'two', 'three'/),
    })
    expect(await ids()).toEqual([1])
    expect(await Promise.all([one, two, last].map(checkedOut))).toEqual([0, 0, 0])
    expect(seen.filter((each) => each.includes('after'))).toEqual([
      'one afterCommit',
      'two afterRollback',
      'three afterRollback',
    ])
  })

  it('C6 does not speak of databases that wrote nothing', async () => {
    const { one, two, last } = three()
    const ending = newContext(async () => {
      one.session()
      await insertOrphan(two)
      last.session()
    })
    await expect(ending).rejects.toMatchObject({ code: '23503' })
  })

  it('C6 C8 commits the rest though its signal fires after the first COMMIT', async () => {
    const { seen, one, two, last } = three()
    const committing = await databaseGate(database.url)
    const key = Number(/\d+/.exec(committing.sql)?.[0])
    const abort = new AbortController()
    const ending = newContext(
      async () => {
        await insert(one, 1)
        await one.db.query('insert into slow (key) values ($1)', [key])
        await insert(two, 2)
        await insert(last, 3)
        return 'done'
      },
      { signal: abort.signal },
    )
    await until(async () => (await backendOf('one'))?.query === 'COMMIT')
    abort.abort()
    await committing.open()
    expect(await ending).toBe('done')
    expect(await ids()).toEqual([1, 2, 3])
    expect(seen.slice(3)).toEqual(['one afterCommit', 'two afterCommit', 'three afterCommit'])
  })

  it('C6 C8 rolls back the rest though its signal came meanwhile, when the first COMMIT fails', async () => {
    const { seen, one, two } = three()
    const committing = await databaseGate(database.url)
    const key = Number(/\d+/.exec(committing.sql)?.[0])
    const abort = new AbortController()
    const ending = newContext(
      async () => {
        await insert(one, 1)
        await one.db.query('insert into slow (key) values ($1)', [key])
        await insertOrphan(one)
        await insert(two, 2)
      },
      { signal: abort.signal },
    )
    ending.catch(() => {})
    await until(async () => (await backendOf('one'))?.query === 'COMMIT')
    abort.abort()
    await committing.open()
    await expect(ending).rejects.toMatchObject({ code: '23503' })
    expect(await ids()).toEqual([])
    expect(seen.filter((each) => each.includes('after'))).toEqual(['one afterRollback', 'two afterRollback'])
  })

  it('C6 gives the connection back of a session that lost it while another one committed', async () => {
    const { one, two, last } = three()
    const committing = await databaseGate(database.url)
    const key = Number(/\d+/.exec(committing.sql)?.[0])
    const ending = newContext(async () => {
      await insert(one, 1)
      await one.db.query('insert into slow (key) values ($1)', [key])
      await insert(two, 2)
      await insert(last, 3)
    })
    ending.catch(() => {})
    await until(async () => (await backendOf('one'))?.query === 'COMMIT')
    const pool = await two.connect()
    const lost = new Promise((resolve) => pool.once('remove', resolve))
    await kill('two')
    await until(async () => (await backendOf('two')) === undefined)
    await new Promise((resolve) => setImmediate(resolve)) // the socket's end has arrived
    await committing.open()
    await expect(ending).rejects.toMatchObject({
      code: 'AMBIENT_PARTIAL_COMMIT',
      databases: { committed: ['one'], unknown: [] },
    })
    await lost
    expect(await Promise.all([one, two, last].map(checkedOut))).toEqual([0, 0, 0])
    expect(await ids()).toEqual([1])
  })
})
