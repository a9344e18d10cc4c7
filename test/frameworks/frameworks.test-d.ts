import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import { createSecureServer, type Http2ServerRequest, type Http2ServerResponse } from 'node:http2'
import { defineDatabase } from 'ambient-db'
import { databaseContext as expressContext } from 'ambient-db/express'
import { databaseContext as fastifyContext } from 'ambient-db/fastify'
import { databaseContext as fetchContext } from 'ambient-db/fetch'
import { databaseContext as h3Context } from 'ambient-db/h3'
import { databaseContext as honoContext } from 'ambient-db/hono'
import { databaseContext as koaContext } from 'ambient-db/koa'
import { Atomic, DatabaseContextModule, InjectHandle } from 'ambient-db/nestjs'
import { databaseContext as nodeContext } from 'ambient-db/node-http'
import { pgAdapter } from 'ambient-db/pg'
import express from 'express'
import express4 from 'express4'
import fastify, { type FastifyRequest } from 'fastify'
import { H3, type H3Event } from 'h3'
import { Hono, type HonoRequest } from 'hono'
import Koa, { type Request as KoaRequest } from 'koa'
import { Pool } from 'pg'
import { expectTypeOf, it } from 'vitest'

it('the middleware for Express gives its options the request of the app', () => {
  express().use(expressContext())
  express4().use(expressContext())
  express().use(expressContext({ transaction: { readOnly: true }, settleTimeout: 1_000, unawaited: 'error' }))
  const middleware: express.RequestHandler = expressContext({
    skip: (request) => {
      expectTypeOf(request).toEqualTypeOf<express.Request>()
      return request.path === '/health'
    },
  })
  express().use(middleware)
  express().use(
    expressContext({
      skip: (request) => request.path === '/health',
      outcome: (status, request) => (status < 500 && request.path !== '/' ? 'commit' : 'rollback'),
      transaction: ({ method }) => (method === 'GET' ? 'autocommit' : undefined),
    }),
  )
  express4().use(expressContext({ skip: (request) => request.path === '/health' }))
  // @ts-expect-error no such outcome
  expressContext({ outcome: () => 'maybe' })
})

it('the wrapper for node:http keeps the types of the handler', () => {
  createServer(
    nodeContext((request, response) => {
      expectTypeOf(request).toEqualTypeOf<IncomingMessage>()
      expectTypeOf(response).toExtend<ServerResponse>()
    }),
  )
  createSecureServer(
    nodeContext((request, response) => {
      expectTypeOf(request).toEqualTypeOf<Http2ServerRequest>()
      expectTypeOf(response).toEqualTypeOf<Http2ServerResponse>()
    }),
  )
  nodeContext(async (request, response) => void response.end(request.url), {
    skip: (request) => request.url === '/health',
    onError: (error, request, response) => {
      expectTypeOf(error).toBeUnknown()
      expectTypeOf(request).toEqualTypeOf<IncomingMessage>()
      response.end()
    },
  })
})

it('the plugin for Fastify fits every kind of server, and gives its options the request', () => {
  fastify().register(fastifyContext)
  fastify({ http2: true }).register(fastifyContext, { transaction: { readOnly: true } })
  fastify({ https: {} }).register(fastifyContext, {
    skip: (request) => {
      expectTypeOf(request).toEqualTypeOf<FastifyRequest>()
      return request.routeOptions.url === '/health'
    },
  })
  // @ts-expect-error no such outcome
  fastify().register(fastifyContext, { outcome: () => 'maybe' })
})

it('the middleware for Koa gives its options the request', () => {
  new Koa().use(koaContext())
  new Koa<{ user: string }, { log(text: string): void }>().use(koaContext({ transaction: 'autocommit' }))
  new Koa().use(koaContext({ skip: ({ path, headers }) => path === '/health' || headers.accept === undefined }))
  new Koa().use(
    koaContext<KoaRequest>({
      skip: (request) => {
        expectTypeOf(request).toEqualTypeOf<KoaRequest>()
        return request.hostname === 'localhost'
      },
    }),
  )
})

it('the middleware for Hono gives its options the request', () => {
  new Hono().use(honoContext())
  new Hono<{ Bindings: { KEY: string }; Variables: { user: string } }>().use(
    honoContext({
      skip: (request) => {
        expectTypeOf(request).toEqualTypeOf<HonoRequest>()
        return request.path === '/health'
      },
    }),
  )
})

it('the wrapper for fetch handlers keeps their types', () => {
  class NextRequest extends Request {
    readonly nextUrl = new URL(this.url)
  }
  const handler = fetchContext(
    async (request: NextRequest, { params }: { params: Promise<{ id: string }> }) =>
      Response.json([request.nextUrl, (await params).id]),
    { skip: (request) => request.nextUrl.pathname === '/health', signal: () => undefined },
  )
  expectTypeOf(handler).toEqualTypeOf<
    (request: NextRequest, context: { params: Promise<{ id: string }> }) => Promise<Response>
  >()
})

it('the middleware for h3 gives its options the event', () => {
  new H3().use(h3Context()).use(
    '/api/**',
    h3Context({
      skip: (event) => {
        expectTypeOf(event).toEqualTypeOf<H3Event>()
        return event.url.pathname === '/health'
      },
    }),
  )
})

it('the module for NestJS takes databases of any kind, and `Atomic` both kinds of decorators', () => {
  const main = defineDatabase({ name: 'main', adapter: pgAdapter(() => new Pool()) })
  DatabaseContextModule.forRoot({ databases: [main], skip: ({ url }) => url === '/health' })
  DatabaseContextModule.forRoot<express.Request>({ databases: [main], skip: ({ path }) => path === '/health' })
  class Users {
    @Atomic(main, { isolationLevel: 'serializable' })
    async create(name: string): Promise<string> {
      return name
    }
  }
  expectTypeOf(new Users().create).toEqualTypeOf<(name: string) => Promise<string>>()
  const descriptor = Object.getOwnPropertyDescriptor(Users.prototype, 'create') as TypedPropertyDescriptor<
    Users['create']
  >
  expectTypeOf(Atomic(main)(Users.prototype, 'create', descriptor)).toBeVoid()
  InjectHandle('main')(Users, undefined, 0)
})
