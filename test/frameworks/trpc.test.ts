import { initTRPC, TRPCError } from '@trpc/server'
import { createHTTPHandler } from '@trpc/server/adapters/standalone'
import { hasContext, isAmbientError, newContext } from 'ambient-db'
import { databaseContext as nodeContext } from 'ambient-db/node-http'
import { databaseContext } from 'ambient-db/trpc'
import { describe, expect, it } from 'vitest'
import { Context } from '../../src/context.ts'
import { useNotebook } from './notebook.ts'
import { serve } from './support.ts'

const notebook = useNotebook()
const { note, doom, notes, contexts, open, closing } = notebook
const headers = { 'content-type': 'application/json' }
const t = initTRPC.create()
const procedure = t.procedure.use(databaseContext())

/** Serves a router; resolves with its port, and what its error handler was given. */
async function start(router: ReturnType<typeof t.router>): Promise<{ port: number; errors: TRPCError[] }> {
  const errors: TRPCError[] = []
  const handler = createHTTPHandler({
    router,
    createContext: () => ({}),
    onError: ({ error }) => void errors.push(error),
  })
  const server = await serve(handler)
  closing(() => server.close())
  return { port: server.port, errors }
}

async function post(port: number, path: string): Promise<{ status: number; body: never }> {
  const response = await fetch(`http://127.0.0.1:${port}/${path}`, { method: 'POST', headers })
  return { status: response.status, body: (await response.json()) as never }
}

