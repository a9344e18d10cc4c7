import { type IncomingHttpHeaders, type ServerResponse, STATUS_CODES } from 'node:http'
import type { Http2ServerResponse } from 'node:http2'
import type { TransactionOptions } from './adapter.ts'
import {
  assertOutcome,
  Context,
  currentContext,
  detach,
  type InternalContextOptions,
  runInTest,
  type Scope,
  type Test,
  testHeader,
  testsByHeader,
} from './context.ts'
import type { NodeRequest, NodeResponse } from './response.ts'
import { type Answering, guardOf, ResponseGuard } from './response-guard.ts'

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

/** A request that a framework on Node's own `http` or `http2` serves. */
export interface ServedRequest<Request>
  extends Pick<Answering, 'onFailure'>,
    Partial<Pick<Answering, 'givenUpHeadersSent'>> {
  /** As the options of the middleware get it. */
  readonly request: Request
  /** Node's own. What stands in for them in tests, and what `http2` has, differ in what the guard does not touch. */
  readonly node: { readonly request: object; readonly response: object }
  readonly options: DatabaseContextOptions<Request>
}

/**
 * Runs `proceed` in a context of the request's own, which is settled by the status before the first byte of the answer leaves.
 * On a response that has such a context already it does nothing more (C3).
 */
export function serveRequest<Request, Result>(served: ServedRequest<Request>, proceed: () => Result): Result {
  return serveGuarded(served, proceed, (guard) => guard.run(proceed))
}

/** What the handlers of a framework have made of its answer, which leaves when they are done. */
export interface PendingAnswer {
  /** Its status; `undefined` where it leaves by itself, past the framework. */
  status(): number | undefined
  /** Takes it back, beyond what stands on Node's response. */
  clear?(): void
}

/**
 * The same for a framework that answers when its handlers are done: settles then by the status, where no answer has begun by
 * itself. Rejects with what failed, and then nothing of the answer is left.
 */
export function serveAwaited<Request>(
  served: ServedRequest<Request>,
  answer: PendingAnswer,
  proceed: () => Promise<unknown>,
): Promise<unknown> {
  return serveGuarded(served, proceed, async (guard) => {
    await guard.run(proceed)
    const status = answer.status()
    if (status !== undefined) await settleAnswer(guard.settle(status), answer)
  })
}

/** What is answered by a value alone, without Node's response: a fetch handler, a procedure, an operation. */
export interface ServedCall<Request> {
  /** As the options of the middleware get it. */
  readonly request: Request
  /** What the call is known by, however often a middleware sees it. */
  readonly identity: object
  readonly options: DatabaseContextOptions<Request>
  /** Fires when the client has gone. */
  readonly signal: AbortSignal | undefined
}

/** The calls that have a context, by their identity. */
const served = new WeakSet<object>()

/**
 * The same where there is no response of Node's: nothing leaves before this resolves.
 *
 * @param statusOfThrown the status that something thrown stands for, if it is an answer in its framework. It is thrown all the same.
 */
export function serveCall<Request>(
  call: ServedCall<Request>,
  answer: PendingAnswer,
  proceed: () => Promise<unknown>,
  statusOfThrown: (thrown: unknown) => number | undefined = () => undefined,
): Promise<void> {
  const test = testOf(call.identity)
  if (test) return runInTest(test, () => serveCallHere(call, answer, proceed, statusOfThrown))
  return serveCallHere(call, answer, proceed, statusOfThrown)
}

async function serveCallHere<Request>(
  { request, identity, options, signal }: ServedCall<Request>,
  answer: PendingAnswer,
  proceed: () => Promise<unknown>,
  statusOfThrown: (thrown: unknown) => number | undefined,
): Promise<void> {
  if (served.has(identity) || isInTest()) return void (await proceed())
  if (options.skip?.(request)) return void (await detach(proceed))
  const context = new Context({ ...contextOptions(request, options), signal }, outermost)
  served.add(identity)
  const settle = async (status: number) => {
    try {
      const outcome = outcomeOf(status, request, options)
      if (!context.settleUntouched(outcome)) await context.settle(outcome)
    } catch (error) {
      await context.settle('rollback', error) // where `outcome` threw; otherwise it has ended
      throw error
    }
  }
  try {
    await context.run(proceed)
  } catch (thrown) {
    const status = statusOfThrown(thrown)
    if (status === undefined) await context.settle('rollback', thrown)
    else await settle(status)
    throw thrown
  }
  await settleAnswer(settle(answer.status() ?? 500), answer)
}

