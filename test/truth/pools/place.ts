import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { DatabaseSync } from 'node:sqlite'
import { createPool, type RowDataPacket } from 'mysql2/promise'
import { Pool } from 'pg'
import { createDatabaseAt } from '../../support/database.ts'
import { acquireMariadb } from '../../support/mariadb-server.ts'
import { lookAt } from '../mysql-activity.ts'

/** What an engine keeps its databases on. */
export interface Server {
  /** A place for one case. */
  open(run: string): Promise<Place>
  close(): Promise<void>
}

/** Marker rows, and a connection to them that no code under test knows of. */
export interface Place {
  /** The connection string of a role of its own; of SQLite the file. */
  readonly url: string
  /** The labels of the marker rows. */
  rows(): Promise<ReadonlySet<string>>
  /** Whether another connection sees this row. */
  sees(label: string): Promise<boolean>
  /** The connections of the case, and what is open on them. */
  connections(): Promise<readonly ServerConnection[]>
  /** The server admits so many connections of the role, and refuses others; without a number as many as there is room for. */
  admit(connections?: number): Promise<void>
  close(): Promise<void>
}

export interface ServerConnection {
  readonly inTransaction: boolean
  /** Its state and its last statement. */
  readonly text: string
}

/** Each place has a role of its own, so that what one case does to the server disturbs no other. */
export async function openPostgres(serverUrl: string): Promise<Server> {
  const database = await createDatabaseAt(serverUrl)
  const witness = new Pool({ connectionString: database.url, application_name: 'witness', max: 4 })
  await witness.query('create table markers (run text, label text, primary key (run, label))')
  await witness.query('grant select, insert on markers to public')
  return {
    async open(run) {
      const role = `${database.name}_${run}`
      await witness.query(`create role ${role} login password '${role}'`)
      const url = new URL(database.url)
      url.username = role
      url.password = role
      return {
        url: url.href,
        async rows() {
          const { rows } = await witness.query('select label from markers where run = $1', [run])
          return new Set(rows.map(({ label }) => String(label)))
        },
        async sees(label) {
          const { rowCount } = await witness.query('select from markers where run = $1 and label = $2', [run, label])
          return rowCount === 1
        },
        async connections() {
          const { rows } = await witness.query<ServerConnection>(
            `select xact_start is not null as "inTransaction", state || ': ' || query as text
               from pg_stat_activity where application_name = $1`,
            [run],
          )
          return rows
        },
        admit: async (connections = -1) =>
          void (await witness.query(`alter role ${role} connection limit ${connections}`)),
        close: async () => void (await witness.query(`drop role ${role}`)),
      }
    },
    async close() {
      await witness.end()
      await database.drop()
    },
  }
}

/** The server is started here, unless `MYSQL_URL` names one; its user may create users. */
export async function openMysql(): Promise<Server> {
  const server = await acquireMariadb()
  const name = `pools_${process.pid}_${Date.now()}`
  const witness = createPool({ uri: server.url, connectionLimit: 4 })
  await witness.query(`create database ${name}`)
  await witness.query(`create table ${name}.markers (run varchar(40), label varchar(40), primary key (run, label))`)
  const look = lookAt(witness)
  return {
    async open(run) {
      const role = `${name}_${run}`.slice(-32)
      await witness.query(`create user '${role}' identified by '${role}'`)
      await witness.query(`grant select, insert on ${name}.markers to '${role}'`)
      const url = new URL(server.url)
      Object.assign(url, { username: role, password: role, pathname: `/${name}` })
      const found = async (condition: string, parameters: string[]) => {
        const sql = `select label from ${name}.markers where ${condition}`
        const [rows] = await witness.query<RowDataPacket[]>(sql, parameters)
        return rows.map(({ label }) => String(label))
      }
      return {
        url: url.href,
        rows: async () => new Set(await found('run = ?', [run])),
        sees: async (label) => (await found('run = ? and label = ?', [run, label])).length === 1,
        async connections() {
          const all = await look()
          return all.filter(({ user }) => user === role).map(({ inTransaction, text }) => ({ inTransaction, text }))
        },
        async admit(connections) {
          const lock = connections === 0 ? 'lock' : 'unlock' // no connections at all can't be said by their number
          await witness.query(`alter user '${role}' with max_user_connections ${connections ?? 0} account ${lock}`)
        },
        close: async () => void (await witness.query(`drop user '${role}'`)),
      }
    },
    async close() {
      await witness.query(`drop database ${name}`)
      await witness.end()
      await server.stop()
    },
  }
}

/** Each place is a file of its own. */
export async function openSqlite(): Promise<Server> {
  const directory = await mkdtemp(join(tmpdir(), 'ambient-db-pools-'))
  return {
    async open(run) {
      const url = join(directory, `${run}.db`)
      const witness = new DatabaseSync(url)
      witness.exec('pragma journal_mode = wal')
      witness.exec('create table markers (run text, label text, primary key (run, label))')
      const rows = async () => {
        const all = witness.prepare('select label from markers where run = ?').all(run)
        return new Set(all.map(({ label }) => String(label)))
      }
      return {
        url,
        rows,
        sees: async (label) => (await rows()).has(label),
        connections: async () => [],
        admit: () => Promise.reject(new Error('A file refuses nobody.')),
        close: async () => witness.close(),
      }
    },
    close: () => rm(directory, { recursive: true, force: true }),
  }
}
