// Four servers, with the middleware and without, for each framework; tells its parent the ports, and on request its CPU time.
import { createServer, type IncomingMessage, type RequestListener, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import { newContext } from 'ambient-db'
import { databaseContext as expressContext } from 'ambient-db/express'
import { databaseContext as nodeContext } from 'ambient-db/node-http'
import express, { type RequestHandler } from 'express'
import { spin } from './spin.ts'
import { insert, pgTarget } from './targets.ts'

const closers: (() => unknown)[] = []
const { main } = await pgTarget({ url: process.argv[2] as string, quick: false, atEnd: (close) => closers.push(close) })

const addRow = () => main.db.query(insert, ['http'])

/** Answers, after an insert where the path says so, and after keeping the CPU busy for as long as the query says. */
function handler(unit: (work: () => Promise<unknown>) => Promise<unknown>) {
  return async (request: IncomingMessage, response: ServerResponse) => {
    const { pathname, searchParams } = new URL(request.url ?? '/', 'http://localhost')
    spin(Number(searchParams.get('spin') ?? 0))
    if (pathname === '/insert') await unit(addRow)
    response.setHeader('content-type', 'application/json')
    response.end('{"ok":true}')
  }
}

const byHand = handler(newContext)
const ambient = handler((work) => work())

function expressApp(...handlers: RequestHandler[]): RequestListener {
  const app = express()
  app.use(...handlers)
  return app
}

const servers: Record<string, RequestListener> = {
  'node:http by hand': byHand,
  'node:http': nodeContext(ambient),
  'Express by hand': expressApp(byHand),
  Express: expressApp(expressContext(), ambient),
}

const ports: Record<string, number> = {}
for (const [name, listener] of Object.entries(servers)) {
  const server = createServer((request, response) => void listener(request, response))
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  ports[name] = (server.address() as AddressInfo).port
  closers.push(() => server.close())
}

process.on('message', () => {
  const { user, system } = process.cpuUsage()
  process.send?.((user + system) / 1000)
})
process.once('disconnect', () => closers.forEach((close) => void close()))
process.send?.(ports)
