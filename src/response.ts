import { type OutgoingHttpHeader, validateHeaderValue } from 'node:http'
import { types } from 'node:util'

export type Method = (...args: unknown[]) => unknown

/** Calls that send something. */
const senders = ['writeHead', 'write', 'end', 'flushHeaders', 'addTrailers'] as const
/** Calls that matter once the head is decided. */
const setters = ['setHeader', 'setHeaders', 'appendHeader', 'removeHeader', 'destroy'] as const

export type Intercepted = (typeof senders)[number] | (typeof setters)[number]
export type Methods = Record<Intercepted | 'on' | 'emit', Method>
export type Headers = Record<string, OutgoingHttpHeader | undefined>

const key: unique symbol = Symbol.for('ambient-db.response')

/** What is needed of a response: `http` and the compatibility API of `http2` have it in common. */
export interface NodeResponse extends Methods {
  statusCode: number
  statusMessage: string | undefined
  sendDate: boolean
  readonly headersSent: boolean
  readonly writableEnded: boolean
  getHeaders(): Headers
  listenerCount(event: string): number
  rawListeners(event: string): unknown[]
  removeListener(event: string, listener: unknown): unknown
  [key]?: Interceptor
}

/** What is needed of a request. */
export interface NodeRequest {
  emit: Method
  readonly httpVersionMajor: number
  readonly socket: NodeSocket | null | undefined
  /** Of `http2`. */
  readonly stream?: NodeStream
  [key]?: Interceptor
}

/** What a response is written to in the end. */
interface Destination {
  listenerCount(event: string): number
  destroy(error: unknown): unknown
}

/** A connection; what stands in for one in tests may have no writer. */
interface NodeSocket extends Destination {
  readonly destroyed: boolean
  write?: Method
  end?: Method
  /** Those whose answers have not left. */
  [key]?: Set<Interceptor>
}

/** Calls of a stream of `http2` that send an answer, past the response that is built on it. */
const streamSenders = ['respond', 'respondWithFD', 'respondWithFile', 'write', 'end'] as const

interface NodeStream extends Destination, Record<(typeof streamSenders)[number], Method> {
  [key]?: Interceptor
}

/** What stands between a response and those who use it. */
export interface Interceptor {
  readonly headersSent: boolean
  readonly writableEnded: boolean
  call(name: Intercepted, args: unknown[]): unknown
  on(args: unknown[]): unknown
  emit(args: unknown[]): unknown
  emitRequest(args: unknown[]): unknown
  /** Throws if nothing may be sent past the response yet. */
  bypass(chunk: unknown): void
}

/** The interceptor of `response`, if it has one. */
export function interceptorOf(response: object): Interceptor | undefined {
  return (response as Partial<NodeResponse>)[key]
}

/** The methods of `response` as they stand. */
export function methodsOf(response: NodeResponse): Methods {
  return {
    writeHead: response.writeHead,
    write: response.write,
    end: response.end,
    flushHeaders: response.flushHeaders,
    addTrailers: response.addTrailers,
    setHeader: response.setHeader,
    setHeaders: response.setHeaders,
    appendHeader: response.appendHeader,
    removeHeader: response.removeHeader,
    destroy: response.destroy,
    on: response.on,
    emit: response.emit,
  }
}

/** The headers of `response` as they stand. */
export function headersOf(response: NodeResponse): Headers {
  const headers = response.getHeaders()
  for (const name in headers) {
    const value = headers[name]
    if (Array.isArray(value)) headers[name] = [...value] // `appendHeader` adds to the array that is there
  }
  return headers
}

/** Puts `interceptor` before the calls that send something, and before the events. */
export function interceptSenders(response: NodeResponse, interceptor: Interceptor): void {
  response[key] = interceptor
  for (const name of senders) response[name] = interceptors[name]
  response.emit = emit
}

/** Puts it before the events of a request. */
export function interceptRequest(request: NodeRequest, interceptor: Interceptor): void {
  request[key] = interceptor
  request.emit = emitRequest
}

/** Puts it before the calls that matter once the head is decided; from now on it says whether the head was sent. */
export function interceptSetters(response: NodeResponse): void {
  for (const name of setters) response[name] = interceptors[name]
  Object.defineProperty(response, 'headersSent', headersSent)
}

/** Lets it say whether the response has ended. */
export function interceptEnd(response: NodeResponse): void {
  Object.defineProperty(response, 'writableEnded', writableEnded)
}

/** Puts it before the registration of listeners. */
export function interceptListeners(response: NodeResponse): void {
  response.on = on
}

/** Puts it before what is sent past the response, on the connection itself. */
export function interceptConnection({ socket, stream, httpVersionMajor }: NodeRequest, interceptor: Interceptor): void {
  if (httpVersionMajor === 2) {
    if (!stream) return
    stream[key] = interceptor
    for (const name of streamSenders) stream[name] = streamInterceptors[name]
  } else if (typeof socket?.write === 'function') {
    socket[key] ??= interceptSocket(socket)
    socket[key].add(interceptor)
  }
}

