import { once } from 'node:events'
import { connect, createServer as createHttp2Server } from 'node:http2'
import type { AddressInfo } from 'node:net'
import { text } from 'node:stream/consumers'
import { getRequestListener } from '@hono/node-server'
import { hasContext, isAmbientError } from 'ambient-db'
import { databaseContext } from 'ambient-db/hono'
import { type Handler, Hono } from 'hono'
import { compress } from 'hono/compress'
import { setCookie } from 'hono/cookie'
import { cors } from 'hono/cors'
import { streamSSE } from 'hono/streaming'
import { describe, expect, it } from 'vitest'
import { decoded, useNotebook } from './notebook.ts'
import { serve } from './support.ts'

const { note, doom, notes, open, ask, closing } = useNotebook()

async function start(app: Hono): Promise<number> {
  const server = await serve(getRequestListener(app.fetch))
  closing(() => server.close())
  return server.port
}

/** An app whose route fails at its commit, with what `answer` makes of it. */
function doomed(app: Hono, answer: Handler): Hono {
  app.use(databaseContext())
  app.use(async (_context, next) => {
    await doom()
    await next()
  })
  app.get('/', answer)
  return app
}

describe('H1 a commit that fails', () => {
  it('is answered by Hono itself where nobody else does', async () => {
    const app = doomed(new Hono(), (context) => context.json({ first: true }, 201))
    const { status, body } = await app.request('/')
    expect(status).toBe(500)
    expect(body && (await new Response(body).text())).toBe('Internal Server Error')
  })

  it.each(['by fetch', 'on Node'])(
    'leaves no success and no header of the answer, and those from before: %s',
    async (way) => {
      const app = new Hono()
      app.onError((error, context) => context.text(error.message))
      app.use(async (context, next) => {
        context.header('x-before', 'yes')
        context.header('set-cookie', 'before=1', { append: true })
        await next()
      })
      doomed(app, (context) => {
        context.status(201)
        context.header('x-before', 'changed')
        context.header('x-first', 'yes')
        setCookie(context, 'first', '1')
        return context.json({ first: true }, { headers: { etag: '"first"' } })
      })
      const answer = way === 'on Node' ? await fetch(`http://127.0.0.1:${await start(app)}/`) : await app.request('/')
      const { status, headers } = answer
      expect([status, await answer.text()]).toEqual([500, expect.stringContaining('foreign key')])
      expect([headers.get('x-before'), headers.get('x-first'), headers.get('etag')]).toEqual(['yes', null, null])
      expect(headers.getSetCookie()).toEqual(['before=1'])
      expect(headers.get('content-type')).toMatch(/^text\/plain/)
    },
  )

  it('goes to the error handler of the app in which the middleware stands', async () => {
    const inner = doomed(new Hono(), (context) => context.text('first'))
    inner.onError((_error, context) => context.text('inner', 503))
    const app = new Hono()
    app.onError((_error, context) => context.text('outer', 502))
    app.route('/inner', inner)
    const answer = await app.request('/inner')
    expect([answer.status, await answer.text()]).toEqual([503, 'inner'])
  })

  it('goes to the next error handler where an error was answered with a success', async () => {
    const inner = new Hono()
    inner.onError((_error, context) => context.text('recovered', 202))
    inner.get('/', async () => {
      await doom()
      throw new Error('no')
    })
    const app = new Hono()
    app.onError((_error, context) => context.text('outer', 502))
    app.use(databaseContext())
    app.route('/', inner)
    const answer = await app.request('/')
    expect([answer.status, await answer.text()]).toEqual([502, 'outer'])
  })

  it('ends the stream of the answer', async () => {
    let cancelled = false
    const body = new ReadableStream({
      pull: (controller) => controller.enqueue(Buffer.from('never')),
      cancel() {
        cancelled = true
      },
    })
    const app = doomed(new Hono(), () => new Response(body))
    expect([(await app.request('/')).status, cancelled]).toEqual([500, true])
  })
})

