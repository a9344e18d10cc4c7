import { Agent, createServer, type IncomingMessage, request, type Server, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import express, { type NextFunction, type Request, type Response } from 'express'
import { databaseContext as forExpress } from '../../../src/frameworks/express.ts'
import { databaseContext as forNode } from '../../../src/frameworks/node-http.ts'
import type { TransactionOptions } from '../../../src/index.ts'

export type Framework = 'node-http' | 'express'

/** What a request is to do. */
export interface Job {
  readonly work: () => Promise<unknown>
  readonly transaction: TransactionOptions | undefined
  /** Runs `serve` where the request belongs. */
  readonly inside: (serve: () => void) => void
  /** The server has noticed that the client has left. */
  readonly left: () => void
}

/** A request that was sent. */
export interface Exchange {
  /** The status, or `undefined` if none came. */
  readonly answered: Promise<number | undefined>
  /** Resolves when the server has nothing to do with it any more; whether it ever had. */
  readonly over: Promise<boolean>
  /** The client goes away; resolves when the server has noticed. Nothing happens if it was answered. */
  leave(): Promise<void>
}

/** A server whose requests run jobs, each in a context of its own. */
export interface Front {
  send(job: Job): Exchange
  close(): Promise<void>
}

export async function openFront(framework: Framework): Promise<Front> {
  const jobs = new Map<string, Job>()
  const begun = new Map<string, ServerResponse>()
  const jobOf = ({ headers }: IncomingMessage) => jobs.get(String(headers['x-job'])) as Job // each request names its own
  const perform = async (incoming: IncomingMessage, response: ServerResponse) => {
    await jobOf(incoming).work()
    response.end('done')
  }
  const listener = framework === 'express' ? expressApp(jobOf, perform) : nodeHandler(jobOf, perform)
  const server = createServer((incoming, response) => {
    const job = jobOf(incoming)
    begun.set(String(incoming.headers['x-job']), response)
    job.inside(() => listener(incoming, response))
    response.once('close', () => response.writableFinished || job.left())
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const { port } = server.address() as AddressInfo
  let count = 0

  return {
    send(job) {
      const id = String(++count)
      jobs.set(id, job)
      const outgoing = request({ port, host: '127.0.0.1', agent: new Agent(), headers: { 'x-job': id } })
      const closed = new Promise<void>((resolve) => {
        outgoing.once('close', resolve)
        outgoing.once('socket', (socket) => socket.once('close', resolve).once('error', resolve)) // of a reset amid the answer
      })
      const answered = new Promise<number | undefined>((resolve) => {
        outgoing.once('response', (incoming) => {
          incoming.resume()
          incoming.once('error', () => {})
          resolve(incoming.statusCode)
        })
        outgoing.once('error', () => {})
        void closed.then(() => resolve(undefined))
      })
      const over = closed.then(async () => {
        const response = begun.get(id)
        if (response) await emitted(response, 'close')
        else await idle(server)
        return begun.has(id)
      })
      outgoing.end()
      return {
        answered,
        over,
        async leave() {
          // Odd ones close their connection, even ones reset it.
          if (count % 2) outgoing.destroy()
          else if (outgoing.socket) outgoing.socket.resetAndDestroy()
          else outgoing.destroy()
          await over
        },
      }
    },
    close: () => new Promise((resolve) => server.close(() => resolve())),
  }
}

function nodeHandler(
  jobOf: (incoming: IncomingMessage) => Job,
  perform: (incoming: IncomingMessage, response: ServerResponse) => Promise<void>,
) {
  return forNode(perform, {
    transaction: (incoming) => jobOf(incoming).transaction,
    onError(_, _incoming, response) {
      if (response.headersSent) return
      response.statusCode = 500
      response.end()
    },
  })
}

function expressApp(
  jobOf: (incoming: IncomingMessage) => Job,
  perform: (incoming: IncomingMessage, response: ServerResponse) => Promise<void>,
) {
  const app = express()
  app.use(forExpress({ transaction: (incoming) => jobOf(incoming).transaction }))
  app.get('/', perform)
  app.use((_error: unknown, _incoming: Request, response: Response, _next: NextFunction) => {
    if (!response.headersSent) response.status(500).end()
  })
  return app
}

async function emitted(response: ServerResponse, event: 'close'): Promise<void> {
  if (!response.closed) await new Promise<void>((resolve) => response.once(event, resolve))
}

/** Resolves when no connection is open: a request that never arrived will not arrive any more. */
async function idle(server: Server): Promise<void> {
  for (;;) {
    const open = await new Promise<number>((resolve) => server.getConnections((_, connections) => resolve(connections)))
    if (open === 0) return
    await new Promise((resolve) => setImmediate(resolve))
  }
}
