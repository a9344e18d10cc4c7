import { defineDatabase, isAmbientError, newContext, openContext } from 'ambient-db'
import { databaseContext } from 'ambient-db/node-http'
import { pgAdapter } from 'ambient-db/pg'
import { expectNoOpenSessions, sandbox } from 'ambient-db/testing'
import { Pool } from 'pg'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { serve } from '../frameworks/support.ts'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'

let database: TestDatabase
const main = defineDatabase({
  name: 'main',
  adapter: pgAdapter(() => new Pool({ connectionString: database.url, max: 3 })),
  acquireTimeout: 2_000,
  trace: true,
})
const box = sandbox(main)

beforeAll(async () => {
  database = await createDatabase()
  await database.witness.rows(`
    create table notes (id int primary key);
    create table parents (id int primary key);
    create table children (parent int references parents deferrable initially deferred);
  `)
})
afterAll(async () => {
  await main.shutdown()
  await database.drop()
})

async function insert(id: number, db: Pool = main.db): Promise<void> {
  await db.query('insert into notes values ($1)', [id])
}

async function ids(db: Pool = main.db): Promise<number[]> {
  const { rows } = await db.query<{ id: number }>('select id from notes order by id')
  return rows.map(({ id }) => id)
}

const witnessed = async () => (await database.witness.rows<{ id: number }>('select id from notes')).map(({ id }) => id)
const coded = (code: string) => (error: unknown) => isAmbientError(error, code as never)

describe('an open sandbox', () => {
  beforeEach(box.begin)
  afterEach(async () => {
    await box.rollback()
    expect(await witnessed()).toEqual([])
  })

  it('shows what was committed before, to the test and to all code, and keeps nothing', async () => {
    await newContext(() => insert(1))
    expect(await ids()).toEqual([1])
    await insert(2)
    await newContext(async () => expect(await ids()).toEqual([1, 2]))
    expect(await ids(box.db)).toEqual([1, 2])
  })

  it('undoes what a unit rolls back', async () => {
    await insert(1)
    await expect(
      newContext(async () => {
        await insert(2)
        throw new Error('no')
      }),
    ).rejects.toThrow('no')
    expect(await ids()).toEqual([1])
  })

  it('keeps commits by hand, blocks, sessions beside and native transactions in their order', async () => {
    await expect(
      newContext(async () => {
        await insert(1)
        await main.commit()
        await main.atomic(() => insert(2))
        await main.newSession(({ db }) => insert(3, db))
        await insert(4)
        const client = await main.db.connect()
        await client.query('begin')
        await client.query('insert into notes values (5)')
        await client.query('rollback')
        client.release()
        await main.atomic(() => insert(6), { current: 'savepoint' })
        await main.rollback()
        await insert(7)
        await main.closeSession('commit')
        await insert(8)
        throw new Error('no')
      }),
    ).rejects.toThrow('no')
    expect(await ids()).toEqual([1, 2, 3, 7])
  })

  it('lets overlapping units wait for each other', async () => {
    const units = [1, 2, 3, 4].map((id) =>
      newContext(async () => {
        await insert(id)
        await insert(id + 10)
        if (id === 3) throw new Error('no')
      }),
    )
    const results = await Promise.allSettled(units)
    expect(results.map(({ status }) => status)).toEqual(['fulfilled', 'fulfilled', 'rejected', 'fulfilled'])
    expect(await ids()).toEqual([1, 2, 4, 11, 12, 14])
  })

  it('refuses at once a unit inside of one that has a transaction open', async () => {
    await newContext(async () => {
      await insert(1)
      await expect(newContext(() => insert(2))).rejects.toSatisfy(coded('AMBIENT_SELF_DEADLOCK'))
      await main.commit()
      await newContext(() => insert(3))
    })
    expect(await ids()).toEqual([1, 3])
  })

  it('runs hooks at the simulated commit, and lets one of them veto it', async () => {
    const seen: string[] = []
    await newContext(async () => {
      main.beforeCommit(() => insert(2))
      main.afterCommit(async () => void seen.push(`after: ${await newContext(() => ids())}`))
      await insert(1)
      expect(seen).toEqual([])
    })
    expect(seen).toEqual(['after: 1,2'])
    const vetoed = newContext(async () => {
      main.beforeCommit(() => {
        throw new Error('veto')
      })
      main.afterRollback(() => void seen.push('rolled back'))
      await insert(3)
    })
    await expect(vetoed).rejects.toThrow('veto')
    expect([seen.at(-1), await ids()]).toEqual(['rolled back', [1, 2]])
  })

  it('checks deferred constraints at the simulated commit, and defers the next ones again', async () => {
    const orphan = () => main.db.query('insert into children values (1)')
    await expect(newContext(orphan)).rejects.toMatchObject({ code: '23503' })
    expect((await main.db.query('select from children')).rowCount).toBe(0)
    await newContext(async () => {
      await orphan() // deferred
      await main.db.query('insert into parents values (1)')
    })
    expect((await main.db.query('select from children')).rowCount).toBe(1)
  })

  it('survives statements that fail, of the test and of its units', async () => {
    await insert(1)
    await expect(main.db.query('select missing')).rejects.toMatchObject({ code: '42703' })
    const swallowing = newContext(async () => {
      await insert(2)
      await main.db.query('select missing').catch(() => {})
    })
    await expect(swallowing).rejects.toSatisfy(coded('AMBIENT_TRANSACTION_ABORTED'))
    await insert(3)
    expect(await ids()).toEqual([1, 3])
  })

  it('is found by requests over real sockets, whose middlewares settle as ever', async () => {
    const server = await serve(
      databaseContext(async (request, response) => {
        await insert(Number(request.url?.slice(1)))
        response.writeHead(request.url === '/2' ? 409 : 201).end()
      }),
    )
    for (const path of ['/1', '/2', '/3']) await fetch(`http://127.0.0.1:${server.port}${path}`)
    await server.close()
    expect(await ids()).toEqual([1, 3])
  })

  it('gives statements without transactions of their own what they are', async () => {
    await newContext(
      async () => {
        await insert(1)
        await expect(insert(1)).rejects.toMatchObject({ code: '23505' })
        await main.atomic(() => insert(2))
      },
      { transaction: 'autocommit' },
    )
    expect(await ids()).toEqual([1, 2])
  })

  it('lets sessions that pin a connection work', async () => {
    await main.newSession(
      async (session) => {
        await insert(1, session.db)
        await session.commit()
        await insert(2, session.db)
        await session.rollback()
        await insert(3, session.db)
      },
      { hold: true },
    )
    expect(await ids()).toEqual([1, 3])
  })

  it('does not wait for ever for a transaction that waits for the test', async () => {
    let done = () => {}
    const waits = new Promise<void>((resolve) => {
      done = resolve
    })
    const unit = newContext(async () => {
      await insert(1)
      await waits
    })
    await expect(ids()).rejects.toSatisfy(coded('AMBIENT_SANDBOX'))
    done()
    await unit
    expect(await ids()).toEqual([1])
  })

  it('refuses to change the host', async () => {
    await expect(main.changeHost('other')).rejects.toSatisfy(coded('AMBIENT_SANDBOX'))
  })
})