async function settleAnswer(settled: Promise<void>, answer: PendingAnswer): Promise<void> {
  try {
    await settled
  } catch (error) {
    answer.clear?.()
    throw error
  }
}

/** Ends what a body is read from, if its answer is not wanted any more. */
export function cancelBody(body: unknown): void {
  const stream = body as ReadableStream | null | undefined
  if (typeof stream?.getReader === 'function') stream.cancel().catch(() => {}) // somebody reads it
}

/** What answers with values, and gives Node's own request and response along where Node serves. */
export interface FetchedRequest<Request> {
  /** As the options of the middleware get it. */
  readonly request: Request
  /** That of the web, by which it is known. */
  readonly raw: globalThis.Request
  readonly incoming: object | undefined
  readonly outgoing: ServerResponse | Http2ServerResponse | undefined
  readonly options: DatabaseContextOptions<Request>
}

/** The same for either: {@link serveAwaited} where Node serves, {@link serveCall} elsewhere. */
export async function serveFetched<Request>(
  { request, raw, incoming, outgoing, options }: FetchedRequest<Request>,
  answer: PendingAnswer,
  proceed: () => Promise<unknown>,
): Promise<void> {
  if (!incoming || !outgoing) {
    return serveCall({ request, identity: raw, options, signal: raw.signal }, answer, proceed)
  }
  // What fails past the framework, or when it is done, is no business of its error handling any more.
  const onFailure = (error: unknown) => answerPlainly(error, incoming, outgoing)
  await serveAwaited({ request, node: { request: incoming, response: outgoing }, options, onFailure }, answer, proceed)
}

/** The test that a request over a socket names by its header, if sandboxes of several are open. */
function testOf(request: object): Test | undefined {
  if (testsByHeader.size === 0) return undefined
  const { headers } = request as { headers?: Headers | IncomingHttpHeaders }
  const id = headers instanceof Headers ? headers.get(testHeader) : headers?.[testHeader]
  return testsByHeader.get(String(id))
}

/** Whether a context of the testing tools is there, to which middlewares yield (C3). */
function isInTest(): boolean {
  const current = currentContext()
  return current?.options.adoptable === true && current.state === 'open'
}

function serveGuarded<Request, Result>(
  served: ServedRequest<Request>,
  proceed: () => Result,
  guarded: (guard: ResponseGuard) => Result,
): Result {
  const test = testOf(served.node.request)
  if (test) return runInTest(test, () => serveHere(served, proceed, guarded))
  return serveHere(served, proceed, guarded)
}

function serveHere<Request, Result>(
  served: ServedRequest<Request>,
  proceed: () => Result,
  guarded: (guard: ResponseGuard) => Result,
): Result {
  const { request, node, options } = served
  if (guardOf(node.response) || isInTest()) return proceed()
  if (options.skip?.(request)) return detach(proceed)
  const context = new Context(contextOptions(request, options), outermost)
  const guard = new ResponseGuard(context, node.request as NodeRequest, node.response as NodeResponse, {
    outcome: (status) => outcomeOf(status, request, options),
    onFailure: served.onFailure,
    givenUpHeadersSent: served.givenUpHeadersSent ?? false,
  })
  return guarded(guard)
}

/** Ends a request whose handler threw: rolled back, and answered by its `onFailure`; false without a context. */
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

/** Answers an error by its status as plain text, with a process warning for 500 and above; what is under way stays as it is. */
export function answerPlainly(error: unknown, _request: unknown, response: ServerResponse | Http2ServerResponse): void {
  const status = statusOf(error)
  if (status >= 500) warn(error)
  if (response.headersSent) return
  response.statusCode = status
  response.setHeader('Content-Type', 'text/plain; charset=utf-8')
  response.end(STATUS_CODES[status] ?? 'Error')
}

/** The status that an error asks for, or 500. */
export function statusOf(error: unknown): number {
  const { statusCode } = Object(error) as { statusCode?: unknown }
  return typeof statusCode === 'number' && statusCode >= 400 && statusCode < 600 ? statusCode : 500
}

/** Tells whoever runs the process of a request that failed. */
export function warn(error: unknown): void {
  const text = error instanceof Error ? (error.stack ?? error.message) : String(error)
  process.emitWarning(`A request failed: ${text}`, 'AmbientRequestWarning')
}
