import { createReadStream } from 'node:fs'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Readable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { setImmediate as nextTurn } from 'node:timers/promises'
import { defineDatabase, isAmbientError, newContext } from 'ambient-db'
import { databaseContext } from 'ambient-db/express'
import { pgAdapter } from 'ambient-db/pg'
import compression from 'compression'
import type { NextFunction, Request, Response } from 'express'
import express from 'express'
import session from 'express-session'
import express4 from 'express4'
import { Pool } from 'pg'
import { describe, expect, it } from 'vitest'
import { decoded, useNotebook } from './notebook.ts'
import { serve } from './support.ts'

const notebook = useNotebook()
const { note, doom, notes, open, ask, closing } = notebook

async function start(app: express.Express): Promise<number> {
  const server = await serve(app)
  closing(() => server.close())
  return server.port
}

const gzip = { 'accept-encoding': 'gzip' }

describe.each([
  ['Express 5', express],
  ['Express 4', express4 as unknown as typeof express], // the calls below are the same in both
])('%s', (_version, framework) => {
  /** An app with `middleware` before (outside) or behind (inside) the context. */
  function appWith(middleware: express.RequestHandler, place: 'outside' | 'inside'): express.Express {
    const app = framework()
    const both = [middleware, databaseContext()]
    app.use(place === 'outside' ? both : both.reverse())
    return app
  }

  function answerErrors(app: express.Express): unknown[] {
    const errors: unknown[] = []
    app.use((error: Error, _request: Request, response: Response, next: NextFunction) => {
      errors.push(error)
      if (response.headersSent) return next(error)
      response.status(500).json({ error: error.message.repeat(50) })
    })
    return errors
  }

  describe.each(['outside', 'inside'] as const)('with compression %s', (place) => {
    const all = { threshold: 0 }

    it('H7 sends what is compressed behind the commit', async () => {
      const app = appWith(compression(all), place)
      app.get('/', async (_request, response) => {
        await note('a')
        response.json({ text: 'x'.repeat(10_000) })
      })
      const client = await open(await start(app))
      client.send({ path: '/', headers: gzip })
      await client.firstByte()
      expect(await notes()).toEqual(['a'])
      const answer = await client.answer()
      expect(answer.headers['content-encoding']).toEqual(['gzip'])
      expect(JSON.parse(decoded(answer))).toEqual({ text: 'x'.repeat(10_000) })
    })

    it.each([gzip, {}])('H7 streams 5 MB with back-pressure, %o', async (headers) => {
      const app = appWith(compression(all), place)
      const chunks = Array.from({ length: 500 }, (_, index) => String.fromCharCode(65 + (index % 26)).repeat(10_000))
      app.get('/', async (_request, response) => {
        await note('a')
        response.type('text')
        Readable.from(chunks).pipe(response)
      })
      const answer = await ask(await start(app), { path: '/', headers })
      expect(decoded(answer) === chunks.join('')).toBe(true)
    })

    it('H7 tells a writer that waits when to go on', async () => {
      const app = appWith(compression(all), place)
      app.get('/', async (_request, response) => {
        await note('a')
        response.type('text')
        for (let line = 0; line < 3; line++) {
          if (!response.write(`${line}\n`)) await new Promise((resolve) => response.once('drain', resolve))
        }
        response.end()
      })
      expect(decoded(await ask(await start(app), { path: '/', headers: gzip }))).toBe('0\n1\n2\n')
    })

    it('H1 answers a failed commit readably', async () => {
      const app = appWith(compression(all), place)
      app.get('/json', async (_request, response) => {
        await doom()
        response.json({ first: 'x'.repeat(10_000) })
      })
      app.get('/stream', async (_request, response) => {
        await doom()
        response.type('text')
        Readable.from(['first', 'answer']).pipe(response)
      })
      app.get('/writes', async (_request, response) => {
        await doom()
        const write = () => void response.type('text').write('first')
        response.on('drain', write)
        write()
      })
      app.use((error: Error, _request: Request, response: Response, _next: NextFunction) => {
        response.status(500).type('text')
        Readable.from(Array<string>(300).fill(error.message.padEnd(10_000))).pipe(response)
      })
      const port = await start(app)
      for (const path of ['/json', '/stream', '/writes']) {
        const answer = await ask(port, { path, headers: gzip })
        expect(answer.status).toBe(500)
        expect(decoded(answer)).toMatch(/^insert or update .* foreign key/)
        expect(decoded(answer)).toHaveLength(3_000_000)
      }
    })
  })

  describe.each(['outside', 'inside'] as const)('with express-session %s', (place) => {
    const options = { secret: 'of the test', resave: false, saveUninitialized: false }

    it('H7 saves the session, commits, then lets the client follow the redirect', async () => {
      const app = appWith(session(options), place)
      app.get('/login', async (request, response) => {
        await note('a')
        Object.assign(request.session, { user: 'a' })
        response.redirect('/me')
      })
      app.get('/me', (request, response) => void response.json(request.session))
      const client = await open(await start(app))
      client.send({ path: '/login' })
      await client.firstByte()
      expect(await notes()).toEqual(['a'])
      const { status, headers } = await client.answer()
      expect([status, headers.location]).toEqual([302, ['/me']])
      const cookie = headers['set-cookie']?.[0]?.split(';')[0] ?? ''
      client.send({ path: '/me', headers: { cookie } })
      expect(JSON.parse((await client.answer()).body)).toMatchObject({ user: 'a' })
    })

    it('H1 answers a failed commit', async () => {
      const app = appWith(session(options), place)
      app.get('/', async (request, response) => {
        await doom()
        Object.assign(request.session, { user: 'a' })
        response.cookie('first', 'yes').redirect('/me')
      })
      const errors = answerErrors(app)
      const answer = await ask(await start(app), { path: '/' })
      expect([answer.status, answer.headers.location]).toEqual([500, undefined])
      expect(answer.headers['set-cookie']?.join() ?? '').not.toContain('first')
      if (place === 'inside') expect(answer.headers['set-cookie']).toBe(undefined)
      expect(errors).toHaveLength(1)
    })
  })

  it('H1 gives a failed commit to the error handlers of the router that was at work', async () => {
    const app = framework()
    app.use(databaseContext())
    const router = framework.Router()
    router.get('/deep', async (_request, response) => {
      await doom()
      response.send('good')
    })
    router.use((_error: unknown, request: Request, response: Response, _next: NextFunction) => {
      response.status(409).json([request.baseUrl, request.url, request.originalUrl])
    })
    app.use('/router', router)
    const errors = answerErrors(app)
    const { status, body } = await ask(await start(app), { path: '/router/deep' })
    expect([status, JSON.parse(body)]).toEqual([409, ['/router', '/deep', '/router/deep']])
    expect(errors).toEqual([])
  })

  it('H1 keeps the headers that were set before the context, and drops those from behind it', async () => {
    const app = framework()
    app.use((_request, response, next) => {
      response.set({ 'Access-Control-Allow-Origin': '*', Vary: 'Origin' }).cookie('outer', '1').cookie('outer2', '2')
      next()
    })
    app.use(databaseContext())
    app.get('/', async (_request, response) => {
      await doom()
      response.appendHeader('Set-Cookie', 'inner=3') // adds to the array that stands there
      response.vary('Accept').cookie('inner2', '4').set('X-Inner', 'yes').status(201).send('good')
    })
    answerErrors(app)
    const { status, headers } = await ask(await start(app), { path: '/' })
    expect(status).toBe(500)
    expect(headers).toMatchObject({ 'access-control-allow-origin': ['*'], vary: ['Origin'] })
    expect(headers['set-cookie']).toEqual(['outer=1; Path=/', 'outer2=2; Path=/'])
    expect(headers['x-inner']).toBe(undefined)
  })

  it('H1 lets an error handler take its time, and use a database of its own', async () => {
    const app = framework()
    app.use(databaseContext())
    app.get('/', async (_request, response) => {
      await doom()
      Readable.from(['first', 'answer']).pipe(response)
    })
    app.use((error: Error, _request: Request, response: Response, _next: NextFunction) => {
      void (async () => {
        await nextTurn()
        await newContext(() => note('logged'))
        response.status(500).type('text')
        Readable.from(Array<string>(300).fill(error.message.padEnd(10_000))).pipe(response)
      })()
    })
    const { status, body } = await ask(await start(app), { path: '/' })
    expect([status, body.length]).toEqual([500, 3_000_000])
    expect(await notes()).toEqual(['logged'])
  })

  it('H5 gives a cursor that is open at the head to the error handlers once, whatever the handler throws then', async () => {
    const app = framework()
    app.use(databaseContext())
    app.get('/', async (_request, response, next) => {
      const rows = await notebook.databases.main.stream('select generate_series(1, 10000) as n')
      await pipeline(
        rows.map((row) => JSON.stringify(row)),
        response,
      ).catch(next)
    })
    const errors = answerErrors(app)
    const { status, body } = await ask(await start(app), { path: '/' })
    expect([status, JSON.parse(body).error]).toEqual([500, expect.stringMatching(/stream is open/)])
    expect(isAmbientError(errors[0], 'AMBIENT_STREAM_OPEN')).toBe(true)
  })

  it('H1 says 500 for an error handler that says nothing', async () => {
    const app = framework()
    app.use(databaseContext())
    app.get('/', async (_request, response) => {
      await doom()
      response.status(201).send('good')
    })
    app.use((_error: unknown, _request: Request, response: Response, _next: NextFunction) => void response.send('bad'))
    const { status, body } = await ask(await start(app), { path: '/' })
    expect([status, body]).toEqual([500, 'bad'])
  })

  it('H1 reaches the default error handler, though the body of the request was not read', async () => {
    const app = framework()
    app.set('env', 'test') // it logs otherwise
    app.use(databaseContext())
    app.post('/', async (_request, response) => {
      await doom()
      response.json({ first: true })
    })
    const client = await open(await start(app))
    for (let time = 0; time < 2; time++) {
      client.send({ method: 'POST', path: '/', body: 'x'.repeat(100_000) })
      const { status, body } = await client.answer()
      expect(status).toBe(500)
      expect(body).toMatch(/foreign key/)
    }
  })

  it('H1 sends files behind the commit, or not at all', async () => {
    const directory = await mkdtemp(join(tmpdir(), 'ambient-db-file-'))
    closing(() => rm(directory, { recursive: true }))
    const file = join(directory, 'file.txt')
    await writeFile(file, 'y'.repeat(1_000_000))
    const app = framework()
    app.use(databaseContext())
    const source = createReadStream(file)
    app.get('/good', async (_request, response) => note('a').then(() => response.sendFile(file)))
    app.get('/doomed', async (_request, response) => doom().then(() => response.sendFile(file)))
    app.get('/piped', async (_request, response) => doom().then(() => source.pipe(response)))
    const errors = answerErrors(app)
    const client = await open(await start(app))
    client.send({ path: '/good' })
    await client.firstByte()
    expect(await notes()).toEqual(['a'])
    expect((await client.answer()).body).toHaveLength(1_000_000)
    for (const path of ['/doomed', '/piped']) {
      client.send({ path })
      const { status, headers, body } = await client.answer()
      expect([status, headers['last-modified'], headers['cache-control']]).toEqual([500, undefined, undefined])
      expect(body).not.toContain('yyy')
    }
    expect(errors).toHaveLength(2)
    while (!source.destroyed) await nextTurn()
  })

  it('H1 never lets an answer through whose handler fails afterwards', async () => {
    const app = framework()
    app.use(databaseContext())
    app.get('/', async (_request, response, next) => {
      await note('a')
      response.json({ good: true })
      next(new Error('after the answer'))
    })
    app.set('env', 'test')
    const client = await open(await start(app))
    client.send({ path: '/' })
    await client.closed
    expect(client.pending).toBe('')
  })

  it('S11 answers 503 for a full pool', async () => {
    const pool = new Pool({
      connectionString: ((await notebook.databases.main.ambient.connect()) as Pool).options.connectionString,
      max: 1,
    })
    const small = defineDatabase({ name: 'small', adapter: pgAdapter(() => pool), acquireTimeout: 50 })
    closing(() => small.shutdown())
    const holder = await pool.connect()
    const app = framework()
    app.set('env', 'test')
    app.use(databaseContext())
    app.get('/', async (_request, response, next) => {
      await small.db.query('select 1').then(() => response.send('good'), next)
    })
    const { status } = await ask(await start(app), { path: '/' })
    holder.release()
    expect(status).toBe(503)
  })

  it('says what is wrong when the middleware was not made', async () => {
    const app = framework()
    app.use(databaseContext as unknown as express.RequestHandler)
    const errors = answerErrors(app)
    await ask(await start(app), { path: '/' })
    expect(isAmbientError(errors[0], 'AMBIENT_INVALID_ARGUMENT')).toBe(true)
  })
})
