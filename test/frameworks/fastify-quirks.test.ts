import { once } from 'node:events'
import { connect } from 'node:http2'
import type { AddressInfo } from 'node:net'
import { Readable } from 'node:stream'
import { text } from 'node:stream/consumers'
import { setImmediate as nextTurn } from 'node:timers/promises'
import compress from '@fastify/compress'
import cors from '@fastify/cors'
import multipart from '@fastify/multipart'
import { hasContext } from 'ambient-db'
import { databaseContext } from 'ambient-db/fastify'
import fastify, { type FastifyInstance } from 'fastify'
import { describe, expect, it } from 'vitest'
import { decoded, useNotebook } from './notebook.ts'

const { note, doom, notes, open, ask, closing } = useNotebook()

/** An app whose log can be looked at. */
async function create(): Promise<FastifyInstance & { readonly logged: string[] }> {
  const logged: string[] = []
  const app = fastify({
    forceCloseConnections: true,
    logger: { level: 'warn', stream: { write: (line) => void logged.push(JSON.parse(line).msg) } },
  })
  closing(() => app.close())
  return Object.assign(app as unknown as FastifyInstance, { logged })
}

async function listen(app: FastifyInstance): Promise<number> {
  await app.listen({ host: '127.0.0.1', port: 0 })
  return (app.server.address() as AddressInfo).port
}

describe('H1 a commit that fails', () => {
  it('goes to the error handler of the scope in which the route was registered, and to the onError hooks', async () => {
    const app = await create()
    const seen: string[] = []
    app.register(databaseContext)
    app.setErrorHandler((_error, _request, reply) => reply.send('outer'))
    app.addHook('onError', async (_request, _reply, error) => void seen.push(error.message))
    app.register(async (scope) => {
      scope.setErrorHandler((_error, _request, reply) => reply.header('x-scope', 'inner').send('inner'))
      scope.get('/', async () => {
        await doom()
        return 'first'
      })
    })
    const { status, headers, body } = await ask(await listen(app), { path: '/' })
    expect([status, headers['x-scope'], body]).toEqual([500, ['inner'], 'inner'])
    expect(seen).toEqual([expect.stringContaining('foreign key')])
  })

  it('is answered by Fastify itself where nobody else does, and logged once', async () => {
    const app = await create()
    app.register(databaseContext)
    app.get('/', async (_request, reply) => {
      await doom()
      return reply.code(201).type('text/html').send('first')
    })
    const { status, headers, body } = await ask(await listen(app), { path: '/' })
    expect([status, headers['content-type']]).toEqual([500, ['application/json; charset=utf-8']])
    expect(JSON.parse(body)).toMatchObject({ statusCode: 500, message: expect.stringContaining('foreign key') })
    expect(app.logged).toEqual([expect.stringContaining('foreign key')])
  })

  it('goes to the next error handler where one had answered with a success', async () => {
    const app = await create()
    app.register(databaseContext)
    app.setErrorHandler((error: Error, _request, reply) => reply.send(`outer: ${error.message}`))
    app.register(async (scope) => {
      scope.setErrorHandler((_error, _request, reply) => reply.code(202).send('recovered'))
      scope.get('/', async () => {
        await doom()
        throw new Error('first')
      })
    })
    const { status, body } = await ask(await listen(app), { path: '/' })
    expect([status, body]).toEqual([500, expect.stringMatching(/^outer: .*foreign key/)])
  })

  it('leaves no header, trailer or serializer of the first answer, and those from before', async () => {
    const app = await create()
    app.addHook('onRequest', async (_request, reply) => {
      reply.header('x-before', 'yes').header('set-cookie', ['before=1'])
    })
    app.register(databaseContext)
    app.get('/', async (_request, reply) => {
      await doom()
      reply
        .header('set-cookie', 'first=1')
        .header('x-before', 'changed')
        .trailer('x-sum', async () => '1')
      return reply.send('first')
    })
    const { status, headers, trailers } = await ask(await listen(app), { path: '/' })
    expect(status).toBe(500)
    expect([headers['set-cookie'], headers['x-before'], headers.trailer]).toEqual([['before=1'], ['yes'], undefined])
    expect(trailers).toEqual({})
  })

  it.each(['node', 'web'])('is answered for a stream (%s) that is given up, once', async (kind) => {
    const app = await create()
    const errors: string[] = []
    app.register(databaseContext)
    app.setErrorHandler(async () => void errors.push('the outer handler'))
    app.register(async (scope) => {
      scope.setErrorHandler(async (error: Error, _request, reply) => {
        errors.push(error.message)
        await nextTurn()
        return reply.code(500).send(`failed: ${error.message}`)
      })
      scope.get('/', async (_request, reply) => {
        await doom()
        const source = Readable.from(endless())
        return reply.send(kind === 'node' ? source : Readable.toWeb(source))
      })
    })
    let ended = false
    const endless = async function* () {
      try {
        for (;;) {
          yield Buffer.from('never')
          await nextTurn()
        }
      } finally {
        ended = true
      }
    }
    app.get('/next', async () => 'next')
    const client = await open(await listen(app))
    client.send({ path: '/' }, { path: '/next' })
    const { status, body } = await client.answer()
    expect([status, body]).toEqual([500, expect.stringMatching(/^failed: .*foreign key/)])
    expect((await client.answer()).body).toBe('next')
    await expect.poll(() => ended).toBe(true)
    await nextTurn()
    expect(errors).toEqual([expect.stringContaining('foreign key')])
    expect(app.logged).toEqual([])
  })

  it('is a plain 500 for a hijacked reply', async () => {
    const app = await create()
    app.register(databaseContext)
    app.get('/', async (_request, reply) => {
      reply.hijack()
      await doom()
      reply.raw.writeHead(201, { 'x-first': 'yes' }).end('first')
    })
    const { status, headers, body } = await ask(await listen(app), { path: '/' })
    expect([status, headers['x-first'], body]).toEqual([500, undefined, 'Internal Server Error'])
  })

  it('has the status that its error asks for', async () => {
    const app = await create()
    app.register(databaseContext, {
      outcome() {
        throw Object.assign(new Error('not now'), { statusCode: 503 })
      },
    })
    app.get('/', async (_request, reply) => {
      await note('a')
      return reply.code(201).send('first')
    })
    app.setErrorHandler((error: Error, _request, reply) => reply.send(`${reply.statusCode} ${error.message}`))
    const { status, body } = await ask(await listen(app), { path: '/' })
    expect([status, body]).toEqual([503, '503 not now'])
    expect(await notes()).toEqual([])
  })
})

