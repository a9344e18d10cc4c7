import { type OutgoingHttpHeader, validateHeaderValue } from 'node:http'
import { types } from 'node:util'
import { type Context, detach, enclosingScopes, runInScope } from './context.ts'
import { AmbientError } from './errors.ts'

type Method = (...args: unknown[]) => unknown

/** Calls that send something: they are recorded until the context has settled. */
const senders = ['writeHead', 'write', 'end', 'flushHeaders', 'addTrailers'] as const
/** Calls that matter once the head is decided: until then they are left alone. */
const others = ['setHeader', 'setHeaders', 'appendHeader', 'removeHeader', 'destroy'] as const
/** Calls of which the guard only takes note. */
const observed = ['on', 'emit'] as const

type Sender = (typeof senders)[number]
type Guarded = Sender | (typeof others)[number] | (typeof observed)[number]

const key: unique symbol = Symbol.for('ambient-db.response')

/** What the guard needs of a response: `http` and the compatibility API of `http2` have it in common. */
export interface GuardedResponse extends Record<Guarded, Method> {
  statusCode: number
  statusMessage: string | undefined
  sendDate: boolean
  readonly headersSent: boolean
  readonly writableEnded: boolean
  readonly destroyed: boolean
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
  /** `open`: nothing would have left yet. `holding`: settling. `passing`: settled. `failed`: the answer is another's. */
  #state: 'open' | 'holding' | 'passing' | 'failed' = 'open'
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
  /** The status that `writeHead` was given. */
  #head: number | undefined
  #held: [Sender, unknown[]][] = []
  #ended = false
  #sealed = false
  /** A writer was told to wait for `drain`. */
  #owesDrain = false
  #drainListeners: Method[] = []
  #sources: Source[] = []
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
    Object.assign(response, intercepted)
    // Whoever replaced `on` (compression) keeps listeners for `drain` where an event of ours would not reach them.
    if (this.#methods.on !== Object.getPrototypeOf(response).on) response.on = interceptedOn
  }

  /** The handler threw: rolls back and has `error` answered, unless the answer has left. */
  async reject(error: unknown): Promise<void> {
    if (this.#state === 'open') {
      this.#hold()
      await this.#context.settle('rollback', error)
      this.#fail(error)
    } else if (this.#state === 'holding') {
      this.#failure ??= { error } // the answer is given up, unless COMMIT has been sent already
      this.#context.abort(new AmbientError('AMBIENT_ABORTED', 'The handler threw after its answer.', { cause: error }))
    } else if (!this.#isAbortion(error)) {
      detach(() => this.#answering.onFailure(error))
    }
  }

  call(name: Guarded, args: unknown[]): unknown {
    const state = this.#state
    if (state === 'passing' || (state === 'failed' && !this.#isDead())) return this.#pass(name, args)
    if (state === 'failed') return this.#ignore(name, args)
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
      case 'destroy':
        return this.#pass(name, args)
      default:
        throw headersSentError()
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
    if (this.#state === 'open' || this.#state === 'holding') return true
    if (this.#state === 'failed' && this.#isDead()) return false
    return this.#native('headersSent')
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
    if (this.#head !== undefined || this.#state === 'holding') throw headersSentError()
    const message = typeof args[1] === 'string' ? args[1] : undefined
    const head = checkedStatus(args[0])
    if (message !== undefined) validateHeaderValue('statusMessage', message)
    applyHeaders(this.#response, message === undefined ? (args[1] ?? args[2]) : args[2])
    this.#response.statusCode = head
    this.#head = head
    this.#held.push(['writeHead', message === undefined ? [head] : [head, message]])
    this.#seal()
    return this.#response
  }

  /** The first call settles the context; until that is done all are held. */
  #send(name: Sender, args: unknown[]): unknown {
    if (this.#state === 'open') {
      if (name !== 'end') this.#refuseInBlock()
      if (this.#settle()) return this.#pass(name, args)
    }
    this.#held.push([name, args])
    if (name === 'write') this.#owesDrain = true
    return false
  }

  /** Settles the context by the status; true if that is done already, because there was nothing to settle. */
  #settle(): boolean {
    let settlement: Promise<void>
    try {
      const outcome = this.#answering.outcome(this.#head ?? this.#response.statusCode)
      if (this.#context.settleUntouched(outcome)) {
        this.#release()
        return true
      }
      settlement = this.#context.settle(outcome)
    } catch (error) {
      settlement = this.#context.settle('rollback', error).then(() => Promise.reject(error))
    }
    this.#hold()
    settlement.then(
      () => this.#released(),
      (error) => this.#fail(error),
    )
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
    Object.assign(this.#response, sealed)
    Object.defineProperties(this.#response, sealedProperties)
  }

  #release(): void {
    this.#state = 'passing'
    for (const [name, args] of this.#held) {
      const result = this.#pass(name, args)
      if (name === 'write') this.#owesDrain = result !== false // otherwise Node emits it
    }
    this.#held = []
  }

  #released(): void {
    try {
      this.#release()
    } catch (error) {
      this.#fail(error) // committed, but Node cannot send this answer
      return
    }
    if (this.#owesDrain && !this.#ended) this.#drain()
    if (this.#failure) detach(() => this.#answering.onFailure(this.#failure?.error))
  }

  #drain(): void {
    if (this.#response.on !== interceptedOn) this.#response.emit('drain')
    else for (const listener of this.#drainListeners.splice(0)) listener.call(this.#response)
  }

  /** Takes the answer back and hands the response over as it was when the request came in. */
  #fail(error: unknown): void {
    const gone = !this.#failure && this.#isAbortion(error)
    this.#failure ??= { error }
    this.#state = 'failed'
    Object.assign(this.#response, intercepted, sealed, { on: this.#methods.on, emit: this.#methods.emit })
    this.#request.emit = this.#emitRequest
    for (const [name, args] of this.#held.splice(0)) this.#ignore(name, args)
    if (!this.#native('headersSent')) this.#restoreHead()
    this.#context.run(() => this.#endSources())
    if (!gone) detach(() => this.#answering.onFailure(this.#failure?.error))
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
    if (this.#state !== 'open' && this.#state !== 'holding') return
    if (this.#state === 'open') this.#state = 'passing'
    this.#context.abort(new AmbientError('AMBIENT_ABORTED', 'The client went away before it was answered.'))
  }

  /** Whether `error` says no more than that the client is gone. */
  #isAbortion(error: unknown): boolean {
    const { abortion } = this.#context
    return abortion !== undefined && (error === abortion || (error as Error | undefined)?.cause === abortion)
  }

  /** Whether the running code belongs to the context that failed. */
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

const intercepted = interceptAll([...senders], {
  emit(this: GuardedResponse, ...args: unknown[]) {
    return this[key]?.emit(args)
  },
})

const sealed = interceptAll([...others], {})

function interceptAll(names: Guarded[], methods: Partial<Record<Guarded, Method>>): Partial<Record<Guarded, Method>> {
  for (const name of names) {
    methods[name] = function (this: GuardedResponse, ...args: unknown[]) {
      return this[key]?.call(name, args)
    }
  }
  return methods
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
