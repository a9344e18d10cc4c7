import type { IncomingMessage, ServerResponse } from 'node:http'
import type { Http2ServerRequest, Http2ServerResponse } from 'node:http2'
import { cancelBody, type DatabaseContextOptions, type PendingAnswer, serveFetched } from '../request.ts'

export type { DatabaseContextOptions } from '../request.ts'

/** What is needed of an event of h3. */
export interface H3EventLike {
  readonly req: Request
  readonly url: URL
  readonly res: { status?: number; statusText?: string; readonly headers: Headers; readonly errHeaders: Headers }
  readonly runtime?:
    | {
        readonly node?: {
          readonly req: IncomingMessage | Http2ServerRequest
          readonly res?: ServerResponse | Http2ServerResponse | undefined
        }
      }
    | undefined
}

/** A middleware for h3 2. */
export type DatabaseContextMiddleware<Event> = (event: Event, next: () => unknown) => Promise<unknown>

/**
 * A middleware for h3 2 and Nitro 3 that gives each request a context of its own. When those behind it are done its work is
 * committed, or rolled back if the status is 400 or more or the client went away; h3 answers afterwards. A commit that fails is
 * thrown, so that `onError` answers, and nothing of the answer is left.
 *
 * What is written to Node's own response is covered too.
 *
 * Headers that are set behind it are dropped with a failed commit: mount CORS and the like before it.
 *
 * @example
 * ```ts
 * import { databaseContext } from 'ambient-db/h3'
 * import { H3 } from 'h3'
 *
 * const app = new H3()
 * app.use(databaseContext({ skip: (event) => event.url.pathname === '/health' }))
 * ```
 */
export function databaseContext<Event extends H3EventLike = H3EventLike>(
  options: DatabaseContextOptions<Event> = {},
): DatabaseContextMiddleware<Event> {
  return async function databaseContextMiddleware(event, next) {
    let result: unknown
    const proceed = async () => {
      result = await next()
    }
    const { req: incoming, res: outgoing } = event.runtime?.node ?? {}
    const served = { request: event, raw: event.req, incoming, outgoing, options }
    await serveFetched(
      served,
      answerOf(event, () => result),
      proceed,
    )
    return result
  }
}

/** What h3 takes for an answer that nobody gives, and for one that Node's own response gives. */
const notFound = Symbol.for('h3.notFound')
const handled = Symbol.for('h3.handled')

function answerOf(event: H3EventLike, resultOf: () => unknown): PendingAnswer {
  const headers = new Headers(event.res.headers)
  const errorHeaders = new Headers(event.res.errHeaders)
  return {
    status() {
      const result = resultOf()
      if (result === handled) return undefined
      if (result === notFound) return 404
      return (isResponse(result) ? result.status : undefined) || event.res.status || 200
    },
    clear() {
      const result = resultOf()
      cancelBody(isResponse(result) ? result.body : result)
      event.res.status = 500 // an error handler that says nothing else must not say 200
      delete event.res.statusText
      restore(event.res.headers, headers)
      restore(event.res.errHeaders, errorHeaders)
    },
  }
}

/** What carries its status with it: a `Response`, an `HTTPResponse` of h3's, or an error. */
function isResponse(result: unknown): result is { readonly status?: number; readonly body?: unknown } {
  if (result instanceof Error) return true
  const { headers } = Object(result) as { headers?: Partial<Headers> }
  return typeof headers?.get === 'function'
}

function restore(headers: Headers, entries: Headers): void {
  for (const name of [...headers.keys()]) headers.delete(name)
  for (const [name, value] of entries) headers.append(name, value)
}
