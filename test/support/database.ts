import { randomBytes } from 'node:crypto'
import { Client } from 'pg'

/** A connection that no code under test knows of: what it sees is what the database holds. */
export interface Witness {
  rows<Row extends object = Record<string, unknown>>(sql: string, parameters?: unknown[]): Promise<Row[]>
}

/** What PostgreSQL says of one connection. */
export interface Backend {
  readonly pid: number
  /** `idle`, `active`, `idle in transaction`, `idle in transaction (aborted)` … */
  readonly state: string | null
  readonly applicationName: string
  /** The statement that runs, or ran last. */
  readonly query: string
  /** `Lock`, `Client`, `LWLock` … while the connection waits. */
  readonly waitsFor: string | null
  /** When the open transaction began. */
  readonly transactionStart: Date | null
  /** The local port of the client's socket. */
  readonly clientPort: number | null
}

/** A fresh, empty database. */
export interface TestDatabase {
  readonly name: string
  readonly url: string
  readonly witness: Witness
  /** Every connection to this database except the witness. */
  backends(): Promise<Backend[]>
  /** Removes the database, with force: connections that are left to it are cut. */
  drop(): Promise<void>
}

/** Creates a database on the server of `serverUrl`. */
export async function createDatabaseAt(serverUrl: string): Promise<TestDatabase> {
  const name = `test_${randomBytes(6).toString('hex')}`
  await administer(serverUrl, `create database ${name}`)

  const url = new URL(serverUrl)
  url.pathname = `/${name}`
  const client = new Client({ connectionString: url.href, application_name: 'witness' })
  client.on('error', () => undefined) // a test may restart the server or cut every connection
  await client.connect()

  async function rows<Row extends object>(sql: string, parameters: unknown[] = []): Promise<Row[]> {
    const result = await client.query<Row>(sql, parameters)
    return result.rows
  }

  return {
    name,
    url: url.href,
    witness: { rows },
    backends: () =>
      rows<Backend>(
        `select pid, state, application_name as "applicationName", query, wait_event_type as "waitsFor",
                xact_start as "transactionStart", client_port as "clientPort"
           from pg_stat_activity
          where datname = current_database() and backend_type = 'client backend' and pid <> pg_backend_pid()
          order by backend_start`,
      ),
    drop: async () => {
      await client.end().catch(() => undefined)
      await administer(serverUrl, `drop database if exists ${name} with (force)`)
    },
  }
}

/** As the server says it: `18.4`. */
export async function serverVersion(serverUrl: string): Promise<string> {
  const client = new Client({ connectionString: serverUrl })
  await client.connect()
  try {
    const { rows } = await client.query<{ server_version: string }>('show server_version')
    return rows[0]?.server_version ?? ''
  } finally {
    await client.end()
  }
}

async function administer(serverUrl: string, sql: string): Promise<void> {
  const client = new Client({ connectionString: serverUrl, application_name: 'witness' })
  await client.connect()
  try {
    await client.query(sql)
  } finally {
    await client.end()
  }
}
