import { once } from 'node:events'
import { IncomingMessage, type RequestListener, ServerResponse } from 'node:http'
import {
  type ClientHttp2Session,
  connect,
  createServer,
  type Http2ServerRequest,
  type Http2ServerResponse,
  type IncomingHttpHeaders,
  type OutgoingHttpHeaders,
} from 'node:http2'
import { type AddressInfo, Socket } from 'node:net'
import { Readable, Writable } from 'node:stream'
import { text } from 'node:stream/consumers'
import { setImmediate as nextTurn } from 'node:timers/promises'
import { newContext } from 'ambient-db'
import { databaseContext, type NodeHttpOptions } from 'ambient-db/node-http'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { RawClient } from '../../src/conformance/raw-client.ts'
import { currentScope } from '../../src/context.ts'
import { createDatabases, type Databases, send, serve } from './support.ts'

let databases: Databases
const closing: (() => unknown)[] = []
const warnings: Error[] = []
const onWarning = (warning: Error) => warnings.push(warning)

beforeAll(async () => {
  databases = await createDatabases()
  await databases.main.witness('create table notes (id text primary key)')
  await databases.main.witness('create table parents (id int primary key)')
  await databases.main.witness('create table doomed (parent int references parents deferrable initially deferred)')
  process.on('warning', onWarning)
})
beforeEach(async () => {
  warnings.length = 0
  await databases.main.witness('truncate notes')
})
afterEach(async () => {
  for (const close of closing.splice(0).reverse()) await close()
})
afterAll(async () => {
  process.off('warning', onWarning)
  await databases.close()
})

async function note(id: string): Promise<void> {
  await databases.main.query('insert into notes values ($1)', [id])
}

async function doom(): Promise<void> {
  await databases.main.query('insert into doomed values (1)')
}

async function notes(): Promise<unknown[]> {
  return (await databases.main.witness('select id from notes order by id')).map(({ id }) => id)
}

async function openTransactions(): Promise<number> {
  const sql = 'select 1 from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()'
  return (await databases.main.witness(`${sql} and xact_start is not null`)).length
}

async function start(
  handler: RequestListener,
  options?: NodeHttpOptions<IncomingMessage, ServerResponse>,
): Promise<RawClient> {
  const server = await serve(databaseContext(handler, options))
  closing.push(() => server.close())
  const client = await RawClient.open(server.port)
  closing.push(() => client.destroy())
  return client
}

