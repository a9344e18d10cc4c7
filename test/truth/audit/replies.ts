// How an answer is sent, in the way of each framework.
import type { ServerResponse } from 'node:http'
import { pipeline, Readable } from 'node:stream'
import type express from 'express'
import type { FastifyReply } from 'fastify'
import type { Answer } from './styles.ts'

/** Sends an answer by Node's own means. */
export function replyByNode({ status, location, body }: Answer, response: ServerResponse): void {
  if (location !== undefined) response.setHeader('location', location)
  if (body instanceof Readable) {
    pipeline(body, response.writeHead(status), () => {})
  } else {
    response.writeHead(status, body && { 'content-type': 'application/json' })
    response.end(body && JSON.stringify(body))
  }
}

export function replyByExpress({ status, location, body }: Answer, response: express.Response): void {
  if (location !== undefined) response.redirect(status, location)
  else if (body instanceof Readable) pipeline(body, response.status(status), () => {})
  else if (body) response.status(status).json(body)
  else response.status(status).end()
}

export function replyByFastify({ status, location, body }: Answer, reply: FastifyReply): FastifyReply {
  return location === undefined ? reply.code(status).send(body) : reply.redirect(location, status)
}

/** An answer as a response of the web. */
export function toResponse({ status, location, body }: Answer): Response {
  const headers = new Headers(location === undefined ? {} : { location })
  if (body instanceof Readable) return new Response(Readable.toWeb(body) as ReadableStream, { status, headers })
  if (body) headers.set('content-type', 'application/json')
  return new Response(body ? JSON.stringify(body) : null, { status, headers })
}
