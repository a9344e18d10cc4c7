import { hasContext, isAmbientError } from 'ambient-db'
import { databaseContext } from 'ambient-db/fetch'
import { describe, expect, it } from 'vitest'
import { useNotebook } from './notebook.ts'

const { note, doom, notes } = useNotebook()

const request = (init?: RequestInit) => new Request('http://localhost/', init)

describe('H2 what a handler throws to answer with', () => {
  const digest = (text: string) => Object.assign(new Error(text), { digest: text })
  it.each([
    ['a redirect of React Router', Response.redirect('http://localhost/made', 303), true],
    ['a response that says no', new Response('no', { status: 404 }), false],
    ['a redirect of Next.js', digest('NEXT_REDIRECT;replace;/made?a=1;b=2;307;'), true],
    ['what Next.js throws for a page that is not there', digest('NEXT_HTTP_ERROR_FALLBACK;404'), false],
    ['an error of Next.js that stands for no answer', digest('BAILOUT_TO_CLIENT_SIDE_RENDERING'), false],
    ['a redirect of SvelteKit', { status: 303, location: '/made' }, true],
    ['an error of SvelteKit', { status: 404, body: { message: 'no' } }, false],
    ['an error with a status that is no answer', Object.assign(new Error('no'), { status: 200 }), false],
    ['an error', new Error('no'), false],
    ['nothing', undefined, false],
  ])('%s decides by its status, and is thrown on', async (_what, thrown, commits) => {
    const handler = databaseContext(async () => {
      await note('a')
      throw thrown
    })
    await expect(handler(request())).rejects.toBe(thrown)
    expect(await notes()).toEqual(commits ? ['a'] : [])
  })

  it('gives way to the error of its commit', async () => {
    const handler = databaseContext(async () => {
      await doom()
      throw Response.redirect('http://localhost/made', 303)
    })
    await expect(handler(request())).rejects.toMatchObject({ code: '23503' })
  })
})

describe('H2 a response', () => {
  it('decides by its status', async () => {
    const handler = databaseContext(async ({ url }: Request) => {
      const status = Number(new URL(url).searchParams.get('status'))
      await note(String(status))
      return new Response(null, { status })
    })
    for (const status of [200, 204, 303, 400, 503]) await handler(new Request(`http://localhost/?status=${status}`))
    expect(await notes()).toEqual(['200', '204', '303'])
  })

  it.each([
    ['of a network error', () => Response.error()],
    ['that is missing', () => undefined as unknown as Response],
  ])('%s rolls back', async (_what, respond) => {
    const handler = databaseContext(async () => {
      await note('a')
      return respond()
    })
    await handler(request())
    expect(await notes()).toEqual([])
  })

  it('whose `outcome` cannot be told rolls back', async () => {
    const handler = databaseContext(
      async () => {
        await note('a')
        return new Response('done')
      },
      {
        outcome() {
          throw new Error('cannot be told')
        },
      },
    )
    await expect(handler(request())).rejects.toThrow('cannot be told')
    expect(await notes()).toEqual([])
  })
})

it('H1 a commit that fails is thrown, and ends what the body is read from', async () => {
  let cancelled = false
  const handler = databaseContext(async () => {
    await doom()
    const cancel = () => {
      cancelled = true
    }
    return new Response(new ReadableStream({ cancel }))
  })
  await expect(handler(request())).rejects.toMatchObject({ code: '23503' })
  expect(cancelled).toBe(true)
})

describe('H4 the signal', () => {
  const abortAndAnswer = (client: AbortController) => async () => {
    await note('a')
    client.abort()
    return new Response('done')
  }

  it('of the request rolls back', async () => {
    const client = new AbortController()
    const handled = databaseContext(abortAndAnswer(client))(request({ signal: client.signal }))
    await expect(handled).rejects.toSatisfy((error) => isAmbientError(error, 'AMBIENT_ABORTED'))
    expect(await notes()).toEqual([])
  })

  it('can be another one, or none', async () => {
    const client = new AbortController()
    const aborted = databaseContext(abortAndAnswer(client), { signal: () => client.signal })
    await expect(aborted(request())).rejects.toSatisfy((error) => isAmbientError(error, 'AMBIENT_ABORTED'))
    const unaware = new AbortController()
    await databaseContext(abortAndAnswer(unaware), { signal: () => undefined })(request({ signal: unaware.signal }))
    expect(await notes()).toEqual(['a'])
  })

  it('keeps nothing of a request that was answered', async () => {
    const client = new AbortController()
    await databaseContext(async () => new Response(await note('a').then(() => 'done')))(
      request({ signal: client.signal }),
    )
    client.abort()
    expect(await notes()).toEqual(['a'])
  })
})

it('H6 the handler gets all its arguments, and the context', async () => {
  const handler = databaseContext(async (_request: Request, { params }: { params: { id: string } }) =>
    Response.json([params.id, hasContext()]),
  )
  const response = await handler(request(), { params: { id: '7' } })
  expect(await response.json()).toEqual(['7', true])
  expect(hasContext()).toBe(false)
})
