import { createServer, type IncomingMessage, type RequestListener, type ServerResponse } from 'node:http'
import { createServer as createHttp2Server } from 'node:http2'
import type { AddressInfo, Server } from 'node:net'
import { text } from 'node:stream/consumers'
import { getRequestListener } from '@hono/node-server'
import bodyParser from '@koa/bodyparser'
import express from 'express'
import express4 from 'express4'
import fastify, { type FastifyInstance } from 'fastify'
import { H3, toNodeHandler } from 'h3'
import { Hono } from 'hono'
import Koa from 'koa'
import { databaseContext as expressContext } from '../../../src/frameworks/express.ts'
import { databaseContext as fastifyContext } from '../../../src/frameworks/fastify.ts'
import { databaseContext as fetchContext } from '../../../src/frameworks/fetch.ts'
import { databaseContext as h3Context } from '../../../src/frameworks/h3.ts'
import { databaseContext as honoContext } from '../../../src/frameworks/hono.ts'
import { databaseContext as koaContext } from '../../../src/frameworks/koa.ts'
import { databaseContext } from '../../../src/frameworks/node-http.ts'
import type { DatabaseContextOptions } from '../../../src/request.ts'
import { onNest } from './nest.ts'
import { replyByExpress, replyByFastify, replyByNode, toResponse } from './replies.ts'
import { type Answer, Recoverable } from './styles.ts'

/** Milliseconds for which a connection waits for its client, on a busy machine. */
const keepAliveTimeout = 120_000

/** What is served: each framework lets its own kind of handler call it, and sends what it answers in its own way. */
export interface App {
  /** Options of the middleware. */
  readonly options: DatabaseContextOptions<{ readonly url?: string | undefined }>
  /** Does what the URL and the JSON body of a request ask for. */
  handle(url: string, body: unknown): Promise<Answer>
  /** What the framework's own error handling answers. */
  explain(error: unknown): Answer
}

/** A server that listens on a port of 127.0.0.1. */
export interface Served {
  readonly port: number
  /** Takes no new connection; resolves when the last one is closed. */
  close(): Promise<void>
}

/** A framework under audit. One entry in {@link frameworks} adds one. */
export interface Framework {
  readonly name: string
  readonly protocol: 'http1' | 'http2'
  serve(app: App): Promise<Served>
}

function onNode(
  name: string,
  protocol: Framework['protocol'],
  create: (listener: RequestListener) => Server,
): Framework {
  const serve = (app: App) => {
    const handler = async (request: IncomingMessage, response: ServerResponse) => {
      const body: unknown = JSON.parse(await text(request))
      const answer = await app.handle(request.url ?? '', body).catch((error) => {
        if (error instanceof Recoverable) return error.answer // there is no error handling behind the handler to do it
        throw error
      })
      replyByNode(answer, response)
    }
    const onError = (error: unknown, _request: unknown, response: ServerResponse) => {
      if (!response.headersSent) replyByNode(app.explain(error), response)
    }
    return listen(create(databaseContext(handler, { ...app.options, onError })))
  }
  return { name, protocol, serve }
}

/** A middleware of Express, true or not. */
export type ExpressMiddleware = (options: App['options']) => express.RequestHandler

export function onExpress(name: string, framework: typeof express, middleware: ExpressMiddleware): Framework {
  const serve = (app: App) => {
    const server = framework()
    server.use(middleware(app.options), framework.json())
    server.post('/callback/:request', (request, response, next) => {
      app.handle(request.originalUrl, request.body).then((answer) => replyByExpress(answer, response), next)
    })
    server.use(async (request, response, next) => {
      try {
        replyByExpress(await app.handle(request.originalUrl, request.body), response)
      } catch (error) {
        next(error)
      }
    })
    // What fails in an error handler, and so the commit of an answer that one gave, goes to those behind it.
    server.use((error: unknown, _request: unknown, response: express.Response, next: express.NextFunction) => {
      if (error instanceof Recoverable) replyByExpress(error.answer, response)
      else next(error)
    })
    server.use((error: unknown, _request: unknown, response: express.Response, next: express.NextFunction) => {
      if (response.headersSent) next(error)
      else replyByExpress(app.explain(error), response)
    })
    return listen(createServer(server))
  }
  return { name, protocol: 'http1', serve }
}

