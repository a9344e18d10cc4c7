import { All, Catch, Controller, Module, Req, Res } from '@nestjs/common'
import { NestFactory } from '@nestjs/core'
import { ExpressAdapter } from '@nestjs/platform-express'
import { FastifyAdapter } from '@nestjs/platform-fastify'
import { DatabaseContextModule } from 'ambient-db/nestjs'
import type { Response } from 'express'
import type { FastifyReply } from 'fastify'
import { afterAll, beforeAll, describe, it } from 'vitest'
import {
  type FrameworkHarness,
  frameworkSuite,
  type SuiteApp,
  type SuiteHandler,
  type SuiteServer,
} from '../../src/conformance/frameworks.ts'
import { createDatabases, type Databases, send, unfold } from './support.ts'

type Platform = 'express' | 'fastify'

let databases: Databases
beforeAll(async () => {
  databases = await createDatabases()
})
afterAll(() => databases.close())

describe.each(['express', 'fastify'] as const)('NestJS 12 on %s', (platform) => {
  for (const { name, run } of frameworkSuite) it(name, () => run(harness(platform)))
})

function harness(platform: Platform): FrameworkHarness {
  return { main: databases.main, other: databases.other, node: true, start: (app) => start(app, platform) }
}

async function start(
  { routes, options = {}, mounted = 1, around }: SuiteApp,
  platform: Platform,
): Promise<SuiteServer> {
  const errors: unknown[] = []
  class Filter {
    catch(error: unknown, host: { switchToHttp(): { getResponse(): unknown } }) {
      errors.push(error)
      const response = host.switchToHttp().getResponse()
      const { statusCode = 500, message } = error as { statusCode?: number; message: string }
      if (platform === 'express') {
        const { headersSent } = response as Response
        if (!headersSent) (response as Response).status(statusCode).json({ error: message })
      } else (response as FastifyReply).code(statusCode).send({ error: message })
    }
  }
  Catch()(Filter)

  // The databases outlive the app.
  class App {}
  const imports = Array.from({ length: mounted }, () => DatabaseContextModule.forRoot({ ...options, databases: [] }))
  Module({ imports, controllers: [controllerOf(routes, platform)] })(App)
  const adapter = platform === 'express' ? new ExpressAdapter() : new FastifyAdapter({ forceCloseConnections: true })
  if (around && adapter instanceof ExpressAdapter)
    adapter.use((_request: unknown, _response: unknown, next: () => void) => void around(next))
  if (adapter instanceof FastifyAdapter) {
    const instance = adapter.getInstance()
    if (around) instance.addHook('onRequest', (_request, _reply, proceed) => void around(() => proceed()))
    instance.addContentTypeParser('*', (_request, _payload, done) => done(null)) // its handler reads it
  }
  const app = await NestFactory.create(App, adapter as never, { logger: false, forceCloseConnections: true })
  app.useGlobalFilters(new Filter())
  await app.listen(0, '127.0.0.1')
  return { port: Number(new URL(await app.getUrl()).port), errors, close: () => app.close() }
}

/** A controller with a method for each route. */
function controllerOf(routes: Readonly<Record<string, SuiteHandler>>, platform: Platform): new () => object {
  class Routes {}
  const prototype = Routes.prototype as Record<string, unknown>
  for (const [index, [path, handler]] of Object.entries(routes).entries()) {
    const name = `route${index}`
    prototype[name] = platform === 'express' ? onExpress(handler) : onFastify(handler)
    All(path)(prototype, name, Object.getOwnPropertyDescriptor(prototype, name) as PropertyDescriptor)
    Req()(prototype, name, 0)
    Res()(prototype, name, 1)
  }
  Controller()(Routes)
  return Routes
}

function onExpress(handler: SuiteHandler) {
  return async (request: Response['req'], response: Response) => {
    const answer = await handler({ json: async () => request.body, node: { request, response } })
    if (!answer) return
    const { status, headers, text, stream } = unfold(answer)
    response.status(status).set(headers)
    if (stream) send(stream, response)
    else if (text === undefined) response.end()
    else response.send(text)
  }
}

function onFastify(handler: SuiteHandler) {
  return async (request: FastifyReply['request'], reply: FastifyReply) => {
    const answer = await handler({
      json: async () => request.body,
      node: { request: request.raw, response: reply.raw },
    })
    if (!answer) return reply.hijack()
    const { status, headers, text, stream } = unfold(answer)
    return reply
      .code(status)
      .headers(headers)
      .send(stream ?? text)
  }
}
