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
  /** What an error has left behind is being found out. */
  #finding: Promise<unknown> | undefined
  #acquiring = false
  #lastActivity = 0

  constructor(limits: { readonly settleTimeout: number }) {
    this.#limits = limits
  }

  get busy(): boolean {
    return this.#answer !== undefined || this.#finding !== undefined || this.#acquiring
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
   * Notes that it is being found out what an error has left behind, as long as it is; returns the same promise. A ROLLBACK waits for
   * it: what is found behind that would be taken for the doing of the statement.
   */
  finding(finding: Promise<void>): Promise<void> {
    this.#finding = finding
    const over = () => {
      if (this.#finding === finding) this.#finding = undefined
    }
    finding.then(over, over)
    return finding
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
    if (wire && cancel) await lease.interrupt(wire)
    else if (wire) await this.#patient(wire, lease)
    else await lease.interruption // what is sent next must not be cancelled in the place of what was
    if (this.#finding) await this.#patient(this.#finding, lease)
  }

  async #patient<Connection>(wire: Promise<unknown>, lease: Lease<Connection>): Promise<void> {
    const settled = wire.catch(() => {})
    await bounded(settled, this.#limits.settleTimeout, () => undefined).catch(() => lease.interrupt(wire))
  }
}