const onFastify: Framework = {
  name: 'Fastify 5',
  protocol: 'http1',
  async serve(app) {
    const server: FastifyInstance = fastify({ keepAliveTimeout })
    await server.register(fastifyContext, app.options)
    server.setErrorHandler((error, _request, reply) => replyByFastify(app.explain(error), reply))
    server.register(async (routes) => {
      routes.setErrorHandler((error, _request, reply) => {
        if (error instanceof Recoverable) return replyByFastify(error.answer, reply)
        throw error
      })
      routes.post('/callback/:request', (request, reply) => {
        const answered = (answer: Answer) => void replyByFastify(answer, reply)
        app.handle(request.url, request.body).then(answered, (error) => void reply.send(error))
      })
      routes.post('*', async (request, reply) => replyByFastify(await app.handle(request.url, request.body), reply))
    })
    const { port } = new URL(await server.listen({ host: '127.0.0.1', port: 0 }))
    return { port: Number(port), close: () => server.close() }
  },
}

const onKoa: Framework = {
  name: 'Koa 3',
  protocol: 'http1',
  serve(app) {
    const server = new Koa()
    const reply = ({ status, location, body }: Answer, context: Koa.Context) => {
      if (location !== undefined) context.redirect(location)
      else context.body = body ?? null
      context.status = status
    }
    const answerErrors = (answer: (error: unknown) => Answer) => async (context: Koa.Context, next: Koa.Next) => {
      try {
        await next()
      } catch (error) {
        reply(answer(error), context)
      }
    }
    server.use(answerErrors((error) => app.explain(error)))
    server.use(koaContext(app.options))
    server.use(bodyParser())
    server.use(
      answerErrors((error) => {
        if (error instanceof Recoverable) return error.answer
        throw error
      }),
    )
    server.use(async (context) => reply(await app.handle(context.url, context.request.body), context))
    // Where an answer to an error fails, those that would explain it are done.
    server.context.onerror = function onError(error) {
      if (error && !this.headerSent) replyByNode(app.explain(error), this.res)
    }
    return listen(createServer(server.callback()))
  },
}

const pathOf = ({ url }: { readonly url: string | URL }) => new URL(url, 'http://localhost').pathname

/** The options of the middleware, by the whole URL. */
function byUrl({ skip, transaction }: App['options']): DatabaseContextOptions<{ readonly url: string | URL }> {
  return {
    skip: (request) => skip?.({ url: pathOf(request) }) ?? false,
    transaction: (request) => (typeof transaction === 'function' ? transaction({ url: pathOf(request) }) : transaction),
  }
}

const onHono: Framework = {
  name: 'Hono 4',
  protocol: 'http1',
  serve(app) {
    const routes = new Hono()
    routes.onError((error) => {
      if (error instanceof Recoverable) return toResponse(error.answer)
      throw error
    })
    routes.post('*', async ({ req }) => toResponse(await app.handle(pathOf(req), await req.json())))
    const server = new Hono()
    server.use(honoContext(byUrl(app.options)))
    server.onError((error) => toResponse(app.explain(error)))
    server.route('/', routes)
    return listen(createServer(getRequestListener(server.fetch)))
  },
}

const onH3: Framework = {
  name: 'h3 2',
  protocol: 'http1',
  serve(app) {
    const onError = (error: Error) => toResponse(app.explain(error.cause ?? error))
    const server = new H3({ silent: true, onError })
    server.use(h3Context(byUrl(app.options)))
    server.use(async (_event, next) => {
      try {
        return await next()
      } catch (error) {
        if (error instanceof Recoverable) return toResponse(error.answer)
        throw error
      }
    })
    server.post('/**', async ({ req }) => toResponse(await app.handle(pathOf(req), await req.json())))
    return listen(createServer(toNodeHandler(server) as RequestListener))
  },
}

const onFetch: Framework = {
  name: 'fetch',
  protocol: 'http1',
  serve(app) {
    const handler = fetchContext(async (request: Request) => {
      try {
        return toResponse(await app.handle(pathOf(request), await request.json()))
      } catch (error) {
        if (error instanceof Recoverable) return toResponse(error.answer)
        throw error
      }
    }, byUrl(app.options))
    const answer = (request: Request) => handler(request).catch((error) => toResponse(app.explain(error)))
    return listen(createServer(getRequestListener(answer)))
  },
}

export const frameworks: readonly Framework[] = [
  onNode('node:http', 'http1', createServer),
  onNode('node:http2', 'http2', (listener) => createHttp2Server().on('request', listener)),
  onExpress('Express 4', express4 as unknown as typeof express, expressContext), // the calls are the same in both
  onExpress('Express 5', express, expressContext),
  onFastify,
  onNest('NestJS 12 on Express', 'express'),
  onNest('NestJS 12 on Fastify', 'fastify'),
  onKoa,
  onHono,
  onH3,
  onFetch,
]

/** Listens on a free port. */
async function listen(server: Server): Promise<Served> {
  Object.assign(server, { keepAliveTimeout })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  return {
    port: (server.address() as AddressInfo).port, // of TCP
    close: () => new Promise((resolve) => server.close(() => resolve())),
  }
}
