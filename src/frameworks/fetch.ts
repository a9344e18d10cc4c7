import { cancelBody, type DatabaseContextOptions, serveCall } from '../request.ts'

export type { DatabaseContextOptions } from '../request.ts'

/** What {@link databaseContext} takes. */
export interface FetchOptions<Incoming> extends DatabaseContextOptions<Incoming> {
  /**
   * The signal that fires when the client has gone before it was answered. Default is `request.signal`; give
   * `() => undefined` where a server aborts that one for requests that are well.
   */
  readonly signal?: ((request: Incoming) => AbortSignal | undefined) | undefined
}

/**
 * Wraps a handler that takes a `Request` and returns a `Response`: a route handler of Next.js, a loader or action, any
 * `fetch` function of a server. Each request gets a context of its own. Work is committed before the response is returned, or
 * rolled back if its status is 400 or more, the handler throws or the client goes away. A commit that fails is thrown instead, to the
 * server's own error handling.
 *
 * What frameworks throw to answer decides by its status as if it had been returned, and is thrown on: a `Response`, redirects of
 * Next.js and SvelteKit.
 *
 * @example
 * ```ts
 * import { databaseContext } from 'ambient-db/fetch'
 *
 * declare function createUser(): Promise<{ id: number }>
 * export const POST = databaseContext(async (request: Request) => Response.json(await createUser(), { status: 201 }))
 * ```
 */
export function databaseContext<Incoming extends Request, Rest extends unknown[], Outgoing extends Response>(
  handler: (request: Incoming, ...rest: Rest) => Outgoing | Promise<Outgoing>,
  options: FetchOptions<Incoming> = {},
): (request: Incoming, ...rest: Rest) => Promise<Outgoing> {
  return async function databaseContextHandler(request, ...rest) {
    let response: Outgoing | undefined
    // A network error has the status 0.
    const answer = { status: () => response?.status || undefined, clear: () => cancelBody(response?.body) }
    const signal = options.signal ? options.signal(request) : request.signal
    await serveCall(
      { request, identity: request, options, signal },
      answer,
      async () => {
        response = await handler(request, ...rest)
      },
      statusOfThrown,
    )
    return response as unknown as Outgoing // the handler has returned it
  }
}

/** The status of what is thrown to answer with, which servers take for a response. Recognised by shape: servers replace `Response`. */
function statusOfThrown(thrown: unknown): number | undefined {
  const { status, headers, location, digest } = Object(thrown) as Record<string, unknown>
  if (typeof digest === 'string') return statusOfDigest(digest)
  const isResponse = typeof (headers as Headers | undefined)?.get === 'function'
  return typeof status === 'number' && (isResponse || typeof location === 'string') ? status : undefined
}

/** Next.js says by a `digest` what its errors stand for: `NEXT_REDIRECT;push;/users;307;`, `NEXT_HTTP_ERROR_FALLBACK;404`. */
function statusOfDigest(digest: string): number | undefined {
  const parts = digest.split(';')
  if (parts[0] === 'NEXT_REDIRECT') return Number(parts.at(-2))
  return parts[0] === 'NEXT_HTTP_ERROR_FALLBACK' ? Number(parts[1]) : undefined
}