describe('H1 a commit', () => {
  it('comes after the onSend hooks of the app, of plugins and of routes, which may still query', async () => {
    const app = await create()
    app.register(databaseContext)
    app.addHook('onSend', () => note('app'))
    app.register(async (scope) => {
      scope.addHook('onSend', () => note('scope'))
      scope.get('/', { onSend: () => note('route') }, async () => {
        await note('handler')
        return 'done'
      })
    })
    const client = await open(await listen(app))
    client.send({ path: '/' })
    await client.firstByte()
    expect(await notes()).toEqual(['app', 'handler', 'route', 'scope'])
  })

  it('comes before the answer of `inject`', async () => {
    const app = await create()
    app.register(databaseContext)
    app.post('/', async (_request, reply) => {
      await note('a')
      return reply.code(201).send({ made: true })
    })
    app.post('/doomed', async () => doom())
    const { statusCode, payload } = await app.inject({ method: 'POST', url: '/' })
    expect([statusCode, payload, await notes()]).toEqual([201, '{"made":true}', ['a']])
    expect((await app.inject({ method: 'POST', url: '/doomed' })).statusCode).toBe(500)
  })

  it('comes for a handler of paths that are not found, too', async () => {
    const app = await create()
    app.register(databaseContext)
    app.setNotFoundHandler(async (_request, reply) => {
      await note('seen')
      return reply.code(200).send('page')
    })
    const { status } = await ask(await listen(app), { path: '/missing' })
    expect([status, await notes()]).toEqual([200, ['seen']])
  })

  it('comes once for a handler that sends and does not return the reply', async () => {
    const app = await create()
    app.register(databaseContext)
    app.get('/', async (_request, reply) => {
      await note('a')
      reply.send('sent')
    })
    expect((await ask(await listen(app), { path: '/' })).body).toBe('sent')
    expect(app.logged).toEqual([])
  })

  it('comes before the answer of HTTP/2', async () => {
    const app = fastify({ http2: true })
    closing(() => app.close())
    app.register(databaseContext)
    app.get('/', async () => {
      await note('a')
      return 'two'
    })
    app.get('/doomed', async () => doom())
    await app.listen({ host: '127.0.0.1', port: 0 })
    const session = connect(`http://127.0.0.1:${(app.server.address() as AddressInfo).port}`)
    closing(() => session.close())
    const get = async (path: string) => {
      const request = session.request({ ':path': path })
      const body = text(request)
      const [headers] = await once(request, 'response')
      return { status: headers[':status'], atHead: await notes(), body: await body }
    }
    expect(await get('/')).toEqual({ status: 200, atHead: ['a'], body: 'two' })
    expect(await get('/doomed')).toMatchObject({ status: 500, body: expect.stringContaining('foreign key') })
  })
})

