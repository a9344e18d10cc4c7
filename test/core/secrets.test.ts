import { readFileSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { inspect } from 'node:util'
import { type AmbientDatabase, defineDatabase, detach, newContext } from 'ambient-db'
import { pgAdapter } from 'ambient-db/pg'
import { Client, Pool } from 'pg'
import { afterAll, afterEach, beforeAll, expect, it, vi } from 'vitest'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'
import { postgresPassword, startPostgres } from '../support/postgres-server.ts'

type Main = AmbientDatabase<Pool, Pool>

let database: TestDatabase
const defined: Main[] = []

beforeAll(async () => {
  database = await createDatabase()
  await database.witness.rows('create table notes (id int primary key)')
})
afterAll(() => database.drop())
afterEach(async () => {
  await Promise.all(defined.splice(0).map((each) => each.shutdown().catch(() => {})))
})

function define(name: string, connectionString: string): Main {
  const pool = () => new Pool({ connectionString, application_name: name, connectionTimeoutMillis: 5000 })
  const main = defineDatabase({ name, adapter: pgAdapter(pool), acquireTimeout: 5000 })
  defined.push(main)
  return main
}

function insert(main: Main, id: number): Promise<unknown> {
  return main.db.query('insert into notes (id) values ($1)', [id])
}

/** Everything that can be read from a thrown value. */
function textOf(error: unknown): string {
  const { stack, message } = (error ?? {}) as Error
  return [inspect(error, { depth: 10, showHidden: true }), stack, message, JSON.stringify(error)].join('\n')
}

it('D5 shows no password and no connection string in any error, event or warning', { timeout: 60_000 }, async () => {
  const guarded = await startPostgres()
  const trusted = new Client({ connectionString: guarded.url })
  await trusted.connect()
  await trusted.query(`create role guest login password '${postgresPassword}'`)
  const rules = join(guarded.dataDirectory, 'pg_hba.conf')
  writeFileSync(rules, `host all guest all scram-sha-256\n${readFileSync(rules, 'utf8')}`)
  await trusted.query('select pg_reload_conf()')
  await trusted.end()

  const server = createServer((socket) => socket.destroy()) // cuts every connection
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const { port } = server.address() as { port: number }
  const closed = createServer()
  await new Promise<void>((resolve) => closed.listen(0, '127.0.0.1', resolve))
  const deadPort = (closed.address() as { port: number }).port
  await new Promise((resolve) => closed.close(resolve))
  const variant = (change: (url: URL) => void) => {
    const other = new URL(database.url)
    change(other)
    return other.href
  }
  const urls = {
    password: variant((each) => {
      each.port = String(guarded.port)
      each.username = 'guest'
      each.password = 'another-secret'
    }),
    dead: variant((each) => {
      each.port = String(deadPort)
    }),
    cut: variant((each) => {
      each.port = String(port)
    }),
    database: variant((each) => {
      each.pathname = '/does-not-exist'
    }),
    role: variant((each) => {
      each.username = 'nobody-of-that-name'
    }),
  }
  const { subscribe, unsubscribe } = await import('node:diagnostics_channel')
  const read: string[] = []
  const listener = (message: unknown) => read.push(textOf(message))
  const channels = ['ambient-db:context', 'ambient-db:session', 'ambient-db:transaction']
  for (const name of channels) subscribe(name, listener)
  const warn = vi.spyOn(process, 'emitWarning').mockImplementation((warning) => {
    read.push(textOf(warning))
  })
  const failures: unknown[] = []
  try {
    for (const [name, connectionString] of Object.entries(urls)) {
      const main = define(name, connectionString)
      const failing = (work: Promise<unknown>) =>
        work.then(
          () => expect.fail(`${name} connected`),
          (error) => failures.push(error),
        )
      await failing(newContext(() => insert(main, 1)))
      await failing(newContext(() => main.atomic(() => insert(main, 1))))
      await failing(main.newSession((session) => session.begin()))
      await newContext(async () => {
        main.afterCommit(() => detach(() => newContext(() => insert(main, 1))))
      })
    }
    const lost = define('lost', database.url)
    await newContext(async () => {
      await insert(lost, 1)
      await database.witness.rows(
        `select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'lost'`,
      )
    }).catch((error) => failures.push(error))
  } finally {
    for (const name of channels) unsubscribe(name, listener)
    warn.mockRestore()
    server.close()
    await guarded.stop()
  }
  expect(failures[0]).toMatchObject({ code: '28P01' })
  expect(failures).toHaveLength(16)
  expect(read.length).toBeGreaterThan(failures.length)
  for (const text of [...failures.map(textOf), ...read]) {
    for (const secret of [postgresPassword, 'another-secret', database.url]) expect(text).not.toContain(secret)
  }
})

it('D5 looks where a secret could be: one in an error of a factory is found', () => {
  expect(textOf(new Error('x', { cause: { url: `postgres://a:${postgresPassword}@b` } }))).toContain(postgresPassword)
})
