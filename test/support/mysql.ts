import { randomBytes } from 'node:crypto'
import { type Connection, createConnection, type RowDataPacket } from 'mysql2/promise'
import { inject } from 'vitest'
import type { Witness } from './postgres.ts'

/** What MySQL says of one connection. */
export interface MysqlBackend {
  readonly id: number
  /** `Query` while a statement runs, `Sleep` while it is idle. */
  readonly command: string
  /** What the statement waits for or does: `User lock`, `Updating` … */
  readonly state: string | null
  /** The statement that runs. */
  readonly query: string | null
  /** The port of the client's socket. */
  readonly clientPort: number
}

/** A fresh, empty database for one test file, on MariaDB or MySQL. */
export interface MysqlDatabase {
  readonly name: string
  readonly url: string
  readonly witness: Witness
  /** Every connection to this database except the witness. */
  backends(): Promise<MysqlBackend[]>
  /** Ends a connection from the side of the server. */
  kill(id: number): Promise<void>
  /** Removes the database; connections that are left to it are cut. */
  drop(): Promise<void>
}

/** Creates a database on the server that all test files share. */
export async function createMysqlDatabase(): Promise<MysqlDatabase> {
  const server = inject('mysqlServer')
  if ('problem' in server) throw new Error(server.problem)
  const name = `test_${randomBytes(6).toString('hex')}`
  const url = new URL(server.url)
  url.pathname = `/${name}`
  const client = await createConnection(server.url)
  client.on('error', () => undefined) // a test may cut every connection
  await client.query(`create database ${name}`)
  await client.changeUser({ database: name })

  async function rows<Row extends object>(sql: string, parameters: unknown[] = []): Promise<Row[]> {
    const [result] = await client.query<RowDataPacket[]>(sql, parameters)
    return result as Row[]
  }
  const backends = () =>
    rows<MysqlBackend>(
      `select id, command, state, info as query, cast(substring_index(host, ':', -1) as unsigned) as clientPort
         from information_schema.processlist where db = ? and id <> connection_id() order by id`,
      [name],
    )
  const kill = (id: number) => killOn(client, id)

  return {
    name,
    url: url.href,
    witness: { rows },
    backends,
    kill,
    drop: async () => {
      for (const { id } of await backends()) await kill(id)
      await client.query(`drop database ${name}`)
      await client.end()
    },
  }
}

async function killOn(client: Connection, id: number): Promise<void> {
  await client.query(`kill ${id}`).catch((error: { errno?: number }) => {
    const gone = 1094 // no such thread
    if (error.errno !== gone) throw error
  })
}
