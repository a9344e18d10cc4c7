import { AsyncResource } from 'node:async_hooks'
import { DatabaseSync } from 'node:sqlite'
import { defineDatabase, detach, isAmbientError, newContext } from 'ambient-db'
import { databaseContext as fetchContext } from 'ambient-db/fetch'
import { kyselyAdapter } from 'ambient-db/kysely'
import { databaseContext } from 'ambient-db/node-http'
import { pgAdapter } from 'ambient-db/pg'
import { sandbox } from 'ambient-db/testing'
import { SqliteDialect } from 'kysely'
import { Pool } from 'pg'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { serve } from '../frameworks/support.ts'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'
import { forKysely } from '../support/sqlite.ts'

let database: TestDatabase
const define = (name: string) =>
  defineDatabase({ name, adapter: pgAdapter(() => new Pool({ connectionString: database.url, max: 20 })) })
const [main, other] = [define('main'), define('other')]
const box = sandbox(main)

beforeAll(async () => {
  database = await createDatabase()
  await database.witness.rows('create table notes (id int)')
})
afterAll(async () => {
  await Promise.all([main.shutdown(), other.shutdown()])
  await database.drop()
})

const insert = (id: number, db = main.db) => db.query('insert into notes values ($1)', [id])
const ids = async (db = main.db) => (await db.query('select id from notes order by id')).rows.map(({ id }) => id)
const witnessed = () => database.witness.rows('select id from notes')
/** Runs a callback as one that was made outside of any test. */
const elsewhere = AsyncResource.bind(<Result>(callback: () => Result) => callback())
const coded = (code: string) => (error: unknown) => isAmbientError(error, code as never)

describe('sandboxes that are open at the same time', () => {
  it('never see each other: 500 tests, by functions, in process and over sockets', async () => {
    const handle = async (id: number) => {
      await insert(id)
      await main.commit()
      await insert(id)
      return (await ids()).join()
    }
    const server = await serve(
      databaseContext(async (request, response) => void response.end(await handle(Number(request.url?.slice(1))))),
    )
    const route = fetchContext(
      async ({ url }: Request) => new Response(await handle(Number(new URL(url).pathname.slice(1)))),
    )
    const tests = Array.from({ length: 500 }, (_, id) =>
      box.run(async ({ headers }) => {
        await insert(id)
        let seen: string
        if (id % 3 === 0) seen = await newContext(() => handle(id))
        else if (id % 3 === 1) seen = await (await route(new Request(`http://localhost/${id}`))).text()
        else seen = await (await fetch(`http://127.0.0.1:${server.port}/${id}`, { headers })).text()
        return [seen, (await ids()).join()]
      }),
    )
    const results = await Promise.all(tests)
    await server.close()
    for (const [id, seen] of results.entries()) expect(seen).toEqual([`${id},${id},${id}`, `${id},${id},${id}`])
    expect(await witnessed()).toEqual([])
  }, 60_000)

  it('refuse code that belongs to none of them', async () => {
    const server = await serve(databaseContext(async (_request, response) => void response.end(String(await ids()))))
    await box.run(async () => {
      await detach(() => newContext(() => insert(1))) // belongs to it
      expect(await ids()).toEqual([1])
      await expect(elsewhere(() => newContext(() => insert(2)))).rejects.toSatisfy(coded('AMBIENT_SANDBOX'))
      await expect(elsewhere(() => insert(2))).rejects.toSatisfy(coded('AMBIENT_NO_CONTEXT'))
      expect((await fetch(`http://127.0.0.1:${server.port}/`)).status).toBe(500) // without the headers
      await expect(box.begin()).rejects.toSatisfy(coded('AMBIENT_SANDBOX'))
    })
    await server.close()
    expect(await witnessed()).toEqual([])
  })

  it('refuse what goes on after its test', async () => {
    let later: () => Promise<unknown> = async () => {}
    await box.run(() => {
      later = AsyncResource.bind(() => newContext(() => insert(1))) // as a queue of the test may call it
    })
    await expect(later()).rejects.toSatisfy(coded('AMBIENT_SANDBOX'))
    expect(await witnessed()).toEqual([])
  })

  it('nest, one for each database', async () => {
    await box.run(() =>
      sandbox(other).run(async () => {
        await newContext(async () => {
          await insert(1)
          await insert(2, other.db)
        })
        expect([await ids(), await ids(other.db)]).toEqual([[1], [2]])
      }),
    )
    expect(await witnessed()).toEqual([])
  })

  it('pass on what the work returns or throws, and say what it left open', async () => {
    expect(await box.run(() => 'returned')).toBe('returned')
    await expect(
      box.run(() => {
        throw new Error('thrown')
      }),
    ).rejects.toThrow('thrown')
    const leaking = box.run(async () => {
      let begun = () => {}
      const started = new Promise<void>((resolve) => {
        begun = resolve
      })
      void newContext(async () => {
        await insert(1)
        begun()
        await new Promise(() => {})
      }).catch(() => {})
      await started
    })
    await expect(leaking).rejects.toSatisfy(coded('AMBIENT_SESSION_LEFT_OPEN'))
    expect(await witnessed()).toEqual([])
  })

  it('are refused where the engine has one connection', async () => {
    const adapter = kyselyAdapter<never>(() => new SqliteDialect({ database: forKysely(new DatabaseSync(':memory:')) }))
    const single = defineDatabase({ name: 'single', adapter })
    await expect(sandbox(single).run(() => {})).rejects.toSatisfy(coded('AMBIENT_SANDBOX'))
    await single.shutdown()
  })
})
