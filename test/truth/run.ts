// npm run truth -- [harness…] [--short] [--seed=<n>] [--minutes=<for each subject>] [--json=<file>] [options of the harness]
import { fork } from 'node:child_process'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { acquirePostgres } from '../support/postgres-server.ts'
import { type Harness, holds, type Planted, type Report } from './harness.ts'
import { harnesses } from './harnesses.ts'

const { values, positionals } = parseArgs({
  allowPositionals: true,
  strict: false, // each harness has options of its own
  options: {
    short: { type: 'boolean' },
    seed: { type: 'string' },
    minutes: { type: 'string', default: '15' },
    json: { type: 'string', default: new URL('results.json', import.meta.url).pathname },
  },
})
const unknown = positionals.find((wanted) => harnesses.every(({ name }) => name !== wanted))
if (unknown) throw new Error(`There is no harness '${unknown}', but ${harnesses.map(({ name }) => name).join(', ')}.`)
const chosen = harnesses.filter(({ name }) => positionals.length === 0 || positionals.includes(name))

const server = await acquirePostgres()
const reports: Record<string, Report> = {}
try {
  for (const harness of chosen) {
    console.log(`\n## ${harness.name}: ${harness.title}`)
    const report = chosen.length === 1 ? await runHere(harness) : await runApart(harness)
    reports[harness.name] = report
    if (chosen.length === 1) printReport(report)
  }
} finally {
  await server.stop()
}
await writeFile(String(values.json), `${JSON.stringify(reports, null, 2)}\n`)
if (chosen.length > 1) printSummary()
if (!Object.values(reports).every(holds)) process.exitCode = 1

function runHere(harness: Harness): Promise<Report> {
  return harness.run({
    url: server.url,
    size: values.short ? 'short' : 'long',
    seed: Number(values.seed ?? Math.floor(Math.random() * 2 ** 31)),
    time: Number(values.minutes) * 60_000,
    option: (name) => (typeof values[name] === 'string' ? values[name] : undefined),
  })
}

/** Each harness in a process of its own: they count what is uncaught, and measure memory. */
async function runApart({ name }: Harness): Promise<Report> {
  const directory = await mkdtemp(join(tmpdir(), 'ambient-db-truth-'))
  const json = join(directory, 'report.json')
  const passedOn = process.argv.slice(2).filter((argument) => argument.startsWith('--') && !/^--json\b/.test(argument))
  const env = { ...process.env, DATABASE_URL: server.url }
  try {
    const child = fork(import.meta.filename, [name, ...passedOn, `--json=${json}`], { env })
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
  printTable(
    rows.map(({ subject, runs, violations, seconds, figures }) => ({ subject, runs, ...figures, violations, seconds })),
  )
  printTable(
    planted.map(({ fault, subject, runs, caught, seenAs }) => ({
      ...{ 'planted fault': fault, subject, runs, caught, 'seen as': seenAs ?? '(no fault)' },
    })),
  )
}

function printSummary(): void {
  const seen = ({ planted }: Report) => {
    const faults = planted.filter(({ seenAs }) => seenAs !== undefined)
    return `${faults.filter(({ caught }: Planted) => caught > 0).length} of ${faults.length}`
  }
  printTable(
    Object.entries(reports).map(([name, report]) => ({
      harness: name,
      runs: sum(report.rows.map(({ runs }) => runs)),
      violations: sum(report.rows.map(({ violations }) => violations)),
      'planted faults seen': seen(report),
      seconds: sum(report.rows.map(({ seconds }) => seconds)),
      holds: holds(report) ? 'yes' : 'NO',
    })),
  )
}

function sum(numbers: readonly number[]): number {
  return numbers.reduce((total, each) => total + each, 0)
}

function printTable(rows: readonly Record<string, string | number>[]): void {
  if (rows.length === 0) return
  const titles = Object.keys(rows[0] ?? {})
  const line = (cells: readonly (string | number | undefined)[]) => `| ${cells.join(' | ')} |`
  const lines = rows.map((row) => line(titles.map((title) => row[title])))
  console.log(`\n${[line(titles), line(titles.map(() => '---')), ...lines].join('\n')}`)
}
