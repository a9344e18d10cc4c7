import { outside } from './context.ts'

/** Settles as `promise` does, or rejects with `onTimeout()` after `ms`. `promise` never becomes an unhandled rejection. */
export function bounded<Result>(promise: Promise<Result>, ms: number, onTimeout: () => unknown): Promise<Result> {
  return new Promise((resolve, reject) => {
    const clock = clockOf(ms)
    const wait = clock.start(() => reject(onTimeout()))
    promise.then(
      (result) => {
        clock.stop(wait)
        resolve(result)
      },
      (error) => {
        clock.stop(wait)
        reject(error)
      },
    )
  })
}

interface Wait {
  /** By `performance.now()`. */
  readonly until: number
  readonly expire: () => void
}

/** All that waits for the same number of ms, in the order in which it runs out, with one timer: a timer for each costs more than what it guards. */
class Clock {
  readonly #ms: number
  readonly #waits = new Set<Wait>()
  #timer: NodeJS.Timeout | undefined

  constructor(ms: number) {
    this.#ms = ms
  }

  start(expire: () => void): Wait {
    const wait = { until: performance.now() + this.#ms, expire }
    this.#waits.add(wait)
    if (!this.#timer) this.#set(this.#ms)
    else if (this.#waits.size === 1) this.#timer.ref()
    return wait
  }

  /** The timer goes on for whoever comes next, but keeps no process alive. */
  stop(wait: Wait): void {
    if (this.#waits.delete(wait) && this.#waits.size === 0) this.#timer?.unref()
  }

  #set(ms: number): void {
    this.#timer = outside(() => setTimeout(this.#ring, ms)) // it outlives the unit of work that set it
  }

  #ring = (): void => {
    const now = performance.now()
    for (const wait of this.#waits) {
      if (wait.until > now) break
      this.#waits.delete(wait)
      wait.expire()
    }
    const [next] = this.#waits
    if (next) this.#set(next.until - now)
    else clocks.delete(this.#ms)
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
