import { setTimeout as sleep } from 'node:timers/promises'
import { createPool, type Pool, type RowDataPacket } from 'mysql2/promise'
import { MysqlSocket } from './mysql-socket.ts'
import type { Server } from './server.ts'
import type { DatabaseName } from './stage.ts'

export const mysql: Server = {
  name: 'MariaDB',
  insert: 'insert into markers (run, label) values (?, ?)',
  conflict: "signal sqlstate '40001'",
  sleep: 'select sleep(0.3)',

  async open(serverUrl) {
    const name = `truth_${process.pid}_${Date.now()}`
    const names = { main: name, other: `${name}_other` } as const
    const witness = createPool({ uri: serverUrl, connectionLimit: 3 })
    for (const database of Object.values(names)) {
      await witness.query(`create database ${database}`)
      await witness.query(
        `create table ${database}.markers (run varchar(40), label varchar(40), primary key (run, label))`,
      )
      await witness.query(`create table ${database}.numbers (n int)`)
      const numbers = Array.from({ length: 40 }, (_, index) => [index + 1])
      await witness.query(`insert into ${database}.numbers values ?`, [numbers])
    }
    const url = new URL(serverUrl)
    url.pathname = `/${name}`
    /** The numbers that the server gave the connections of a run. */
    const connections = new Map<string, Set<number>>()
    const look = lookAt(witness)
    return {
      url: url.href,
      makePool({ url: uri, run, database, size, log }) {
        const { hostname, port } = new URL(uri)
        const stream = () => new MysqlSocket(log.tap(database)).connect(Number(port), hostname)
        const pool = createPool({ uri, connectionLimit: size, stream })
        const mine = connections.get(run) ?? new Set()
        connections.set(run, mine)
        pool.pool.on('connection', ({ threadId }) => mine.add(threadId))
        return pool
      },
      async rowsOf(run) {
        const rows = await Promise.all(
          (Object.keys(names) as DatabaseName[]).map(async (database) => {
            const sql = `select label from ${names[database]}.markers where run = ?`
            const [found] = await witness.query<RowDataPacket[]>(sql, [run])
            return found.map(({ label }) => `${database}:${label}`)
          }),
        )
        return new Set(rows.flat())
      },
      async busy(run) {
        const mine = connections.get(run) ?? new Set()
        return (await look()).filter(({ id }) => mine.has(id)).map(({ id, doing }) => `${id}: ${doing}`)
      },
      async close() {
        for (const database of Object.values(names)) await witness.query(`drop database ${database}`)
        await witness.end()
      },
    }
  },
}

interface Busy {
  readonly id: number
  readonly doing: string
}

/** What is at work, or in a transaction. */
const activity = `select p.id, concat(p.command, ' ', coalesce(p.info, t.trx_state, '')) as doing
  from information_schema.processlist p left join information_schema.innodb_trx t on t.trx_mysql_thread_id = p.id
  where p.id <> connection_id() and (t.trx_id is not null or p.command <> 'Sleep')`

/**
 * Looks at the server for all who ask at the same time: it shows what it showed before to whoever asks again within 100 ms.
 * The answer is from after the question.
 */
function lookAt(witness: Pool): () => Promise<Busy[]> {
  let next: Promise<Busy[]> | undefined
  let last: Promise<unknown> = Promise.resolve()
  return () => {
    next ??= last
      .then(() => sleep(110))
      .then(async () => {
        next = undefined
        const [rows] = await witness.query<RowDataPacket[]>(activity)
        return rows as unknown as Busy[]
      })
    last = next.catch(() => {})
    return next
  }
}
