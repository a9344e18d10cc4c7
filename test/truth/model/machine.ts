/** What a course waits for. */
export interface Wait {
  readonly over: () => boolean
  /** Who of those that can goes on: lower numbers first, then in the order in which they began to wait. Default is 0. */
  readonly rank?: number
}

/** Goes on before everybody else. */
const atOnce = -1
/** Goes on after the others. */
const later = 1
/** Goes on only when nobody else can, as whatever waits for quiet does. */
const whenQuiet = 2

/** A course of action of the model: it is suspended wherever the real one may have to wait. */
export type Course<Result = void> = Generator<Wait, Result, void>

/** A course that runs beside others. */
export interface Task<Result = void> {
  readonly ended: boolean
  /** What it ended with. Throws what it threw. */
  result(): Result
}

/**
 * Runs courses side by side, one at a time and in the same order each time: where the real order is anybody's, `choices` say which of
 * two it is.
 */
export class Machine {
  #waiting: { readonly wait: Wait; readonly goOn: () => void }[] = []
  readonly #choices: readonly boolean[]
  #asked = 0

  constructor(choices: readonly boolean[]) {
    this.#choices = choices
  }

  /** How many choices there were so far. */
  get asked(): number {
    return this.#asked
  }

  /**
   * Takes time, much or little: whoever else can go on may do so before or after it, one, two or all of them until they come to rest.
   * `likely` is what is taken unless the choice is against it.
   */
  *race(likely: 'before' | 'after'): Course {
    let usual = likely === 'before'
    for (const rank of [later, later, whenQuiet]) {
      if (!this.#others() || this.#unlikely() === usual) return
      usual = false
      yield { over: () => true, rank }
    }
  }

  /** Whether not to wait until the others have come to rest. */
  early(): boolean {
    return this.#waiting.some(({ wait }) => wait.over()) && this.#unlikely()
  }

  #unlikely(): boolean {
    return this.#choices[this.#asked++] ?? false
  }

  /** `wait` comes behind all others. */
  requeue(wait: Wait): void {
    const moved = this.#waiting.filter((each) => each.wait === wait)
    this.#waiting = [...this.#waiting.filter((each) => each.wait !== wait), ...moved]
  }

  /** Starts `course`, which runs at once up to where it waits. */
  start<Result>(course: Course<Result>): Task<Result> {
    let end: (() => Result) | undefined
    const goOn = () => {
      try {
        const { done, value } = course.next()
        if (done) end = () => value
        else this.#waiting.push({ wait: value, goOn })
      } catch (error) {
        end = () => {
          throw error
        }
      }
    }
    goOn()
    return {
      get ended() {
        return end !== undefined
      },
      result: () => (end as () => Result)(), // asked for only when it has ended
    }
  }

  /** Lets everybody go on who can, until all have ended or wait. */
  run(): void {
    for (let next = this.#next(); next; next = this.#next()) {
      this.#waiting = this.#waiting.filter((each) => each !== next)
      next.goOn()
    }
  }

  /** Nobody waits. */
  get idle(): boolean {
    return this.#waiting.length === 0
  }

  #next() {
    for (const rank of [atOnce, 0, later, whenQuiet]) {
      const next = this.#waiting.find(({ wait }) => (wait.rank ?? 0) === rank && wait.over())
      if (next) return next
    }
    return undefined
  }

  /** Who can go on that does not wait for quiet. */
  #others(): boolean {
    return this.#waiting.some(({ wait }) => wait.rank !== whenQuiet && wait.over())
  }
}

/** Waits until `over` holds. */
export function* until(over: () => boolean): Course {
  yield { over }
}

/** Waits until `over` holds, and then goes on at once. */
export function* untilTurn(over: () => boolean): Course {
  yield { over, rank: atOnce }
}

/** Waits until `over` holds and nobody else can go on. */
export function* untilQuiet(over: () => boolean): Course {
  yield { over, rank: whenQuiet }
}

/** Waits for the end of `task`. */
export function* endOf<Result>(task: Task<Result>): Course<Result> {
  if (!task.ended) yield { over: () => task.ended }
  return task.result()
}