describe('H6 the context', () => {
  it('holds in all the app, also where the plugin was registered in a scope of its own only there', async () => {
    const app = await create()
    app.register(async (scope) => {
      scope.register(databaseContext)
      scope.get('/inside', async () => String(hasContext()))
    })
    app.get('/outside', async () => String(hasContext()))
    const port = await listen(app)
    expect((await ask(port, { path: '/inside' })).body).toBe('true')
    expect((await ask(port, { path: '/outside' })).body).toBe('false')
  })

  it('holds in every hook behind it, in validation and in the error handler', async () => {
    const app = await create()
    app.register(databaseContext)
    const seen: string[] = []
    const look = (name: string) => async () => {
      if (hasContext()) seen.push(name)
    }
    app.addHook('onRequest', look('onRequest'))
    app.addHook('preParsing', look('preParsing'))
    app.addHook('preValidation', look('preValidation'))
    app.addHook('preHandler', look('preHandler'))
    app.addHook('preSerialization', look('preSerialization'))
    app.addHook('onError', look('onError'))
    app.setErrorHandler(async (_error, _request, reply) => {
      await look('errorHandler')()
      return reply.code(400).send({})
    })
    app.post('/', async () => {
      throw new Error('no')
    })
    const headers = { 'content-type': 'application/json' }
    await ask(await listen(app), { method: 'POST', path: '/', headers, body: '{}' })
    expect(seen).toEqual([
      'onRequest',
      'preParsing',
      'preValidation',
      'preHandler',
      'onError',
      'errorHandler',
      'preSerialization',
    ])
  })

  it('holds while a multipart upload is read', async () => {
    const app = await create()
    app.register(databaseContext)
    app.register(multipart)
    app.post('/', async (request) => {
      for await (const part of request.parts()) {
        if (part.type === 'file') await note(`${part.filename}: ${(await part.toBuffer()).length}`)
        else await note(`${part.fieldname}: ${part.value}`)
      }
      return 'taken'
    })
    const body = [
      '--x\r\ncontent-disposition: form-data; name="title"\r\n\r\nphoto\r\n',
      '--x\r\ncontent-disposition: form-data; name="file"; filename="a.bin"\r\ncontent-type: application/octet-stream\r\n\r\n',
      `${'b'.repeat(200_000)}\r\n--x--\r\n`,
    ].join('')
    const headers = { 'content-type': 'multipart/form-data; boundary=x' }
    const answer = await ask(await listen(app), { method: 'POST', path: '/', headers, body })
    expect([answer.status, await notes()]).toEqual([200, ['a.bin: 200000', 'title: photo']])
  })
})

describe.each(['outside', 'inside'])('with @fastify/compress and @fastify/cors %s', (place) => {
  async function start(): Promise<number> {
    const app = await create()
    const others = async () => {
      await app.register(cors, { origin: true })
      await app.register(compress, { threshold: 0, encodings: ['gzip'] })
    }
    if (place === 'outside') await others()
    await app.register(databaseContext)
    if (place === 'inside') await others()
    app.get('/', async () => {
      await note('a')
      return { text: 'x'.repeat(10_000) }
    })
    app.get('/stream', async (_request, reply) => {
      await note('a')
      return reply.type('text/plain').send(Readable.from(Array<string>(500).fill('x'.repeat(10_000))))
    })
    app.get('/doomed', async () => {
      await doom()
      return { first: 'x'.repeat(10_000) }
    })
    return listen(app)
  }
  const headers = { 'accept-encoding': 'gzip', origin: 'http://localhost' }

  it('H7 sends what is compressed behind the commit', async () => {
    const client = await open(await start())
    client.send({ path: '/', headers })
    await client.firstByte()
    expect(await notes()).toEqual(['a'])
    const answer = await client.answer()
    expect(answer.headers['content-encoding']).toEqual(['gzip'])
    expect(answer.headers['access-control-allow-origin']).toEqual(['http://localhost'])
    expect(JSON.parse(decoded(answer))).toEqual({ text: 'x'.repeat(10_000) })
  })

  it('H7 streams 5 MB', async () => {
    const answer = await ask(await start(), { path: '/stream', headers })
    expect(decoded(answer)).toHaveLength(5_000_000)
    expect(await notes()).toEqual(['a'])
  })

  it('H1 answers a failed commit readably', async () => {
    const answer = await ask(await start(), { path: '/doomed', headers })
    expect(answer.status).toBe(500)
    expect(JSON.parse(decoded(answer)).message).toMatch(/foreign key/)
    expect(answer.headers['access-control-allow-origin']).toEqual(
      place === 'outside' ? ['http://localhost'] : undefined,
    )
  })
})
