import { type Context, currentScope, detach, enclosingScopes, runInScope } from './context.ts'
import { AmbientError, isAmbientError } from './errors.ts'
import {
  applyHead,
  assertChunk,
  type Headers,
  headersOf,
  headersSentError,
  type Intercepted,
  type Interceptor,
  interceptConnection,
  interceptEnd,
  interceptListeners,
  interceptorOf,
  interceptRequest,
  interceptSenders,
  interceptSetters,
  isInterim,
  type Method,
  type Methods,
  methodsOf,
  type NodeRequest,
  type NodeResponse,
  releaseConnection,
} from './response.ts'

/** What the guard asks of a framework. */
export interface Answering {
  /** How the context ends with this status. */
  outcome(status: number): 'commit' | 'rollback'
  /** Answers `error` instead; nothing of the first answer is left. Called outside any context; must not throw. */
  onFailure(error: unknown): void
  /**
   * What code whose answer was given up is told of `headersSent`. By `true` Express would destroy the socket of the other answer;
   * by `false` Fastify would answer once more.
   */
  readonly givenUpHeadersSent: boolean
}

/** The guard of `response`, if it has one. */
export function guardOf(response: object): ResponseGuard | undefined {
  return interceptorOf(response) as ResponseGuard | undefined // nobody else puts one there
}

/** What pipes into a response. */
interface Source {
  unpipe?(destination: unknown): unknown
  destroy?(): unknown
}

/**
 * Stands between a handler and Node's response, and lets nothing leave before the context has settled (H1): the first byte
 * settles it, what follows is held meanwhile, then either goes out as it was or gives way to the answer of a failure.
 */
export class ResponseGuard implements Interceptor {
  /** `open`: nothing would have left yet. `holding`: settling, so nothing may leave. `passing`: settled. */
  #state: 'open' | 'holding' | 'passing' = 'open'
  readonly #context: Context
  readonly #request: NodeRequest
  readonly #response: NodeResponse
  readonly #answering: Answering
  /** What stood on the response when the request came in: all of it stands there again if the answer fails. */
  readonly #methods: Methods
  readonly #headers: Headers
  readonly #statusMessage: string | undefined
  readonly #emitRequest: Method
  #sealed = false
  /** The head is decided. Its status is the one that `writeHead` was given, or that stood there when the context settled. */
  #begun = false
  #head: number | undefined
  #ended = false
  #held: [Intercepted, unknown[]][] = []
  /** How many listeners for `drain` there were when the request came in. */
  readonly #drainCount: number
  #drainListeners: Method[] | undefined
  #sources: Source[] = []
  /** Who waits for {@link ResponseGuard.settle}. */
  #waiter: { resolve(): void; reject(error: unknown): void } | undefined
  /** What the handler threw while its answer was held. */
  #thrown: { error: unknown } | undefined
  /** The answer of the handler was given up for this; what its context goes on to say is ignored. */
  #failure: { error: unknown } | undefined

  constructor(context: Context, request: NodeRequest, response: NodeResponse, answering: Answering) {
    this.#context = context
    this.#request = request
    this.#response = response
    this.#answering = answering
    this.#methods = methodsOf(response)
    this.#headers = headersOf(response)
    this.#statusMessage = request.httpVersionMajor === 2 ? undefined : response.statusMessage // http2 has none, and warns
    this.#emitRequest = request.emit
    this.#drainCount = response.listenerCount('drain')
    interceptRequest(request, this)
    interceptSenders(response, this)
    interceptConnection(request, this)
    // Whoever replaced `on` (compression) keeps listeners for `drain` where an event of ours would not reach them.
    if (this.#methods.on !== Object.getPrototypeOf(response).on) {
      this.#drainListeners = []
      interceptListeners(response)
    }
  }

  /** Runs `work` in the context of the request. */
  run<Result>(work: () => Result): Result {
    return this.#context.run(work)
  }

