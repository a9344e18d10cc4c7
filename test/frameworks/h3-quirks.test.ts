import { databaseContext } from 'ambient-db/h3'
import { H3, type H3Event, HTTPError, HTTPResponse, handleCors, html, noContent, redirect, toNodeHandler } from 'h3'
import { describe, expect, it } from 'vitest'
import { useNotebook } from './notebook.ts'
import { serve } from './support.ts'

const { note, doom, notes, closing } = useNotebook()

async function start(app: H3): Promise<string> {
  const server = await serve(toNodeHandler(app) as Parameters<typeof serve>[0])
  closing(() => server.close())
  return `http://127.0.0.1:${server.port}`
}

describe('H2 the status', () => {
  it.each([
    ['a text', () => 'text', 200],
    ['an object with a status of its own', () => ({ status: 500, headers: {} }), 200],
    ['a status that was set', (event) => Object.assign(event.res, { status: 422 }) && 'text', 422],
    ['a response', () => new Response('no', { status: 409 }), 409],
    ['an HTTPResponse', () => new HTTPResponse('made', { status: 201 }), 201],
    [
      'an HTTPResponse that leaves it to others',
      (event) => Object.assign(event.res, { status: 410 }) && html('no'),
      410,
    ],
    ['a redirect', () => redirect('/made', 303), 303],
    ['no content', () => noContent(), 204],
    ['an error that is returned', () => new HTTPError({ status: 418 }), 418],
    ['an error that is thrown', () => Promise.reject(new HTTPError({ status: 403 })), 403],
  ] satisfies [string, (event: H3Event) => unknown, number][])('of %s decides', async (_what, answer, expected) => {
    const app = new H3({ silent: true })
    app.use(databaseContext())
    app.get('/:way', async (event) => {
      await note(event.context.params?.way ?? '')
      return answer(event)
    })
    expect((await app.request('/fetch')).status).toBe(expected)
    expect((await fetch(`${await start(app)}/node`, { redirect: 'manual' })).status).toBe(expected)
    expect(await notes()).toEqual(expected < 400 ? ['fetch', 'node'] : [])
  })

  it('of a path that nobody serves is 404', async () => {
    const app = new H3({ silent: true })
    app.use(databaseContext())
    app.use(() => note('a'))
    expect((await app.request('/missing')).status).toBe(404)
    expect(await notes()).toEqual([])
  })
})

describe('H1 a commit that fails', () => {
  function doomed(app: H3): H3 {
    app.use(databaseContext())
    app.get('/', async (event) => {
      await doom()
      event.res.status = 201
      event.res.statusText = 'Made'
      event.res.headers.set('x-first', 'yes')
      event.res.errHeaders.set('x-first-error', 'yes')
      return { first: true }
    })
    return app
  }

  it.each(['by fetch', 'on Node'])('is answered by h3 itself where nobody else does: %s', async (way) => {
    const app = new H3({ silent: true })
    app.use((event) => {
      handleCors(event, { origin: '*' })
      event.res.errHeaders.set('x-before', 'yes')
    })
    doomed(app)
    const { status, statusText, headers } = await (way === 'on Node' ? fetch(await start(app)) : app.request('/'))
    expect([status, statusText === 'Made', headers.get('x-before')]).toEqual([500, false, 'yes'])
    expect([headers.get('x-first'), headers.get('x-first-error')]).toEqual([null, null])
  })

  it('leaves no success to an error handler that says nothing of the status', async () => {
    const errors: HTTPError[] = []
    const app = doomed(
      new H3({
        silent: true,
        onError(error) {
          errors.push(error)
          return 'failed'
        },
      }),
    )
    const answer = await app.request('/')
    expect([answer.status, await answer.text(), answer.headers.get('x-first')]).toEqual([500, 'failed', null])
    expect(answer.statusText).not.toBe('Made')
    expect(errors).toEqual([expect.objectContaining({ cause: expect.objectContaining({ code: '23503' }) })])
  })

  it.each([
    ['a stream', (body: ReadableStream) => body],
    ['a response', (body: ReadableStream) => new Response(body)],
  ])('ends what %s is read from', async (_what, answer) => {
    let cancelled = false
    const body = new ReadableStream({
      cancel() {
        cancelled = true
      },
    })
    const app = new H3({ silent: true })
    app.use(databaseContext())
    app.get('/', async () => {
      await doom()
      return answer(body)
    })
    expect([(await app.request('/')).status, cancelled]).toEqual([500, true])
  })
})
