import { createServer, type IncomingMessage, type RequestListener, type Server, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import { pipeline, Readable } from 'node:stream'
import { text } from 'node:stream/consumers'
import { defineDatabase } from 'ambient-db'
import type { NodeHttpOptions } from 'ambient-db/node-http'
import { pgAdapter } from 'ambient-db/pg'
import { Pool } from 'pg'
import QueryStream from 'pg-query-stream'
import type {
  FrameworkHarness,
  SuiteAnswer,
  SuiteApp,
  SuiteDatabase,
  SuiteServer,
} from '../../src/conformance/frameworks.ts'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'

export interface Databases {
  readonly main: SuiteDatabase
  readonly other: SuiteDatabase
  /** The same databases, by new pools. */
  reopen(): Databases
  close(): Promise<void>
}

/** Two fresh databases. */
export async function createDatabases(): Promise<Databases> {
  const databases = [await createDatabase(), await createDatabase()] as const
  return openDatabases(...databases, async () => {
    for (const database of databases) await database.drop()
  })
}

function openDatabases(one: TestDatabase, two: TestDatabase, afterClose: () => Promise<void>): Databases {
  const [main, other] = [openDatabase('main', one), openDatabase('other', two)]
  return {
    main,
    other,
    reopen: () => openDatabases(one, two, async () => {}),
    close: async () => {
      await Promise.all([main.ambient.shutdown(), other.ambient.shutdown()])
      await afterClose()
    },
  }
}

function openDatabase(name: string, { url, witness }: TestDatabase): SuiteDatabase {
  const ambient = defineDatabase({
    name,
    adapter: pgAdapter(() => new Pool({ connectionString: url, max: 5 })),
    settleTimeout: 5_000,
  })
  return {
    ambient,
    query: async (sql, parameters) => (await ambient.db.query(sql, parameters)).rows,
    stream: async (sql) => {
      const client = await ambient.db.connect()
      return client.query(new QueryStream(sql, [], { batchSize: 10 })).on('close', () => client.release())
    },
    witness: witness.rows,
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

/** The same as a response of the web. */
export function toResponse(answer: SuiteAnswer): Response {
  const { status, headers, text: body, stream } = unfold(answer)
  const pairs = Object.entries(headers).flatMap(([name, value]) => [value].flat().map((each) => [name, each] as const))
  const source = stream && (Readable.toWeb(stream) as ReadableStream)
  return new Response(source ?? body ?? null, { status, headers: new Headers(pairs as [string, string][]) })
}

/** As the documentation of Node recommends to send a stream. */
export function send(stream: Readable, response: NodeJS.WritableStream): void {
  pipeline(stream, response, () => {})
}

/** Puts a middleware before a handler of `node:http`. */
export type Wrap = (
  handler: RequestListener,
  options?: NodeHttpOptions<IncomingMessage, ServerResponse>,
) => RequestListener

/** What the suite needs of `node:http`, with this middleware. */
export function nodeHttpHarness({ main, other }: Databases, wrap: Wrap): FrameworkHarness {
  return { main, other, node: true, start }

  function start({ routes, options, mounted = 1, around }: SuiteApp): Promise<SuiteServer> {
    const errors: unknown[] = []
    let listener: RequestListener = async (request, response) => {
      const route = routes[request.url ?? '']
      if (!route) throw new Error('no such route')
      const answer = await route({ json: async () => JSON.parse(await text(request)), node: { request, response } })
      if (!answer) return
      const { status, headers, text: body, stream } = unfold(answer)
      response.writeHead(status, headers)
      if (stream) send(stream, response)
      else response.end(body)
    }
    const withErrors: Parameters<Wrap>[1] = {
      ...options,
      onError(error, _request, response) {
        errors.push(error)
        const { statusCode = 500, message } = error as { statusCode?: number; message: string }
        if (!response.headersSent) response.writeHead(statusCode).end(message)
      },
    }
    for (let time = 0; time < mounted; time++) listener = wrap(listener, withErrors)
    const wrapped = listener
    return serve(around ? (request, response) => void around(() => wrapped(request, response)) : wrapped, errors)
  }
}
