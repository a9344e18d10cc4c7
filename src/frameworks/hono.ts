import type { Context, HonoRequest, MiddlewareHandler } from 'hono'
import {
  cancelBody,
  type DatabaseContextOptions,
  type FetchedRequest,
  type PendingAnswer,
  serveFetched,
} from '../request.ts'

export type { DatabaseContextOptions } from '../request.ts'

/**
 * A middleware for Hono 4 that gives each request a context of its own. When those behind it are done its work is committed, or
 * rolled back if the status is 400 or more or the client went away; Hono answers afterwards. A commit that fails is thrown, so that
 * `app.onError` answers, and nothing of the answer is left.
 *
 * Behind `@hono/node-server` what is written to `c.env.outgoing` is covered too.
 *
 * Headers that are set behind it are dropped with a failed commit: mount CORS and the like before it.
 *
 * @example
 * ```ts
 * import { databaseContext } from 'ambient-db/hono'
 * import { Hono } from 'hono'
 *
 * const app = new Hono()
 * app.use(databaseContext({ skip: (request) => request.path === '/health' }))
 * ```
 */
export function databaseContext(options: DatabaseContextOptions<HonoRequest> = {}): MiddlewareHandler {
  return async function databaseContextMiddleware(context, next) {
    const { req: request } = context
    const { incoming, outgoing } = (context.env ?? {}) as NodeBindings // whatever the server gives
    await serveFetched({ request, raw: request.raw, incoming, outgoing, options }, answerOf(context), next)
  }
}

/** What `@hono/node-server` gives to the handlers. */
type NodeBindings = Partial<Pick<FetchedRequest<unknown>, 'incoming' | 'outgoing'>>

function answerOf(context: Context): PendingAnswer {
  const headers = new Headers(context.newResponse(null).headers) // those of the middlewares before
  return {
    // With that header the handler has answered by itself, on Node's response.
    status: () => (context.res.headers.has('x-hono-already-sent') ? undefined : context.res.status),
    clear() {
      cancelBody(context.res.body)
      context.res = undefined
      context.finalized = false
      for (const name of [...context.newResponse(null).headers.keys()]) context.header(name)
      for (const [name, value] of headers) context.header(name, value, { append: true })
      context.status(500) // an error handler that says nothing else must not say 200
    },
  }
}
