import { newContext } from 'ambient-db'
import { kyselyHandle } from 'ambient-db/kysely'
import { type Kysely, PostgresDialect } from 'kysely'
import type { PoolClient } from 'pg'
import Cursor from 'pg-cursor'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { gate } from '../support/gate.ts'
import { createSubject, type Subject } from '../support/subject.ts'

let subject: Subject
let main: Subject['main']
let note: Subject['note']
let notes: Subject['notes']
let fail: Subject['fail']
/** A library over the same pool whose transactions take a callback. */
let kysely: Kysely<{ notes: { text: string } }>

beforeAll(async () => {
  subject = await createSubject()
  ;({ main, note, notes, fail } = subject)
  kysely = kyselyHandle(main, (pool) => new PostgresDialect({ pool }))
})
afterAll(() => subject.close())
beforeEach(() => subject.clear())
afterEach(() => expect(subject.overlapping).toEqual([]))

const boom = new Error('boom')
const busy = { code: 'AMBIENT_SESSION_BUSY', database: 'main' }
const aborted = { code: 'AMBIENT_TRANSACTION_ABORTED' }

function put(client: PoolClient, text: string): Promise<unknown> {
  return client.query('insert into notes values ($1)', [text])
}

/** Leases a client of the session for `work`. */
async function withClient<Result>(work: (client: PoolClient) => Promise<Result>): Promise<Result> {
  const client = await main.db.connect()
  try {
    return await work(client)
  } finally {
    client.release()
  }
}

