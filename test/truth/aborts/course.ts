import { AsyncLocalStorage } from 'node:async_hooks'
import { promiseHooks } from 'node:v8'

/** A place in the run of a unit of work: so many awaits have gone on since the n-th event with this label. */
export interface Point {
  readonly label: string
  readonly occurrence: number
  readonly awaits: number
}

interface Stretch {
  readonly label: string
  readonly occurrence: number
  awaits: number
  /** The fewest and the most of them while something could be aborted; none if nothing could. */
  first: number | undefined
  last: number
}

/**
 * The course of one run: its events (what was sent and answered, what the library published), and how many promises went on
 * after each of them. JavaScript runs from one such place to the next without a break, so there are no others to abort it in.
 */
export class Course {
  readonly #stretches: Stretch[] = []
  readonly #counts = new Map<string, number>()
  readonly #target: Point | undefined
  readonly #onReached: () => void
  #current: Stretch
  #reached = false
  /** How many pieces of work can be aborted now. */
  #abortable = 0

  constructor(target?: Point, onReached: () => void = () => {}) {
    this.#target = target
    this.#onReached = onReached
    this.#current = this.#begin('start')
  }

  get reached(): boolean {
    return this.#reached
  }

  /** An event. */
  mark(label: string): void {
    if (this.#reached) return
    this.#current = this.#begin(label)
    this.#look()
  }

  /** A promise of the run goes on. */
  goOn(): void {
    if (this.#reached) return
    this.#current.awaits++
    this.#look()
  }

  /** What can be aborted has begun: from here on. */
  begun(): void {
    this.#abortable++
    this.#look()
  }

  /** What can be aborted has ended. */
  ended(): void {
    this.#abortable--
  }

  /** Every place at which something could be aborted. */
  points(): Point[] {
    return this.#stretches.flatMap(({ label, occurrence, first, last }) => {
      if (first === undefined) return []
      return Array.from({ length: last - first + 1 }, (_, index) => ({ label, occurrence, awaits: first + index }))
    })
  }

  /** The events among them. */
  events(): Point[] {
    return this.points().filter(({ awaits }) => awaits === 0)
  }

  #begin(label: string): Stretch {
    const occurrence = (this.#counts.get(label) ?? 0) + 1
    this.#counts.set(label, occurrence)
    const stretch = { label, occurrence, awaits: 0, first: undefined, last: 0 }
    this.#stretches.push(stretch)
    return stretch
  }

  #look(): void {
    const { label, occurrence, awaits } = this.#current
    if (this.#abortable > 0) {
      this.#current.first ??= awaits
      this.#current.last = awaits
    }
    const target = this.#target
    if (target?.label !== label || target.occurrence !== occurrence || target.awaits !== awaits || this.#reached) return
    this.#reached = true
    this.#onReached()
  }
}

/** Which course, and which piece of the work, the running code belongs to. */
export interface Place<Run extends { readonly course: Course }, Piece> {
  readonly run: Run
  readonly piece?: Piece | undefined
}

/** Lets every promise that is made inside a run count in the course of the run. `stop` ends it. */
export function followPromises<Run extends { readonly course: Course }, Piece>(): {
  places: AsyncLocalStorage<Place<Run, Piece>>
  stop(): void
} {
  const places = new AsyncLocalStorage<Place<Run, Piece>>()
  const courses = new WeakMap<Promise<unknown>, Course>()
  const stop = promiseHooks.createHook({
    init(promise) {
      const course = places.getStore()?.run.course
      if (course) courses.set(promise, course)
    },
    before(promise) {
      courses.get(promise)?.goOn()
    },
  }) as () => void // its declaration says Function
  return { places, stop }
}
