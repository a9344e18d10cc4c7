import { fork } from 'node:child_process'
import { once } from 'node:events'
import { createDatabaseAt } from '../../support/database.ts'
import { commandOf, type Failure, type Harness, type Planted, type Row } from '../harness.ts'
import type { Leftovers } from './child.ts'
import { type Use, uses } from './uses.ts'

/** In all, whatever the number of contexts: what the engine itself needs now and then is less. */
const most = 1_000_000

const faults = [
  { fault: 'an object for each context', use: 'nothing', contexts: 40_000, seenAs: 'bytes' },
  { fault: 'a listener for each context', use: 'a shared signal and a timeout', contexts: 1000, seenAs: 'listeners' },
  { fault: 'a timer that pins the session', use: 'a forgotten timer, committed', contexts: 50, seenAs: 'alive' },
] as const

/** Options: `--use=<name>` (that one alone, without planted faults), `--contexts=<n>`. */
export const memory: Harness = {
  name: 'memory',
  title: 'contexts end by the million, and leave nothing behind',
  async run({ url, size, option }) {
    const database = await createDatabaseAt(url)
    const measure = async ({ name }: Use, count: number, fault = 'none') => {
      const startedAt = performance.now()
      const module = new URL('./child.ts', import.meta.url)
      const env = { ...process.env, DATABASE_URL: database.url }
      const child = fork(module, [name, String(count), fault], { execArgv: ['--expose-gc'], env })
      const ended = once(child, 'close').then(() => {
        throw new Error(`The contexts of '${name}' ended without a result.`)
      })
      ended.catch(() => {})
      const [leftovers] = (await Promise.race([once(child, 'message'), ended])) as [Leftovers]
      return { leftovers, seconds: Math.round((performance.now() - startedAt) / 1000) }
    }
    try {
      const rows: Row[] = []
      const failures: Failure[] = []
      for (const use of uses.filter(({ name }) => name === (option('use') ?? name))) {
        const count = Number(option('contexts') ?? use.contexts[size])
        const { leftovers, seconds } = await measure(use, count)
        const found = tooMuch(leftovers)
        const { bytes, alive, listeners, connectionsOut } = leftovers
        const figures = { 'bytes kept': bytes, 'still alive': alive, listeners, 'connections out': connectionsOut }
        rows.push({ subject: use.name, runs: count, violations: found.length, seconds, figures })
        const again = commandOf('memory', { use: use.name, contexts: count })
        if (found.length > 0) failures.push({ id: use.name, found: JSON.stringify(leftovers), again })
      }
      const planted: Planted[] = []
      for (const { fault, use: name, contexts, seenAs } of option('use') === undefined ? faults : []) {
        const use = uses.find((each) => each.name === name) as Use // the table above names uses that there are
        const { leftovers } = await measure(use, contexts, fault)
        planted.push({
          fault,
          subject: name,
          runs: contexts,
          caught: tooMuch(leftovers).includes(seenAs) ? 1 : 0,
          seenAs,
        })
      }
      return { rows, planted, failures }
    } finally {
      await database.drop()
    }
  },
}

/** What is more than may be left. */
function tooMuch({ bytes, alive, listeners, connectionsOut }: Leftovers): string[] {
  const excess = { bytes: bytes > most, alive: alive > 0, listeners: listeners > 0, connectionsOut: connectionsOut > 0 }
  return Object.entries(excess).flatMap(([name, is]) => (is ? [name] : []))
}
