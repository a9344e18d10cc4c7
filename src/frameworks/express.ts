import type { IncomingMessage, ServerResponse } from 'node:http'
import { AmbientError } from '../errors.ts'
import { type DatabaseContextOptions, serveRequest } from '../request.ts'

export type { DatabaseContextOptions } from '../request.ts'

/** A middleware for Express 4 and 5. */
export type DatabaseContextMiddleware<Request, Response> = (
  request: Request,
  response: Response,
  next: (error?: unknown) => void,
) => void

/**
 * Gives each request a context of its own. Work is committed before the status line leaves, or rolled back if the status is
 * 400 or more or the client went away. A commit that fails goes to the error handlers of the app, and nothing of the first
 * answer is left in theirs.
 *
 * Headers that are set behind it are dropped with a failed commit: mount CORS and the like before it.
 *
 * @example
 * ```ts
 * import express from 'express'
 * import { databaseContext } from 'ambient-db/express'
 *
 * const app = express()
 * app.use(express.json())
 * app.use(databaseContext({ skip: (request) => request.url === '/health' }))
 * ```
 */
export function databaseContext<
  Request extends IncomingMessage = IncomingMessage,
  Response extends ServerResponse = ServerResponse,
>(options: DatabaseContextOptions<Request> = {}): DatabaseContextMiddleware<Request, Response> {
  if ('headers' in options) {
    throw new AmbientError(
      'AMBIENT_INVALID_ARGUMENT',
      'databaseContext makes the middleware: app.use(databaseContext()).',
    )
  }
  return function databaseContextMiddleware(request, response, next) {
    // Express keeps the `next` of the router that is at work on the request: the one from here would skip its error handlers.
    const onFailure = (error: unknown) => ((request as { next?: typeof next }).next ?? next)(error)
    serveRequest({ request, node: { request, response }, options, onFailure }, () => next())
  }
}
