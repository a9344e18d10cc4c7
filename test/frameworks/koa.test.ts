import bodyParser from '@koa/bodyparser'
import { databaseContext } from 'ambient-db/koa'
import Koa, { type Context } from 'koa'
import { afterAll, beforeAll, describe, it } from 'vitest'
import { type FrameworkHarness, frameworkSuite, type SuiteApp } from '../../src/conformance/frameworks.ts'
import { createDatabases, type Databases, serve, unfold } from './support.ts'

let databases: Databases
beforeAll(async () => {
  databases = await createDatabases()
})
afterAll(() => databases.close())

describe('Koa 3', () => {
  for (const { name, run } of frameworkSuite) it(name, () => run(harness()))
})

function harness(): FrameworkHarness {
  return { main: databases.main, other: databases.other, node: true, start }
}

function start({ routes, options = {}, mounted = 1, around }: SuiteApp) {
  const errors: unknown[] = []
  const app = new Koa()
  app.use(async (context, next) => {
    try {
      await next()
    } catch (error) {
      errors.push(error)
      const { statusCode = 500, message } = error as { statusCode?: number; message: string }
      context.status = statusCode
      context.body = { error: message }
    }
  })
  app.on('error', (error) => {
    if (!error.headerSent) errors.push(error) // otherwise Koa tells of a connection that broke
  })
  if (around) app.use((_context, next) => around(next) as Promise<void>)
  for (let times = 0; times < mounted; times++) app.use(databaseContext(options))
  app.use(bodyParser())
  app.use(async (context: Context) => {
    const handler = routes[context.path]
    if (!handler) return
    context.res.statusCode = 200 // Koa begins with 404, also for those who go past it
    const node = { request: context.req, response: context.res }
    const answer = await handler({ json: async () => context.request.body, node })
    if (!answer) {
      context.respond = false
      return
    }
    const { status, headers, text, stream } = unfold(answer)
    context.status = status
    context.set(headers)
    context.body = stream ?? text ?? null
    context.status = status
  })
  return serve(app.callback(), errors)
}
