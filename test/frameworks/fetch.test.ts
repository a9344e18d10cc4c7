import { getRequestListener } from '@hono/node-server'
import { databaseContext } from 'ambient-db/fetch'
import { afterAll, beforeAll, describe, it } from 'vitest'
import { type FrameworkHarness, frameworkSuite, type SuiteApp } from '../../src/conformance/frameworks.ts'
import { createDatabases, type Databases, serve, toResponse } from './support.ts'

let databases: Databases
beforeAll(async () => {
  databases = await createDatabases()
})
afterAll(() => databases.close())

describe('fetch handlers', () => {
  for (const { name, needsNode, run } of frameworkSuite) if (!needsNode) it(name, () => run(harness()))
})

function harness(): FrameworkHarness {
  return { main: databases.main, other: databases.other, node: false, start }
}

function start({ routes, options = {}, mounted = 1, around }: SuiteApp) {
  const errors: unknown[] = []
  const pathOf = ({ url }: { url: string }) => ({ url: new URL(url).pathname })
  const { skip, outcome, transaction } = options
  let handler = async (request: Request): Promise<Response> => {
    const route = routes[pathOf(request).url]
    if (!route) throw new Error('no such route')
    const answer = await route({ json: () => request.json() })
    return toResponse(answer ?? {})
  }
  const byPath = {
    ...options,
    skip: (request: Request) => skip?.(pathOf(request)) ?? false,
    ...(outcome && { outcome: (status: number, request: Request) => outcome(status, pathOf(request)) }),
    transaction: (request: Request) => (typeof transaction === 'function' ? transaction(pathOf(request)) : transaction),
  }
  for (let times = 0; times < mounted; times++) handler = databaseContext(handler, byPath)
  const serveSafely = async (request: Request) => {
    try {
      return await (around ? (around(() => handler(request)) as Promise<Response>) : handler(request))
    } catch (error) {
      errors.push(error)
      const { statusCode = 500, message } = error as { statusCode?: number; message: string }
      return new Response(message, { status: statusCode })
    }
  }
  return serve(getRequestListener(serveSafely), errors)
}
