import { getRequestListener, type HttpBindings } from '@hono/node-server'
import { RESPONSE_ALREADY_SENT } from '@hono/node-server/utils/response'
import { databaseContext } from 'ambient-db/hono'
import { Hono } from 'hono'
import type { ContentfulStatusCode } from 'hono/utils/http-status'
import { afterAll, beforeAll, describe, it } from 'vitest'
import {
  type FrameworkHarness,
  frameworkSuite,
  type SuiteApp,
  type SuiteServer,
} from '../../src/conformance/frameworks.ts'
import { createDatabases, type Databases, serve, toResponse } from './support.ts'

let databases: Databases
beforeAll(async () => {
  databases = await createDatabases()
})
afterAll(() => databases.close())

describe.each([
  ['Hono 4 on Node', true],
  ['Hono 4 by fetch', false],
])('%s', (_name, node) => {
  for (const { name, needsNode, run } of frameworkSuite) if (node || !needsNode) it(name, () => run(harness(node)))
})

function harness(node: boolean): FrameworkHarness {
  return { main: databases.main, other: databases.other, node, start: (app) => start(app, node) }
}

async function start({ routes, options = {}, mounted = 1, around }: SuiteApp, node: boolean): Promise<SuiteServer> {
  const errors: unknown[] = []
  const app = new Hono<{ Bindings: HttpBindings }>()
  app.onError((error, context) => {
    errors.push(error)
    const { statusCode = 500, message } = error as { statusCode?: ContentfulStatusCode; message: string }
    return context.json({ error: message }, statusCode)
  })
  if (around) app.use((_context, next) => around(next) as Promise<void>)
  const { skip, outcome, transaction } = options
  const byPath = {
    ...options,
    ...(skip && { skip: ({ path }: { path: string }) => skip({ url: path }) }),
    ...(outcome && { outcome: (status: number, { path }: { path: string }) => outcome(status, { url: path }) }),
    ...(typeof transaction === 'function' && {
      transaction: ({ path }: { path: string }) => transaction({ url: path }),
    }),
  } as Parameters<typeof databaseContext>[0]
  for (let times = 0; times < mounted; times++) app.use(databaseContext(byPath))
  for (const [path, handler] of Object.entries(routes)) {
    app.all(path, async (context) => {
      const bindings = node ? { request: context.env.incoming, response: context.env.outgoing } : undefined
      const answer = await handler({ json: () => context.req.json(), node: bindings as never })
      return answer ? toResponse(answer) : RESPONSE_ALREADY_SENT
    })
  }
  const fetch = node ? app.fetch : (request: Request) => app.fetch(request)
  const server = await serve(getRequestListener(fetch as never), errors)
  // What fails past Hono is no business of `onError`.
  const onWarning = (warning: Error) => {
    if (warning.name === 'AmbientRequestWarning') errors.push(warning)
  }
  process.on('warning', onWarning)
  return {
    ...server,
    close() {
      process.off('warning', onWarning)
      return server.close()
    },
  }
}
