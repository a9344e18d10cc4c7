import type { AmbientError } from './errors.ts'
import { drained, nextTurn } from './time.ts'

/** What has its turn in a lane, or waits for it. */
export interface Occupant {
  /** For messages: `a statement`, `atomic block 'transfer'`. */
  readonly label: string
  /** Where it was issued, while tracing. */
  readonly place?: string | undefined
  /** It owns the session for as long as user code takes (a block, a commit with its hooks): waiters are watched. */
  readonly owns?: boolean
  /** Others are refused at once rather than made to wait: a stream, a transaction that cannot be scoped. */
  exclusive?: 'stream' | 'transaction' | undefined
  /** The lane of the block that has its turn. */
  readonly inner?: Lane
  /** What its caller got. */
  promise?: Promise<unknown>
}

interface Waiter {
  readonly occupant: Occupant
  readonly since: number
  readonly start: () => void
  readonly refuse: (error: AmbientError) => void
}

/** Lets a promise take only so long. */
export type Bound = <Result>(waiting: Promise<Result>) => Promise<Result>

/** What a lane needs to know of its session. */
export interface LaneHost {
  readonly blockTimeout: number
  /** Something is at the database right now. */
  readonly atDatabase: boolean
  /** When something last was, by `performance.now()`. */
  readonly lastActivity: number
  refuseBehind(holder: Occupant, waiter: Occupant): AmbientError
}

/**
 * A queue in which one thing runs at a time, in the order of issue (S8). A session has one, and so has each block; a block
 * takes one turn in the lane that surrounds it, so what is outside waits until the block has ended (A3).
 */
export class Lane {
  readonly #host: LaneHost
  readonly #waiting: Waiter[] = []
  #current: Occupant | undefined
  #refusal: (() => AmbientError) | undefined
  #cut = false
  #watch: NodeJS.Timeout | undefined
  #joining = false
  #failure: { error: unknown } | undefined
  #onIdle: (() => void) | undefined

  constructor(host: LaneHost) {
    this.#host = host
  }

  get busy(): boolean {
    return this.#current !== undefined
  }

  /** The stream that is open or waits to be. */
  get stream(): Occupant | undefined {
    return this.#exclusive()?.exclusive === 'stream' ? this.#exclusive() : this.#current?.inner?.stream
  }

  /** Runs `work` when its turn has come, in the caller's async context. */
  run<Result>(occupant: Occupant, work: () => Promise<Result>): Promise<Result> {
    return this.track(occupant, this.#perform(occupant, work))
  }

  /** Remembers the promise that the caller of `occupant` got, so that its failure is no unhandled rejection if a join reports it. */
  track<Result>(occupant: Occupant, promise: Promise<Result>): Promise<Result> {
    occupant.promise = promise
    if (this.#joining) promise.catch(() => {})
    return promise
  }

  async #perform<Result>(occupant: Occupant, work: () => Promise<Result>): Promise<Result> {
    try {
      if (this.#refusal) throw this.#refusal()
      if (this.#current) await this.#turn(occupant)
      else this.#current = occupant
      try {
        return await work()
      } finally {
        this.#next()
      }
    } catch (error) {
      if (this.#joining) this.#failure ??= { error }
      throw error
    }
  }

  /** Waits in line. */
  #turn(occupant: Occupant): Promise<void> {
    const holder = this.#exclusive()
    if (holder) throw this.#host.refuseBehind(holder, occupant)
    return new Promise<void>((start, refuse) => {
      this.#waiting.push({ occupant, since: performance.now(), start, refuse })
      this.#watchOwner()
    })
  }

  /**
   * Resolves when nothing is under way and nothing follows from what was (C4, A6). `bound` limits the waiting, if there is any.
   *
   * @throws the first failure among what was still under way (C5).
   */
  async quiet(bound: Bound): Promise<void> {
    this.#joining = true
    this.#current?.promise?.catch(() => {})
    for (const { occupant } of this.#waiting) occupant.promise?.catch(() => {})
    await drained()
    try {
      if (this.#current) await bound(this.#idle())
    } finally {
      this.#joining = false
    }
    const failure = this.#failure
    this.#failure = undefined
    if (failure) throw failure.error
  }

  async #idle(): Promise<void> {
    while (this.#current) {
      await new Promise<void>((resolve) => {
        this.#onIdle = resolve
      })
      await nextTurn()
    }
  }

  /**
   * Refuses what comes from now on and what waits, here and in the blocks inside. What is at the database goes on, and so does what
   * has its turn and is about to be sent, unless it is `cut` off.
   */
  close(refusal: () => AmbientError, cut = false): void {
    this.#refusal ??= refusal
    this.#cut ||= cut
    clearTimeout(this.#watch)
    for (const waiter of this.#waiting.splice(0)) waiter.refuse(this.#refusal())
    this.#current?.inner?.close(refusal, cut)
  }

  /** Throws if what has its turn must not be sent any more. */
  assertMaySend(): void {
    if (this.#refusal && this.#cut) throw this.#refusal()
  }

  /** What was issued so far and is awaited by nobody is no unhandled rejection: the unit that fails speaks for it. */
  answerFor(): void {
    for (const occupant of [this.#current, ...this.#waiting.map(({ occupant: each }) => each)]) {
      occupant?.promise?.catch(() => {})
      occupant?.inner?.answerFor()
    }
  }

  #exclusive(): Occupant | undefined {
    if (this.#current?.exclusive) return this.#current
    return this.#waiting.find(({ occupant }) => occupant.exclusive)?.occupant
  }

  #next(): void {
    const next = this.#waiting.shift()
    this.#current = next?.occupant
    if (next) {
      next.start()
      this.#watchOwner()
    } else {
      this.#onIdle?.()
      this.#onIdle = undefined
    }
  }

  /** Refuses waiters whose owner has had nothing at the database for `blockTimeout` (A3). */
  #watchOwner(delay = this.#host.blockTimeout): void {
    if (!this.#current?.owns || this.#waiting.length === 0 || this.#watch) return
    this.#watch = setTimeout(() => {
      this.#watch = undefined
      const owner = this.#current
      if (!owner?.owns) return
      const now = performance.now()
      let soonest = this.#host.blockTimeout
      for (const waiter of [...this.#waiting]) {
        const idleSince = this.#host.atDatabase ? now : Math.max(this.#host.lastActivity, waiter.since)
        const left = idleSince + this.#host.blockTimeout - now
        if (left > 0) {
          soonest = Math.min(soonest, left)
        } else {
          this.#waiting.splice(this.#waiting.indexOf(waiter), 1)
          waiter.refuse(this.#host.refuseBehind(owner, waiter.occupant))
        }
      }
      this.#watchOwner(soonest)
    }, delay)
  }
}
