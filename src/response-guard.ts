import { type OutgoingHttpHeader, validateHeaderValue } from 'node:http'
import { types } from 'node:util'
import { type Context, detach, enclosingScopes, runInScope } from './context.ts'
import { AmbientError } from './errors.ts'

type Method = (...args: unknown[]) => unknown

/** Calls that send something: they are held until the context has settled. */
const senders = ['writeHead', 'write', 'end', 'flushHeaders', 'addTrailers'] as const
/** Calls that matter only once the head is decided. */
const sealed = ['setHeader', 'setHeaders', 'appendHeader', 'removeHeader', 'destroy'] as const

type Guarded = (typeof senders)[number] | (typeof sealed)[number] | 'on' | 'emit'

const key: unique symbol = Symbol.for('ambient-db.response')

/** What the guard needs of a response: `http` and the compatibility API of `http2` have it in common. */
export interface GuardedResponse extends Record<Guarded, Method> {
  statusCode: number
  statusMessage: string | undefined
  sendDate: boolean
  readonly headersSent: boolean
  readonly writableEnded: boolean
  getHeaders(): Record<string, OutgoingHttpHeader | undefined>
  [key]?: ResponseGuard
}

/** What the guard needs of the request. */
export interface GuardedRequest {
  emit: Method
  readonly httpVersionMajor: number
}

/** What the guard asks of a framework. */
export interface Answering {
  /** How the context ends with this status. */
  outcome(status: number): 'commit' | 'rollback'
  /** Answers `error` instead; nothing of the first answer is left. Called outside any context; must not throw. */
  onFailure(error: unknown): void
}

/** The guard of `response`, if it has one. */
export function guardOf(response: object): ResponseGuard | undefined {
  return (response as Partial<GuardedResponse>)[key]
}

/**
 * Stands between a handler and Node's response, and lets nothing leave before the context has settled (H1): the first byte
 * settles it, what follows is held meanwhile, then either goes out as it was or gives way to the answer of a failure.
 */
export class ResponseGuard {
  /** `open`: nothing would have left yet. `holding`: settling, so nothing may leave. `passing`: settled. */
  #state: 'open' | 'holding' | 'passing' = 'open'
  readonly #context: Context
  readonly #request: GuardedRequest
  readonly #response: GuardedResponse
  readonly #answering: Answering
  /** What stood on the response when the request came in: all of it stands there again if the answer fails. */
  readonly #methods: Record<Guarded, Method>
  readonly #headers: Record<string, OutgoingHttpHeader | undefined>
  readonly #status: number
  readonly #statusMessage: string | undefined
  readonly #emitRequest: Method
  #sealed = false
  /** The head is decided: by the status that `writeHead` was given, if it was. */
  #begun = false
  #head: number | undefined
  #ended = false
  #held: [Guarded, unknown[]][] = []
  /** A writer was told to wait for `drain`. */
  #owesDrain = false
  #drainListeners: Method[] = []
  #sources: Source[] = []
  /** What the handler threw while its answer was held. */
  #thrown: { error: unknown } | undefined
  /** The answer of the handler was given up for this; what its context goes on to say is ignored. */
  #failure: { error: unknown } | undefined