describe('node:http without error handling of its own', () => {
  it('H1 answers a failed commit with a plain 500, and warns', async () => {
    const client = await start(async (_request, response) => {
      await doom()
      response.setHeader('set-cookie', 'a=b')
      response.end('good')
    })
    client.send({ path: '/' })
    const { status, headers, body } = await client.answer()
    expect([status, headers['set-cookie'], body]).toEqual([500, undefined, 'Internal Server Error'])
    await nextTurn()
    expect(warnings.map(({ name, message }) => [name, message])).toEqual([
      ['AmbientRequestWarning', expect.stringMatching(/foreign key/)],
    ])
  })

  it('H1 H2 sends the status that it was settled by, whatever is assigned behind the end of the answer', async () => {
    const client = await start(async (_request, response) => {
      await note('a')
      response.statusCode = 400
      response.end('bad')
      response.statusCode = 200
    })
    client.send({ path: '/' })
    expect(await client.answer()).toMatchObject({ status: 400, body: 'bad' })
    expect(await notes()).toEqual([])
  })

  it('H2 takes no outcome for one that is none, such as a promise', async () => {
    const outcome = (async () => 'commit') as unknown as () => 'commit'
    const client = await start(
      async (_request, response) => {
        await note('a')
        response.end('good')
      },
      { outcome },
    )
    client.send({ path: '/' })
    expect(await client.answer()).toMatchObject({ status: 500 })
    expect(await notes()).toEqual([])
  })

  it('H3 answers a throw by its statusCode, and warns only of server errors', async () => {
    const client = await start((request) => {
      throw Object.assign(new Error('no'), { statusCode: Number(request.url?.slice(1)) })
    })
    for (const [path, expected] of Object.entries({ '/503': 503, '/418': 418, '/200': 500, '/no': 500 })) {
      client.send({ path })
      expect((await client.answer()).status).toBe(expected)
    }
    await nextTurn()
    expect(warnings).toHaveLength(3)
  })

  it('H3 answers anything that is thrown', async () => {
    const client = await start(async () => Promise.reject(undefined))
    client.send({ path: '/' })
    expect((await client.answer()).status).toBe(500)
  })

  it('H3 gives an answer up whose handler throws behind its head', async () => {
    const client = await start(async (_request, response) => {
      response.writeHead(200, { 'content-length': 10 })
      response.write('half')
      throw new Error('no')
    })
    client.send({ path: '/' })
    await client.closed
    await nextTurn()
    expect(warnings).toHaveLength(1)
  })

  it('H3 lets an answer stand that had left when the handler threw', async () => {
    const client = await start(async (_request, response) => {
      response.end('good')
      throw new Error('no')
    })
    client.send({ path: '/' })
    expect((await client.answer()).body).toBe('good')
    await nextTurn()
    expect(warnings).toHaveLength(1)
  })

  it('H3 rolls back when the handler throws while its answer is held', async () => {
    const seen: unknown[] = []
    const onError: NodeHttpOptions<IncomingMessage, ServerResponse>['onError'] = (error, _request, response) => {
      seen.push((error as Error).message, response.headersSent)
      response.writeHead(500).end('failed')
    }
    const client = await start(
      async (_request, response) => {
        await note('a')
        response.end('good')
        throw new Error('behind the answer')
      },
      { onError },
    )
    client.send({ path: '/' })
    const { status, body } = await client.answer()
    expect([status, body]).toEqual([500, 'failed'])
    expect(seen).toEqual(['behind the answer', false])
    expect(await notes()).toEqual([])
  })

  it('destroys the response when onError throws', async () => {
    const client = await start(
      () => {
        throw new Error('first')
      },
      { onError: () => Promise.reject(new Error('second')) },
    )
    client.send({ path: '/' })
    await client.closed
    await nextTurn()
    expect(warnings.map(({ message }) => message)).toEqual([expect.stringMatching(/second/)])
  })

  it('H3 works without a context too', async () => {
    const client = await start(() => Promise.reject(new Error('no')), { skip: () => true })
    client.send({ path: '/' })
    expect((await client.answer()).status).toBe(500)
  })

  it('H4 is quiet about a handler that fails because its client is gone', async () => {
    let entered = () => {}
    let failed: unknown
    const inside = new Promise<void>((resolve) => {
      entered = resolve
    })
    const client = await start(async (_request, response) => {
      await note('a')
      entered()
      await once(response, 'close')
      await note('b').catch((error) => {
        failed = error
        throw error
      })
    })
    client.send({ path: '/' })
    await inside
    client.destroy()
    while (!failed || (await openTransactions()) > 0) await nextTurn()
    expect(warnings).toEqual([])
    expect(await notes()).toEqual([])
  })

  it('H4 rolls back a pipelined request that is not answered yet when its client goes', async () => {
    let entered = 0
    const client = await start(async () => {
      await note(String(entered++))
    })
    client.send({ path: '/' })
    client.send({ path: '/' })
    while (entered < 2 || (await openTransactions()) < 2) await nextTurn()
    client.destroy()
    while ((await openTransactions()) > 0) await nextTurn()
    expect(await notes()).toEqual([])
  })

  it('H1 answers an error when Node cannot send the answer that was committed', async () => {
    const client = await start(async (_request, response) => {
      await note('a')
      response.writeHead(200, { trailer: 'x-sum', 'content-length': 4 }) // trailers need a chunked body
      response.end('body')
    })
    client.send({ path: '/' })
    const { status, headers } = await client.answer()
    expect([status, headers.trailer]).toEqual([500, undefined])
    expect(await notes()).toEqual(['a'])
  })

  it('H1 lets nothing of the head leak that is no header', async () => {
    const client = await start(async (_request, response) => {
      await doom()
      response.setHeader('date', 'Thu, 01 Jan 1970 00:00:00 GMT')
      response.statusMessage = 'Made'
      response.end('good')
    })
    client.send({ path: '/' })
    await client.arrival('\r\n')
    expect(client.pending).toMatch(/^HTTP\/1\.1 500 Internal Server Error\r\n/)
    const { headers } = await client.answer()
    expect(headers.date).toEqual([expect.not.stringContaining('1970')])
  })

  it('H1 can be answered by an error handler that reads the body of the request first', async () => {
    const onError: NodeHttpOptions<IncomingMessage, ServerResponse>['onError'] = (_error, request, response) => {
      request.on('end', () => response.end('read')).resume()
    }
    const client = await start(
      async (_request, response) => {
        await doom()
        response.end('good')
      },
      { onError },
    )
    client.send({ method: 'POST', path: '/', body: 'x'.repeat(100_000) })
    const { status, body } = await client.answer()
    expect([status, body]).toEqual([500, 'read'])
  })

  it('H1 answers a failed echo', async () => {
    const client = await start(async (request, response) => {
      await doom()
      request.pipe(response)
    })
    client.send({ method: 'POST', path: '/', body: 'x'.repeat(100_000) })
    const { status, body } = await client.answer()
    expect([status, body]).toEqual([500, 'Internal Server Error'])
  })

  it('H1 leaves a source alone that was taken off the response', async () => {
    const source = Readable.from(['never read'])
    const client = await start(async (_request, response) => {
      await doom()
      source.pipe(response)
      source.unpipe(response)
      response.end('good')
    })
    client.send({ path: '/' })
    expect((await client.answer()).status).toBe(500)
    expect(source.destroyed).toBe(false)
  })

  it('H1 gives an answer up that Node refuses behind its head', async () => {
    const client = await start(async (_request, response) => {
      response.strictContentLength = true
      await note('a')
      response.writeHead(200, { 'content-length': 3 })
      response.end('four')
    })
    client.send({ path: '/' })
    await client.closed
    await nextTurn()
    expect(warnings).toMatchObject([{ message: expect.stringMatching(/content-length/) }])
  })

  it('H5 drops the write that met an open cursor, though the other answer comes later', async () => {
    const onError: NodeHttpOptions<IncomingMessage, ServerResponse>['onError'] = async (_error, _request, response) => {
      await nextTurn()
      response.end('bad')
    }
    const client = await start(
      async (_request, response) => {
        await databases.main.stream('select generate_series(1, 1000)')
        const refused = await new Promise((resolve) => response.write('first', resolve))
        expect(refused).toMatchObject({ code: 'AMBIENT_STREAM_OPEN' })
      },
      { onError },
    )
    client.send({ path: '/' })
    const { status, body } = await client.answer()
    expect([status, body]).toEqual([500, 'bad'])
  })

  it('H5 answers an error when a source pipes in an open block', async () => {
    const client = await start(async (_request, response) => {
      await databases.main.ambient.atomic(async () => {
        await note('a')
        Readable.from(['first']).pipe(response)
        await once(response, 'close')
      })
    })
    client.send({ path: '/' })
    expect((await client.answer()).status).toBe(500)
    client.destroy()
    await nextTurn()
    expect(warnings).toMatchObject([{ message: expect.stringMatching(/AMBIENT_RESPONSE_IN_BLOCK|inside a block/) }])
    expect(await notes()).toEqual([])
  })

  it('H2 answers an error when `outcome` throws', async () => {
    const client = await start(async (_request, response) => response.end(await note('a')), {
      outcome: () => {
        throw new Error('undecided')
      },
    })
    client.send({ path: '/' })
    expect((await client.answer()).status).toBe(500)
    expect(await notes()).toEqual([])
  })

  it('H5 throws what Node throws where there was nothing to settle', async () => {
    const thrown: unknown[] = []
    const client = await start((_request, response) => {
      response.strictContentLength = true
      response.writeHead(200, { 'content-length': 3 })
      try {
        response.end('four')
      } catch (error) {
        thrown.push((error as { code: unknown }).code, response.headersSent)
        response.destroy()
      }
    })
    client.send({ path: '/' })
    await client.closed
    expect(thrown).toEqual(['ERR_HTTP_CONTENT_LENGTH_MISMATCH', true])
  })

  it('H5 asks nobody to write on who has ended', async () => {
    let drains = 0
    const client = await start(async (_request, response) => {
      await note('a')
      response.on('drain', () => drains++)
      response.write('go')
      response.end('od')
    })
    client.send({ path: '/' })
    expect((await client.answer()).body).toBe('good')
    expect(drains).toBe(0)
  })

  it('H1 rolls back when what was sent past the response is refused', async () => {
    const client = await start(async (_request, response) => {
      await note('a')
      response.socket?.end('HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n')
    })
    client.send({ path: '/' })
    expect((await client.answer()).status).toBe(500)
    await nextTurn()
    expect(warnings).toMatchObject([{ message: expect.stringMatching(/sent past the response/) }])
    expect(await notes()).toEqual([])
  })

  it('H1 refuses it while the answer waits for the commit as well', async () => {
    const client = await start(async (_request, response) => {
      await note('a')
      response.end('good')
      response.socket?.write('HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n')
    })
    client.send({ path: '/' })
    expect((await client.answer()).status).toBe(500)
    expect(await notes()).toEqual([])
  })

  it('H1 closes the connection that a source pipes into past the response', async () => {
    const client = await start(async (_request, response) => {
      await note('a')
      Readable.from(['HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n']).pipe(response.socket as Socket)
    })
    client.send({ path: '/' })
    await client.closed
    expect(client.pending).toBe('')
    while ((await openTransactions()) > 0) await nextTurn()
    expect(await notes()).toEqual([])
  })

  it('H1 leaves the connection to who takes it behind the head, and to the requests that follow', async () => {
    const client = await start(async (request, response) => {
      await note(request.url ?? '')
      if (request.url === '/plain') return response.end('good')
      response.writeHead(200, { 'content-length': 7 }).flushHeaders()
      while ((await notes()).length === 0) await nextTurn()
      await nextTurn()
      response.socket?.write('by hand')
      return response.end()
    })
    client.send({ path: '/' })
    expect((await client.answer()).body).toBe('by hand')
    client.send({ path: '/plain' })
    expect((await client.answer()).body).toBe('good')
    expect(await notes()).toEqual(['/', '/plain'])
  })

  it('H1 lets Node answer what it cannot read, though a request is open on the connection', async () => {
    let entered = () => {}
    const inside = new Promise<void>((resolve) => {
      entered = resolve
    })
    const client = await start(async () => {
      await note('a')
      entered()
    })
    client.send({ path: '/' })
    await inside
    client.socket.write('this is no request\r\n\r\n')
    expect((await client.answer()).status).toBe(400)
    while ((await openTransactions()) > 0) await nextTurn()
    expect(await notes()).toEqual([])
  })

  it('H6 lets events of the response run in the context', async () => {
    const codes: unknown[] = []
    const client = await start((_request, response) => {
      response.on('close', () => void note('late').catch(({ code }) => codes.push(code)))
    })
    client.send({ path: '/' })
    client.socket.end()
    while (codes.length === 0) await nextTurn()
    expect(codes).toEqual(['AMBIENT_CONTEXT_ENDED'])
  })

  it('C3 takes an inherited context for no parent', async () => {
    const parents: unknown[] = []
    await newContext(async () => {
      const client = await start((_request, response) => {
        parents.push(currentScope()?.parent)
        response.end()
      })
      client.send({ path: '/' })
      await client.answer()
    })
    expect(parents).toEqual([undefined])
  })

  it('H5 serves a response without a server, on a stream that was assigned to it', async () => {
    const request = new IncomingMessage(new Socket())
    const response = new ServerResponse(request)
    let received = ''
    const socket = new Writable({
      write(chunk, _encoding, done) {
        received += chunk
        done()
      },
    })
    response.assignSocket(socket as Socket)
    databaseContext(async (_request, answer) => {
      await note('a')
      answer.end('good')
    })(request, response)
    await once(response, 'finish')
    expect(received).toMatch(/^HTTP\/1\.1 200 OK\r\n.*good$/s)
    expect(await notes()).toEqual(['a'])
  })
})

