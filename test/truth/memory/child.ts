// Runs the contexts of one use, and tells its parent what they left behind. Arguments: the use, how many, a planted fault.
import { getEventListeners } from 'node:events'
import { connectionsOut, file, main, type Tools, uses } from './uses.ts'

/** What contexts have left behind. */
export interface Leftovers {
  /** After as many contexts as were run; before, others had run to compile the code. */
  readonly bytes: number
  /** Sessions, handles and hooks that the garbage collector could not take. */
  readonly alive: number
  /** Listeners on the signal that all contexts share. */
  readonly listeners: number
  readonly connectionsOut: number
}

const [name, count, fault] = process.argv.slice(2)
const contexts = Number(count)
const use = uses.find((each) => each.name === name)
if (!use) throw new Error(`There is no use '${name}'.`)

const kept: object[] = []
let watched: WeakRef<object>[] = []
let latest: object | undefined
const { signal } = new AbortController()
const tools: Tools = {
  signal,
  watch(object) {
    if (use.measured === 'pins') watched.push(new WeakRef(object))
    latest = object
  },
  forgetTimer() {
    const pin = fault === 'a timer that pins the session' ? latest : undefined
    setInterval(() => pin, 600_000).unref()
  },
}

async function run(times: number): Promise<void> {
  for (let time = 0; time < times; time++) {
    if (fault === 'an object for each context') kept.push({ time })
    if (fault === 'a listener for each context') signal.addEventListener('abort', () => time)
    await use?.run(tools)
  }
}

async function collect(): Promise<void> {
  latest = undefined
  for (let pass = 0; pass < 10; pass++) {
    await new Promise((resolve) => setTimeout(resolve, 5))
    globalThis.gc?.()
  }
}

async function bytesInUse(): Promise<number> {
  await collect()
  const { heapUsed, external } = process.memoryUsage()
  return heapUsed + external
}

await run(Math.min(20_000, contexts)) // compiles what will run, and opens the connections
kept.length = 0
watched = []
const before = await bytesInUse()
await run(contexts)
await run(use.measured === 'pins' ? 1 : 0) // the driver may still hold what it did last
watched.splice(-4)
const bytes = Math.max(0, (await bytesInUse()) - before)
const leftovers: Leftovers = {
  bytes: use.measured === 'bytes' ? bytes : 0,
  alive: watched.filter((reference) => reference.deref()).length,
  listeners: getEventListeners(signal, 'abort').length,
  connectionsOut: connectionsOut(),
}
process.send?.(leftovers)
await Promise.all([main.shutdown(), file.shutdown()])
process.disconnect?.()
