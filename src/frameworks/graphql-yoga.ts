import { type ExecutionArgs, getOperationAST } from 'graphql'
import { type DatabaseContextOptions, serveCall } from '../request.ts'

export type { DatabaseContextOptions } from '../request.ts'

/** An operation that is executed, as the options see it. */
export interface GraphqlOperation extends ExecutionArgs {
  readonly type: 'query' | 'mutation' | 'subscription' | undefined
}

/** What executes an operation. */
type Execute = (args: ExecutionArgs) => unknown

/** A plugin for GraphQL Yoga, or whatever else takes those of Envelop. */
export interface DatabaseContextPlugin {
  onExecute(event: { readonly executeFn: Execute; setExecuteFn(execute: Execute): void }): void
}

/**
 * A plugin for GraphQL Yoga: each operation that is executed gets a context of its own, also in a batch. Its work is committed
 * before the result is answered, or rolled back if the result has errors or the client went away. A commit that fails is an error
 * of the whole operation, by Yoga's own handling of errors.
 *
 * The events of a subscription, and what `@defer` and `@stream` leave for later, take contexts of their own (`newContext`).
 *
 * The `status` of `outcome` is 200, or that of the first error: `extensions.http.status`, or 500.
 *
 * @example
 * ```ts
 * import { databaseContext } from 'ambient-db/graphql-yoga'
 * import { createSchema, createYoga } from 'graphql-yoga'
 *
 * const schema = createSchema({ typeDefs: 'type Query { version: String }' })
 * const yoga = createYoga({ schema, plugins: [databaseContext()] })
 * ```
 */
export function databaseContext(options: DatabaseContextOptions<GraphqlOperation> = {}): DatabaseContextPlugin {
  return {
    onExecute({ executeFn, setExecuteFn }) {
      setExecuteFn(async (args: ExecutionArgs) => {
        let result: unknown
        const type = getOperationAST(args.document, args.operationName)?.operation
        const answer = { status: () => statusOfResult(result) }
        const { request } = Object(args.contextValue) as { request?: Request }
        const call = { request: { ...args, type }, identity: args, options, signal: request?.signal }
        await serveCall(call, answer, async () => {
          result = await executeFn(args)
        })
        return result
      })
    },
  }
}

function statusOfResult(result: unknown): number {
  const { errors } = Object(result) as { errors?: readonly { extensions?: { http?: { status?: number } } }[] }
  if (!errors || errors.length === 0) return 200
  return errors[0]?.extensions?.http?.status ?? 500
}
