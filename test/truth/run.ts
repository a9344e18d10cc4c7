// npm run truth -- [--library=<name>] [--unit=<name>] [--every=<n>] [--case=<id>] [--json=<file>] [--mutants=only|none]
//   [--minutes=<of each library>] [--concurrency=<n>]
import { writeFile } from 'node:fs/promises'
import { parseArgs } from 'node:util'
import { acquirePostgres } from '../support/postgres-server.ts'
import { type Case, cutsOf, idOf, type Lab, openLab, type Result } from './lab.ts'
import { type Library, libraries } from './libraries.ts'
import { control, type Mutant, mutants } from './mutants.ts'
import type { Violation } from './stage.ts'
import { units } from './units.ts'

type Counts = Partial<Record<Violation['kind'], number>>

/** What came of the cases of one library. */
export interface Row {
  readonly library: string
  readonly units: number
  readonly boundaries: number
  readonly cases: number
  /** Cases for which there was no time. */
  readonly left: number
  /** Cases in which an error said, and had to say, that the outcome is unknown. */
  readonly unknowns: number
  readonly violations: Counts
  /** Cases that failed for want of time, and passed when run again alone. */
  readonly underLoad: number
  /** Those that the documentation of the adapter declares. */
  readonly declared: Counts
  readonly seconds: number
}

/** What came of a mutant. */
export interface MutantRow {
  readonly mutant: string
  /** A fault, or an adapter that must pass. */
  readonly planted: boolean
  readonly library: string
  readonly cases: number
  readonly shows: Violation['kind']
  /** Cases in which the harness said so. */
  readonly caught: number
}

export interface Report {
  readonly rows: Row[]
  readonly mutants: MutantRow[]
  /** Cases that failed in company with others, for want of time, and passed alone. */
  readonly underLoad: { readonly id: string; readonly violations: readonly Violation[] }[]
  readonly failures: { readonly id: string; readonly violations: readonly Violation[]; readonly summary: string }[]
}

const { values: options } = parseArgs({
  options: {
    library: { type: 'string' },
    unit: { type: 'string' },
    every: { type: 'string', default: '1' },
    case: { type: 'string' },
    json: { type: 'string', default: new URL('results.json', import.meta.url).pathname },
    mutants: { type: 'string' },
    minutes: { type: 'string', default: '15' },
    concurrency: { type: 'string', default: '32' },
  },
})
const every = Number(options.every)
const concurrency = Number(options.concurrency)
let deadline = Number.POSITIVE_INFINITY
const measuredInTime: readonly Violation['kind'][] = [
  'unreached',
  'lost slot',
  'hang',
  'open transaction',
  'leaked socket',
]

const server = await acquirePostgres()
const lab = await openLab(server.url)
try {
  if (options.case === undefined) await runAll(lab)
  else await runAlone(lab, options.case)
} finally {
  await lab.close()
  await server.stop()
}

async function runAll(lab: Lab): Promise<void> {
  const report: Report = { rows: [], mutants: [], underLoad: [], failures: [] }
  if (options.mutants !== 'none') {
    const rows = await Promise.all([control, ...mutants].map((mutant) => runMutant(lab, mutant)))
    report.mutants.push(...rows.flat())
  }
  if (options.mutants !== 'only') {
    for (const library of libraries.filter(({ name }) => name === (options.library ?? name))) {
      deadline = performance.now() + Number(options.minutes) * 60_000
      const row = await runLibrary(lab, library, report)
      report.rows.push(row)
      console.log(`${library.name}: ${row.cases} cases in ${row.seconds} s`)
    }
  }
  await writeFile(options.json, `${JSON.stringify(report, null, 2)}\n`)
  printReport(report)
  const escaped = report.mutants.some(({ planted, caught }) => (planted ? caught === 0 : caught > 0))
  if (escaped || report.failures.length > 0) process.exitCode = 1
}

