import type { AsyncLocalStorage } from 'node:async_hooks'
import type { ServerResponse } from 'node:http'
import type { Pool, PoolClient } from 'pg'
import type { Adapter } from '../../../src/adapter.ts'
import { databaseContext } from '../../../src/frameworks/express.ts'
import { openContext } from '../../../src/index.ts'
import { serveRequest } from '../../../src/request.ts'
import type { ExpressMiddleware } from './frameworks.ts'
import type { Kind } from './judge.ts'
import type { Plan, WireFault } from './plan.ts'
import type { StyleName } from './styles.ts'

type AnyAdapter = Adapter<Pool, Pool, PoolClient>

/** A fault that the audit must see: a middleware or an adapter made worse. */
export interface Fault {
  readonly middleware?: ExpressMiddleware
  readonly mutate?: (adapter: AnyAdapter) => AnyAdapter
  /** Requests in which it shows; a few of them, so that proving it takes no time. */
  readonly on: (plan: Plan) => boolean
  /** What it must be seen as. */
  readonly shows: Kind
}

/** Nothing happens to it from outside. */
const quiet = ({ wire, leaves }: Plan) => wire === undefined && leaves === undefined
const quietly =
  (...styles: StyleName[]) =>
  (plan: Plan) =>
    quiet(plan) && styles.includes(plan.style)
const doomed = (plan: Plan) =>
  quietly('json', 'redirect', 'empty', 'callback')(plan) && plan.spoils.main?.includes('doomed') === true
const cutAt =
  (...at: WireFault['at'][]) =>
  ({ style, leaves, wire }: Plan) =>
    style === 'json' && leaves === undefined && wire !== undefined && wire.way !== 'stall' && at.includes(wire.at)

const answered = (status: number) => (status < 400 ? 'commit' : 'rollback')

export const faults: Readonly<Record<string, Fault>> = {
  'commits when the answer has left': {
    middleware: (options) => (request, response, next) => {
      if (options.skip?.(request)) return next()
      const context = openContext()
      response.on('finish', () => void context.settle(answered(response.statusCode)).catch(() => {}))
      response.on('close', () => void context.settle('rollback').catch(() => {}))
      context.run(next)
    },
    on: quietly('json', 'stream'),
    shows: 'not visible',
  },
  'lets the head go before the commit': {
    middleware: (options) => (request, response, next) => {
      if (options.skip?.(request)) return next()
      const context = openContext()
      const { end } = response
      response.end = function (this: ServerResponse, ...args: Parameters<typeof end>) {
        const settled = context.settle(answered(this.statusCode))
        if (!this.headersSent) this.flushHeaders()
        settled.then(
          () => end.apply(this, args),
          () => this.destroy(),
        )
        return this
      } as typeof end
      response.on('close', () => void context.settle('rollback').catch(() => {}))
      context.run(next)
    },
    on: quietly('json', 'stream'),
    shows: 'not visible',
  },
  'enters the context for good': {
    middleware: (options) => {
      const key = Symbol.for('ambient-db')
      const { storage } = (globalThis as unknown as Record<symbol, { storage: AsyncLocalStorage<unknown> }>)[key] as {
        storage: AsyncLocalStorage<unknown>
      }
      const run = databaseContext(options)
      return (request, response, next) => {
        if (options.skip?.(request)) return next()
        let scope: unknown
        run(request, response, () => {
          scope = storage.getStore()
        })
        storage.enterWith(scope)
        next()
      }
    },
    on: quietly('json', 'without a context'),
    shows: 'leaked context',
  },
  'swallows what COMMIT fails with': {
    mutate: (adapter) => ({ ...adapter, commit: (client) => adapter.commit(client).catch(() => 'committed') }),
    on: doomed,
    shows: 'success without rows',
  },
  'takes a lost answer to COMMIT for a rollback': {
    mutate: (adapter) => ({ ...adapter, commit: (client) => adapter.commit(client).catch(() => 'rolled-back') }),
    on: cutAt('commit', 'answer'),
    shows: 'missed unknown',
  },
  'takes every failure of COMMIT for a lost answer': {
    mutate: (adapter) => ({
      ...adapter,
      async commit(client) {
        const answer = await adapter.commit(client).catch(() => 'nothing')
        if (answer === 'committed') return answer
        throw new Error('There was no answer.')
      },
    }),
    on: doomed,
    shows: 'unjustified unknown',
  },
  'commits whatever the status': {
    middleware: (options) => databaseContext({ ...options, outcome: () => 'commit' }),
    on: quietly('status of a failure', 'throw'),
    shows: 'failure with rows',
  },
  'begins no transaction': {
    mutate: ({ transactionStatus: _, ...adapter }) => ({ ...adapter, begin: async () => {} }),
    on: cutAt('statement'),
    shows: 'half of the rows',
  },
  'gives connections back without ROLLBACK': {
    mutate: (adapter) => ({ ...adapter, rollback: async () => {} }),
    on: quietly('throw'),
    shows: 'open transaction',
  },
  'keeps the connections that are broken': {
    mutate: (adapter) => ({
      ...adapter,
      release: (pool, client, broken) => (broken ? undefined : adapter.release(pool, client)),
    }),
    on: (plan) => plan.opens && cutAt('statement', 'commit')(plan),
    shows: 'lost slot',
  },
  'listens to no error of its connections': {
    mutate: (adapter) => ({
      ...adapter,
      acquire: async (pool, onLost) => (await adapter.acquire(pool, onLost)).removeAllListeners('error'),
    }),
    on: cutAt('statement', 'commit'),
    shows: 'uncaught',
  },
  'closes the connection of whose commit failed': {
    middleware: (options) => (request, response, next) =>
      serveRequest({ request, node: { request, response }, options, onFailure: () => void response.destroy() }, () =>
        next(),
      ),
    on: doomed,
    shows: 'no answer',
  },
  'does not answer whose commit failed': {
    middleware: (options) => (request, response, next) =>
      serveRequest({ request, node: { request, response }, options, onFailure: () => {} }, () => next()),
    on: (plan) => plan.opens && doomed(plan), // so that none waits for another
    shows: 'hang',
  },
  'forgets the contexts of clients that left': {
    middleware: (options) => (request, response, next) => {
      if (options.skip?.(request)) return next()
      const context = openContext()
      response.on('finish', () => void context.settle(answered(response.statusCode)).catch(() => {}))
      context.run(next)
    },
    on: ({ leaves }) => leaves === 'once sent',
    shows: 'left open',
  },
}
