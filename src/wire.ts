import { bounded } from './clock.ts'
import type { Lease } from './engine.ts'
import { sleep } from './time.ts'

/** What a transaction has at the database now, and how long it may be there. */
export class Wire {
  /** Settles when the stream that is open is closed. */
  stream: Promise<unknown> | undefined
  readonly #limits: { readonly settleTimeout: number }
  /** What is awaited from the server. */
  #answer: Promise<unknown> | undefined
  #acquiring = false
  #lastActivity = 0

  constructor(limits: { readonly settleTimeout: number }) {
    this.#limits = limits
  }

  get busy(): boolean {
    return this.#answer !== undefined || this.#acquiring
  }

  get lastActivity(): number {
    return this.#lastActivity
  }

  active(): void {
    this.#lastActivity = performance.now()
  }

  /** Notes that a connection is waited for, as long as it is; returns the same promise. */
  connection<Connection>(lease: Promise<Lease<Connection>>): Promise<Lease<Connection>> {
    this.#acquiring = true
    const over = () => {
      this.#acquiring = false
      this.active()
    }
    lease.then(over, over)
    return lease
  }

  /** Notes that an answer is waited for, as long as it is; returns the same promise. */
  answer<Result>(answer: Promise<Result>): Promise<Result> {
    this.#answer = answer
    const over = () => {
      if (this.#answer === answer) this.#answer = undefined
      this.active()
    }
    answer.then(over, over)
    return answer
  }

  /**
   * SQLite: BEGIN and COMMIT that found the file locked succeed when called again a little later (S13). Between two calls nothing is
   * at the database, and the answer stands if it is `over` by then.
   */
  async insist<Result, Connection>(
    act: () => Promise<Result>,
    lease: Lease<Connection>,
    timeout: number,
    over: () => boolean,
  ): Promise<Result> {
    const deadline = performance.now() + timeout
    for (let wait = 1; ; wait = Math.min(wait * 2, 50)) {
      try {
        return await this.answer(act())
      } catch (error) {
        if (!lease.adapter.traits(error).busy || performance.now() + wait > deadline) throw error
        await sleep(wait * (0.5 + Math.random() / 2))
        if (over()) throw error
      }
    }
  }

  /** For what ends a transaction or savepoint: rejects when its answer has not come after `settleTimeout`. */
  bounded<Result>(answer: Promise<Result>): Promise<Result> {
    const timeout = this.#limits.settleTimeout
    return bounded(answer, timeout, () => new Error(`The server did not answer within ${timeout} ms.`))
  }

  /** Awaits what is at the database. With `cancel`, or after `settleTimeout`, asks the server to stop it, or destroys the connection. */
  async stop<Connection>(lease: Lease<Connection> | undefined, cancel: boolean): Promise<void> {
    const wire = this.#answer ?? this.stream
    if (!lease) return
    if (!wire) return lease.interruption // what is sent next must not be cancelled in the place of what was
    if (cancel) return lease.interrupt(wire)
    const settled = wire.catch(() => {})
    await bounded(settled, this.#limits.settleTimeout, () => undefined).catch(() => lease.interrupt(wire))
  }
}