async function runLibrary(lab: Lab, library: Library, { failures, underLoad }: Report): Promise<Row> {
  const startedAt = performance.now()
  const chosen = units.filter(({ name }) => name === (options.unit ?? name))
  const undisturbed = chosen.map((unit) => ({ library, unit }))
  const uncut = await runCases(lab, undisturbed, 6)
  const cases = chosen.flatMap((unit, index): Case[] => {
    const cuts = cutsOf(uncut[index]?.boundaries ?? [])
    return cuts.filter((_, each) => each % every === index % every).map((cut) => ({ library, unit, cut }))
  })
  const results = [...uncut, ...(await runCases(lab, cases))]
  for (const { violations, id, summary } of results)
    if (violations.length > 0) failures.push({ id, violations, summary })
  const passedAlone = results.filter((result) => result.underLoad && result.violations.length === 0)
  for (const result of passedAlone) underLoad.push({ id: result.id, violations: result.underLoad ?? [] })
  return {
    library: library.name,
    units: chosen.length,
    boundaries: uncut.reduce((sum, { boundaries }) => sum + boundaries.length, 0),
    cases: results.length,
    left: uncut.length + cases.length - results.length,
    unknowns: results.filter(({ unknowns }) => unknowns > 0).length,
    violations: count(results.map(({ violations }) => violations)),
    underLoad: passedAlone.length,
    declared: count(results.map(({ declared }) => declared)),
    seconds: Math.round((performance.now() - startedAt) / 1000),
  }
}

/** In how many cases there was each kind. */
function count(cases: readonly (readonly Violation[])[]): Counts {
  const counts: Counts = {}
  for (const found of cases) {
    for (const kind of new Set(found.map((each) => each.kind))) counts[kind] = (counts[kind] ?? 0) + 1
  }
  return counts
}

/** The faults are put in at the driver, so they are run where the engine is its pool. */
async function runMutant(lab: Lab, { name, mutate, units: names, labels, shows }: Mutant): Promise<MutantRow[]> {
  const rows: MutantRow[] = []
  for (const library of libraries.filter(({ limits }) => !limits.uncaught)) {
    const cases: Case[] = []
    for (const unit of units.filter((each) => names.includes(each.name))) {
      cases.push({ library, unit, mutate })
      const { boundaries } = await lab.run({ library, unit, mutate })
      const cuts = cutsOf(boundaries.filter(({ label }) => labels.test(label)))
      for (const cut of cuts) if (!cut.fate.endsWith('stall')) cases.push({ library, unit, cut, mutate })
    }
    const results = await runCases(lab, cases, 4)
    const caught = results.filter(({ violations }) => violations.some(({ kind }) => kind === shows)).length
    const planted = mutants.some((each) => each.name === name)
    rows.push({ mutant: name, planted, library: library.name, cases: cases.length, shows, caught })
  }
  return rows
}

/** Runs several cases at a time, each with a proxy and pools of its own; results come in the order of the cases. */
async function runCases(lab: Lab, cases: readonly Case[], atOnce = concurrency): Promise<Result[]> {
  const results: Result[] = []
  const waiting = spread(cases.length)
  const worker = async () => {
    for (let index = waiting.pop(); index !== undefined; index = waiting.pop()) {
      results[index] = await lab.run(cases[index] as Case)
      if (performance.now() > deadline) return
    }
  }
  await Promise.all(Array.from({ length: Math.min(atOnce, cases.length) }, worker))
  for (const [index, subject] of cases.entries()) {
    if (subject.mutate) continue // it is to fail
    const first = results[index]
    let result = first
    for (let again = 1; again <= 3 && result && mayBeLoad(result); again++) result = await lab.run(subject)
    if (result && first && result !== first) results[index] = { ...result, underLoad: first.violations }
  }
  return results.filter(Boolean)
}

