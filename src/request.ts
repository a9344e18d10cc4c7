import type { TransactionOptions } from './adapter.ts'
import { assertOutcome, Context, currentContext, detach, type InternalContextOptions, type Scope } from './context.ts'
import type { NodeRequest, NodeResponse } from './response.ts'
import { guardOf, ResponseGuard } from './response-guard.ts'

/** What every middleware takes. */
export interface DatabaseContextOptions<Request> {
  /** How transactions of a request begin, as a value or by the request. Default is what each database says. */
  readonly transaction?: TransactionOptions | ((request: Request) => TransactionOptions | undefined) | undefined
  /** `true` for requests that shall have no context. Default is none. */
  readonly skip?: ((request: Request) => boolean) | undefined
  /** How a request ends with this status. Default is `'commit'` below 400, otherwise `'rollback'`. */
  readonly outcome?: ((status: number, request: Request) => 'commit' | 'rollback') | undefined
  /** Milliseconds for work that is under way at the end. Default is what each database says. */
  readonly settleTimeout?: number | undefined
  /** `'join'` (the default) awaits work that nobody awaited; `'error'` makes it an error by itself. */
  readonly unawaited?: 'join' | 'error' | undefined
}

/**
 * Runs `proceed` in a context of the request's own, which is settled by the status before the first byte of the answer leaves.
 * On a response that has such a context already it does nothing more (C3).
 *
 * @param onFailure answers an error instead of the handler: what the commit failed with, or what {@link failRequest} was given.
 */
export function serveRequest<Request extends object, Result>(
  request: Request,
  response: object,
  options: DatabaseContextOptions<Request>,
  onFailure: (error: unknown) => void,
  proceed: () => Result,
): Result {
  if (guardOf(response)) return proceed()
  const current = currentContext()
  if (current?.options.adoptable && current.state === 'open') return proceed()
  if (options.skip?.(request)) return detach(proceed)
  const context = new Context(contextOptions(request, options), outermost)
  // http, http2 and what stands in for them in tests have in common what the guard touches; their overloads differ.
  new ResponseGuard(context, request as NodeRequest, response as NodeResponse, {
    outcome: (status) => outcomeOf(status, request, options),
    onFailure,
  })
  return context.run(proceed)
}

/** Ends a request whose handler threw: rolled back, and answered by the `onFailure` of {@link serveRequest}; false without a context. */
export function failRequest(response: object, error: unknown): boolean {
  const guard = guardOf(response)
  guard?.reject(error)
  return guard !== undefined
}

/** How a request with this status ends (H2). */
function outcomeOf<Request>(
  status: number,
  request: Request,
  { outcome }: DatabaseContextOptions<Request>,
): 'commit' | 'rollback' {
  const decided = outcome ? outcome(status, request) : status < 400 ? 'commit' : 'rollback'
  assertOutcome(decided)
  return decided
}

function contextOptions<Request>(request: Request, options: DatabaseContextOptions<Request>): InternalContextOptions {
  const { transaction, settleTimeout, unawaited } = options
  return {
    transaction: typeof transaction === 'function' ? transaction(request) : transaction,
    settleTimeout,
    unawaited,
    streams: 'refuse',
  }
}

/** A context that the server happened to inherit is not the request's (C3). */
function outermost(context: Context): Scope {
  return { parent: undefined, context }
}
