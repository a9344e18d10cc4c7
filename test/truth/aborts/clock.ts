import type { Place } from './course.ts'
import type { Piece } from './piece.ts'
import type { Places, Run } from './stage.ts'

/** The clock of the process, of which one timeout passes when the harness says so. */
export interface Clock {
  /** The `timeout` that stands for it. */
  readonly timeout: number
  /** It has passed for all who wait for it in `run`; `each` hears of the piece whose it was before that. */
  reach(run: Run, each: (piece: Piece | undefined) => void): void
  giveBack(): void
}

export function takeClock(places: Places): Clock {
  const timeout = 86_399_999 // which nobody else waits for
  const { setTimeout: set, clearTimeout: clear } = globalThis
  const waiting = new Map<NodeJS.Timeout, { place: Place<Run, Piece>; reached: () => void }>()
  const take = (reached: () => void, ms: number, ...rest: []) => {
    const timer = set(reached, ms, ...rest)
    const place = ms === timeout ? places.getStore() : undefined
    if (place) waiting.set(timer, { place, reached })
    return timer
  }
  globalThis.setTimeout = Object.defineProperties(take, Object.getOwnPropertyDescriptors(set)) as typeof set
  globalThis.clearTimeout = (timer) => {
    waiting.delete(timer as NodeJS.Timeout)
    clear(timer)
  }
  return {
    timeout,
    reach(run, each) {
      for (const [timer, { place, reached }] of [...waiting]) {
        if (place.run !== run) continue
        globalThis.clearTimeout(timer)
        each(place.piece)
        reached()
      }
    },
    giveBack() {
      Object.assign(globalThis, { setTimeout: set, clearTimeout: clear })
    },
  }
}
