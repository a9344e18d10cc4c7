import type { Adapter, Capabilities, CommitStatus } from './adapter.ts'
import { bounded } from './clock.ts'
import { bindCallback, detach, outside } from './context.ts'
import { AmbientError, isAmbientError } from './errors.ts'
import { nextTurn } from './time.ts'

/** How long a cancelled statement may take to end before its connection is destroyed, in ms. */
const cancelGrace = 1000

/** How long a unit waits for its turn in a sandbox at most, in ms: what holds it up may wait for the test. */
const sandboxTurn = 5_000

/** What waiting for a connection ends with when it took too long. */
const tooLate = Symbol('too late')

/** A connection that a session holds, until it is released once. */
export class Lease<Connection> {
  readonly adapter: Adapter<unknown, unknown, Connection>
  readonly capabilities: Capabilities
  readonly connection: Connection
  /** What the connection was lost with. */
  lost: Error | undefined
  /** Hears of the loss. */
  onLost: ((error: Error) => void) | undefined
  readonly #engine: unknown
  readonly #onRelease: () => void
  #released = false
  #interruption: Promise<void> | undefined

  constructor(slot: Slot<Connection>, engine: unknown, connection: Connection, onRelease: () => void) {
    this.adapter = slot.adapter
    this.capabilities = slot.capabilities(engine)
    this.connection = connection
    this.#engine = engine
    this.#onRelease = onRelease
  }

  /** Gives the connection back; `broken`, or its loss, destroys it. Harmless when called again. */
  release(broken?: Error): Promise<void> | undefined {
    // A cancel request that is on its way would hit the next borrower.
    return this.#interruption ? this.#interruption.then(() => this.#giveBack(broken)) : this.#giveBack(broken)
  }

