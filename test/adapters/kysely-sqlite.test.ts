import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { DatabaseSync } from 'node:sqlite'
import { setImmediate as nextTurn } from 'node:timers/promises'
import { defineDatabase, detach, newContext } from 'ambient-db'
import type { AdapterHarness, EngineProbe } from 'ambient-db/conformance'
import { kyselyAdapter } from 'ambient-db/kysely'
import BetterSqlite3 from 'better-sqlite3'
import { CompiledQuery, type Kysely, type SqliteDatabase, SqliteDialect, sql } from 'kysely'
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { gate } from '../support/gate.ts'
import { forKysely } from '../support/sqlite.ts'
import { kyselyOperations, type Tables } from './kysely-subject.ts'
import { itHoldsTheSuite } from './support.ts'

/** What the tests need to see of a database of either library. */
interface Opened {
  readonly database: SqliteDatabase
  readonly inTransaction: boolean
  readonly open: boolean
  exec(sql: string): unknown
  ids(): number[]
}

const selectIds = 'select id from items order by id'
const idOf = (row: unknown) => (row as { id: number }).id

const libraries: Record<string, (file: string) => Opened> = {
  'node:sqlite': (file) => {
    const own = new DatabaseSync(file, { timeout: 0 })
    return {
      database: forKysely(own),
      get inTransaction() {
        return own.isOpen && own.isTransaction
      },
      get open() {
        return own.isOpen
      },
      exec: (sql) => own.exec(sql),
      ids: () => own.prepare(selectIds).all().map(idOf),
    }
  },
  'better-sqlite3': (file) => {
    const own = new BetterSqlite3(file, { timeout: 0 })
    return {
      database: own,
      get inTransaction() {
        return own.inTransaction
      },
      get open() {
        return own.open
      },
      exec: (sql) => own.exec(sql),
      ids: () => own.prepare(selectIds).all().map(idOf),
    }
  },
}

interface SqliteHarness extends AdapterHarness<Kysely<Tables>> {
  /** A connection of the same library: two copies of SQLite in one process do not see each other's locks. */
  readonly other: Opened
  readonly folder: string
}

async function sqliteHarness(open: (file: string) => Opened): Promise<SqliteHarness> {
  const folder = await mkdtemp(join(tmpdir(), 'ambient-db-'))
  const file = join(folder, 'main.sqlite')
  const other = open(file)
  other.exec(`
    pragma journal_mode = wal;
    create table items (id integer primary key, n integer not null default 0);
    create table orphans (item integer references items deferrable initially deferred);
  `)
  let probes: EngineProbe[] = []
  const { query, ...operations } = kyselyOperations
  return {
    ...operations,
    other,
    folder,
    capabilities: {
      savepoints: true,
      streaming: true,
      cancelling: false,
      failedStatementAborts: false,
      transactionStatus: false,
      pipelining: false,
      lossDetection: false,
      commitLookup: false,
      singleConnection: true,
    },
    define({ connections: _, ...options } = {}) {
      const dialect = (host?: string) => {
        const opened = open(file)
        probes.push({
          host,
          get open() {
            return opened.open ? 1 : 0
          },
          get busy() {
            return opened.inTransaction ? 1 : 0
          },
          get closed() {
            return !opened.open
          },
        })
        return new SqliteDialect({ database: opened.database })
      }
      const factory = options.host === undefined ? () => dialect() : (host: string) => dialect(host)
      return defineDatabase({ name: 'main', ...options, adapter: kyselyAdapter<Tables>(factory) })
    },
    async reset() {
      probes = []
      other.exec('delete from orphans; delete from items')
    },
    engines: () => probes,
    insert: (handle, id) => query(handle, 'insert into items (id) values (?)', [id]),
    ids: async (handle) => {
      const { rows } = await query(handle, selectIds)
      return rows.map(idOf)
    },
    fail: (handle) => query(handle, 'select * from missing'),
    witness: async () => other.ids(),
    async spoilCommit(handle) {
      await handle.executeQuery(CompiledQuery.raw('insert into orphans values (-1)'))
    },
  }
}