describe('H8 a procedure', () => {
  it('is committed before its answer leaves', async () => {
    const { port } = await start(t.router({ make: procedure.mutation(() => note('a')) }))
    const client = await open(port)
    client.send({ method: 'POST', path: '/make', headers })
    await client.firstByte()
    expect(await notes()).toEqual(['a'])
    expect((await client.answer()).status).toBe(200)
  })

  it('of a batch is settled by its own result', async () => {
    const seen = new Set<unknown>()
    const router = t.router({
      good: procedure.mutation(async () => {
        await note('good')
        seen.add((await notebook.databases.main.query('select txid_current() as id'))[0]?.id)
      }),
      bad: procedure.mutation(async () => {
        await note('bad')
        throw new TRPCError({ code: 'CONFLICT' })
      }),
      doomed: procedure.mutation(async () => {
        await note('doomed')
        await doom()
      }),
      other: procedure.mutation(async () => {
        await note('other')
        seen.add((await notebook.databases.main.query('select txid_current() as id'))[0]?.id)
      }),
    })
    const { port, errors } = await start(router)
    const { status, body } = await post(port, 'good,bad,doomed,other?batch=1')
    expect(status).toBe(207)
    expect(body).toMatchObject([
      { result: {} },
      { error: { data: { code: 'CONFLICT' } } },
      { error: { data: { code: 'INTERNAL_SERVER_ERROR' }, message: expect.stringContaining('foreign key') } },
      { result: {} },
    ])
    expect(await notes()).toEqual(['good', 'other'])
    expect(seen.size).toBe(2)
    expect(errors.map(({ cause }) => (cause as { code?: string } | undefined)?.code)).toContain('23503')
  })

  it('whose client goes is rolled back', async () => {
    let leave = () => {}
    let ended: Promise<unknown> = Promise.resolve()
    const gone = new Promise<void>((resolve) => {
      leave = resolve
    })
    const { port, errors } = await start(
      t.router({
        make: procedure.mutation(({ signal }) => {
          ended = (async () => {
            await note('a')
            leave()
            await new Promise((resolve) => signal?.addEventListener('abort', resolve))
            return note('b')
          })()
          return ended
        }),
      }),
    )
    const client = await open(port)
    client.send({ method: 'POST', path: '/make', headers })
    await gone
    client.destroy()
    await expect.poll(() => errors.length).toBeGreaterThan(0)
    await expect(ended).rejects.toSatisfy((error) => isAmbientError(error, 'AMBIENT_CONTEXT_ENDED'))
    expect(await notes()).toEqual([])
  })

  it('is the unit beside the request that it came with, and beside one that it calls', async () => {
    const router = t.router({
      inner: procedure.mutation(async () => {
        await note('inner')
        throw new TRPCError({ code: 'CONFLICT' })
      }),
      outer: procedure.mutation(async ({ ctx }) => {
        await note('outer')
        await t
          .createCallerFactory(router)(ctx)
          .inner()
          .catch(() => {})
      }),
    })
    const handler = createHTTPHandler({ router, createContext: () => ({}) })
    const failing = nodeContext(async (request, response) => {
      await note('request')
      response.statusCode = 500
      handler(request, response)
    })
    const server = await serve(failing, [])
    closing(() => server.close())
    await post(server.port, 'outer')
    expect(await notes()).toEqual(['outer'])
  })

  it('has one context, however often the middleware stands there', async () => {
    const make = procedure.use(databaseContext()).mutation(async () => {
      await note('a')
      await doom()
    })
    await expect(t.createCallerFactory(t.router({ make }))({}).make()).rejects.toMatchObject({
      cause: { code: '23503' },
    })
    expect(await contexts()).toBe(1)
  })

  it('keeps the order of middlewares and their context', async () => {
    const withUser = t.procedure
      .use(({ next }) => next({ ctx: { user: 'ann', inside: hasContext() } }))
      .use(databaseContext())
      .use(({ next, ctx }) => next({ ctx: { ...ctx, inside: [ctx.inside, hasContext()] } }))
    const caller = t.createCallerFactory(t.router({ who: withUser.query(({ ctx }) => [ctx.user, ctx.inside]) }))({})
    expect(await caller.who()).toEqual(['ann', [false, true]])
  })

  it('takes its options by the call', async () => {
    const { main } = notebook.databases
    const readOnly = async () => (await main.query('show transaction_read_only'))[0]?.transaction_read_only
    const by = t.procedure.use(
      databaseContext({
        transaction: ({ type }) => ({ readOnly: type === 'query' }),
        skip: ({ path }) => path === 'skipped',
        outcome: (status, { path }) =>
          status === 404 && path === 'missing' ? 'commit' : status < 400 ? 'commit' : 'rollback',
      }),
    )
    const caller = t.createCallerFactory(
      t.router({
        read: by.query(readOnly),
        write: by.mutation(readOnly),
        skipped: by.query(() => hasContext()),
        missing: by.mutation(async () => {
          await note('missing')
          throw new TRPCError({ code: 'NOT_FOUND' })
        }),
      }),
    )({})
    expect([await caller.read(), await caller.write(), await caller.skipped()]).toEqual(['on', 'off', false])
    await expect(caller.missing()).rejects.toMatchObject({ code: 'NOT_FOUND' })
    expect(await notes()).toEqual(['missing'])
  })

  it('that is a subscription has ended its context when it yields', async () => {
    const caller = t.createCallerFactory(
      t.router({
        watch: procedure.subscription(async function* () {
          yield await note('a').catch((error) => error.code)
          yield await newContext(() => note('b').then(() => 'noted'))
        }),
      }),
    )({})
    const seen = []
    for await (const event of await caller.watch()) seen.push(event)
    expect(seen[0]).toMatch(/^AMBIENT_(NO_CONTEXT|CONTEXT_ENDED)$/)
    expect([seen[1], await notes()]).toEqual(['noted', ['b']])
  })
})

it('C3 a procedure yields to a context of the testing tools', async () => {
  const test = new Context({ adoptable: true })
  await test.run(async () => {
    await t
      .createCallerFactory(t.router({ make: procedure.mutation(() => note('a')) }))({})
      .make()
    expect(await notes()).toEqual([])
  })
  await test.settle('rollback')
  expect(await notes()).toEqual([])
})
