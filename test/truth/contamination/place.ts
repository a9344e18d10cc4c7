import { createPool, type RowDataPacket } from 'mysql2/promise'
import { Pool } from 'pg'
import { createDatabaseAt } from '../../support/database.ts'

/** What the server holds of a unit. */
export interface Held {
  readonly unit: number
  readonly rows: number
  /** A bit for each step. */
  readonly steps: bigint
}

/** A database for one run, and a connection to it that no code under test knows of. */
export interface Place {
  /** Whether rows carry the id of the transaction that wrote them; otherwise that of the connection tells. */
  readonly xids: boolean
  readonly sql: {
    /** Parameters of both: unit, step, part. */
    readonly write: string
    /** Like `write`, and it leaves a mark that no rollback undoes. */
    readonly late: string
    readonly read: string
    readonly slow: string
    readonly fail: string
  }
  makePool(size: number): unknown
  held(): Promise<readonly Held[]>
  /** Rows that share a transaction with those of another part, or not with those of their own; in words. */
  mixed(): Promise<readonly string[]>
  /** How many late statements have come to the server. */
  late(): Promise<number>
  /** Connections of the pool that are in a transaction. */
  open(): Promise<readonly string[]>
  close(): Promise<void>
}

const columns = 'insert into steps (unit, step, part, xid, pid)'

/** With `pipeline` the pool sends without waiting for answers. */
export async function openPostgres(url: string, pipeline: boolean): Promise<Place> {
  const database = await createDatabaseAt(url)
  const rows = database.witness.rows
  const identity = 'pg_current_xact_id()::text::bigint, pg_backend_pid()'
  const named = 'pg_current_xact_id()::text::bigint as xid, pg_backend_pid() as pid'
  await rows('create table steps (unit int, step int, part int, xid bigint, pid int)')
  await rows('create sequence late')
  await rows('create view numbers as select pg_current_xact_id()::text::bigint as n from generate_series(1, 40)')
  return {
    xids: true,
    sql: {
      write: `${columns} values ($1, $2, $3, ${identity}) returning xid, pid`,
      late: `${columns} select $1::int, $2::int, $3::int, ${identity} where nextval('late') > 0 returning xid, pid`,
      read: `select ${named}`,
      slow: `select ${named} from pg_sleep(0.01)`,
      fail: 'select 1 / 0',
    },
    makePool: (max) => {
      const options = { connectionString: database.url, application_name: 'pool', max }
      return new Pool(pipeline ? ({ ...options, pipeline } as typeof options) : options)
    },
    async held() {
      const found = await rows<{ unit: number; rows: number; steps: string }>(
        'select unit, count(*)::int as rows, bit_or(1::bigint << step)::text as steps from steps group by unit',
      )
      return found.map(({ steps, ...more }) => ({ ...more, steps: BigInt(steps) }))
    },
    async mixed() {
      const shared = await rows<{ text: string }>(
        `select 'transaction ' || xid || ' wrote for parts ' || string_agg(distinct unit || '.' || part, ', ') as text from steps
          group by xid having min(unit) <> max(unit) or min(part) <> max(part) limit 20`,
      )
      const torn = await rows<{ text: string }>(
        `select 'part ' || unit || '.' || part || ' was written in several transactions' as text from steps
          group by unit, part having min(xid) <> max(xid) or min(pid) <> max(pid) limit 20`,
      )
      return [...shared, ...torn].map(({ text }) => text)
    },
    async late() {
      const [sequence] = await rows<{ called: boolean; last: string }>(
        'select is_called as called, last_value as last from late',
      )
      return sequence?.called ? Number(sequence.last) : 0
    },
    async open() {
      const found = await rows<{ text: string }>(
        `select pid || ' ' || state || ': ' || query as text from pg_stat_activity
          where datname = current_database() and application_name = 'pool' and xact_start is not null`,
      )
      return found.map(({ text }) => text)
    },
    close: () => database.drop(),
  }
}

/** What stands here uses sequences, and INSERT … RETURNING. */
export async function isMariadb(url: string): Promise<boolean> {
  const pool = createPool({ uri: url, connectionLimit: 1 })
  const [[row] = []] = await pool.query<RowDataPacket[]>('select version() as version')
  await pool.end()
  return /MariaDB/.test(row?.version)
}

/** MariaDB gives a transaction no id that it tells cheaply, so there parts are told by their connections alone. */
export async function openMariadb(url: string): Promise<Place> {
  const name = `contamination_${process.pid}_${Date.now()}`
  const witness = createPool({ uri: url, connectionLimit: 1 })
  await witness.query(`create database ${name}`)
  await witness.query(`create table ${name}.steps (unit int, step int, part int, xid bigint, pid int)`)
  await witness.query(`create sequence ${name}.late nocache`)
  await witness.query(`create table ${name}.tens (n int)`)
  await witness.query(`insert into ${name}.tens values ?`, [Array.from({ length: 40 }, (_, n) => [n])])
  await witness.query(`create view ${name}.numbers as select connection_id() as n from ${name}.tens`)
  const rows = async (sql: string) => (await witness.query<RowDataPacket[]>(sql))[0]
  const there = new URL(url)
  there.pathname = `/${name}`
  return {
    xids: false,
    sql: {
      write: `${columns} values (?, ?, ?, 0, connection_id()) returning xid, pid`,
      late: `${columns} select ?, ?, ?, 0, connection_id() from dual where nextval(late) > 0 returning xid, pid`,
      read: 'select 0 as xid, connection_id() as pid',
      slow: 'select sleep(0.01) as xid, connection_id() as pid',
      fail: "signal sqlstate '45000'",
    },
    makePool: (connectionLimit) => createPool({ uri: there.href, connectionLimit }),
    async held() {
      const found = await rows(
        `select unit, count(*) as held, cast(bit_or(1 << step) as char) as steps from ${name}.steps group by unit`,
      )
      return found.map(({ unit, held, steps }) => ({ unit, rows: Number(held), steps: BigInt(steps) }))
    },
    async mixed() {
      const torn = await rows(
        `select unit, part from ${name}.steps group by unit, part having min(pid) <> max(pid) limit 20`,
      )
      return torn.map(({ unit, part }) => `part ${unit}.${part} was written on several connections`)
    },
    async late() {
      const [sequence] = await rows(`select next_not_cached_value as next from ${name}.late`)
      return Number(sequence?.next) - 1
    },
    async open() {
      const found = await rows(
        `select p.id, coalesce(p.info, '') as doing from information_schema.processlist p
           join information_schema.innodb_trx t on t.trx_mysql_thread_id = p.id where p.db = '${name}'`,
      )
      return found.map(({ id, doing }) => `${id}: ${doing}`)
    },
    async close() {
      const left = await rows(`select id from information_schema.processlist where db = '${name}'`)
      for (const { id } of left) await witness.query(`kill ${id}`).catch(() => {}) // its locks would keep the tables
      await witness.query(`drop database ${name}`)
      await witness.end()
    },
  }
}