for (const [library, open] of Object.entries(libraries)) {
  describe(`kyselyAdapter over ${library}`, () => {
    let harness: SqliteHarness
    beforeAll(async () => {
      harness = await sqliteHarness(open)
    })
    afterAll(async () => {
      harness.other.database.close()
      await rm(harness.folder, { recursive: true })
    })

    describe('holds the suite', () => {
      itHoldsTheSuite(() => harness)
    })

    describe('knows SQLite', () => {
      const planned = new Error('planned')
      beforeEach(() => harness.reset())

      it('S13 begins IMMEDIATE, unless it is read-only', async () => {
        const main = harness.define()
        await newContext(async () => {
          await harness.ids(main.db)
          expect(() => harness.other.exec('begin immediate')).toThrow(/locked/)
        })
        await newContext(
          async () => {
            await harness.ids(main.db)
            harness.other.exec('begin immediate')
            harness.other.exec('rollback')
          },
          { transaction: { readOnly: true } },
        )
        await main.shutdown()
      })

      it('S13 tries BEGIN again until the lock is free', async () => {
        const main = harness.define({ acquireTimeout: 5000 })
        harness.other.exec('begin immediate')
        const waiting = newContext(() => harness.insert(main.db, 1))
        await nextTurn()
        await nextTurn()
        harness.other.exec('commit')
        await waiting
        expect(await harness.witness()).toEqual([1])
        await main.shutdown()
      })

      it('S13 gives BEGIN up after acquireTimeout', async () => {
        const main = harness.define({ acquireTimeout: 30 })
        harness.other.exec('begin immediate')
        const waiting = newContext(() => harness.insert(main.db, 1))
        await expect(waiting).rejects.toMatchObject({
          code: expect.stringMatching(/^(?:ERR_SQLITE_ERROR|SQLITE_BUSY)$/),
        })
        harness.other.exec('rollback')
        await newContext(() => harness.insert(main.db, 2))
        expect(await harness.witness()).toEqual([2])
        await main.shutdown()
      })

      it('S13 tries COMMIT again until readers let it', async () => {
        harness.other.exec('pragma journal_mode = delete') // there a reader holds up COMMIT, and nothing else
        const main = harness.define({ acquireTimeout: 5000 })
        harness.other.exec('begin; select * from items')
        const waiting = newContext(() => harness.insert(main.db, 1))
        const settled = waiting.then(() => 'committed')
        await nextTurn()
        await nextTurn()
        expect(await Promise.race([settled, nextTurn('waiting')])).toBe('waiting')
        harness.other.exec('commit')
        await waiting
        expect(await harness.witness()).toEqual([1])
        await main.shutdown()
        harness.other.exec('pragma journal_mode = wal')
      })

      it('S13 rolls back when COMMIT stays busy, and keeps the connection', async () => {
        harness.other.exec('pragma journal_mode = delete')
        const main = harness.define({ acquireTimeout: 30 })
        harness.other.exec('begin; select * from items')
        const failing = newContext(() => harness.insert(main.db, 1))
        await expect(failing).rejects.toMatchObject({
          code: expect.stringMatching(/^(?:ERR_SQLITE_ERROR|SQLITE_BUSY)$/),
        })
        harness.other.exec('commit')
        await newContext(() => harness.insert(main.db, 2))
        expect(await harness.witness()).toEqual([2])
        expect(harness.engines()).toHaveLength(1)
        await main.shutdown()
        harness.other.exec('pragma journal_mode = wal')
      })

      it('S11 refuses who waits for the connection inside a unit that comes to hold it', async () => {
        const main = harness.define({ acquireTimeout: 10_000 })
        const [holding, release] = [gate(), gate()]
        const holder = newContext(async () => {
          await harness.insert(main.db, 1)
          holding.open()
          await release.passed
        })
        await holding.passed
        const order: string[] = []
        await newContext(async () => {
          const outer = harness.insert(main.db, 2).then(() => order.push('outer'))
          const inner = newContext(() => harness.insert(main.db, 3))
          const stranger = detach(() => newContext(() => harness.insert(main.db, 4))).then(() => order.push('stranger'))
          release.open()
          await expect(inner).rejects.toMatchObject({ code: 'AMBIENT_SELF_DEADLOCK', database: 'main' })
          await outer
          return { stranger }
        }).then(({ stranger }) => stranger)
        await holder
        expect(order).toEqual(['outer', 'stranger'])
        expect(await harness.witness()).toEqual([1, 2, 4])
        await main.shutdown()
      })

      it('S11 refuses at once who waits inside a session that holds the connection, also without a context around it', async () => {
        const main = harness.define({ acquireTimeout: 10_000 })
        await main.newSession(async (session) => {
          await harness.insert(session.db, 1)
          for (const unit of [
            newContext(() => harness.insert(main.db, 2)),
            main.newSession(({ db }) => harness.insert(db, 2)),
          ]) {
            await expect(unit).rejects.toMatchObject({ code: 'AMBIENT_SELF_DEADLOCK' })
          }
        })
        expect(await harness.witness()).toEqual([1])
        await main.shutdown()
      })

      it('S11 refuses at once who waits inside a unit whose BEGIN is still under way', async () => {
        const main = harness.define({ acquireTimeout: 10_000 })
        harness.other.exec('begin immediate')
        await newContext(async () => {
          const outer = harness.insert(main.db, 1)
          await nextTurn()
          const inner = newContext(() => harness.insert(main.db, 2))
          await expect(inner).rejects.toMatchObject({ code: 'AMBIENT_SELF_DEADLOCK' })
          harness.other.exec('rollback')
          await outer
        })
        expect(await harness.witness()).toEqual([1])
        await main.shutdown()
      })

      it('S11 C8 refuses nobody for a connection that comes too late for a block that was aborted', async () => {
        const main = harness.define({ acquireTimeout: 10_000 })
        const [holding, release] = [gate(), gate()]
        const holder = newContext(async () => {
          await harness.insert(main.db, 1)
          holding.open()
          await release.passed
        })
        await holding.passed
        await newContext(async () => {
          const abort = new AbortController()
          const block = main.atomic(() => harness.insert(main.db, 2), { signal: abort.signal })
          await nextTurn()
          const inner = newContext(() => harness.insert(main.db, 3))
          await nextTurn()
          abort.abort()
          await expect(block).rejects.toMatchObject({ code: 'AMBIENT_ABORTED' })
          release.open()
          await inner
        })
        await holder
        expect(await harness.witness()).toEqual([1, 3])
        await main.shutdown()
      })

      it('C8 S13 tries BEGIN no more when the work is aborted, and leaves nothing open', async () => {
        const main = harness.define({ acquireTimeout: 5000 })
        const abort = new AbortController()
        harness.other.exec('begin immediate')
        const waiting = newContext(() => harness.insert(main.db, 1), { signal: abort.signal })
        await nextTurn()
        await nextTurn()
        abort.abort()
        await expect(waiting).rejects.toMatchObject({ code: 'AMBIENT_ABORTED', outcome: 'rolled-back' })
        harness.other.exec('rollback')
        for (const until = performance.now() + 200; performance.now() < until; ) {
          await newContext(() => harness.ids(main.db)) // it would have tried again by then
          await nextTurn()
          expect(harness.engines().map(({ busy }) => busy)).toEqual([0])
        }
        await main.shutdown()
      })

      it.each(['context', 'block'] as const)('C8 S13 tries COMMIT no more when its %s is aborted', async (what) => {
        harness.other.exec('pragma journal_mode = delete')
        const main = harness.define({ acquireTimeout: 5000 })
        const abort = new AbortController()
        const { signal } = abort
        harness.other.exec('begin; select * from items')
        const work = () => harness.insert(main.db, 1)
        const waiting =
          what === 'context' ? newContext(work, { signal }) : newContext(() => main.atomic(work, { signal }))
        const settled = waiting.then(
          () => 'committed',
          (error: Error) => error,
        )
        await nextTurn()
        await nextTurn()
        abort.abort()
        const error = await settled
        harness.other.exec('commit')
        expect(error).toMatchObject({ code: expect.stringMatching(/^(?:ERR_SQLITE_ERROR|SQLITE_BUSY)$/) })
        await newContext(() => harness.insert(main.db, 2))
        expect(await harness.witness()).toEqual([2])
        await main.shutdown()
        harness.other.exec('pragma journal_mode = wal')
      })

      it('A5 runs a block again that met a lock', async () => {
        const main = harness.define({ acquireTimeout: 1 })
        harness.other.exec('begin immediate')
        let attempts = 0
        const block = async () => {
          if (++attempts === 2) harness.other.exec('rollback')
          await harness.insert(main.db, 1)
        }
        await newContext(() => main.atomic(block, { retry: { attempts: 3 } }))
        expect(attempts).toBe(2)
        expect(await harness.witness()).toEqual([1])
        await main.shutdown()
      })

      it('S4 detects that a statement rolled the transaction back', async () => {
        const main = harness.define()
        await newContext(() => harness.insert(main.db, 1))
        const work = newContext(async () => {
          await harness.insert(main.db, 2)
          const conflict = sql`insert or rollback into items (id) values (1)`.execute(main.db)
          await expect(conflict).rejects.toThrow(/UNIQUE/)
          await expect(harness.insert(main.db, 3)).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED' })
        })
        await expect(work).rejects.toMatchObject({
          code: 'AMBIENT_TRANSACTION_ABORTED',
          outcome: 'rolled-back',
          cause: { message: expect.stringMatching(/UNIQUE/) },
        })
        expect(await harness.witness()).toEqual([1])
        await newContext(() => harness.insert(main.db, 4))
        expect(await harness.witness()).toEqual([1, 4])
        await main.shutdown()
      })

      it('S13 never closes the connection, whatever failed on it', async () => {
        const main = harness.define()
        const work = newContext(async () => {
          await harness.insert(main.db, 1)
          await harness.fail(main.db).catch(() => {})
          throw planned
        })
        await expect(work).rejects.toBe(planned)
        await main.newSession((session) => harness.insert(session.db, 2), { hold: true })
        await newContext(() => harness.insert(main.db, 3))
        expect(harness.engines().map(({ open }) => open)).toEqual([1])
        expect(await harness.witness()).toEqual([2, 3])
        await main.shutdown()
      })

      it('S9 ends the iterator of a stream that was left, so that COMMIT and DDL go on', async () => {
        const main = harness.define()
        await newContext(async () => {
          for (const id of [1, 2, 3]) await harness.insert(main.db, id)
          for await (const { id } of main.db.selectFrom('items').select('id').orderBy('id').stream())
            if (id === 2) break
          await sql`create table if not exists later (id integer)`.execute(main.db)
          await sql`drop table later`.execute(main.db)
        })
        expect(await harness.witness()).toEqual([1, 2, 3])
        await main.shutdown()
      })

      it('gives a plain Kysely by connect(), which waits for the session that holds the connection', async () => {
        const main = harness.define()
        const plain = (await main.connect()) as Kysely<Tables>
        const seen: number[] = []
        const inside = newContext(async () => {
          await harness.insert(main.db, 1)
          const reading = harness.ids(plain).then((ids) => seen.push(...ids))
          await nextTurn()
          expect(seen).toEqual([])
          return { reading }
        })
        await (await inside).reading
        expect(seen).toEqual([1])
        await main.shutdown()
      })
    })
  })
}