describe('node:http2', () => {
  type Handler = (request: Http2ServerRequest, response: Http2ServerResponse) => unknown

  async function startHttp2(handler: Handler): Promise<ClientHttp2Session> {
    const server = createServer(databaseContext<Http2ServerRequest, Http2ServerResponse>(handler))
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
    closing.push(() => server.close())
    const session = connect(`http://127.0.0.1:${(server.address() as AddressInfo).port}`)
    closing.push(() => session.destroy())
    return session
  }

  async function ask(session: ClientHttp2Session, headers: OutgoingHttpHeaders = {}) {
    const stream = session.request({ ':path': '/', ...headers })
    const trailers: IncomingHttpHeaders[] = []
    stream.on('trailers', (fields) => trailers.push(fields))
    const body = text(stream)
    const [head] = (await once(stream, 'response')) as [IncomingHttpHeaders & { ':status': number }]
    const committed = await notes()
    return { head, status: head[':status'], committed, body: await body, trailers }
  }

  it('H1 commits before the head leaves', async () => {
    const session = await startHttp2(async (request, response) => {
      await note(await text(request.on('error', () => {})))
      response.writeHead(201, { 'x-kind': 'flat' })
      response.write('go')
      response.end('od')
    })
    const { status, head, committed, body } = await ask(session, { ':method': 'GET' })
    expect([status, head['x-kind'], body, committed]).toEqual([201, 'flat', 'good', ['']])
  })

  it('H1 answers a failed commit, and nothing of the first answer leaks', async () => {
    const session = await startHttp2(async (_request, response) => {
      await doom()
      response.setHeader('set-cookie', ['a=b', 'c=d'])
      response.addTrailers({ 'x-sum': '1' })
      response.statusCode = 201
      response.end('good')
    })
    const { status, head, body, trailers } = await ask(session)
    expect([status, head['set-cookie'], body, trailers]).toEqual([500, undefined, 'Internal Server Error', []])
  })

  it('H1 refuses an answer on the stream itself while there is something to commit', async () => {
    const codes: unknown[] = []
    const session = await startHttp2(async (request, response) => {
      const attempt = (act: () => unknown) => {
        try {
          act()
        } catch (error) {
          codes.push((error as { code?: unknown }).code)
        }
      }
      await note('a')
      attempt(() => request.stream.respond({ ':status': 200 }))
      attempt(() => response.stream.write('past'))
      attempt(() => response.stream.end('past'))
      response.end('good')
    })
    const { status, body, committed } = await ask(session)
    expect([status, body, committed]).toEqual([200, 'good', ['a']])
    expect(codes).toEqual(Array(3).fill('AMBIENT_RESPONSE_BYPASSED'))
  })

  it('H1 takes an answer on the stream itself where nothing was touched', async () => {
    const session = await startHttp2((_request, response) => {
      response.stream.respond({ ':status': 202 })
      response.stream.end('past')
    })
    const { status, body } = await ask(session)
    expect([status, body]).toEqual([202, 'past'])
  })

  it('H4 rolls back when the client resets the stream', async () => {
    let entered = () => {}
    const inside = new Promise<void>((resolve) => {
      entered = resolve
    })
    const session = await startHttp2(async (_request, response) => {
      await note('a')
      entered()
      await once(response, 'close')
    })
    const stream = session.request({ ':path': '/' }).on('error', () => {})
    await inside
    expect(await openTransactions()).toBe(1)
    stream.close(8)
    while ((await openTransactions()) > 0) await nextTurn()
    expect(await notes()).toEqual([])
  })

  it('H5 streams 5 MB behind the commit, and ends with trailers', async () => {
    const session = await startHttp2(async (_request, response) => {
      await note('a')
      response.addTrailers({ 'x-sum': '5' })
      send(Readable.from(Array<string>(100).fill('x'.repeat(50_000))), response as unknown as NodeJS.WritableStream)
    })
    const { committed, body, trailers } = await ask(session)
    expect([committed, body.length]).toEqual([['a'], 5_000_000])
    expect(trailers).toMatchObject([{ 'x-sum': '5' }])
  })

  it('H7 answers HEAD, 204 and a redirect', async () => {
    const session = await startHttp2(async (request, response) => {
      await note(request.method + request.url)
      response.writeHead(request.url === '/204' ? 204 : 302, { location: '/' }).end()
    })
    for (const [method, path, expected] of [
      ['HEAD', '/', 302],
      ['GET', '/204', 204],
      ['GET', '/', 302],
    ] as const) {
      const { status, committed } = await ask(session, { ':method': method, ':path': path })
      expect(status).toBe(expected)
      expect(committed).toContain(method + path)
    }
  })

  it('H7 warns of nothing', async () => {
    const session = await startHttp2((_request, response) => response.end('good'))
    await ask(session)
    expect(warnings).toEqual([])
  })
})
