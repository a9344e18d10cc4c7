import type { TRPCError } from '@trpc/server'
import { getHTTPStatusCodeFromError } from '@trpc/server/http'
import { type DatabaseContextOptions, serveCall } from '../request.ts'

export type { DatabaseContextOptions } from '../request.ts'

/** A call of a procedure, as the options see it. */
export interface ProcedureCall {
  readonly path: string
  readonly type: 'query' | 'mutation' | 'subscription'
  readonly ctx: unknown
}

/** What is needed of the argument of a middleware. */
export interface ProcedureMiddlewareOptions<Result> extends ProcedureCall {
  readonly signal: AbortSignal | undefined
  readonly getRawInput: () => Promise<unknown>
  next(): Promise<Result>
}

/** What a middleware of tRPC comes to. */
type MiddlewareResult = { readonly ok: true } | { readonly ok: false; readonly error: TRPCError }

/** A middleware for procedures of tRPC 11. */
export type DatabaseContextMiddleware = <Result extends MiddlewareResult>(
  options: ProcedureMiddlewareOptions<Result>,
) => Promise<Result>

/**
 * A middleware for procedures of tRPC 11: each call gets a context of its own, also in a batch. Its work is committed before the
 * result is answered, or rolled back if the procedure failed or the client went away. A commit that fails is the error of the
 * procedure, with the original as its `cause`.
 *
 * A subscription is settled when it begins: what it yields afterwards takes contexts of its own (`newContext`).
 *
 * The `status` of `outcome` is 200, or the HTTP status of the error's code.
 *
 * @example
 * ```ts
 * import { initTRPC } from '@trpc/server'
 * import { databaseContext } from 'ambient-db/trpc'
 *
 * const t = initTRPC.create()
 * export const procedure = t.procedure.use(databaseContext({ transaction: ({ type }) => ({ readOnly: type === 'query' }) }))
 * ```
 */
export function databaseContext(options: DatabaseContextOptions<ProcedureCall> = {}): DatabaseContextMiddleware {
  return async function databaseContextMiddleware<Result extends MiddlewareResult>(
    call: ProcedureMiddlewareOptions<Result>,
  ): Promise<Result> {
    let result: Result | undefined
    const status = () => (result?.ok === false ? getHTTPStatusCodeFromError(result.error) : 200)
    const { signal, getRawInput: identity } = call // which all middlewares of a call have in common
    await serveCall({ request: call, identity, options, signal }, { status }, async () => {
      result = await call.next()
    })
    return result as Result // there is one by now
  }
}
