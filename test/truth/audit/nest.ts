import { All, type ArgumentsHost, Catch, Controller, Module, Req, Res } from '@nestjs/common'
import { NestFactory } from '@nestjs/core'
import { ExpressAdapter } from '@nestjs/platform-express'
import { FastifyAdapter } from '@nestjs/platform-fastify'
import type express from 'express'
import type { FastifyReply, FastifyRequest } from 'fastify'
import { DatabaseContextModule } from '../../../src/frameworks/nestjs.ts'
import type { App, Framework } from './frameworks.ts'
import { replyByExpress, replyByFastify } from './replies.ts'
import { type Answer, Recoverable } from './styles.ts'

/** NestJS on one of its platforms: errors are answered by exception filters. */
export function onNest(name: string, platform: 'express' | 'fastify'): Framework {
  const reply = (answer: Answer, response: express.Response | FastifyReply) => {
    if ('raw' in response) replyByFastify(answer, response)
    else replyByExpress(answer, response)
  }
  const serve = async (app: App) => {
    class ExplainingFilter {
      catch(error: unknown, host: ArgumentsHost) {
        const response = host.switchToHttp().getResponse()
        if (!response.headersSent) reply(error instanceof Recoverable ? error.answer : app.explain(error), response)
      }
    }
    class Routes {
      async handle(request: express.Request | FastifyRequest, response: express.Response | FastifyReply) {
        reply(await app.handle(request.originalUrl, request.body), response)
      }
    }
    class Root {}
    Catch()(ExplainingFilter)
    const { prototype } = Routes
    All(platform === 'express' ? '*path' : '*')(
      prototype,
      'handle',
      Object.getOwnPropertyDescriptor(prototype, 'handle') as PropertyDescriptor,
    )
    Req()(prototype, 'handle', 0)
    Res()(prototype, 'handle', 1)
    Controller()(Routes)
    // The databases outlive the server.
    Module({ imports: [DatabaseContextModule.forRoot({ ...app.options, databases: [] })], controllers: [Routes] })(Root)
    const adapter = platform === 'express' ? new ExpressAdapter() : new FastifyAdapter()
    const server = await NestFactory.create(Root, adapter as never, { logger: false })
    server.useGlobalFilters(new ExplainingFilter())
    await server.listen(0, '127.0.0.1')
    Object.assign(server.getHttpServer(), { keepAliveTimeout: 120_000 })
    return { port: Number(new URL(await server.getUrl()).port), close: () => server.close() }
  }
  return { name, protocol: 'http1', serve }
}
