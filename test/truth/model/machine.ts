/** What a course waits for. */
export interface Wait {
  readonly over: () => boolean
  /** It goes on before everybody else, or only when nobody else can. Default is in the order in which they began to wait. */
  readonly rank?: 'first' | 'last'
}

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

  /** Takes time at the database: whoever else can go on may do so before or after it. */
  *race(): Course {
    if (this.#next() && this.#choices[this.#asked++]) yield { over: () => true, rank: 'last' }
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
    const able = this.#waiting.filter(({ wait }) => wait.over())
    const ranked = (rank: Wait['rank']) => able.find(({ wait }) => wait.rank === rank)
    return ranked('first') ?? ranked(undefined) ?? able[0]
  }
}

/** Waits until `over` holds. */
export function* until(over: () => boolean): Course {
  yield { over }
}

/** Waits until `over` holds, and then goes on at once. */
export function* untilTurn(over: () => boolean): Course {
  yield { over, rank: 'first' }
}

/** Waits until `over` holds and nobody else can go on. */
export function* untilQuiet(over: () => boolean): Course {
  yield { over, rank: 'last' }
}

/** Waits for the end of `task`. */
export function* endOf<Result>(task: Task<Result>): Course<Result> {
  if (!task.ended) yield { over: () => task.ended }
  return task.result()
}
