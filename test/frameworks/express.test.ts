import { databaseContext } from 'ambient-db/express'
import express from 'express'
import express4 from 'express4'
import { afterAll, beforeAll, describe, it } from 'vitest'
import { type FrameworkHarness, frameworkSuite, type SuiteApp } from '../../src/conformance/frameworks.ts'
import { createDatabases, type Databases, send, serve, unfold } from './support.ts'

let databases: Databases
beforeAll(async () => {
  databases = await createDatabases()
})
afterAll(() => databases.close())

describe.each([
  ['Express 5', express],
  ['Express 4', express4 as unknown as typeof express], // the calls below are the same in both
])('%s', (_name, framework) => {
  for (const { name, run } of frameworkSuite) it(name, () => run(harness()))

  function harness(): FrameworkHarness {
    return { main: databases.main, other: databases.other, node: true, start }
  }

  function start({ routes, options = {}, mounted = 1, around }: SuiteApp) {
    const errors: unknown[] = []
    const app = framework()
    if (around) app.use((_request, _response, next) => void around(next))
    for (let times = 0; times < mounted; times++) app.use(databaseContext(options))
    app.use(framework.json())
    for (const [path, handler] of Object.entries(routes)) {
      app.all(path, async (request, response, next) => {
        try {
          const answer = await handler({ json: async () => request.body, node: { request, response } })
          if (!answer) return
          const { status, headers, text, stream } = unfold(answer)
          response.status(status).set(headers)
          if (stream) send(stream, response)
          else if (text === undefined) response.end()
          else response.send(text)
        } catch (error) {
          next(error)
        }
      })
    }
    app.use(
      (
        error: Error & { statusCode?: number },
        _request: unknown,
        response: express.Response,
        next: express.NextFunction,
      ) => {
        errors.push(error)
        if (response.headersSent) return next(error)
        response.status(error.statusCode ?? 500).json({ error: error.message })
      },
    )
    return serve(app, errors)
  }
})