describe('a leased client', () => {
  it('A4 makes BEGIN and COMMIT on it a savepoint of the session', async () => {
    await newContext(async () => {
      await note('a')
      await withClient(async (client) => {
        await client.query('BEGIN')
        await put(client, 'b')
        await client.query('COMMIT')
      })
      expect(await notes()).toEqual([])
      await note('c')
    })
    expect(await notes()).toEqual(['a', 'b', 'c'])
    expect(subject.sent.map((text) => text.split(' ')[0])).toEqual([
      'BEGIN',
      'insert',
      'SAVEPOINT',
      'insert',
      'RELEASE',
      'insert',
      'COMMIT',
    ])
  })

  it('A4 keeps the outer work when it rolls back', async () => {
    await newContext(async () => {
      await note('a')
      await withClient(async (client) => {
        await client.query('begin')
        await put(client, 'b')
        await client.query('rollback')
      })
      await note('c')
    })
    expect(await notes()).toEqual(['a', 'c'])
  })

  it('A4 takes the ROLLBACK that follows a COMMIT that failed, so that the error of the COMMIT is seen', async () => {
    await newContext(async () => {
      await withClient(async (client) => {
        await client.query('begin')
        await put(client, 'a')
        await client.query('select * from missing').catch(() => {})
        await expect(client.query('commit')).rejects.toMatchObject(aborted)
        await client.query('rollback')
        await expect(client.query('rollback')).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_CONTROL' })
      })
      await note('b')
    })
    expect(await notes()).toEqual(['b'])
  })

  it('A6 is refused unsent what it is asked for after its release', async () => {
    await newContext(async () => {
      const [used, unused] = await Promise.all([main.db.connect(), main.db.connect()])
      await used.query('begin')
      await put(used, 'a')
      await used.query('commit')
      const issued = put(used, 'b')
      for (const client of [used, unused]) client.release()
      await issued
      subject.sent.length = 0
      for (const client of [used, unused]) {
        for (const refused of [
          put(client, 'late'),
          client.query('begin'),
          client.query(new Cursor('select 1')).read(1),
        ])
          await expect(refused).rejects.toMatchObject({ code: 'AMBIENT_BLOCK_ENDED', database: 'main' })
      }
      expect(subject.sent).toEqual([])
      await note('c')
    })
    expect(await notes()).toEqual(['a', 'b', 'c'])
  })

  it('A4 loses its work with the session', async () => {
    const work = newContext(async () => {
      await withClient(async (client) => {
        await client.query('begin')
        await put(client, 'a')
        await client.query('commit')
      })
      throw boom
    })
    await expect(work).rejects.toBe(boom)
    expect(await notes()).toEqual([])
  })

  it('A4 runs statements without BEGIN in the session', async () => {
    await newContext(async () => {
      await withClient(async (client) => {
        await put(client, 'a')
        await note('b')
        await put(client, 'c')
      })
      await main.rollback()
    })
    expect(await notes()).toEqual([])
  })

  it('A4 nests in an atomic block', async () => {
    await newContext(async () => {
      await main.atomic(async () => {
        await note('a')
        await withClient(async (client) => {
          await client.query('begin')
          await put(client, 'b')
          await client.query('rollback')
        })
        await withClient(async (client) => {
          await client.query('begin')
          await put(client, 'c')
          await client.query('commit')
        })
      })
      expect(await notes()).toEqual(['a', 'c'])
    })
  })

  it('A4 refuses statements of others while its transaction is open, unsent, and never mixes them in', async () => {
    await newContext(async () => {
      await note('a')
      await withClient(async (client) => {
        await client.query('begin')
        await put(client, 'b')
        const before = subject.sent.length
        await expect(note('x')).rejects.toMatchObject(busy)
        await expect(main.atomic(() => note('x'), { current: 'savepoint' })).rejects.toMatchObject(busy)
        await expect(main.commit()).rejects.toMatchObject(busy)
        await expect(main.rollback()).rejects.toMatchObject(busy)
        await expect(main.closeSession('rollback')).rejects.toMatchObject(busy)
        const other = await main.db.connect()
        await expect(other.query('begin')).rejects.toMatchObject(busy)
        await expect(put(other, 'x')).rejects.toMatchObject(busy)
        other.release()
        expect(subject.sent).toHaveLength(before)
        await put(client, 'c')
        await client.query('rollback')
      })
      await note('d')
    })
    expect(await notes()).toEqual(['a', 'd'])
  })

  it('A4 takes BEGIN again once another transaction that refused it has ended', async () => {
    await newContext(async () => {
      const [first, second] = [await main.db.connect(), await main.db.connect()]
      await first.query('begin')
      await expect(second.query('begin')).rejects.toMatchObject(busy)
      await first.query('commit')
      await second.query('begin')
      await put(second, 'a')
      await second.query('commit')
      first.release()
      second.release()
    })
    expect(await notes()).toEqual(['a'])
  })

  it('A4 rolls back a transaction that is open at its release', async () => {
    await newContext(async () => {
      await note('a')
      const client = await main.db.connect()
      await client.query('begin')
      await put(client, 'b')
      client.release()
      await note('c')
    })
    expect(await notes()).toEqual(['a', 'c'])
  })

  it('A4 begins again on the same client', async () => {
    await newContext(async () => {
      await withClient(async (client) => {
        for (const [text, end] of [
          ['a', 'commit'],
          ['b', 'rollback'],
          ['c', 'commit'],
        ] as const) {
          await client.query('begin')
          await expect(client.query('begin')).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_OPEN' })
          await put(client, text)
          await client.query(end)
          await put(client, `${text} outside`)
        }
      })
    })
    expect(await notes()).toEqual(['a', 'a outside', 'b outside', 'c', 'c outside'])
  })

  it('A4 refuses transaction control on the pool, and on a client without a transaction', async () => {
    const control = { code: 'AMBIENT_TRANSACTION_CONTROL' }
    await newContext(async () => {
      await note('a')
      const before = subject.sent.length
      for (const text of ['BEGIN', 'start transaction', 'commit;', 'END', 'ROLLBACK', 'abort', 'savepoint a']) {
        await expect(main.db.query(text)).rejects.toMatchObject(control)
      }
      await withClient(async (client) => {
        for (const text of ['commit', 'rollback', 'savepoint a', 'rollback to a', 'release savepoint a']) {
          await expect(client.query(text)).rejects.toMatchObject(control)
        }
      })
      expect(subject.sent).toHaveLength(before)
    })
    expect(await notes()).toEqual(['a'])
  })

  it('A4 A7 takes the isolation level of BEGIN text', async () => {
    const level = (client: PoolClient) =>
      client.query('select 1 as n, current_setting($1) as level', ['transaction_isolation'])
    await newContext(async () => {
      await withClient(async (client) => {
        await client.query('BEGIN ISOLATION LEVEL SERIALIZABLE, READ ONLY')
        expect((await level(client)).rows).toEqual([{ n: 1, level: 'serializable' }])
        await expect(put(client, 'x')).rejects.toMatchObject({ code: '25006' })
        await client.query('ROLLBACK')
      })
      await main.rollback()
      await main.begin({ isolationLevel: 'repeatable read' })
      await withClient(async (client) => {
        await expect(client.query('begin isolation level serializable')).rejects.toMatchObject({
          code: 'AMBIENT_TRANSACTION_OPTIONS',
        })
        await client.query('start transaction isolation level repeatable read')
        await put(client, 'a')
        await client.query('commit')
      })
    })
    expect(await notes()).toEqual(['a'])
  })

  it('A7 holds what is inside it to the options of its BEGIN, and lets go of them if nothing was opened', async () => {
    await newContext(async () => {
      const options = { code: 'AMBIENT_TRANSACTION_OPTIONS' }
      await kysely
        .transaction()
        .setIsolationLevel('repeatable read')
        .execute(async () => {
          const inner = main.atomic(() => note('x'), { isolationLevel: 'serializable' })
          await expect(inner).rejects.toMatchObject(options)
        })
      await withClient(async (client) => {
        await client.query('begin isolation level serializable read only')
        await client.query('commit')
      })
      await note('a')
    })
    expect(await notes()).toEqual(['a'])
    expect(subject.sent[0]).toBe('BEGIN')
  })

  it('A4 S4 fails at COMMIT when it swallowed the error of a statement, and the outer work stays', async () => {
    await newContext(async () => {
      await note('a')
      await withClient(async (client) => {
        await client.query('begin')
        const first = await client.query('select * from missing').catch((error: unknown) => error)
        await expect(put(client, 'b')).rejects.toMatchObject({ ...aborted, cause: first })
        await expect(client.query('commit')).rejects.toMatchObject({ ...aborted, cause: first })
      })
      await note('c')
    })
    expect(await notes()).toEqual(['a', 'c'])
  })

  it('A6 refuses what comes after the end of its transaction only in its own scope', async () => {
    await newContext(async () => {
      await withClient(async (client) => {
        await client.query('begin')
        await put(client, 'a')
        await client.query('commit')
        await put(client, 'b')
        await note('c')
      })
    })
    expect(await notes()).toEqual(['a', 'b', 'c'])
  })

  it('A4 begins and commits a transaction of its own in an autocommit context', async () => {
    await newContext(
      async () => {
        await withClient(async (client) => {
          await client.query('begin isolation level serializable')
          await put(client, 'a')
          expect(await notes()).toEqual([])
          await client.query('commit')
          expect(await notes()).toEqual(['a'])
          await client.query('begin')
          await put(client, 'b')
          await client.query('rollback')
          await put(client, 'c')
          expect(await notes()).toEqual(['a', 'c'])
        })
      },
      { transaction: 'autocommit' },
    )
    expect(await notes()).toEqual(['a', 'c'])
  })

  it('A4 rolls back with the context that ends by a throw in the middle of it', async () => {
    const work = newContext(async () => {
      const client = await main.db.connect()
      await client.query('begin')
      await put(client, 'a')
      throw boom
    })
    await expect(work).rejects.toBe(boom)
    expect(await notes()).toEqual([])
    expect(await subject.openTransactions()).toBe(0)
  })

  it('A4 takes BEGIN, statements and COMMIT that are not awaited one by one', async () => {
    await newContext(async () => {
      await withClient(async (client) => {
        await Promise.all([client.query('begin'), put(client, 'a'), put(client, 'b'), client.query('commit')])
      })
      await withClient(async (client) => {
        await Promise.all([client.query('begin'), put(client, 'c'), client.query('rollback')])
      })
    })
    expect(await notes()).toEqual(['a', 'b'])
  })
})

