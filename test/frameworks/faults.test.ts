import type { AsyncLocalStorage } from 'node:async_hooks'
import { type IncomingMessage, ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import { type AmbientContext, detach, hasContext, newContext, openContext } from 'ambient-db'
import { databaseContext } from 'ambient-db/node-http'
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { frameworkSuite } from '../../src/conformance/frameworks.ts'
import { Context } from '../../src/context.ts'
import { createDatabases, type Databases, nodeHttpHarness, type Wrap } from './support.ts'

/** A middleware that does one thing wrong, and the cases that must tell. */
interface Fault {
  /** Makes the faulty middleware. Default is the true one. */
  readonly wrap?: Wrap
  /** Plants the fault in the process; returns what removes it. */
  readonly plant?: () => () => void
  readonly breaks: readonly string[]
}

const answered = (status: number) => (status < 400 ? 'commit' : 'rollback')

/** The true middleware in front of a handler whose response is tampered with. */
function tampering(tamper: (response: ServerResponse, request: IncomingMessage) => unknown): Wrap {
  return (handler, options) =>
    databaseContext((request, response) => {
      tamper(response, request)
      return handler(request, response)
    }, options)
}

/** Puts another member in the place of one. */
function replace<Owner extends object, Name extends keyof Owner>(
  owner: Owner,
  name: Name,
  by: Owner[Name],
): () => void {
  const member = Object.getOwnPropertyDescriptor(owner, name)
  owner[name] = by
  return () => void (member ? Object.defineProperty(owner, name, member) : Reflect.deleteProperty(owner, name))
}

const contexts = new WeakMap<Socket, AmbientContext>()

const faults: Record<string, Fault> = {
  'commits when the answer has gone': {
    wrap: (handler) => (request, response) => {
      const context = openContext()
      context.bind(request)
      response.on('close', () => void context.settle(answered(response.statusCode)).catch(() => {}))
      const fail = (error: { statusCode?: number }) => {
        if (!response.headersSent) response.writeHead(error.statusCode ?? 500)
        response.end()
      }
      context.run(async () => handler(request, response)).catch(fail)
    },
    breaks: [
      'H1 commits before the status line leaves',
      'H1 answers a failed COMMIT by its error handling, and nothing of the first answer leaks',
      'H1 answers an error when the answer to COMMIT is lost',
      'H1 answers a failed stream as a whole, before its first byte',
      'H4 keeps what was committed when the client goes amid the body, and ends its source',
      'H5 streams 5 MB behind the commit, and reads no further while it lasts',
      'H5 sends events one by one after the commit, and has ended the context by then',
      'H5 refuses a cursor that is open at the head, at once',
      'H5 lets `end` in an open block wait for the block',
      'H5 refuses write and flushHeaders in an open block',
      'H5 settles at writeHead followed by write, flushHeaders or end, not before',
      'H5 holds writes while it settles: write returns false, drain follows',
      'H7 commits before answers without a body: HEAD, 204, 304, redirects, nothing',
      'C5 joins work that nobody awaited, and fails if it fails',
      'C6 answers an error that says which database committed and which did not',
    ],
  },
  'lets the head go and holds the last byte': {
    wrap: (handler) => (request, response) => {
      const context = openContext()
      const { end } = response
      response.end = function (this: ServerResponse, body?: string) {
        if (body) this.write(body.slice(0, -1))
        else this.flushHeaders()
        void context.settle(answered(this.statusCode)).then(
          () => end.call(this, body?.slice(-1) ?? '', 'utf8'),
          () => this.destroy(),
        )
        return this
      } as typeof end
      void context.run(async () => handler(request, response)).catch(() => response.destroy())
    },
    breaks: [
      'H1 commits before the status line leaves',
      'H1 answers a failed COMMIT by its error handling, and nothing of the first answer leaks',
      'H7 commits before answers without a body: HEAD, 204, 304, redirects, nothing',
    ],
  },
  'enters the context for good': {
    plant: () => {
      const { storage } = (globalThis as unknown as Record<symbol, { storage: AsyncLocalStorage<unknown> }>)[
        Symbol.for('ambient-db')
      ] as { storage: AsyncLocalStorage<unknown> }
      return replace(Context.prototype, 'run', function (this: Context, work) {
        storage.enterWith(this.scope)
        return work()
      })
    },
    breaks: ['H6 never leaks the context to the next request of the socket'],
  },
  'never enters the context': {
    plant: () => replace(Context.prototype, 'run', (work) => work()),
    breaks: [
      'H6 keeps the context through the body parser',
      'H6 serves 200 requests on one socket, each with a transaction of its own',
      'S1 takes no connection for a request that touches no database',
    ],
  },
  'shares a context among the requests of a socket': {
    wrap: (handler) => (request, response) => {
      const context = contexts.get(request.socket) ?? openContext()
      contexts.set(request.socket, context)
      void context.run(async () => handler(request, response)).catch(() => response.writeHead(500).end())
      response.on('close', () => void context.settle('commit').catch(() => {}))
    },
    breaks: [
      'H6 serves 200 requests on one socket, each with a transaction of its own',
      'H6 answers pipelined requests in order, and commits the last one though the first waits',
    ],
  },
  'does not bind the request': {
    wrap: tampering((_response, request) => Reflect.deleteProperty(request, 'emit')),
    breaks: ['H6 keeps the context in raw events of the request'],
  },
  'commits whatever the status': {
    wrap: (handler, options) => databaseContext(handler, { ...options, outcome: () => 'commit' }),
    breaks: [
      'H2 rolls back for a status of 400 or more, commits below',
      'H2 asks `outcome`',
      'H5 never settles for 1xx',
    ],
  },
  'commits though the handler threw': {
    plant: () => {
      const { settle } = Context.prototype
      return replace(Context.prototype, 'settle', function (this: Context, _outcome, reason) {
        return settle.call(this, 'commit', reason).catch(() => {})
      })
    },
    breaks: ['H3 rolls back when the handler throws; its error handling answers'],
  },
  'forgets its options': {
    wrap: (handler, options) => databaseContext(handler, { onError: options?.onError }),
    breaks: [
      'H2 asks `outcome`',
      'H6 never leaks the context to the next request of the socket',
      'C5 takes work that nobody awaited for an error with `unawaited`',
      'A7 begins transactions as the request asks',
    ],
  },
  'does not care for the client': {
    plant: () => replace(Context.prototype, 'abort', () => {}),
    breaks: [
      'H4 rolls back at once when the client goes before the answer',
      'H4 fires the signal of the context when the client goes, and not when it is answered',
      'H4 cancels the statement that runs when the client goes',
      'H4 cancels what its answer waits for when the client goes',
      'H4 rolls back when a handler never answers and the client goes',
      'H4 rolls back when the handler itself destroys the response or its socket',
    ],
  },
  'leaves the first answer in the second': {
    plant: () => replace(ServerResponse.prototype, 'removeHeader', () => {}),
    breaks: [
      'H1 answers a failed COMMIT by its error handling, and nothing of the first answer leaks',
      'H1 answers a failed stream as a whole, before its first byte',
      'H1 ignores what the failed handler goes on to write',
    ],
  },
  'lets everybody write on': {
    wrap: tampering((response) => {
      response.write = (() => true) as typeof response.write
    }),
    breaks: [
      'H5 streams 5 MB behind the commit, and reads no further while it lasts',
      'H5 holds writes while it settles: write returns false, drain follows',
    ],
  },
  'swallows what is wrong with an answer': {
    wrap: tampering((response) => {
      const { writeHead } = response
      response.writeHead = function (this: ServerResponse, ...args: Parameters<typeof writeHead>) {
        try {
          return writeHead.apply(this, args)
        } catch {
          return this
        }
      } as typeof writeHead
    }),
    breaks: ['H5 says at once what is wrong with a head or a chunk'],
  },
  'does not watch the connection': {
    wrap: tampering((_response, { socket }) => {
      for (const name of ['write', 'end']) Reflect.deleteProperty(socket, name)
    }),
    breaks: ['H1 refuses what is sent past the response while there is something to commit'],
  },
  'takes an interim answer for the answer': {
    wrap: tampering((response) => {
      response.writeProcessing = () => response.flushHeaders()
    }),
    breaks: ['H5 never settles for 1xx'],
  },
  'drops trailers': {
    wrap: tampering((response) => {
      response.addTrailers = () => {}
    }),
    breaks: ['H5 sends trailers after the body'],
  },
  'takes the context of the server for its own': {
    wrap: (handler, options) => {
      const right = databaseContext(handler, options)
      return (request, response) => {
        if (hasContext()) Promise.resolve(handler(request, response)).catch(() => response.writeHead(500).end())
        else right(request, response)
      }
    },
    breaks: ['C3 opens a context of its own in a server that began to listen inside one'],
  },
  'does not yield to tests': {
    wrap: (handler, options) => {
      const right = databaseContext(handler, options)
      return (request, response) => detach(() => right(request, response))
    },
    breaks: ['C3 yields to a context of the testing tools'],
  },
  'opens another context when it is mounted again': {
    wrap: (handler, options) => {
      const right = databaseContext(handler, options)
      return (request, response) => {
        if (!hasContext()) right(request, response)
        else newContext(async () => handler(request, response)).catch(() => {}) // its connection may be cut in the end
      }
    },
    breaks: ['C3 does nothing the second time it is mounted'],
  },
  'begins a transaction for every request': {
    wrap: (handler, options) =>
      databaseContext(async (request, response) => {
        await databases.main.query('select 1')
        return handler(request, response)
      }, options),
    breaks: ['S1 takes no connection for a request that touches no database'],
  },
}

let first: Databases
let databases: Databases
beforeAll(async () => {
  first = await createDatabases()
})
beforeEach(() => {
  databases = first.reopen() // a fault may leave a pool without connections
})
afterAll(() => first.close())

describe.each(Object.entries(faults))('a middleware that %s', (_name, { wrap = databaseContext, plant, breaks }) => {
  for (const name of breaks) {
    it(`does not pass: ${name}`, async () => {
      const found = frameworkSuite.find((each) => each.name === name)
      const remove = plant?.()
      try {
        await expect(found?.run({ ...nodeHttpHarness(databases, wrap), patience: 700 })).rejects.toThrow()
      } finally {
        remove?.()
        await endTransactions()
      }
    })
  }
})

describe('the suite', () => {
  it('has no case that no fault breaks', () => {
    const caught = new Set(Object.values(faults).flatMap(({ breaks }) => breaks))
    expect(frameworkSuite.filter(({ name }) => !caught.has(name)).map(({ name }) => name)).toEqual([])
  })
})

/** A faulty middleware leaves transactions open, which the next case would take for its own. */
async function endTransactions(): Promise<void> {
  for (const { witness } of [databases.main, databases.other]) {
    await witness(
      `select pg_terminate_backend(pid, 1000) from pg_stat_activity
        where datname = current_database() and pid <> pg_backend_pid() and xact_start is not null`,
    )
  }
}
