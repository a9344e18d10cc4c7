import { fork } from 'node:child_process'
import { once } from 'node:events'
import type { Bench, Measure } from './measure.ts'

/** What a process keeps of contexts that have ended, measured in one of its own with an exposed garbage collector. */
export async function memory({ quick }: Bench): Promise<Measure[]> {
  const contexts = quick ? 200_000 : 1_000_000
  return (['none', 'session'] as const).map((use) => ({
    kind: 'count',
    name: `memory: kept per context, ${use === 'none' ? 'empty' : 'with a session'}`,
    unit: 'bytes',
    goal: 1,
    measure: (variant) => keptPerContext(contexts, use, variant),
  }))
}

async function keptPerContext(contexts: number, use: string, variant: string): Promise<number> {
  const module = new URL('./memory-child.ts', import.meta.url)
  const child = fork(module, [String(contexts), use, variant], { execArgv: ['--expose-gc'] })
  const [bytes] = await once(child, 'message')
  child.disconnect()
  return bytes / contexts
}