describe('misuse', () => {
  it('is refused where a sandbox is opened twice, or is not open', async () => {
    await expect(box.rollback()).rejects.toSatisfy(coded('AMBIENT_SANDBOX'))
    await box.begin()
    await expect(box.begin()).rejects.toSatisfy(coded('AMBIENT_SANDBOX'))
    await expect(sandbox(main).begin()).rejects.toSatisfy(coded('AMBIENT_SANDBOX'))
    await box.rollback()
    await box.begin()
    await insert(1)
    await box.rollback()
    expect(await witnessed()).toEqual([])
  })

  it('is told where SQL has ended the transaction of the sandbox', async () => {
    await box.begin()
    const unit = newContext(async () => {
      await insert(1)
      await main.db.query('select 1; commit')
    })
    await expect(unit).rejects.toSatisfy(coded('AMBIENT_TRANSACTION_ABORTED'))
    await expect(newContext(() => insert(2))).rejects.toSatisfy(coded('AMBIENT_SANDBOX_ENDED'))
    await expect(box.rollback()).rejects.toSatisfy(coded('AMBIENT_SANDBOX_ENDED'))
    expect(await witnessed()).toEqual([1])
    await database.witness.rows('truncate notes')
  })

  it('is told where sessions are left open, which are ended', async () => {
    await box.begin()
    const context = openContext()
    await context.run(() => insert(1))
    expect(() => expectNoOpenSessions(main)).toThrow(
      /Sessions are still open \(1\): one with a transaction\..*sandbox\.test\.ts/s,
    )
    await expect(box.rollback()).rejects.toSatisfy(coded('AMBIENT_SESSION_LEFT_OPEN'))
    expect(context.state).toBe('rolled-back')
    expect(() => expectNoOpenSessions(main)).not.toThrow()
    await box.begin()
    await insert(1)
    await box.rollback()
  })

  it('of a handle without a context is what it was once the sandbox is closed', async () => {
    await box.begin()
    await box.rollback()
    await expect(insert(1)).rejects.toSatisfy(coded('AMBIENT_NO_CONTEXT'))
  })

  it('closes the engine at its end where the code under test has shut the database down', async () => {
    const pool = new Pool({ connectionString: database.url })
    const other = defineDatabase({ name: 'other', adapter: pgAdapter(() => pool) })
    const its = sandbox(other)
    await its.begin()
    await insert(1, its.db)
    await other.shutdown()
    expect(pool.ended).toBe(false)
    await its.rollback()
    expect([pool.ended, await witnessed()]).toEqual([true, []])
  })

  it('leaves the database as it was where the sandbox cannot begin', async () => {
    const broken = defineDatabase({
      name: 'broken',
      adapter: pgAdapter(() => new Pool({ port: 1, host: '127.0.0.1' })),
    })
    const its = sandbox(broken)
    await expect(its.begin()).rejects.toMatchObject({ code: 'ECONNREFUSED' })
    await expect(its.rollback()).rejects.toSatisfy(coded('AMBIENT_SANDBOX'))
    await expect(its.begin()).rejects.toMatchObject({ code: 'ECONNREFUSED' })
    await broken.shutdown()
  })
})
