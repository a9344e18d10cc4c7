import type { RequestListener } from 'node:http'
import { finished } from 'node:stream/promises'
import { getRequestListener } from '@hono/node-server'
import { databaseContext } from 'ambient-db/h3'
import { H3, toNodeHandler } from 'h3'
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
  ['h3 2 on Node', true],
  ['h3 2 by fetch', false],
])('%s', (_name, node) => {
  for (const { name, needsNode, run } of frameworkSuite) if (node || !needsNode) it(name, () => run(harness(node)))
})

function harness(node: boolean): FrameworkHarness {
  return { main: databases.main, other: databases.other, node, start: (app) => start(app, node) }
}

async function start({ routes, options = {}, mounted = 1, around }: SuiteApp, node: boolean): Promise<SuiteServer> {
  const errors: unknown[] = []
  const app = new H3({
    silent: true,
    onError(error) {
      const original = (error.cause ?? error) as { statusCode?: number; message: string }
      errors.push(original)
      return new Response(original.message, { status: original.statusCode ?? 500 })
    },
  })
  if (around) app.use((_event, next) => around(next))
  const { skip, outcome, transaction } = options
  const byPath: Parameters<typeof databaseContext>[0] = {
    ...options,
    skip: ({ url }) => skip?.({ url: url.pathname }) ?? false,
    outcome: (status, { url }) => outcome?.(status, { url: url.pathname }) ?? (status < 400 ? 'commit' : 'rollback'),
    transaction: ({ url }) => (typeof transaction === 'function' ? transaction({ url: url.pathname }) : transaction),
  }
  for (let times = 0; times < mounted; times++) app.use(databaseContext(byPath))
  for (const [path, handler] of Object.entries(routes)) {
    app.all(path, async (event) => {
      const { req: request, res: response } = event.runtime?.node ?? {}
      const answer = await handler({
        json: () => event.req.json(),
        node: node ? ({ request, response } as never) : undefined,
      })
      if (answer) return toResponse(answer)
      await finished(response as NodeJS.WritableStream).catch(() => {})
      return Symbol.for('h3.handled')
    })
  }
  const listener = node ? toNodeHandler(app) : getRequestListener((request) => app.fetch(request))
  const server = await serve(listener as RequestListener, errors)
  // What fails past h3 is no business of `onError`.
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
