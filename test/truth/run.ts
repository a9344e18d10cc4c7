// npm run truth -- [harness…] [--short] [--seed=<n>] [--minutes=<for each subject>] [--json=<file>] [--record] [options of the harness]
//
// --record: writes what the harnesses that ran came to into figures.json, and all figures into docs/truth.md.
import { fork } from 'node:child_process'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { serverVersion } from '../support/database.ts'
import { acquirePostgres } from '../support/postgres-server.ts'
import { type Figures, plantedTable, type Recorded, rowsTable, tableOf, withFigures } from './figures.ts'
import { type Harness, holds, type Planted, type Report } from './harness.ts'
import { harnesses } from './harnesses.ts'

const { values, positionals } = parseArgs({
  allowPositionals: true,
  strict: false, // each harness has options of its own
  options: {
    short: { type: 'boolean' },
    record: { type: 'boolean' },
    seed: { type: 'string' },
    minutes: { type: 'string', default: '15' },
    json: { type: 'string', default: new URL('results.json', import.meta.url).pathname },
  },
})
const unknown = positionals.find((wanted) => harnesses.every(({ name }) => name !== wanted))
if (unknown) throw new Error(`There is no harness '${unknown}', but ${harnesses.map(({ name }) => name).join(', ')}.`)
const chosen = harnesses.filter(({ name }) => positionals.length === 0 || positionals.includes(name))

const seed = Number(values.seed ?? Math.floor(Math.random() * 2 ** 31))
const server = await acquirePostgres()
const postgres = await serverVersion(server.url)
const reports: Record<string, Report> = {}
try {
  for (const harness of chosen) {
    console.log(`\n## ${harness.name}: ${harness.title}`)
    const report = chosen.length === 1 ? await runHere(harness) : await runApart(harness)
    reports[harness.name] = report
    if (chosen.length === 1) printReport(report)
  }
} catch (error) {
  console.error(error) // a harness that counts what is uncaught would count this
  process.exit(1)
}
await server.stop()
await writeFile(String(values.json), `${JSON.stringify(reports, null, 2)}\n`)
if (chosen.length > 1) printSummary()
if (values.record) await record()
process.exit(Object.values(reports).every(holds) ? 0 : 1) // whatever a fault left open

function runHere(harness: Harness): Promise<Report> {
  return harness.run({
    url: server.url,
    size: values.short ? 'short' : 'long',
    seed,
    time: Number(values.minutes) * 60_000,
    option: (name) => (typeof values[name] === 'string' ? values[name] : undefined),
  })
}

/** Each harness in a process of its own: they count what is uncaught, and measure memory. */
async function runApart({ name }: Harness): Promise<Report> {
  const directory = await mkdtemp(join(tmpdir(), 'ambient-db-truth-'))
  const json = join(directory, 'report.json')
  const passedOn = process.argv.slice(2).filter((argument) => /^--(?!(json|record|seed)\b)/.test(argument))
  const env = { ...process.env, DATABASE_URL: server.url }
  try {
    const child = fork(import.meta.filename, [name, ...passedOn, `--seed=${seed}`, `--json=${json}`], { env })
    const status = await new Promise((resolve) => child.once('close', resolve))
    const text = await readFile(json, 'utf8').catch(() => undefined)
    if (text !== undefined) return (JSON.parse(text) as Record<string, Report>)[name] as Report // it was asked for this one
    const found = `The harness ended with ${status} and without a report.`
    return { rows: [], planted: [], failures: [{ id: name, found, again: `npm run truth -- ${name}` }] }
  } finally {
    await rm(directory, { recursive: true, force: true })
  }
}

function printReport({ rows, planted, failures }: Report): void {
  for (const { id, found, again } of failures.slice(0, 60)) console.log(`\n${id}\n${found}\n  again: ${again}`)
  if (failures.length > 60) console.log(`\n… and ${failures.length - 60} more in ${values.json}`)
  if (rows.length > 0) console.log(`\n${rowsTable(rows)}`)
  if (planted.length > 0) console.log(`\n${plantedTable(planted)}`)
}

function printSummary(): void {
  const seen = ({ planted }: Report) => {
    const faults = planted.filter(({ seenAs }) => seenAs !== undefined)
    return `${faults.filter(({ caught }: Planted) => caught > 0).length} of ${faults.length}`
  }
  const summary = Object.entries(reports).map(([name, report]) => ({
    harness: name,
    runs: sum(report.rows.map(({ runs }) => runs)),
    violations: sum(report.rows.map(({ violations }) => violations)),
    'planted faults seen': seen(report),
    seconds: sum(report.rows.map(({ seconds }) => seconds)),
    holds: holds(report) ? 'yes' : 'NO',
  }))
  console.log(`\n${tableOf(summary)}`)
}

function sum(numbers: readonly number[]): number {
  return numbers.reduce((total, each) => total + each, 0)
}

/** Keeps the figures of the harnesses that did not run. */
async function record(): Promise<void> {
  const file = new URL('figures.json', import.meta.url)
  const page = new URL('../../docs/truth.md', import.meta.url)
  const known: Figures = JSON.parse(await readFile(file, 'utf8'))
  const conditions = { date: new Date().toISOString().slice(0, 10), node: process.versions.node, postgres }
  const figures = Object.fromEntries(
    harnesses.flatMap(({ name, title }): [string, Recorded][] => {
      const report = reports[name]
      const own = process.argv.slice(2).filter((argument) => /^--(?!(json|record|seed)\b)/.test(argument))
      const command = ['npm run truth --', name, `--seed=${seed}`, ...own].join(' ')
      const recorded = report ? { title, ...conditions, command, ...report } : known[name]
      return recorded ? [[name, recorded]] : []
    }),
  )
  await writeFile(file, `${JSON.stringify(figures, null, 2)}\n`)
  await writeFile(page, withFigures(await readFile(page, 'utf8'), figures))
}
