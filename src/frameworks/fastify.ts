import type { FastifyReply, FastifyRequest } from 'fastify'
import { answerPlainly, type DatabaseContextOptions, serveRequest, statusOf } from '../request.ts'

export type { DatabaseContextOptions } from '../request.ts'

/** What is needed of an instance of Fastify: the same of every kind of server. */
export interface HookableInstance {
  addHook(
    name: 'onRequest',
    hook: (request: FastifyRequest, reply: FastifyReply, proceed: (error?: Error) => void) => void,
  ): unknown
}

/**
 * The plugin for Fastify 5. It gives each request a context of its own, from its `onRequest` hook on. Work is committed before the
 * status line leaves, after all `onSend` hooks, or rolled back if the status is 400 or more or the client went away. A commit that
 * fails goes to the error handler of the route, and nothing of the first answer is left in that one's. It covers `reply.raw` and
 * `reply.hijack()` too; where the commit of a hijacked reply fails, the answer is a plain 500.
 *
 * Headers that are set behind it are dropped with a failed commit: register CORS and the like before it.
 *
 * @example
 * ```ts
 * import { databaseContext } from 'ambient-db/fastify'
 * import fastify from 'fastify'
 *
 * const app = fastify()
 * app.register(databaseContext, { skip: (request) => request.url === '/health' })
 * ```
 */
export function databaseContext(
  instance: HookableInstance,
  options: DatabaseContextOptions<FastifyRequest>,
  done: (error?: Error) => void,
): void {
  instance.addHook('onRequest', (request, reply, proceed) => {
    const headers = headersOf(reply)
    const onFailure = (error: unknown) => answerFailure(error, reply, headers)
    const node = { request: request.raw, response: reply.raw }
    serveRequest({ request, node, options, onFailure, givenUpHeadersSent: true }, () => proceed())
  })
  done()
}

// For all routes of the instance that it is registered on, not in a scope of its own.
Object.assign(databaseContext, {
  [Symbol.for('skip-override')]: true,
  [Symbol.for('fastify.display-name')]: 'ambient-db',
})

type Headers = ReturnType<FastifyReply['getHeaders']>

function headersOf(reply: FastifyReply): Headers {
  const headers = reply.getHeaders()
  for (const [name, value] of Object.entries(headers)) {
    if (Array.isArray(value)) headers[name] = [...value] // `header` adds to the array that is there
  }
  return headers
}

/** Gives `error` to the error handler of the route, with the reply as it was when the request came in. */
function answerFailure(error: unknown, reply: FastifyReply, headers: Headers): void {
  if (reply.raw.headersSent) {
    reply.log.error({ err: error }, 'a reply could not be sent to its end')
    reply.raw.destroy()
    return
  }
  if (reply.sent) {
    answerPlainly(error, reply.request.raw, reply.raw) // hijacked: Fastify does not answer it any more
    return
  }
  const trailers = reply.getHeader('trailer')
  for (const name of String(trailers ?? '').split(' ')) reply.removeTrailer(name)
  for (const name of Object.keys(reply.getHeaders())) reply.removeHeader(name)
  reply.headers(headers).code(statusOf(error)).send(error)
}