describe('H4 a client that goes', () => {
  it('rolls back, also where there is no connection to be seen', async () => {
    const client = new AbortController()
    const errors: unknown[] = []
    const app = new Hono()
    app.onError((error, context) => {
      errors.push(error)
      return context.text('nobody reads it', 500)
    })
    app.use(databaseContext())
    app.get('/', async (context) => {
      await note('a')
      client.abort()
      return context.text('done')
    })
    expect((await app.request('/', { signal: client.signal })).status).toBe(500)
    expect(errors.map((error) => isAmbientError(error, 'AMBIENT_ABORTED'))).toEqual([true])
    expect(await notes()).toEqual([])
  })
})

it('H1 a commit comes before the answer of `app.request`', async () => {
  const app = new Hono()
  app.use(databaseContext())
  app.post('/', async (context) => {
    await note('a')
    return context.body(null, 204)
  })
  expect([(await app.request('/', { method: 'POST' })).status, await notes()]).toEqual([204, ['a']])
})

it('H1 a commit comes before the answer of HTTP/2', async () => {
  const app = new Hono()
  app.use(databaseContext())
  app.get('/', async (context) => {
    await note('a')
    return context.text('two')
  })
  const server = createHttp2Server(getRequestListener(app.fetch) as Parameters<typeof createHttp2Server>[0])
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  closing(() => server.close())
  const session = connect(`http://127.0.0.1:${(server.address() as AddressInfo).port}`)
  closing(() => session.close())
  const request = session.request({ ':path': '/' })
  const body = text(request)
  await once(request, 'response')
  expect([await notes(), await body]).toEqual([['a'], 'two'])
})

it('H5 server-sent events come after the commit', async () => {
  const app = new Hono()
  app.use(databaseContext())
  app.get('/', async (context) => {
    await note('a')
    return streamSSE(context, async (stream) => {
      await stream.writeSSE({ data: 'begun' }) // which is not read before
    })
  })
  const client = await open(await start(app))
  client.send({ path: '/' })
  await client.firstByte()
  expect(await notes()).toEqual(['a'])
  expect((await client.answer()).body).toBe('data: begun\n\n')
})

it('H6 the context holds while a multipart upload is read', async () => {
  const app = new Hono()
  app.use(databaseContext())
  app.post('/', async (context) => {
    const { title, file } = await context.req.parseBody()
    await note(`${title}: ${(file as File).size}`)
    return context.text(String(hasContext()))
  })
  const form = new FormData()
  form.set('title', 'photo')
  form.set('file', new File(['b'.repeat(200_000)], 'a.bin'))
  const answer = await fetch(`http://127.0.0.1:${await start(app)}/`, { method: 'POST', body: form })
  expect([await answer.text(), await notes()]).toEqual(['true', ['photo: 200000']])
})

describe.each(['outside', 'inside'])('with compress and cors %s', (place) => {
  async function serveThem(): Promise<number> {
    const app = new Hono()
    const others = [cors(), compress({ threshold: 0, encoding: 'gzip' })]
    for (const each of place === 'outside' ? [...others, databaseContext()] : [databaseContext(), ...others])
      app.use(each)
    app.get('/', async (context) => {
      await note('a')
      return context.text('x'.repeat(10_000))
    })
    app.get('/doomed', async (context) => {
      await doom()
      return context.text('x'.repeat(10_000))
    })
    return start(app)
  }
  const headers = { 'accept-encoding': 'gzip', origin: 'http://localhost' }

  it('H7 sends what is compressed behind the commit', async () => {
    const client = await open(await serveThem())
    client.send({ path: '/', headers })
    await client.firstByte()
    expect(await notes()).toEqual(['a'])
    const answer = await client.answer()
    expect([answer.headers['content-encoding'], decoded(answer).length]).toEqual([['gzip'], 10_000])
  })

  it('H1 answers a failed commit readably', async () => {
    const answer = await ask(await serveThem(), { path: '/doomed', headers })
    expect([answer.status, decoded(answer)]).toEqual([500, 'Internal Server Error'])
    expect(answer.headers['access-control-allow-origin']).toEqual(place === 'outside' ? ['*'] : undefined)
  })
})
