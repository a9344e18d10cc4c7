import type { IncomingHttpHeaders, IncomingMessage, ServerResponse } from 'node:http'
import { type DatabaseContextOptions, type PendingAnswer, serveAwaited } from '../request.ts'

export type { DatabaseContextOptions } from '../request.ts'

/** What options need of a request; the whole of it is theirs by `databaseContext<Koa.Request>(…)`. */
export interface KoaRequest {
  readonly headers: IncomingHttpHeaders
  readonly method: string
  readonly url: string
  readonly path: string
}

/** What is needed of a context of Koa. */
export interface KoaContext<Request> {
  readonly req: IncomingMessage
  readonly res: ServerResponse
  readonly request: Request
  status: number
  body: unknown
  readonly respond?: boolean | undefined
  onerror(error: Error): void
}

/** A middleware for Koa 3. */
export type DatabaseContextMiddleware<Request> = (
  context: KoaContext<Request>,
  next: () => Promise<unknown>,
) => Promise<void>

/**
 * A middleware for Koa 3 that gives each request a context of its own. When those behind it are done its work is committed, or
 * rolled back if the status is 400 or more or the client went away; Koa answers afterwards. A commit that fails is thrown to the
 * middlewares before it, and nothing of the answer is left.
 *
 * What is thrown by those behind it decides by the status that it is answered with. `ctx.respond = false` is covered too.
 *
 * Headers that are set behind it are dropped with a failed commit: mount CORS and the like before it.
 *
 * @example
 * ```ts
 * import { databaseContext } from 'ambient-db/koa'
 * import Koa from 'koa'
 *
 * const app = new Koa()
 * app.use(databaseContext({ skip: (request) => request.path === '/health' }))
 * ```
 */
export function databaseContext<Request extends KoaRequest = KoaRequest>(
  options: DatabaseContextOptions<Request> = {},
): DatabaseContextMiddleware<Request> {
  return async function databaseContextMiddleware(context, next) {
    const { request, req, res } = context
    const onFailure = (error: unknown) => context.onerror(error as Error) // Koa makes an error of anything else
    await serveAwaited({ request, node: { request: req, response: res }, options, onFailure }, answerOf(context), next)
  }
}

function answerOf(context: KoaContext<unknown>): PendingAnswer {
  return {
    status: () => (context.respond === false ? undefined : context.status),
    clear() {
      context.body = undefined
      context.status = 500 // an error handler that says nothing else must not say 200
    },
  }
}
