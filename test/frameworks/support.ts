import { createServer, type RequestListener, type Server } from 'node:http'
import type { AddressInfo } from 'node:net'
import { pipeline, Readable } from 'node:stream'
import { defineDatabase } from 'ambient-db'
import { pgAdapter } from 'ambient-db/pg'
import { Pool } from 'pg'
import QueryStream from 'pg-query-stream'
import type { SuiteAnswer, SuiteDatabase, SuiteServer } from '../../src/conformance/frameworks.ts'
import { createDatabase } from '../support/postgres.ts'

export interface Databases {
  readonly main: SuiteDatabase
  readonly other: SuiteDatabase
  close(): Promise<void>
}

/** Two fresh databases. */
export async function createDatabases(): Promise<Databases> {
  const [main, other] = [await createSuiteDatabase('main'), await createSuiteDatabase('other')]
  return { main, other, close: async () => void (await Promise.all([main.close(), other.close()])) }
}

async function createSuiteDatabase(name: string): Promise<SuiteDatabase & { close(): Promise<void> }> {
  const database = await createDatabase()
  const ambient = defineDatabase({
    name,
    adapter: pgAdapter(() => new Pool({ connectionString: database.url, max: 5 })),
  })
  return {
    ambient,
    query: async (sql, parameters) => (await ambient.db.query(sql, parameters)).rows,
    stream: async (sql) => {
      const client = await ambient.db.connect()
      return client.query(new QueryStream(sql, [], { batchSize: 10 })).on('close', () => client.release())
    },
    witness: database.witness.rows,
    close: async () => {
      await ambient.shutdown()
      await database.drop()
    },
  }
}

/** Serves on a free port of 127.0.0.1. */
export async function serve(
  listener: RequestListener,
  errors: unknown[] = [],
): Promise<SuiteServer & { server: Server }> {
  const server = createServer(listener)
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  return {
    server,
    port: (server.address() as AddressInfo).port,
    errors,
    close: () =>
      new Promise((resolve) => {
        server.close(() => resolve())
        server.closeAllConnections()
      }),
  }
}

/** What the wire needs of a neutral answer; how it is sent is the framework's. */
export function unfold({ status = 200, headers = {}, body }: SuiteAnswer): {
  status: number
  headers: Record<string, string | string[]>
  text: string | undefined
  stream: Readable | undefined
} {
  if (body instanceof Readable) return { status, headers: { ...headers }, text: undefined, stream: body }
  if (typeof body !== 'object') return { status, headers: { ...headers }, text: body, stream: undefined }
  return {
    status,
    headers: { 'content-type': 'application/json', ...headers },
    text: JSON.stringify(body),
    stream: undefined,
  }
}

/** As the documentation of Node recommends to send a stream. */
export function send(stream: Readable, response: NodeJS.WritableStream): void {
  pipeline(stream, response, () => {})
}
