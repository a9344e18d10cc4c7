// Runs contexts by the million and tells its parent how many bytes they left behind.
import { defineDatabase, newContext } from 'ambient-db'
import { pgAdapter } from 'ambient-db/pg'
import { Pool } from 'pg'

const [contexts = 0, use, variant] = process.argv
  .slice(2)
  .map((text) => (Number.isNaN(Number(text)) ? text : Number(text)))
const main = defineDatabase({ name: 'main', adapter: pgAdapter(() => new Pool()) })
const kept: unknown[] = []

const work = async () => {
  if (use === 'session') main.session()
  if (variant === 'planted' && kept.length < 200_000) kept.push({ a: 1, b: 2 })
}

async function runContexts(count: number): Promise<void> {
  for (let run = 0; run < count; run++) await newContext(work)
}

async function bytesInUse(): Promise<number> {
  for (let pass = 0; pass < 5; pass++) {
    globalThis.gc?.()
    await new Promise((resolve) => setImmediate(resolve))
  }
  const { heapUsed, external } = process.memoryUsage()
  return heapUsed + external
}

await runContexts(100_000) // compiles what will run
kept.length = 0
const before = await bytesInUse()
await runContexts(Number(contexts))
process.send?.(Math.max(0, (await bytesInUse()) - before))
