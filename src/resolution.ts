import { assertTimeout } from './abortion.ts'
import type { CommitStatus } from './adapter.ts'
import { bounded } from './clock.ts'
import { detach } from './context.ts'
import type { CommitOutcome, Resolve } from './errors.ts'
import { sleep } from './time.ts'

/** How long one question may take, in ms: on a network that swallows packets, the next one may get through. */
const patience = 5000
const longestPause = 1000

/** Makes the `resolve` of an error. `ask` puts the question once; absent where there is nothing to ask by. */
export function resolver(ask?: (signal: AbortSignal) => Promise<CommitStatus>): Resolve {
  let open = ask
  let answer: CommitOutcome = 'unknown'
  return async ({ timeout = 30_000 } = {}) => {
    assertTimeout(timeout)
    const deadline = performance.now() + timeout
    for (let pause = 20; open; pause = Math.min(pause * 2, longestPause)) {
      const status = await askOnce(open, Math.min(patience, deadline - performance.now()))
      if (status === 'unknown') break
      if (status !== 'pending') {
        answer = status
        open = undefined // it is final, and keeps the engine no longer
      } else if (performance.now() + pause > deadline) break
      else await sleep(pause * (0.5 + Math.random() / 2))
    }
    return answer
  }
}

async function askOnce(ask: (signal: AbortSignal) => Promise<CommitStatus>, time: number): Promise<CommitStatus> {
  const controller = new AbortController()
  try {
    const asking = detach(() => ask(controller.signal))
    return await bounded(asking, Math.max(0, time), () => undefined)
  } catch {
    return 'pending' // no answer is none yet
  } finally {
    controller.abort()
  }
}
