/** Deadlines that pass when the harness says so. */
export interface Alarms {
  set(): Alarm
  giveBack(): void
}

export interface Alarm {
  /** The `timeout` that stands for it. */
  readonly timeout: number
  /** Lets it pass, for whoever waits for it. */
  fire(): void
}

/** Takes the timers of the process; those that are not set for an alarm stay as they are. */
export function takeAlarms(): Alarms {
  const { setTimeout: set, clearTimeout: clear } = globalThis
  const first = 1_000_000_000 // which nobody else waits for
  let count = 0
  const waiting = new Map<number, { readonly timer: NodeJS.Timeout; readonly pass: () => void }>()
  const take = (pass: () => void, ms: number, ...rest: []) => {
    const timer = set(pass, ms, ...rest)
    if (ms >= first) waiting.set(ms, { timer, pass })
    return timer
  }
  globalThis.setTimeout = Object.defineProperties(take, Object.getOwnPropertyDescriptors(set)) as typeof set
  globalThis.clearTimeout = (timer) => {
    for (const [ms, each] of waiting) if (each.timer === timer) waiting.delete(ms)
    clear(timer)
  }
  return {
    set() {
      const timeout = first + ++count
      return {
        timeout,
        fire() {
          const alarm = waiting.get(timeout)
          if (!alarm) return
          globalThis.clearTimeout(alarm.timer)
          alarm.pass()
        },
      }
    },
    giveBack() {
      Object.assign(globalThis, { setTimeout: set, clearTimeout: clear })
    },
  }
}