describe('named savepoints of a leased client', () => {
  const inTransaction = (work: (client: PoolClient) => Promise<unknown>) =>
    newContext(async () => {
      await note('outer')
      await withClient(async (client) => {
        await client.query('begin')
        await work(client)
      })
    })

  it('A4 goes back to one, also again and after an error', async () => {
    await inTransaction(async (client) => {
      await put(client, 'a')
      await client.query('savepoint one')
      await put(client, 'b')
      await client.query('rollback to savepoint one')
      await client.query('select * from missing').catch(() => {})
      await client.query('rollback to one')
      await put(client, 'c')
      await client.query('release savepoint one')
      await client.query('commit')
    })
    expect(await notes()).toEqual(['a', 'c', 'outer'])
  })

  it('A4 undoes all of them with the transaction, released or not', async () => {
    await inTransaction(async (client) => {
      await put(client, 'a')
      await client.query('savepoint one')
      await put(client, 'b')
      await client.query('savepoint two')
      await put(client, 'c')
      await client.query('release one')
      await put(client, 'd')
      await client.query('rollback')
    })
    expect(await notes()).toEqual(['outer'])
  })

  it('A4 goes back to an outer one past inner ones, which are gone then', async () => {
    await inTransaction(async (client) => {
      await client.query('savepoint one')
      await put(client, 'a')
      await client.query('savepoint two')
      await put(client, 'b')
      await client.query('rollback to one')
      await expect(client.query('rollback to two')).rejects.toMatchObject({ code: 'AMBIENT_INVALID_ARGUMENT' })
      await put(client, 'c')
      await client.query('commit')
    })
    expect(await notes()).toEqual(['c', 'outer'])
  })

  it('A4 lets a name hide an older one of the same name', async () => {
    await inTransaction(async (client) => {
      await client.query('savepoint one')
      await put(client, 'a')
      await client.query('savepoint one')
      await put(client, 'b')
      await client.query('rollback to one')
      await client.query('release one')
      await put(client, 'c')
      await client.query('rollback to one')
      await put(client, 'd')
      await client.query('commit')
    })
    expect(await notes()).toEqual(['d', 'outer'])
  })

  it('A4 keeps the work of those that are open at COMMIT', async () => {
    await inTransaction(async (client) => {
      await client.query('savepoint one')
      await put(client, 'a')
      await client.query('savepoint "Two"')
      await put(client, 'b')
      await client.query('commit')
    })
    expect(await notes()).toEqual(['a', 'b', 'outer'])
  })

  it('A4 fails at COMMIT when a statement failed inside one that is open', async () => {
    const first = await inTransaction(async (client) => {
      await client.query('savepoint one')
      await client.query('select * from missing').catch(() => {})
      await expect(client.query('commit')).rejects.toMatchObject(aborted)
    })
    expect(first).toBeUndefined()
    expect(await notes()).toEqual(['outer'])
  })

  it('A4 knows no name that was not set', async () => {
    await inTransaction(async (client) => {
      await expect(client.query('rollback to nowhere')).rejects.toMatchObject({ code: 'AMBIENT_INVALID_ARGUMENT' })
      await put(client, 'a')
      await client.query('commit')
    })
    expect(await notes()).toEqual(['a', 'outer'])
  })
})

