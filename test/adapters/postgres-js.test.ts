import { defineDatabase } from 'ambient-db'
import { postgresJsAdapter } from 'ambient-db/postgres-js'
import type { Sql } from 'postgres'
import { afterAll, beforeAll, describe } from 'vitest'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'
import { sqlEngines } from './postgres-js-support.ts'
import { itHoldsTheSuite, type PostgresSubject, postgresHarnessOver } from './support.ts'

type Harness = Awaited<ReturnType<typeof postgresHarnessOver<Sql, Sql>>>

const subject: PostgresSubject<Sql, Sql> = {
  define(make, options) {
    const factory = options.host === undefined ? () => make() : (host: string) => make(host)
    return defineDatabase({ name: 'main', ...options, adapter: postgresJsAdapter(factory) })
  },
  query: (handle, sql, parameters = []) =>
    handle.unsafe(sql, parameters as never[]).then((rows) => ({ rows: rows as unknown[] })), // sent at once
  async *stream(handle) {
    for await (const rows of handle`select id from items order by id`.cursor(1)) for (const { id } of rows) yield id
  },
  transaction: (handle, work) =>
    handle.begin((sql) => work({ insert: (id) => sql`insert into items (id) values (${id})` })) as never, // what `work` resolves with
  async beginTransaction(handle) {
    const reserved = await handle.reserve()
    await reserved`begin`
    const end = async (text: string) => {
      await reserved.unsafe(text)
      reserved.release()
    }
    return {
      insert: (id) => reserved`insert into items (id) values (${id})`,
      commit: () => end('commit'),
      rollback: () => end('rollback'),
    }
  },
}

for (const [name, options] of [
  ['', {}],
  [' without prepared statements, and with no types fetched', { prepare: false, fetch_types: false }],
] as const) {
  describe(`postgresJsAdapter holds the suite${name}`, () => {
    let database: TestDatabase
    let harness: Harness
    beforeAll(async () => {
      database = await createDatabase()
      harness = await postgresHarnessOver(database, subject, sqlEngines(options))
    })
    afterAll(async () => {
      await harness.close()
      await database.drop()
    })

    itHoldsTheSuite(() => harness)
  })
}