/** All numbers below `count`, neighbours far from each other: whatever is run when the time is up is a fair sample. */
function spread(count: number): number[] {
  const golden = (index: number) => (index * 0.6180339887498949) % 1
  return Array.from({ length: count }, (_, index) => index).sort((one, other) => golden(one) - golden(other))
}

/**
 * On a busy machine a unit may run into its short timeouts before it comes to the message, and clean-up may take longer than
 * allowed: such cases are run again, alone. The report lists those that failed only in company.
 */
function mayBeLoad({ violations }: Result): boolean {
  return violations.length > 0 && violations.every(({ kind }) => measuredInTime.includes(kind))
}

async function runAlone(lab: Lab, id: string): Promise<void> {
  const [libraryName, unitName] = id.split('/')
  const library = libraries.find(({ name }) => name === libraryName)
  const unit = units.find(({ name }) => name === unitName)
  if (!library || !unit) throw new Error(`There is no unit '${unitName}' or no library '${libraryName}'.`)
  const uncut = await lab.run({ library, unit })
  const subjects = cutsOf(uncut.boundaries).map((cut): Case => ({ library, unit, cut }))
  const subject = subjects.find((each) => idOf(each) === id)
  if (!subject && id !== uncut.id) throw new Error(`There is no such boundary: ${id}`)
  const result = subject ? await lab.run(subject) : uncut
  console.log(result.summary)
  for (const { kind, text } of result.violations) console.log(`${kind}: ${text}`)
  for (const { kind, text } of result.declared) console.log(`declared: ${kind}: ${text}`)
  if (result.violations.length > 0) process.exitCode = 1
}

function printReport({ rows, mutants, failures }: Report): void {
  const shown = failures.slice(0, 60)
  for (const { id, violations, summary } of shown) {
    console.log(`\n${violations.map(({ kind, text }) => `${kind}: ${text}`).join('\n')}`)
    console.log(`  said: ${summary}\n  again: npm run truth -- --case=${quote(id)}`)
  }
  if (failures.length > shown.length) console.log(`\n… and ${failures.length - shown.length} more in ${options.json}`)
  if (rows.length > 0) console.log(`\n${table(rows.map(cellsOf))}`)
  if (mutants.length > 0) {
    const cells = mutants.map(({ mutant, planted, library, cases, shows, caught }) => ({
      ...{ 'planted fault': mutant, library, cases, caught, 'seen as': planted ? shows : '(no fault)' },
    }))
    console.log(`\n${table(cells)}`)
  }
}

function cellsOf({ library, units, boundaries, cases, left, unknowns, declared, violations, underLoad, seconds }: Row) {
  const cell = (...kinds: Violation['kind'][]) => {
    const sum = (counts: Counts) => kinds.reduce((total, kind) => total + (counts[kind] ?? 0), 0)
    return sum(declared) > 0 ? `${sum(violations)} (${sum(declared)} declared)` : sum(violations)
  }
  return {
    ...{
      library,
      units,
      boundaries,
      cases: left > 0 ? `${cases} (${left} left)` : cases,
      'wrong outcomes': cell('wrong outcome'),
      unknowns,
    },
    'not justified': cell('unjustified unknown', 'missed unknown'),
    uncaught: cell('uncaught'),
    'lost slots': cell('lost slot'),
    'left open': cell('open transaction', 'leaked socket'),
    hangs: cell('hang'),
    'never reached': cell('unreached'),
    'only under load': underLoad,
    seconds,
  }
}

function table(rows: readonly Record<string, string | number>[]): string {
  const titles = Object.keys(rows[0] ?? {})
  const line = (cells: readonly (string | number | undefined)[]) => `| ${cells.join(' | ')} |`
  return [
    line(titles),
    line(titles.map(() => '---')),
    ...rows.map((row) => line(titles.map((title) => row[title]))),
  ].join('\n')
}

function quote(text: string): string {
  return `'${text.replaceAll("'", `'\\''`)}'`
}
