import type { IncomingMessage, ServerResponse } from 'node:http'
import type { Http2ServerRequest, Http2ServerResponse } from 'node:http2'
import { answerPlainly, type DatabaseContextOptions, failRequest, serveRequest, warn } from '../request.ts'

export type { DatabaseContextOptions } from '../request.ts'

/** What {@link databaseContext} takes. */
export interface NodeHttpOptions<Request, Response> extends DatabaseContextOptions<Request> {
  /**
   * Answers a request that failed: the handler threw, or the commit failed. If `response.headersSent`, an answer is under way
   * that can only be given up; it is destroyed unless it has ended. Default is a plain text of the error's `statusCode`, or
   * 500, and a process warning for 500 and above.
   */
  readonly onError?: ((error: unknown, request: Request, response: Response) => unknown) | undefined
}

/**
 * Wraps a handler of `node:http`, or of `node:http2` with its compatibility API: each request gets a context of its own.
 * Work is committed before the status line leaves, or rolled back if the status is 400 or more, the handler throws or the
 * client goes away. A commit that fails is answered by `onError`, and nothing of the first answer is left in that one.
 *
 * @example
 * ```ts
 * import { createServer } from 'node:http'
 * import { databaseContext } from 'ambient-db/node-http'
 *
 * declare function createUser(): Promise<{ id: number }>
 * const server = createServer(
 *   databaseContext(async (request, response) => {
 *     const user = await createUser()
 *     response.writeHead(201, { 'content-type': 'application/json' }).end(JSON.stringify(user))
 *   }),
 * )
 * ```
 */
export function databaseContext<
  Request extends IncomingMessage | Http2ServerRequest = IncomingMessage,
  Response extends ServerResponse | Http2ServerResponse = ServerResponse,
>(
  handler: (request: Request, response: Response) => unknown,
  options: NodeHttpOptions<Request, Response> = {},
): (request: Request, response: Response) => void {
  const { onError = answerPlainly } = options

  async function answer(error: unknown, request: Request, response: Response): Promise<void> {
    const begun = response.headersSent
    try {
      await onError(error, request, response)
    } catch (second) {
      warn(second)
      response.destroy()
    }
    if (begun && !response.writableEnded) response.destroy()
  }

  async function serve(request: Request, response: Response): Promise<void> {
    const onFailure = (error: unknown) => void answer(error, request, response)
    try {
      await serveRequest({ request, node: { request, response }, options, onFailure }, () => handler(request, response))
    } catch (error) {
      if (!failRequest(response, error)) onFailure(error)
    }
  }

  return function databaseContextHandler(request, response) {
    void serve(request, response)
  }
}