describe('a native transaction with a callback', () => {
  const insert = (db: Kysely<{ notes: { text: string } }>, text: string) =>
    db.insertInto('notes').values({ text }).execute()

  it('A4 is a savepoint that helpers called inside take part in', async () => {
    await newContext(async () => {
      await note('a')
      const inner = kysely.transaction().execute(async (transaction) => {
        await insert(transaction, 'b')
        await note('helper')
        await insert(kysely, 'ambient')
        throw boom
      })
      await expect(inner).rejects.toBe(boom)
      await kysely.transaction().execute(async (transaction) => {
        await insert(transaction, 'c')
        await note('d')
      })
    })
    expect(await notes()).toEqual(['a', 'c', 'd'])
  })

  it('A3 runs parallel ones one after the other, each with an outcome of its own', async () => {
    await newContext(async () => {
      await note('outer')
      const results = await Promise.allSettled(
        ['f', 'g', 'h'].map((name) =>
          kysely.transaction().execute(async (transaction) => {
            await insert(transaction, `${name} 1`)
            await insert(transaction, `${name} 2`)
            if (name === 'g') throw boom
          }),
        ),
      )
      expect(results.map(({ status }) => status)).toEqual(['fulfilled', 'rejected', 'fulfilled'])
    })
    expect(await notes()).toEqual(['f 1', 'f 2', 'h 1', 'h 2', 'outer'])
  })

  it('A3 makes statements of other branches wait for it', async () => {
    await newContext(async () => {
      const inside = { began: gate(), goOn: gate() }
      const native = kysely.transaction().execute(async (transaction) => {
        await insert(transaction, 'native')
        inside.began.open()
        await inside.goOn.passed
        throw boom
      })
      await inside.began.passed
      const sibling = note('sibling')
      inside.goOn.open()
      await expect(native).rejects.toBe(boom)
      await sibling
    })
    expect(await notes()).toEqual(['sibling'])
  })

  it('A4 nests with atomic blocks both ways', async () => {
    await newContext(async () => {
      await main.atomic(async () => {
        await note('a')
        await kysely.transaction().execute(async (transaction) => {
          await insert(transaction, 'b')
          const inner = main.atomic(async () => {
            await note('c')
            throw boom
          })
          await expect(inner).rejects.toBe(boom)
          await expect(main.commit()).rejects.toMatchObject({ code: 'AMBIENT_ATOMIC_NESTING' })
          await insert(transaction, 'd')
        })
      })
    })
    expect(await notes()).toEqual(['a', 'b', 'd'])
  })

  it('A6 joins what nobody awaited, and refuses what comes late', async () => {
    await newContext(async () => {
      const late = gate()
      let laterOn: Promise<unknown> | undefined
      await kysely.transaction().execute(async (transaction) => {
        laterOn = late.passed.then(() => note('late'))
        void note('a')
        await insert(transaction, 'b')
      })
      late.open()
      await expect(laterOn).rejects.toMatchObject({ code: 'AMBIENT_BLOCK_ENDED' })
    })
    expect(await notes()).toEqual(['a', 'b'])
  })

  it('A6 rolls it back when a statement failed that nobody awaited', async () => {
    await newContext(async () => {
      await note('outer')
      const native = kysely.transaction().execute(async (transaction) => {
        await insert(transaction, 'a')
        void fail().catch(() => {})
      })
      await expect(native).rejects.toMatchObject({ code: '42P01' })
    })
    expect(await notes()).toEqual(['outer'])
  })

  it('A4 opens a transaction of its own in an autocommit context', async () => {
    await newContext(
      async () => {
        await kysely.transaction().execute(async (transaction) => {
          await insert(transaction, 'a')
          expect(await notes()).toEqual([])
        })
        expect(await notes()).toEqual(['a'])
        const failing = kysely.transaction().execute(async (transaction) => {
          await insert(transaction, 'b')
          throw boom
        })
        await expect(failing).rejects.toBe(boom)
      },
      { transaction: 'autocommit' },
    )
    expect(await notes()).toEqual(['a'])
  })
})

