import { once } from 'node:events'
import { connect, createServer } from 'node:http2'
import type { AddressInfo } from 'node:net'
import { Readable } from 'node:stream'
import { text } from 'node:stream/consumers'
import cors from '@koa/cors'
import { isAmbientError } from 'ambient-db'
import { databaseContext } from 'ambient-db/koa'
import Koa from 'koa'
import compress from 'koa-compress'
import { describe, expect, it } from 'vitest'
import type { RawClient } from '../../src/conformance/raw-client.ts'
import { decoded, useNotebook } from './notebook.ts'
import { serve } from './support.ts'

const notebook = useNotebook()
const { note, doom, notes, open, ask, closing } = notebook

/** An app that keeps what it would log. */
function create(): Koa & { readonly errors: unknown[] } {
  const errors: unknown[] = []
  const app = new Koa()
  app.on('error', (error) => errors.push(error))
  return Object.assign(app, { errors })
}

async function start(app: Koa): Promise<number> {
  const server = await serve(app.callback())
  closing(() => server.close())
  return server.port
}

describe('H1 a commit that fails', () => {
  it('is answered by Koa itself where nobody catches it', async () => {
    const app = create()
    app.use(databaseContext())
    app.use(async (context) => {
      await doom()
      context.cookies.set('first', '1')
      context.body = { first: true }
    })
    const { status, headers, body } = await ask(await start(app), { path: '/' })
    expect([status, headers['set-cookie'], body]).toEqual([500, undefined, 'Internal Server Error'])
    expect(app.errors).toEqual([expect.objectContaining({ code: '23503' })])
  })

  it.each([
    ['says nothing', () => {}, 'Internal Server Error'],
    ['sets a body alone', (context: Koa.Context) => Object.assign(context, { body: 'caught' }), 'caught'],
  ])('leaves no success to a middleware that catches it and %s', async (_what, answer, expected) => {
    const app = create()
    app.use(async (context, next) => {
      try {
        await next()
      } catch {
        answer(context)
      }
    })
    app.use(databaseContext())
    app.use(async (context) => {
      await doom()
      context.set('x-first', 'yes')
      context.status = 201
      context.body = { first: true }
    })
    const { status, headers, body } = await ask(await start(app), { path: '/' })
    expect([status, headers['x-first'], body]).toEqual([500, undefined, expected])
  })

  it('ends the stream of the answer', async () => {
    const app = create()
    app.use(databaseContext())
    const source = Readable.from(['never'])
    app.use(async (context) => {
      await doom()
      context.body = source
    })
    expect((await ask(await start(app), { path: '/' })).status).toBe(500)
    expect(source.destroyed).toBe(true)
  })

  it('is answered by Koa where the answer was sent past it', async () => {
    const app = create()
    app.use(databaseContext())
    app.use(async (context) => {
      context.respond = false
      await doom()
      context.res.writeHead(201, { 'x-first': 'yes' }).end('first')
    })
    const { status, headers, body } = await ask(await start(app), { path: '/' })
    expect([status, headers['x-first'], body]).toEqual([500, undefined, 'Internal Server Error'])
  })

  it('is answered by Koa where an error was answered with a success', async () => {
    const app = create()
    app.use(async (context, next) => {
      await next().catch(() => {
        context.status = 202
        context.body = 'recovered'
      })
    })
    app.use(databaseContext())
    app.use(async () => {
      await doom()
      throw new Error('no')
    })
    expect((await ask(await start(app), { path: '/' })).status).toBe(500)
  })

  describe('because the client has gone', () => {
    /** Serves `handler`; resolves with what reached the middleware before it. */
    async function seenBefore(handler: (context: Koa.Context, leave: () => void) => Promise<void>): Promise<unknown> {
      const app = create()
      let client: RawClient
      const seen = new Promise<unknown>((resolve) => {
        app.use((_context, next) => next().then(resolve, resolve))
      })
      app.use(databaseContext())
      app.use((context) => handler(context, () => client.destroy()))
      client = await open(await start(app))
      client.send({ path: '/' })
      return seen
    }

    it('before its answer is thrown to those before it', async () => {
      const seen = await seenBefore(async (context, leave) => {
        await note('a')
        leave()
        await once(context.res, 'close')
        context.body = 'nobody reads it'
      })
      expect(isAmbientError(seen, 'AMBIENT_ABORTED')).toBe(true)
      expect(await notes()).toEqual([])
    })

    it('while its work is awaited is thrown to those before it', async () => {
      const seen = await seenBefore(async (context, leave) => {
        await note('a')
        void notebook.databases.main.query('select pg_sleep(30)').catch(() => {})
        setImmediate(leave)
        context.body = 'nobody reads it'
      })
      expect(isAmbientError(seen, 'AMBIENT_ABORTED')).toBe(true)
      expect(await notes()).toEqual([])
    })
  })
})