  /**
   * Settles by `status`, for a framework that answers when its handlers are done; until then nothing may leave. Rejects with what
   * failed, and then the response is as it came in; also if the client has gone. Does nothing where an answer has begun by itself.
   */
  async settle(status: number): Promise<void> {
    const { abortion } = this.#context
    if (abortion) throw abortion
    if (this.#state !== 'open') return
    await new Promise<void>((resolve, reject) => {
      this.#waiter = { resolve, reject }
      this.#begun = true
      this.#head = status
      if (this.#settle('end')) this.#released()
    })
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

  call(name: Intercepted, args: unknown[]): unknown {
    if (this.#failure && this.#isInside()) return this.#ignore(name, args)
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
      case 'destroy':
        return this.#pass(name, args)
      default:
        if (this.#begun) throw headersSentError()
        return this.#pass(name, args)
    }
  }

  on(args: unknown[]): unknown {
    const [event, listener] = args
    if (event !== 'drain' || typeof listener !== 'function') return this.#pass('on', args)
    const unlessFailed = Object.assign(() => this.#failure ?? listener.call(this.#response), { listener })
    this.#drainListeners?.push(unlessFailed)
    return this.#pass('on', ['drain', unlessFailed])
  }

  emit(args: unknown[]): unknown {
    if (args[0] === 'close') this.#onClose()
    else if (args[0] === 'pipe') this.#sources.push(args[1] as Source)
    else if (args[0] === 'unpipe') this.#sources = this.#sources.filter((source) => source !== args[1])
    return this.#inContext(() => this.#pass('emit', args))
  }

  emitRequest(args: unknown[]): unknown {
    // Before Node 24 the response of a pipelined request that waits for its turn is not closed with its connection.
    if (args[0] === 'close' && this.#request.socket?.destroyed) this.#onClose()
    return this.#inContext(() => this.#emitRequest.apply(this.#request, args))
  }

  #inContext(work: () => unknown): unknown {
    const { scope } = this.#context
    return currentScope() === scope ? work() : runInScope(scope, work)
  }

  /**
   * What is sent past the response cannot be held. Where nothing is to be settled it is the answer; otherwise its sender is told.
   * Node itself sends so as well: interim answers, and outside of the context what it says to requests that it cannot read.
   */
  bypass(chunk: unknown): void {
    if (this.#state === 'passing' || isInterim(chunk) || !this.#isInside()) return
    if (this.#state === 'open' && this.#context.settleUntouched('commit')) return void this.#release()
    throw new AmbientError(
      'AMBIENT_RESPONSE_BYPASSED',
      'Something was sent past the response of a request before its context had settled.',
    )
  }

  get headersSent(): boolean {
    if (this.#failure && this.#isInside()) return this.#answering.givenUpHeadersSent
    return this.#state === 'passing' ? this.#native('headersSent') : this.#begun
  }

  get writableEnded(): boolean {
    return (this.#state === 'holding' && this.#ended) || this.#native('writableEnded')
  }

  #native(property: 'headersSent' | 'writableEnded'): boolean {
    return Reflect.get(Object.getPrototypeOf(this.#response), property, this.#response)
  }

  #pass(name: keyof Methods, args: unknown[]): unknown {
    return this.#methods[name].apply(this.#response, args)
  }

  /** Records the head and sets its headers, so that whatever is wrong with them is said at once, as by Node. */
  #writeHead(args: unknown[]): NodeResponse {
    if (this.#begun) throw headersSentError()
    const head = applyHead(this.#response, args)
    this.#head = head[0]
    this.#begun = true
    this.#held.push(['writeHead', head])
    this.#seal()
    return this.#response
  }

  /** The first call settles the context; until that is done all are held. */
  #send(name: Intercepted, args: unknown[]): unknown {
    if (this.#state === 'open') {
      if (this.#settle(name)) {
        this.#release()
        return this.#pass(name, args)
      }
      if (this.#failure) return this.#ignore(name, args)
    }
    this.#begun = true
    this.#held.push([name, args])
    return false
  }

  /** Settles the context by the status; true if that is done, because there was nothing to settle. */
  #settle(name: Intercepted): boolean {
    try {
      if (name !== 'end') this.#refuseInBlock()
      this.#head ??= this.#response.statusCode
      const outcome = this.#answering.outcome(this.#head)
      if (this.#context.settleUntouched(outcome)) return true
      // Before the settlement would end it: what reads it must fail after the answer was given up, not before.
      if (outcome === 'commit') for (const session of this.#context.participants()) session.endStream('refuse')
      this.#hold()
      this.#context.settle(outcome).then(
        () => this.#released(),
        (error) => this.#fail(error),
      )
    } catch (error) {
      // Whoever writes is told; but in a source that pipes it would be an uncaught exception.
      if (isAmbientError(error, 'AMBIENT_RESPONSE_IN_BLOCK') && this.#sources.length === 0) throw error
      this.#giveUp(error)
    }
    return false
  }

  #hold(): void {
    this.#state = 'holding'
    this.#seal()
    interceptEnd(this.#response)
  }

  /** From now on the head is decided, and the response says so. */
  #seal(): void {
    if (!this.#sealed) interceptSetters(this.#response)
    this.#sealed = true
  }

  /** Lets everything out that was held; true if a writer waits for a `drain` that Node will not emit. */
  #release(): boolean {
    let drain = false
    this.#letPass()
    // What it was settled by, whatever was assigned since: Node would have sent it by now.
    if (this.#head !== undefined && !this.#native('headersSent')) this.#response.statusCode = this.#head
    for (const [name, args] of this.#held.splice(0)) {
      const result = this.#pass(name, args)
      if (name === 'write') drain = result !== false
    }
    return drain && !this.#ended
  }

  #letPass(): void {
    this.#state = 'passing'
    releaseConnection(this.#request, this)
  }

  #released(): void {
    let drain: boolean
    try {
      drain = this.#release()
    } catch (error) {
      this.#fail(error) // settled, but Node cannot send this answer
      return
    }
    if (drain) this.#drain()
    this.#waiter?.resolve()
    this.#waiter = undefined
    if (this.#thrown) this.#report(this.#thrown.error)
  }

  #drain(): void {
    if (!this.#drainListeners) this.#response.emit('drain')
    else for (const listener of this.#drainListeners.splice(0)) listener.call(this.#response)
  }

  /** The context did not settle as it should: another answer is due. */
  #fail(error: unknown): void {
    this.#takeBack(this.#thrown?.error ?? error)
    this.#letPass()
    // Otherwise nobody is left to be answered.
    if (this.#waiter || this.#thrown || !this.#isAbortion(error)) this.#report(this.#failure?.error)
  }

  /** Rolls back; the other answer is made meanwhile, and held until that is done. */
  #giveUp(error: unknown): void {
    this.#hold()
    this.#takeBack(error)
    detach(() => void this.#context.settle('rollback', error).then(() => this.#released()))
    this.#report(error)
  }

  #report(error: unknown): void {
    const waiter = this.#waiter
    this.#waiter = undefined
    if (waiter) waiter.reject(error)
    else detach(() => this.#answering.onFailure(error))
  }

  /** Makes the response as it was when the request came in. */
  #takeBack(error: unknown): void {
    const response = this.#response
    this.#failure = { error }
    interceptSenders(response, this)
    interceptSetters(response)
    response.on = this.#methods.on
    response.emit = this.#methods.emit
    this.#request.emit = this.#emitRequest
    for (const [name, args] of this.#held.splice(0)) this.#ignore(name, args)
    this.#begun = this.#ended = false
    this.#head = undefined
    if (!this.#native('headersSent')) this.#restoreHead()
    // The drain of the other answer must not wake the writers of this one.
    for (const listener of response.rawListeners('drain').slice(this.#drainCount))
      response.removeListener('drain', listener)
    this.#context.run(() => this.#endSources())
  }

  #restoreHead(): void {
    const response = this.#response
    const headers = response.getHeaders()
    for (const name in headers) if (!(name in this.#headers)) this.#pass('removeHeader', [name])
    for (const name in this.#headers) {
      if (headers[name] !== this.#headers[name]) this.#pass('setHeader', [name, this.#headers[name]])
    }
    response.statusCode = 500 // an error handler that says nothing else must not say 200
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
  #ignore(name: Intercepted, args: unknown[]): unknown {
    const callback = args.at(-1)
    if (typeof callback === 'function') process.nextTick(callback, this.#failure?.error)
    return name === 'write' ? false : this.#response
  }

  /** The client went before the answer: the work is rolled back (H4). */
  #onClose(): void {
    if (this.#state === 'passing') return
    if (this.#state === 'open') this.#letPass()
    this.#context.abort(new AmbientError('AMBIENT_ABORTED', 'The client went away before it was answered.'))
  }

  /** Whether `error` says no more than that the client is gone. */
  #isAbortion(error: unknown): boolean {
    const { abortion } = this.#context
    return abortion !== undefined && (error === abortion || (error as Error | undefined)?.cause === abortion)
  }

  /** Whether the running code belongs to the context; once its answer was given up it is ignored. */
  #isInside(): boolean {
    for (const { context } of enclosingScopes()) if (context === this.#context) return true
    return false
  }

  #refuseInBlock(): void {
    for (const { block } of enclosingScopes()) {
      if (!block?.session || !block.live || !this.#context.participants().includes(block.session)) continue
      throw new AmbientError('AMBIENT_RESPONSE_IN_BLOCK', 'The answer was begun inside a block that is still open.', {
        database: block.session.name,
      })
    }
  }
}