describe('a leased client without a transaction', () => {
  it('A4 knows no savepoint of the transaction before', async () => {
    await newContext(async () => {
      await withClient(async (client) => {
        await client.query('begin')
        await client.query('savepoint a')
        await put(client, 'a')
        await client.query('commit')
        await client.query('begin')
        await put(client, 'b')
        await expect(client.query('rollback to a')).rejects.toMatchObject({ code: 'AMBIENT_INVALID_ARGUMENT' })
        await client.query('commit')
      })
    })
    expect(await notes()).toEqual(['a', 'b'])
  })

  it('A4 refuses BEGIN when its session or context has ended or ends', async () => {
    const ended = await newContext(async () => main.db.connect())
    await expect(ended.query('BEGIN')).rejects.toMatchObject({ code: 'AMBIENT_CONTEXT_ENDED' })
    ended.release()
    await newContext(async () => {
      const session = main.session()
      const closed = await main.db.connect()
      await session.close()
      await expect(closed.query('BEGIN')).rejects.toMatchObject({ code: 'AMBIENT_SESSION_CLOSED' })
      closed.release()
      await note('a')
      const open = await main.db.connect()
      const ending = gate()
      const late = ending.passed.then(() => open.query('BEGIN')).catch((error: unknown) => error)
      main.beforeCommit(async () => {
        ending.open()
        expect(await late).toMatchObject({ code: 'AMBIENT_CONTEXT_ENDED' })
      })
    })
    expect(await notes()).toEqual(['a'])
    expect(subject.sent.map((text) => text.split(' ')[0])).toEqual(['BEGIN', 'insert', 'COMMIT'])
  })
})