describe('H2 the status', () => {
  it('is 404 where nothing was answered, so nothing is committed', async () => {
    const app = create()
    app.use(databaseContext())
    app.use(() => note('a'))
    expect((await ask(await start(app), { path: '/' })).status).toBe(404)
    expect(await notes()).toEqual([])
  })

  it('stands once the handler is done, whatever its other branches do', async () => {
    const app = create()
    app.use(databaseContext())
    let sent: boolean | undefined
    app.use(async (context) => {
      void note('a').then(() => {
        sent = context.headerSent
        context.status = 500
        context.res.statusCode = 501
      })
      context.body = 'done'
    })
    expect([(await ask(await start(app), { path: '/' })).status, await notes(), sent]).toEqual([200, ['a'], true])
  })

  it('of an error that was answered with a success commits', async () => {
    const app = create()
    app.use(async (context, next) => {
      await next().catch(() => {
        context.status = 202
        context.body = 'recovered'
      })
    })
    app.use(databaseContext())
    app.use(async () => {
      await note('a')
      throw new Error('no')
    })
    expect((await ask(await start(app), { path: '/' })).status).toBe(202)
    expect(await notes()).toEqual(['a'])
  })
})

it('H1 comes before the answer of HTTP/2', async () => {
  const app = create()
  app.use(databaseContext())
  app.use(async (context) => {
    await (context.path === '/' ? note('a') : doom())
    context.body = 'two'
  })
  const server = createServer(app.callback() as Parameters<typeof createServer>[0]) // Koa's types speak of HTTP/1 alone
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  closing(() => server.close())
  const session = connect(`http://127.0.0.1:${(server.address() as AddressInfo).port}`)
  closing(() => session.close())
  const get = async (path: string) => {
    const request = session.request({ ':path': path })
    const body = text(request)
    const [headers] = await once(request, 'response')
    return { status: headers[':status'], atHead: await notes(), body: await body }
  }
  expect(await get('/')).toEqual({ status: 200, atHead: ['a'], body: 'two' })
  expect(await get('/doomed')).toMatchObject({ status: 500, body: 'Internal Server Error' })
})

describe.each(['outside', 'inside'])('with koa-compress and @koa/cors %s', (place) => {
  async function serveThem(): Promise<number> {
    const app = create()
    const others = [cors(), compress({ threshold: 0, br: false })]
    const ours = [databaseContext()]
    for (const middleware of place === 'outside' ? [...others, ...ours] : [...ours, ...others]) app.use(middleware)
    app.use(async (context) => {
      await (context.path === '/doomed' ? doom() : note('a'))
      context.type = 'text'
      context.body =
        context.path === '/stream' ? Readable.from(Array<string>(500).fill('x'.repeat(10_000))) : 'x'.repeat(10_000)
    })
    return start(app)
  }
  const headers = { 'accept-encoding': 'gzip', origin: 'http://localhost' }

  it.each(['/', '/stream'])('H7 sends what is compressed behind the commit: %s', async (path) => {
    const client = await open(await serveThem())
    client.send({ path, headers })
    await client.firstByte()
    expect(await notes()).toEqual(['a'])
    const answer = await client.answer()
    expect(answer.headers['content-encoding']).toEqual(['gzip'])
    expect(decoded(answer)).toHaveLength(path === '/' ? 10_000 : 5_000_000)
  })

  it('H1 answers a failed commit readably', async () => {
    const answer = await ask(await serveThem(), { path: '/doomed', headers })
    expect([answer.status, decoded(answer)]).toEqual([500, 'Internal Server Error'])
    expect(answer.headers['content-encoding']).toBeUndefined()
  })
})
