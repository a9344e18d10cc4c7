import type { RequestListener } from 'node:http'
import { text } from 'node:stream/consumers'
import { databaseContext } from 'ambient-db/node-http'
import { afterAll, beforeAll, describe, it } from 'vitest'
import { type FrameworkHarness, frameworkSuite, type SuiteApp } from '../../src/conformance/frameworks.ts'
import { createDatabases, type Databases, send, serve, unfold } from './support.ts'

let databases: Databases
beforeAll(async () => {
  databases = await createDatabases()
})
afterAll(() => databases.close())

describe('node:http', () => {
  for (const { name, run } of frameworkSuite) it(name, () => run(harness()))
})

function harness(): FrameworkHarness {
  return { main: databases.main, other: databases.other, node: true, start }
}

function start({ routes, options = {}, mounted = 1 }: SuiteApp) {
  const errors: unknown[] = []
  let handler: RequestListener = async (request, response) => {
    const route = routes[request.url ?? '']
    if (!route) throw Object.assign(new Error('no such route'), { statusCode: 404 })
    const answer = await route({ json: async () => JSON.parse(await text(request)), node: { request, response } })
    if (!answer) return
    const { status, headers, text: body, stream } = unfold(answer)
    response.writeHead(status, headers)
    if (stream) send(stream, response)
    else response.end(body)
  }
  for (let inner = 1; inner < mounted; inner++) handler = databaseContext(handler)
  const outermost = databaseContext(handler, {
    ...options,
    onError(error, _request, response) {
      errors.push(error)
      const { statusCode = 500, message } = error as { statusCode?: number; message: string }
      response.writeHead(statusCode).end(message)
    },
  })
  return serve(outermost, errors)
}
