import { createConnection } from 'mysql2/promise'
import { Client } from 'pg'
import type { MysqlDatabase } from './mysql.ts'

/** A point that code waits at until the test lets it pass. */
export interface Gate {
  /** Resolves when the gate is open. */
  readonly passed: Promise<void>
  open(): void
}

export function gate(): Gate {
  let open = () => {}
  const passed = new Promise<void>((resolve) => {
    open = resolve
  })
  return { passed, open }
}

/** Resolves when `condition` holds; asks again and again, so that no test need guess how long something takes. */
export async function until(condition: () => boolean | Promise<boolean>, what = 'the condition'): Promise<void> {
  const deadline = performance.now() + 10_000
  while (!(await condition())) {
    if (performance.now() > deadline) throw new Error(`Waited in vain for ${what}.`)
    await new Promise((resolve) => setImmediate(resolve))
  }
}

/** A gate at the database: `select pg_advisory_xact_lock_shared(key)` waits there until it opens. */
export interface DatabaseGate {
  readonly key: number
  readonly sql: string
  open(): Promise<void>
}

let keys = 0

export async function databaseGate(url: string): Promise<DatabaseGate> {
  const key = ++keys
  const client = new Client({ connectionString: url, application_name: 'gate' })
  await client.connect()
  await client.query('select pg_advisory_lock($1)', [key])
  let ended: Promise<void> | undefined
  return {
    key,
    sql: `select pg_advisory_xact_lock_shared(${key})`,
    open: () => {
      ended ??= client.end()
      return ended
    },
  }
}

/** The same on MySQL, where it is a row that is locked. */
export async function mysqlGate(
  database: MysqlDatabase,
): Promise<DatabaseGate & { /** Whether a statement waits there. */ waiting(): Promise<boolean> }> {
  const id = ++keys
  await database.witness.rows('create table if not exists gates (id int primary key)')
  await database.witness.rows('insert into gates values (?)', [id])
  const keeper = await createConnection(new URL('/mysql', database.url).href) // not one of those of the database
  await keeper.beginTransaction()
  await keeper.query(`select id from ${database.name}.gates where id = ? for update`, [id])
  const sql = `select id from gates where id = ${id} lock in share mode`
  let ended: Promise<void> | undefined
  return {
    key: id,
    sql,
    open: () => {
      ended ??= keeper.end()
      return ended
    },
    waiting: async () => (await database.backends()).some(({ query }) => query === sql),
  }
}