  /** Never throws: what the transaction has come to is not changed by it. */
  #giveBack(broken: Error | undefined): Promise<void> | undefined {
    if (this.#released) return undefined
    this.#released = true
    const failed = (error: unknown) => {
      process.emitWarning(`ambient-db: giving a connection back failed: ${codeOf(error)}`)
    }
    try {
      const releasing = outside(() => this.adapter.release(this.#engine, this.connection, broken ?? this.lost))
      if (releasing) return releasing.catch(failed).then(this.#onRelease)
    } catch (error) {
      failed(error)
    }
    this.#onRelease()
    return undefined
  }

  /** What asks for the fate of the transaction that `id` stands for. It keeps the engine, not the connection. */
  lookupOf(id: string): (signal: AbortSignal) => Promise<CommitStatus> {
    const { adapter } = this
    const engine = this.#engine
    return async (signal) => (await adapter.lookUpTransaction?.(engine, id, signal)) ?? 'unknown'
  }

  /** The connection is of no use any more; the first error says why. */
  lose(error: Error): void {
    if (this.lost) return
    this.lost = error
    this.onLost?.(error)
  }

  /** Ends the statement that runs: cancels it on the server, else destroys the connection. Resolves when `wire` has settled. */
  interrupt(wire: Promise<unknown>): Promise<void> {
    this.#interruption = Promise.resolve(this.#interruption).then(() => this.#interrupt(wire))
    return this.#interruption
  }

  /** Resolves when no cancel request is on its way any more; absent if none was sent. */
  get interruption(): Promise<void> | undefined {
    return this.#interruption
  }

  async #interrupt(wire: Promise<unknown>): Promise<void> {
    if (this.capabilities.cancelling && (await this.#cancel(wire).catch(() => false))) return
    this.lose(new Error('The connection was destroyed, because its statement could not be cancelled.'))
    await this.#giveBack(this.lost)
  }

  /** Resolves with whether `wire` has settled in time. A request that overtakes its statement finds nothing to cancel, so it is repeated. */
  async #cancel(wire: Promise<unknown>): Promise<boolean> {
    let settled = false
    const settle = () => {
      settled = true
    }
    const ended = wire.then(settle, settle)
    const deadline = performance.now() + cancelGrace
    const within = (promise: Promise<unknown>, ms: number) => {
      const left = Math.max(0, deadline - performance.now())
      return bounded(promise, Math.min(ms, left), () => undefined)
    }
    for (let pause = 100; ; pause *= 2) {
      await within(
        detach(async () => this.adapter.cancel?.(this.#engine, this.connection)),
        cancelGrace,
      )
      await within(ended, pause).catch(() => {})
      if (settled) return true
      if (performance.now() >= deadline) return false
    }
  }
}

/** Counts who is inside, and tells when nobody is. */
class Tally {
  #count = 0
  readonly #onEmpty: (() => void)[] = []

  get count(): number {
    return this.#count
  }

  get empty(): boolean {
    return this.#count === 0
  }

  /** Returns what leaves again. */
  enter(): () => void {
    this.#count++
    let inside = true
    return () => {
      if (!inside) return
      inside = false
      if (--this.#count === 0) for (const resolve of this.#onEmpty.splice(0)) resolve()
    }
  }

  async emptied(): Promise<void> {
    if (!this.empty) await new Promise<void>((resolve) => this.#onEmpty.push(resolve))
  }
}

/** The engine of one host. */
class Slot<Connection> {
  readonly adapter: Adapter<unknown, unknown, Connection>
  readonly host: string | undefined
  /** Sessions that hold a connection, or wait for one. */
  readonly users: Tally = new Tally()
  readonly #database: string
  /** The engine, once it is there. */
  ready: unknown
  #engine: Promise<unknown> | undefined
  #capabilities: Capabilities | undefined
  /** Resolves when the only connection of a single-connection engine is free. */
  #turn: Promise<void> = Promise.resolve()
  readonly #waiters = new Set<() => void>()
  holder: object | undefined
  /** It stands in place of the engine in a test. */
  readonly sandboxed: boolean

  constructor(
    adapter: Adapter<unknown, unknown, Connection>,
    database: string,
    host: string | undefined,
    sandboxed = false,
  ) {
    this.adapter = adapter
    this.#database = database
    this.host = host
    this.sandboxed = sandboxed
  }

  /** The engine, created once, outside any context (D1, S12). */
  engine(): Promise<unknown> {
    this.#engine ??= detach(async () => {
      this.ready = await this.adapter.createEngine(this.host)
      return this.ready
    }).catch((error) => {
      this.#engine = undefined
      if (!isAmbientError(error, 'AMBIENT_HOST_MISSING')) throw error
      throw new AmbientError('AMBIENT_HOST_MISSING', 'No host is configured.', { database: this.#database })
    })
    return this.#engine
  }

  capabilities(engine: unknown): Capabilities {
    this.#capabilities ??= this.adapter.capabilities(engine)
    return this.#capabilities
  }

  get created(): boolean {
    return this.#engine !== undefined
  }

  /**
   * Waits for the only connection, bounded by `within`; returns what frees it. `refusal` is asked at once, and again whenever another
   * session has come to hold the connection.
   */
  async takeTurn(
    within: (turn: Promise<void>) => Promise<void>,
    refusal: () => AmbientError | undefined,
  ): Promise<() => void> {
    const refused = refusal()
    if (refused) throw refused
    let free = () => {}
    const before = this.#turn
    this.#turn = new Promise((resolve) => {
      free = resolve
    })
    let look = () => {}
    const turn = new Promise<void>((resolve, reject) => {
      void before.then(resolve)
      look = () => {
        const error = refusal()
        if (error) reject(error)
      }
    })
    this.#waiters.add(look)
    try {
      await within(turn)
    } catch (error) {
      void before.then(free)
      throw error
    } finally {
      this.#waiters.delete(look)
    }
    return free
  }

  /** Somebody holds the connection now: who waits for it inside that unit of work would wait for itself. */
  refuseWaiters(): void {
    for (const look of [...this.#waiters]) look()
  }

  /**
   * Closes the engine, if there is one.
   *
   * @throws `AMBIENT_SHUT_DOWN` after `timeout` ms, which says what holds it open.
   */
  async close(timeout: number): Promise<void> {
    const engine = this.#engine
    const made = this.ready !== undefined
    this.#engine = undefined
    this.ready = undefined
    const closing = engine?.then(
      (engine) => detach(() => this.adapter.closeEngine(engine)),
      () => {}, // it was never made
    )
    if (closing) await bounded(closing, timeout, () => this.#heldOpen(timeout, made))
  }

  #heldOpen(timeout: number, made: boolean): AmbientError {
    const { count } = this.users
    let why =
      'no session holds a connection of it, so one that was taken from `connect()` does, or it does not end by itself'
    if (count > 0) why = `sessions hold or await ${count} of its connections`
    if (!made) why = 'its factory has not returned'
    const what = `The engine was not closed within ${timeout} ms: ${why}.`
    return new AmbientError('AMBIENT_SHUT_DOWN', what, { database: this.#database })
  }
}

/** What the engines need of their database. */
export interface EngineHost {
  readonly name: string
  readonly acquireTimeout: number
  readonly settleTimeout: number
}

/** The engines of a database, one per host, and the way to their connections (D1, D3, D4, S11). */
export class Engines<Connection> {
  readonly #adapter: Adapter<unknown, unknown, Connection>
  readonly #database: EngineHost
  #slot: Slot<Connection>
  /** Hooks that are due or run after the end of a transaction. */
  readonly hooks: Tally = new Tally()
  #changing: Promise<void> = Promise.resolve()
  /** What rejects those who wait for a connection, or for what comes before it. */
  readonly #waiting = new Set<(error: unknown) => void>()
  /** Engines of former hosts, until they are closed. */
  readonly #closing = new Set<Promise<void>>()
  #shutdown: Promise<void> | undefined
  /** Of the sandboxes that are open at once, each for its own test. */
  readonly #isolated = new Set<Slot<Connection>>()

  constructor(adapter: Adapter<unknown, unknown, Connection>, database: EngineHost, host: string | undefined) {
    this.#adapter = adapter
    this.#database = database
    this.#slot = new Slot(adapter, database.name, host)
  }

  get host(): string | undefined {
    return this.#slot.host
  }

  /** Throws `AMBIENT_SHUT_DOWN` if no new work is taken. */
  assertOpen(): void {
    if (!this.#shutdown) return
    throw new AmbientError('AMBIENT_SHUT_DOWN', 'It was shut down.', { database: this.#database.name, statusCode: 503 })
  }

  /**
   * Sends sessions to `adapter` in place of the engine (`ambient-db/testing`), until `restore` is called: all of them, or those of
   * one test among others that run at the same time.
   *
   * @throws `AMBIENT_SANDBOX` if they are sent elsewhere already.
   */
  divert(
    adapter: Adapter<unknown, unknown, Connection>,
    whose: 'all' | 'of one test',
  ): { readonly slot: object; restore(): Promise<void> } {
    const { name, settleTimeout } = this.#database
    if (this.#slot.sandboxed || (whose === 'all' && this.#isolated.size > 0)) {
      throw new AmbientError('AMBIENT_SANDBOX', 'A sandbox of it is open already.', { database: name })
    }
    const before = this.#slot
    const slot = new Slot(adapter, name, before.host, true)
    if (whose === 'all') this.#slot = slot
    else this.#isolated.add(slot)
    const restore = async () => {
      if (!this.#isolated.delete(slot)) this.#slot = before
      if (this.#shutdown && this.#isolated.size === 0) await before.close(settleTimeout) // which has closed nothing real
    }
    return { slot, restore }
  }

  /** Where a session of the test that `place` belongs to, if any, takes its connections from. */
  #slotOf(place: object | undefined): Slot<Connection> {
    if (place && this.#isolated.has(place as Slot<Connection>)) return place as Slot<Connection> // it is one of them
    if (!place && this.#isolated.size === 0) return this.#slot
    const what = place
      ? 'The sandbox of the test that this belongs to is closed.'
      : 'Sandboxes of several tests are open, and this code belongs to none of them.'
    throw new AmbientError('AMBIENT_SANDBOX', what, { database: this.#database.name })
  }

  /** Waits at most `acquireTimeout`, and no longer than `shutdown` does. */
  within<Result>(promise: Promise<Result>, onTimeout: () => unknown = () => tooLate): Promise<Result> {
    return bounded(promise, this.#database.acquireTimeout, onTimeout, this.#waiting)
  }

  /** The native engine of the host in force. */
  async engine(): Promise<unknown> {
    this.assertOpen()
    return this.#slot.engine()
  }

  /**
   * Takes a connection for `session`, waiting at most `acquireTimeout`. `around` lists the sessions around the running code, and
   * `wanted` tells whether the connection is still of use when it is there.
   */
  async acquire(
    session: { readonly sandbox: object | undefined },
    around: () => { readonly holdsConnection: boolean }[],
    wanted: () => boolean,
  ): Promise<Lease<Connection>> {
    this.assertOpen()
    const slot = this.#slotOf(session.sandbox)
    const leave = slot.users.enter() // so that the engine is not closed between here and the connection
    let free = () => {}
    let engine: unknown
    let acquiring: Promise<Connection> | undefined
    try {
      engine = slot.ready ?? (await this.within(slot.engine()))
      if (slot.capabilities(engine).singleConnection) {
        const surrounds = (holder: object | undefined) =>
          around().some((each) => each === holder && each !== (session as object))
        const refusal = bindCallback(() => (surrounds(slot.holder) ? this.#selfDeadlock(slot) : undefined))
        free = await slot.takeTurn((turn) => (slot.sandboxed ? this.#withinTest(turn) : this.within(turn)), refusal)
        if (!wanted()) throw tooLate // nobody need be refused for it
        slot.holder = session
      }
      let lease: Lease<Connection> | undefined
      let lost: Error | undefined
      const onLost = (error: Error) => {
        lost ??= error
        lease?.lose(error)
      }
      acquiring = detach(() => slot.adapter.acquire(engine, onLost))
      const connection = await this.within(acquiring)
      lease = new Lease(slot, engine, connection, () => {
        slot.holder = undefined
        free()
        leave()
      })
      lease.lost = lost
      if (slot.holder === session) slot.refuseWaiters()
      return lease
    } catch (error) {
      acquiring?.then((unwanted) => detach(() => slot.adapter.release(engine, unwanted))).catch(() => {})
      if (slot.holder === session) slot.holder = undefined
      free()
      leave()
      throw error === tooLate ? this.#acquireTimeout(around().filter((each) => each.holdsConnection).length) : error
    }
  }

  #withinTest(turn: Promise<void>): Promise<void> {
    const timeout = Math.min(sandboxTurn, this.#database.acquireTimeout)
    const late = () => {
      const what = `In a sandbox transactions wait for each other, and the one that is open has not ended for ${timeout} ms.`
      return new AmbientError('AMBIENT_SANDBOX', what, { database: this.#database.name })
    }
    return bounded(turn, timeout, late, this.#waiting)
  }

  #acquireTimeout(held: number): AmbientError {
    const { acquireTimeout } = this.#database
    return this.#tooLate(
      `No connection within ${acquireTimeout} ms; this context and its parents hold ${held} of them.`,
    )
  }

  #tooLate(what: string): AmbientError {
    return new AmbientError('AMBIENT_ACQUIRE_TIMEOUT', what, { database: this.#database.name, statusCode: 503 })
  }

  #selfDeadlock({ sandboxed }: Slot<Connection>): AmbientError {
    const what = sandboxed
      ? 'A sandbox has one connection, and the unit of work that waits for it holds it: such a test needs real commits.'
      : 'The only connection is held by the unit of work that waits for it.'
    return new AmbientError('AMBIENT_SELF_DEADLOCK', what, { database: this.#database.name })
  }

  /** Sends new transactions to `host`; the engine of the old one is closed when those under way have ended (D3). */
  changeHost(host: string): Promise<void> {
    const change = this.#changing.then(() => this.#change(host))
    this.#changing = change.catch(() => {})
    return change
  }

  async #change(host: string): Promise<void> {
    this.assertOpen()
    const old = this.#slot
    if (host === old.host) return
    if (old.sandboxed || this.#isolated.size > 0) {
      throw new AmbientError('AMBIENT_SANDBOX', 'Its host cannot change while a sandbox is open.', {
        database: this.#database.name,
      })
    }
    const next = new Slot(this.#adapter, this.#database.name, host)
    const { acquireTimeout, settleTimeout } = this.#database
    const warn = (error: unknown) => process.emitWarning(`ambient-db: closing an old engine failed: ${textOf(error)}`)
    const late = () => this.#tooLate(`The engine of the new host was not there within ${acquireTimeout} ms.`)
    if (old.created) {
      await bounded(next.engine(), acquireTimeout, late).catch((error) => {
        void next.close(settleTimeout).catch(warn) // it may still be made
        throw error
      })
    }
    if (this.#shutdown) await next.close(settleTimeout)
    this.assertOpen()
    this.#slot = next
    const closing = old.users
      .emptied()
      .then(() => old.close(settleTimeout))
      .catch(warn)
      .finally(() => this.#closing.delete(closing))
    this.#closing.add(closing)
  }

  /**
   * Refuses new work, waits for what is under way, closes the engine (D4). `interrupt` ends what is still there after the wait, with
   * the error that it is given. A failure is a process warning too, so that nobody need wait for it.
   */
  shutdown(interrupt: (refusal: () => AmbientError) => Promise<void>): Promise<void> {
    if (this.#shutdown) return this.#shutdown
    const closing = this.#close(interrupt)
    closing.catch((error: unknown) => process.emitWarning(`ambient-db: the shutdown failed: ${textOf(error)}`))
    this.#shutdown = closing
    return closing
  }

  async #close(interrupt: (refusal: () => AmbientError) => Promise<void>): Promise<void> {
    const { name: database, settleTimeout } = this.#database
    const details = { database, statusCode: 503 }
    const refusal = () => new AmbientError('AMBIENT_SHUT_DOWN', 'It was shut down while work was under way.', details)
    try {
      await bounded(this.#quiet(), settleTimeout, () => tooLate)
    } catch {
      for (const refuse of [...this.#waiting]) refuse(refusal())
      await nextTurn() // these end by themselves
      await interrupt(refusal)
    }
    for (const refuse of [...this.#waiting]) refuse(refusal()) // in `beforeSession`
    const former = bounded(Promise.all(this.#closing), settleTimeout, () => {
      const what = `The engine of a former host was not closed within ${settleTimeout} ms.`
      return new AmbientError('AMBIENT_SHUT_DOWN', what, { database })
    })
    await Promise.all([this.#slot.close(settleTimeout), former])
  }

  /** Resolves when no transaction is under way on any host, and no hook after one. */
  async #quiet(): Promise<void> {
    do {
      await Promise.all([...this.#closing, this.#slot.users.emptied(), this.hooks.emptied()])
      await nextTurn() // the hooks of the last transaction are due by then
    } while (!this.#slot.users.empty || !this.hooks.empty)
  }
}

/** What of an error may be shown. */
function textOf(error: unknown): string {
  return isAmbientError(error) ? error.message : codeOf(error)
}

/** What of a driver's error may be shown: its message could hold a connection string (D5). */
function codeOf(error: unknown): string {
  return String((error as { code?: unknown } | null)?.code ?? (error instanceof Error ? error.name : 'unknown error'))
}