  constructor(context: Context, request: GuardedRequest, response: GuardedResponse, answering: Answering) {
    this.#context = context
    this.#request = request
    this.#response = response
    this.#answering = answering
    this.#methods = {
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
    this.#headers = copyHeaders(response.getHeaders())
    this.#status = response.statusCode
    this.#statusMessage = request.httpVersionMajor === 2 ? undefined : response.statusMessage // http2 has none, and warns
    this.#emitRequest = request.emit
    response[key] = this
    Object.assign(response, senderMethods)
    // Whoever replaced `on` (compression) keeps listeners for `drain` where an event of ours would not reach them.
    if (this.#methods.on !== Object.getPrototypeOf(response).on) response.on = interceptedOn
  }

  /** The handler threw: rolls back and has `error` answered, unless the answer has left. */
  reject(error: unknown): void {
    if (this.#failure || this.#isAbortion(error)) return // a consequence of what is known already
    if (this.#state === 'open') this.#giveUp(error)
    else if (this.#state === 'passing') this.#report(error)
    else {
      this.#thrown ??= { error } // too late only if COMMIT has been sent
      this.#context.abort(new AmbientError('AMBIENT_ABORTED', 'The handler threw after its answer.', { cause: error }))
    }
  }

  call(name: Guarded, args: unknown[]): unknown {
    if (this.#failure && this.#isDead()) return this.#ignore(name, args)
    if (this.#state === 'passing') return this.#pass(name, args)
    switch (name) {
      case 'writeHead':
        return this.#writeHead(args)
      case 'write':
        assertChunk(args[0])
        return this.#send(name, args)
      case 'end':
        if (args[0] && typeof args[0] !== 'function') assertChunk(args[0])
        this.#send(name, args)
        this.#ended = true
        return this.#response
      case 'flushHeaders':
        this.#send(name, args)
        return undefined
      case 'addTrailers':
        this.#held.push([name, args])
        return undefined
      case 'destroy': // `pipeline` does it when its source fails, as one does that ends with the context
        if (this.#state === 'open') return this.#pass(name, args)
        this.#held.push([name, args])
        return this.#response
      default:
        if (this.#begun) throw headersSentError()
        return this.#pass(name, args)
    }
  }

  on(args: unknown[]): unknown {
    if (args[0] === 'drain') this.#drainListeners.push(args[1] as Method)
    return this.#pass('on', args)
  }

  emit(args: unknown[]): unknown {
    if (args[0] === 'close') this.#onClose()
    else if (args[0] === 'pipe') this.#sources.push(args[1] as Source)
    else if (args[0] === 'unpipe') this.#sources = this.#sources.filter((source) => source !== args[1])
    return runInScope(this.#context.scope, () => this.#pass('emit', args))
  }

  get headersSent(): boolean {
    if (this.#failure && this.#isDead()) return false
    return this.#state === 'passing' ? this.#native('headersSent') : this.#begun
  }

  get writableEnded(): boolean {
    return (this.#state === 'holding' && this.#ended) || this.#native('writableEnded')
  }

  #native(property: 'headersSent' | 'writableEnded'): boolean {
    return Reflect.get(Object.getPrototypeOf(this.#response), property, this.#response)
  }

  #pass(name: Guarded, args: unknown[]): unknown {
    return this.#methods[name].apply(this.#response, args)
  }

  /** Records the head and sets its headers, so that whatever is wrong with them is said at once, as by Node. */
  #writeHead(args: unknown[]): GuardedResponse {
    if (this.#begun) throw headersSentError()
    const message = typeof args[1] === 'string' ? args[1] : undefined
    const head = checkedStatus(args[0])
    if (message !== undefined) validateHeaderValue('statusMessage', message)
    applyHeaders(this.#response, message === undefined ? (args[1] ?? args[2]) : args[2])
    this.#response.statusCode = head
    this.#head = head
    this.#begun = true
    this.#held.push(['writeHead', message === undefined ? [head] : [head, message]])
    this.#seal()
    return this.#response
  }

  /** The first call settles the context; until that is done all are held. */
  #send(name: Guarded, args: unknown[]): unknown {
    if (this.#state === 'open') {
      if (name !== 'end') this.#refuseInBlock()
      if (this.#settle()) return this.#pass(name, args)
      if (this.#failure) return this.#ignore(name, args)
    }
    this.#begun = true
    this.#held.push([name, args])
    if (name === 'write') this.#owesDrain = true
    return false
  }

  /** Settles the context by the status; true if that is done, because there was nothing to settle. */
  #settle(): boolean {
    try {
      const outcome = this.#answering.outcome(this.#head ?? this.#response.statusCode)
      if (this.#context.settleUntouched(outcome)) {
        this.#release()
        return true
      }
      // Before the settlement would end it: what reads it must fail after the answer was given up, not before.
      if (outcome === 'commit') for (const session of this.#context.participants()) session.endStream('refuse')
      this.#hold()
      this.#context.settle(outcome).then(
        () => this.#released(),
        (error) => this.#fail(error),
      )
    } catch (error) {
      this.#giveUp(error)
    }
    return false
  }

  #hold(): void {
    this.#state = 'holding'
    this.#seal()
  }

  /** From now on the head is decided, and the response says so. */
  #seal(): void {
    if (this.#sealed) return
    this.#sealed = true
    Object.assign(this.#response, sealedMethods)
    Object.defineProperties(this.#response, sealedProperties)
  }

  #release(): void {
    this.#state = 'passing'
    for (const [name, args] of this.#held.splice(0)) {
      const result = this.#pass(name, args)
      if (name === 'write') this.#owesDrain = result !== false // otherwise Node emits it
    }
  }

  #released(): void {
    try {
      this.#release()
    } catch (error) {
      this.#fail(error) // settled, but Node cannot send this answer
      return
    }
    if (this.#owesDrain && !this.#ended) this.#drain()
    if (this.#thrown) this.#report(this.#thrown.error)
  }

  #drain(): void {
    if (this.#response.on !== interceptedOn) this.#response.emit('drain')
    else for (const listener of this.#drainListeners.splice(0)) listener.call(this.#response)
  }

  /** The context did not settle as it should: another answer is due. */
  #fail(error: unknown): void {
    this.#takeBack(this.#thrown?.error ?? error)
    this.#state = 'passing'
    if (this.#thrown || !this.#isAbortion(error)) this.#report(this.#failure?.error) // otherwise nobody is left to be answered
  }

  /** Rolls back; the other answer is made meanwhile, and held until that is done. */
  #giveUp(error: unknown): void {
    this.#hold()
    this.#takeBack(error)
    detach(() => void this.#context.settle('rollback', error).then(() => this.#released()))
    this.#report(error)
  }

  #report(error: unknown): void {
    detach(() => this.#answering.onFailure(error))
  }

  /** Makes the response as it was when the request came in. */
  #takeBack(error: unknown): void {
    this.#failure = { error }
    Object.assign(this.#response, senderMethods, sealedMethods, { on: this.#methods.on, emit: this.#methods.emit })
    this.#request.emit = this.#emitRequest
    for (const [name, args] of this.#held.splice(0)) this.#ignore(name, args)
    this.#begun = this.#ended = this.#owesDrain = false
    this.#head = undefined
    if (!this.#native('headersSent')) this.#restoreHead()
    this.#context.run(() => this.#endSources())
  }

  #restoreHead(): void {
    const response = this.#response
    const headers = response.getHeaders()
    for (const name in headers) if (!(name in this.#headers)) this.#pass('removeHeader', [name])
    for (const name in this.#headers) {
      if (headers[name] !== this.#headers[name]) this.#pass('setHeader', [name, this.#headers[name]])
    }
    response.statusCode = this.#status
    response.sendDate = true
    if (this.#request.httpVersionMajor !== 2) response.statusMessage = this.#statusMessage
  }

  /** Destroyed without an error: it would be an uncaught one where nobody listens. The request must live to be answered. */
  #endSources(): void {
    for (const source of this.#sources.splice(0)) {
      source.unpipe?.(this.#response)
      if (source !== this.#request) source.destroy?.()
    }
  }

  /** Drops a call whose answer is not wanted any more. */
  #ignore(name: Guarded, args: unknown[]): unknown {
    const callback = args.at(-1)
    if (typeof callback === 'function') process.nextTick(callback, this.#failure?.error)
    return name === 'write' ? false : this.#response
  }

  /** The client went before the answer: the work is rolled back (H4). */
  #onClose(): void {
    if (this.#state === 'passing') return
    if (this.#state === 'open') this.#state = 'passing'
    this.#context.abort(new AmbientError('AMBIENT_ABORTED', 'The client went away before it was answered.'))
  }

  /** Whether `error` says no more than that the client is gone. */
  #isAbortion(error: unknown): boolean {
    const { abortion } = this.#context
    return abortion !== undefined && (error === abortion || (error as Error | undefined)?.cause === abortion)
  }

  /** Whether the running code belongs to the context of the answer that was given up. */
  #isDead(): boolean {
    for (const { context } of enclosingScopes()) if (context === this.#context) return true
    return false
  }

  #refuseInBlock(): void {
    for (const { block } of enclosingScopes()) {
      if (!block?.live || !this.#context.participants().includes(block.session)) continue
      throw new AmbientError('AMBIENT_RESPONSE_IN_BLOCK', 'The answer was begun inside a block that is still open.', {
        database: block.session.name,
      })
    }
  }
}

/** What pipes into a response. */
interface Source {
  unpipe?(destination: unknown): unknown
  destroy?(): unknown
}

// The same functions on every response keep all responses of one shape.

type Methods = Partial<Record<Guarded, Method>>

const sealedMethods = Object.fromEntries(sealed.map(intercept)) as Methods // by name
const senderMethods = Object.fromEntries([...senders.map(intercept), ['emit', interceptedEmit]]) as Methods // by name

function intercept(name: Guarded): [Guarded, Method] {
  return [
    name,
    function (this: GuardedResponse, ...args: unknown[]) {
      return this[key]?.call(name, args)
    },
  ]
}

function interceptedEmit(this: GuardedResponse, ...args: unknown[]): unknown {
  return this[key]?.emit(args)
}

function interceptedOn(this: GuardedResponse, ...args: unknown[]): unknown {
  return this[key]?.on(args)
}

const sealedProperties: PropertyDescriptorMap & ThisType<GuardedResponse> = {
  headersSent: {
    configurable: true,
    get() {
      return this[key]?.headersSent
    },
  },
  writableEnded: {
    configurable: true,
    get() {
      return this[key]?.writableEnded
    },
  },
}

function copyHeaders(headers: Record<string, OutgoingHttpHeader | undefined>): typeof headers {
  // `appendHeader` adds to the array that is there.
  for (const name in headers) {
    const value = headers[name]
    if (Array.isArray(value)) headers[name] = [...value]
  }
  return headers
}

/** Sets what `writeHead` was given: an object, a flat array, or an array of pairs; the arrays may repeat a name. */
function applyHeaders(response: GuardedResponse, headers: unknown): void {
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

function checkedStatus(status: unknown): number {
  const checked = Number(status) | 0
  if (checked >= 100 && checked <= 999) return checked
  throw coded(new RangeError(`Invalid status code: ${String(status)}`), 'ERR_HTTP_INVALID_STATUS_CODE')
}

function assertChunk(chunk: unknown): void {
  if (typeof chunk === 'string' || types.isUint8Array(chunk)) return
  throw coded(new TypeError('The "chunk" argument must be a string or a Uint8Array.'), 'ERR_INVALID_ARG_TYPE')
}

function headersSentError(): Error {
  return coded(new Error('Cannot set headers after they are sent to the client'), 'ERR_HTTP_HEADERS_SENT')
}

/** The codes of Node, for what it would have said itself a moment later. */
function coded<Failure extends Error>(error: Failure, code: string): Failure {
  return Object.assign(error, { code })
}
