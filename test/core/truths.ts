import { type AmbientDatabase, newContext } from 'ambient-db'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { gate } from '../support/gate.ts'
import { createMysqlDatabase } from '../support/mysql.ts'
import { createDatabase, type Witness } from '../support/postgres.ts'
import { startProxy, type WireProxy } from '../support/proxy.ts'
import { failure } from './wire.ts'

/** A kind of server, and what passes on the wire to it. */
export interface TruthServer {
  create(): Promise<{ readonly url: string; readonly witness: Witness; drop(): Promise<void> }>
  readonly begin: RegExp
  readonly begun: RegExp
  readonly commit: RegExp
  readonly committed: RegExp
  /** What a second row with the same key is refused with. */
  readonly duplicate: object
  /** Whether that aborts the transaction. */
  readonly aborts: boolean
}

export const postgres: TruthServer = {
  create: createDatabase,
  begin: /^> Q BEGIN/i,
  begun: /^< C BEGIN/,
  commit: /^> Q commit$/i,
  committed: /^< C COMMIT/,
  duplicate: { code: '23505' },
  aborts: true,
}

export const mysql: TruthServer = {
  create: createMysqlDatabase,
  begin: /^> Query BEGIN/i,
  begun: /^< OK BEGIN/,
  commit: /^> Query commit$/i,
  committed: /^< OK COMMIT/,
  duplicate: { errno: 1062 },
  aborts: false,
}

/** A library under test. */
export interface TruthSubject {
  readonly name: string
  readonly server: TruthServer
  /** Defines a database over the server at `url`, with a pool of at most `max` connections. */
  define(url: string, max: number): TruthDatabase
}

/** A database under test, over the table `t (id int primary key)`. */
export interface TruthDatabase {
  readonly main: AmbientDatabase<unknown, unknown>
  /** Inserts a row in the session of the context, with the library's own means. */
  insert(id: number): Promise<unknown>
}

/** What must hold whichever library runs the statements: nobody is told that work is there if it is not. */
export function truths(subject: TruthSubject): void {
  const { server } = subject
  describe(`truths of ${subject.name}`, () => {
    let database: Awaited<ReturnType<TruthServer['create']>>
    let proxy: WireProxy
    let main: TruthDatabase['main']
    let insert: TruthDatabase['insert']
    const uncaught: unknown[] = []
    const onUncaught = (error: unknown) => uncaught.push(error)

    beforeAll(async () => {
      database = await server.create()
      await database.witness.rows('create table t (id int primary key)')
      process.on('uncaughtExceptionMonitor', onUncaught)
      process.on('unhandledRejection', onUncaught)
    })
    afterAll(async () => {
      process.off('uncaughtExceptionMonitor', onUncaught)
      process.off('unhandledRejection', onUncaught)
      await database.drop()
    })
    beforeEach(async () => {
      await database.witness.rows('truncate t')
      proxy = await startProxy(database.url)
      ;({ main, insert } = subject.define(proxy.url, 2))
    })
    afterEach(async () => {
      await proxy.close()
      await main.shutdown()
      expect(uncaught.splice(0)).toEqual([])
    })

    async function ids(): Promise<number[]> {
      const rows = await database.witness.rows<{ id: number }>('select id from t order by id')
      return rows.map(({ id }) => id)
    }

    /** Both connections of the pool are usable, and at once. */
    async function expectFullPool(): Promise<void> {
      const both = gate()
      let inside = 0
      const unit = (id: number) =>
        newContext(async () => {
          await insert(id)
          if (++inside === 2) both.open()
          await both.passed
        })
      await Promise.all([unit(1001), unit(1002)])
      expect(await ids()).toEqual(expect.arrayContaining([1001, 1002]))
    }

    const swallowed = server.aborts
      ? 'T1 rejects with the first error when a statement error was swallowed, and nothing is committed'
      : 'T1 commits all but the statement whose error was swallowed, where that does not abort the transaction'
    it(swallowed, async () => {
      const seen: unknown[] = []
      const work = newContext(async () => {
        await insert(1)
        await insert(1).catch((first) => seen.push(first))
        await insert(2).catch((second) => seen.push(second))
        return 'fine'
      })
      if (server.aborts) {
        const error = await failure(work)
        expect(error).toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED', outcome: 'rolled-back' })
        expect(error.cause).toBe(seen[0])
        expect(seen).toMatchObject([server.duplicate, { code: 'AMBIENT_TRANSACTION_ABORTED' }])
        expect(await ids()).toEqual([])
      } else {
        expect(await work).toBe('fine')
        expect(seen).toMatchObject([server.duplicate])
        expect(await ids()).toEqual([1, 2])
      }
      await expectFullPool()
    })

    it('T2 refuses a sibling branch that writes after the rollback, and its row is absent', async () => {
      const rolledBack = gate()
      const mine = new Error('mine')
      let late: Promise<unknown> | undefined
      const error = await failure(
        newContext(async () => {
          await insert(1)
          late = rolledBack.passed.then(() => failure(insert(2)))
          await Promise.all([late, Promise.reject(mine)])
        }),
      )
      expect(error).toBe(mine)
      rolledBack.open()
      expect(await late).toMatchObject({ code: 'AMBIENT_CONTEXT_ENDED' })
      expect(await ids()).toEqual([])
      await expectFullPool()
    })

    it('T2 refuses a sibling branch of a block that was rolled back, and commits what came before and after', async () => {
      const rolledBack = gate()
      let late: Promise<unknown> | undefined
      await newContext(async () => {
        await insert(1)
        const block = main.atomic(async () => {
          await insert(2)
          late = rolledBack.passed.then(() => failure(insert(3)))
          await Promise.all([late, Promise.reject(new Error('mine'))])
        })
        expect(await failure(block)).toMatchObject({ message: 'mine' })
        await insert(4)
        rolledBack.open()
        expect(await late).toMatchObject({ code: 'AMBIENT_BLOCK_ENDED' })
      })
      expect(await ids()).toEqual([1, 4])
    })

    it.each(['reset', 'end'] as const)('T3 says unknown when the reply to COMMIT is cut (%s)', async (how) => {
      proxy.at(server.committed, how)
      const error = await failure(newContext(() => insert(1)))
      expect(error).toMatchObject({ code: 'AMBIENT_COMMIT_UNKNOWN', outcome: 'unknown', cause: expect.any(Error) })
      expect(await ids()).toEqual([1])
      expect(proxy.traffic.labels.filter((label) => server.commit.test(label))).toHaveLength(1)
      await expectFullPool()
    })

    it.each([
      ['begin', 'reset'],
      ['begun', 'end'],
    ] as const)('T4 has its pool back when the connection was cut four times at %s by %s', async (message, how) => {
      const trap = proxy.at(server[message], how, { times: 4 })
      for (const id of [1, 2, 3, 4]) expect(await failure(newContext(() => insert(id)))).toBeInstanceOf(Error)
      expect(trap.count).toBe(4)
      expect(await ids()).toEqual([])
      await expectFullPool()
    })

    it('T4 has its pool back when the connections are cut in twos', async () => {
      proxy.at(server.begin, 'reset', { times: 4 })
      const pair = (ids: number[]) => Promise.all(ids.map((id) => failure(newContext(() => insert(id)))))
      for (const ids of [
        [1, 2],
        [3, 4],
      ]) {
        for (const error of await pair(ids)) expect(error).toBeInstanceOf(Error)
      }
      await expectFullPool()
      expect(await ids()).toEqual([1001, 1002])
    })
  })
}
