import { databaseContext } from 'ambient-db/fastify'
import fastify, { type FastifyInstance } from 'fastify'
import { afterAll, beforeAll, describe, it } from 'vitest'
import {
  type FrameworkHarness,
  frameworkSuite,
  type SuiteApp,
  type SuiteServer,
} from '../../src/conformance/frameworks.ts'
import { createDatabases, type Databases, unfold } from './support.ts'

let databases: Databases
beforeAll(async () => {
  databases = await createDatabases()
})
afterAll(() => databases.close())

describe('Fastify 5', () => {
  for (const { name, run } of frameworkSuite) it(name, () => run(harness()))
})

function harness(): FrameworkHarness {
  return { main: databases.main, other: databases.other, node: true, start }
}

async function start({ routes, options = {}, mounted = 1, around }: SuiteApp): Promise<SuiteServer> {
  const errors: unknown[] = []
  const app: FastifyInstance = fastify({ forceCloseConnections: true })
  if (around) app.addHook('onRequest', (_request, _reply, proceed) => void around(() => proceed()))
  for (let times = 0; times < mounted; times++) await app.register(databaseContext, options)
  app.setErrorHandler<Error & { statusCode?: number }>((error, _request, reply) => {
    errors.push(error)
    return reply.code(error.statusCode ?? 500).send({ error: error.message })
  })
  app.addContentTypeParser('*', (_request, _payload, done) => done(null)) // its handler reads it
  for (const [url, handler] of Object.entries(routes)) {
    app.all(url, async (request, reply) => {
      const node = { request: request.raw, response: reply.raw }
      const answer = await handler({ json: async () => request.body, node })
      if (!answer) return reply.hijack()
      const { status, headers, text, stream } = unfold(answer)
      return reply
        .code(status)
        .headers(headers)
        .send(stream ?? text)
    })
  }
  const address = new URL(await app.listen({ host: '127.0.0.1', port: 0 }))
  return { port: Number(address.port), errors, close: () => app.close() }
}