/** The answer may leave: what is sent past the response is its user's affair. */
export function releaseConnection({ socket, httpVersionMajor }: NodeRequest, interceptor: Interceptor): void {
  if (httpVersionMajor !== 2) socket?.[key]?.delete(interceptor)
}

/** Done once: a connection serves many requests, perhaps several at a time. */
function interceptSocket(socket: NodeSocket): Set<Interceptor> {
  const interceptors = new Set<Interceptor>()
  for (const name of ['write', 'end'] as const) {
    const send = socket[name]
    if (!send) continue
    socket[name] = function (this: NodeSocket, ...args) {
      for (const interceptor of interceptors) if (isRefused(this, interceptor, name, args[0])) return false
      return send.apply(this, args)
    }
  }
  return interceptors
}

// The same functions in the same order keep all responses of one shape.

const interceptors = Object.fromEntries(
  [...senders, ...setters].map((name) => [
    name,
    function (this: NodeResponse, ...args: unknown[]) {
      return this[key]?.call(name, args)
    },
  ]),
) as Record<Intercepted, Method> // by their names

const streamInterceptors = Object.fromEntries(
  streamSenders.map((name) => [
    name,
    function (this: NodeStream, ...args: unknown[]) {
      if (this[key] && isRefused(this, this[key], name, args[0])) return false
      return Reflect.get(Object.getPrototypeOf(this), name).apply(this, args)
    },
  ]),
) as Record<(typeof streamSenders)[number], Method> // by their names

/** Whoever sends is told; but in a source that pipes it would be an uncaught exception. */
function isRefused(destination: Destination, interceptor: Interceptor, name: string, chunk: unknown): boolean {
  if (name === 'end' && (!chunk || typeof chunk === 'function')) return false // nothing is sent by it
  try {
    interceptor.bypass(chunk)
    return false
  } catch (error) {
    if (destination.listenerCount('unpipe') === 0) throw error
    destination.destroy(error)
    return true
  }
}

/** An interim answer (1xx) as text, which Node writes past the response. */
export function isInterim(chunk: unknown): boolean {
  return typeof chunk === 'string' && chunk.startsWith('HTTP/1.1 1')
}

function emit(this: NodeResponse, ...args: unknown[]): unknown {
  return this[key]?.emit(args)
}

function emitRequest(this: NodeRequest, ...args: unknown[]): unknown {
  return this[key]?.emitRequest(args)
}

function on(this: NodeResponse, ...args: unknown[]): unknown {
  return this[key]?.on(args)
}

const headersSent: PropertyDescriptor & ThisType<NodeResponse> = {
  configurable: true,
  get() {
    return this[key]?.headersSent
  },
}

const writableEnded: PropertyDescriptor & ThisType<NodeResponse> = {
  configurable: true,
  get() {
    return this[key]?.writableEnded
  },
}

/** What `writeHead` was given, checked as by Node; its headers are set on the response. */
export function applyHead(response: NodeResponse, [status, second, third]: unknown[]): [number, string?] {
  const message = typeof second === 'string' ? second : undefined
  const code = Number(status) | 0
  if (code < 100 || code > 999) {
    throw coded(new RangeError(`Invalid status code: ${String(status)}`), 'ERR_HTTP_INVALID_STATUS_CODE')
  }
  if (message !== undefined) validateHeaderValue('statusMessage', message)
  applyHeaders(response, message === undefined ? (second ?? third) : third)
  response.statusCode = code
  return message === undefined ? [code] : [code, message]
}

/** Sets an object, a flat array, or an array of pairs; the arrays may repeat a name. */
function applyHeaders(response: NodeResponse, headers: unknown): void {
  if (!Array.isArray(headers)) {
    for (const [name, value] of Object.entries(headers ?? {})) response.setHeader(name, value)
    return
  }
  const flat: unknown[] = Array.isArray(headers[0]) ? headers.flat(1) : headers
  if (flat.length % 2 !== 0) {
    throw coded(new TypeError("The argument 'headers' must hold pairs of names and values."), 'ERR_INVALID_ARG_VALUE')
  }
  for (let index = 0; index < flat.length; index += 2) response.removeHeader(flat[index])
  for (let index = 0; index < flat.length; index += 2) response.appendHeader(flat[index], flat[index + 1])
}

export function assertChunk(chunk: unknown): void {
  if (typeof chunk === 'string' || types.isUint8Array(chunk)) return
  throw coded(new TypeError('The "chunk" argument must be a string or a Uint8Array.'), 'ERR_INVALID_ARG_TYPE')
}

export function headersSentError(): Error {
  return coded(new Error('Cannot set headers after they are sent to the client'), 'ERR_HTTP_HEADERS_SENT')
}

/** The codes of Node, for what it would have said itself a moment later. */
function coded<Failure extends Error>(error: Failure, code: string): Failure {
  return Object.assign(error, { code })
}
