import { AsyncLocalStorage } from 'node:async_hooks'
import { newContext } from 'ambient-db'
import type { Bench, Measure } from './measure.ts'
import { pgTarget } from './targets.ts'

/** In one operation, so that it is long enough to be measured and to be delayed by a tenth. */
const contexts = 100
const calls = 20_000

/** What contexts and sessions cost before any statement, beside an empty `AsyncLocalStorage.run` on the same machine. */
export async function context(bench: Bench): Promise<Measure[]> {
  const { main } = await pgTarget(bench)
  const storage = new AsyncLocalStorage<object>()
  const empty = async () => {}
  const many = (once: () => Promise<void>) => ({
    async operation() {
      for (let context = 0; context < contexts; context++) await once()
    },
  })
  const run = many(() => storage.run({}, empty))
  const common = { kind: 'comparison', shows: 'time', baseline: run, repeats: contexts } as const
  const session = {
    operation: () => {
      for (let call = 0; call < calls; call++) main.session()
    },
    around: (slice: () => Promise<void>) => newContext(slice),
  }
  const getStore = {
    operation: () => {
      for (let call = 0; call < calls; call++) storage.getStore()
    },
    around: (slice: () => Promise<void>) => storage.run({}, slice),
  }
  return [
    { ...common, name: 'context: empty', goal: 3, subject: many(() => newContext(empty)) },
    {
      ...common,
      name: 'context: with a session, no statement',
      subject: many(() => newContext(() => void main.session())),
    },
    { ...common, name: 'session()', goal: 0.25, repeats: calls, baseline: getStore, subject: session },
  ]
}
