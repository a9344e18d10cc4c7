// npm run bench -- [--quick] [--self-test] [--volatile] [words of the name of a measure…]
import { writeFile } from 'node:fs/promises'
import { cpus } from 'node:os'
import { parseArgs } from 'node:util'
import { Client } from 'pg'
import { acquirePostgres } from '../test/support/postgres-server.ts'
import { context } from './context.ts'
import { handle } from './handle.ts'
import { type Budget, type Comparison, compare, compareWithPlanted } from './harness.ts'
import { http } from './http.ts'
import type { Bench, Count, Measure } from './measure.ts'
import { memory } from './memory.ts'
import { printRow, printTitles, type Row, rowOf, rowOfCount } from './report.ts'
import { roundTrips } from './round-trips.ts'
import { prepareTable } from './targets.ts'
import { throughput } from './throughput.ts'

const families = [throughput, handle, roundTrips, context, memory, http]

const { values: options, positionals: filter } = parseArgs({
  allowPositionals: true,
  options: {
    quick: { type: 'boolean', default: false },
    'self-test': { type: 'boolean', default: false },
    volatile: { type: 'boolean', default: false },
  },
})
const budget: Budget = options.quick
  ? { rounds: 50, slice: 5, warm: { operations: 2000, most: 300 } }
  : { rounds: 500, slice: 5, warm: { operations: 40_000, most: 10_000 } }

// What tests may leave out a server in service does not: COMMIT waits for the disk unless `--volatile` is given.
const durability = options.volatile ? 'off' : 'on'
const server = await acquirePostgres({ settings: { fsync: durability, full_page_writes: durability } })
const closers: (() => unknown)[] = [() => server.stop()]
try {
  const bench: Bench = { url: server.url, quick: options.quick, atEnd: (close) => closers.unshift(close) }
  await prepareTable(bench.url)
  const conditions = await describeConditions(bench.url)
  console.log(`${conditions.join(', ')}; ${budget.rounds} rounds of ${budget.slice} ms for each side`)
  const measures: Measure[] = []
  for (const family of families) measures.push(...(await family(bench)))
  const chosen = measures.filter(({ name }) => filter.length === 0 || filter.some((word) => name.includes(word)))
  const ok = options['self-test'] ? await testItself(chosen) : await report(chosen, conditions)
  if (!ok && options['self-test']) process.exitCode = 1
} finally {
  for (const close of closers) await close()
}

async function report(measures: Measure[], conditions: string[]): Promise<boolean> {
  printTitles()
  const rows: Row[] = []
  for (const measure of measures) {
    const row =
      measure.kind === 'count'
        ? rowOfCount(measure, await measure.measure('real'))
        : rowOf(measure, await compare(measure, budget))
    rows.push(row)
    printRow(row)
  }
  await writeFile(
    new URL('results.json', import.meta.url),
    `${JSON.stringify({ conditions, budget, rows }, null, 2)}\n`,
  )
  return rows.every(({ met }) => met !== 'NO')
}

/**
 * Every measure must tell a planted fault from none: equals read as equal, a tenth more as more (by how much depends on who
 * else wants the CPU that the delay takes), and a count is above the goal.
 */
async function testItself(measures: Measure[]): Promise<boolean> {
  let ok = true
  for (const measure of measures) {
    const { tells, what } = measure.kind === 'count' ? await tellsCount(measure) : await tellsDelay(measure)
    console.log(`${tells ? 'tells' : 'FAILS TO TELL'}  ${measure.name}: ${what}`)
    ok &&= tells
  }
  return ok
}

async function tellsCount(measure: Count): Promise<{ tells: boolean; what: string }> {
  const found = await measure.measure('planted')
  return { tells: found > measure.goal, what: `planted fault counts ${found} against a goal of ${measure.goal}` }
}

async function tellsDelay(measure: Comparison): Promise<{ tells: boolean; what: string }> {
  const { same, slow } = await compareWithPlanted(measure, budget)
  const key = measure.shows === 'cpu' ? 'cpu' : 'wall'
  const nothing = same[key].median
  const tenth = slow[key].median
  return {
    tells: Math.abs(nothing - 1) < 0.04 && tenth - nothing > 0.05,
    what: `nothing planted reads ×${nothing.toFixed(3)}, 10 % planted reads ×${tenth.toFixed(3)}`,
  }
}

async function describeConditions(url: string): Promise<string[]> {
  const client = new Client({ connectionString: url })
  await client.connect()
  const { rows } = await client.query<{ server_version: string; fsync: string }>(
    "select current_setting('server_version') as server_version, current_setting('fsync') as fsync",
  )
  await client.end()
  return [
    `Node ${process.versions.node}`,
    `PostgreSQL ${rows[0]?.server_version} (fsync ${rows[0]?.fsync})`,
    `${cpus().length} cores`,
  ]
}
