import { outside } from './context.ts'

/**
 * Settles as `promise` does, or rejects with `onTimeout()` after `ms`. `promise` never becomes an unhandled rejection.
 *
 * @param waiting while it waits, this has what rejects it before its time.
 */
export function bounded<Result>(
  promise: Promise<Result>,
  ms: number,
  onTimeout: () => unknown,
  waiting?: Set<(error: unknown) => void>,
): Promise<Result> {
  return new Promise((resolve, reject) => {
    const clock = clockOf(ms)
    const wait = clock.start(() => {
      waiting?.delete(reject)
      reject(onTimeout())
    })
    waiting?.add(reject)
    promise.then(
      (result) => {
        clock.stop(wait)
        waiting?.delete(reject)
        resolve(result)
      },
      (error) => {
        clock.stop(wait)
        waiting?.delete(reject)
        reject(error)
      },
    )
  })
}

/** A link of a ring, so that one is taken out without looking for it and without leaving anything behind. */
class Wait {
  before: Wait = this
  after: Wait = this
  /** By `performance.now()`. */
  readonly until: number
  readonly expire: () => void

  constructor(until: number, expire: () => void) {
    this.until = until
    this.expire = expire
  }

  insertBefore(other: Wait): void {
    this.before = other.before
    this.after = other
    this.before.after = this
    other.before = this
  }

  remove(): void {
    this.before.after = this.after
    this.after.before = this.before
    this.before = this
    this.after = this
  }
}

/**
 * All that waits for the same number of ms, in the order in which it runs out, with one timer: a timer for each costs more than
 * what it guards.
 */
class Clock {
  readonly #ms: number
  /** Its `after` is the wait that runs out first. */
  readonly #ends = new Wait(Number.POSITIVE_INFINITY, () => {})
  #timer: NodeJS.Timeout | undefined

  constructor(ms: number) {
    this.#ms = ms
  }

  get #idle(): boolean {
    return this.#ends.after === this.#ends
  }

  start(expire: () => void): Wait {
    const wait = new Wait(performance.now() + this.#ms, expire)
    if (!this.#timer) this.#set(this.#ms)
    else if (this.#idle) this.#timer.ref()
    wait.insertBefore(this.#ends)
    return wait
  }

  /** The timer goes on for whoever comes next, but keeps no process alive. */
  stop(wait: Wait): void {
    wait.remove()
    if (this.#idle) this.#timer?.unref()
  }

  #set(ms: number): void {
    this.#timer = outside(() => setTimeout(this.#ring, ms)) // it outlives the unit of work that set it
  }

  /** What came while the process itself was held up is read first: its own delay is nobody's silence. */
  #ring = (): void => {
    setImmediate(this.#expire)
  }

  #expire = (): void => {
    const now = performance.now()
    let first = this.#ends.after
    while (first.until <= now) {
      first.remove()
      first.expire()
      first = this.#ends.after
    }
    if (this.#idle) clocks.delete(this.#ms)
    else this.#set(first.until - now)
  }
}

const clocks = new Map<number, Clock>()

function clockOf(ms: number): Clock {
  const known = clocks.get(ms)
  if (known) return known
  const clock = new Clock(ms)
  clocks.set(ms, clock)
  return clock
}
