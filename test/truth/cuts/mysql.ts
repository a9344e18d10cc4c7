import { createPool, type RowDataPacket } from 'mysql2/promise'
import { lookAt } from '../mysql-activity.ts'
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
        return (await look()).filter(({ id, busy }) => busy && mine.has(id)).map(({ id, text }) => `${id}: ${text}`)
      },
      async close() {
        for (const database of Object.values(names)) await witness.query(`drop database ${database}`)
        await witness.end()
      },
    }
  },
}
