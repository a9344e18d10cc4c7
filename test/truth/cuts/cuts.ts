import { acquireMariadb } from '../../support/mariadb-server.ts'
import { runCases } from '../cases.ts'
import {
  type Conditions,
  commandOf,
  type Failure,
  type Harness,
  type Planted,
  type Report,
  type Row,
} from '../harness.ts'
import { type Library, libraries } from '../libraries.ts'
import { mysqlLibraries } from '../mysql-libraries.ts'
import { type Case, cutsOf, idOf, type Lab, openLab, type Result } from './lab.ts'
import { control, type Mutant, mutants } from './mutants.ts'
import { mysql } from './mysql.ts'
import { postgres } from './postgres.ts'
import type { Server } from './server.ts'
import type { Violation } from './stage.ts'
import { type Unit, unitsFor } from './units.ts'

type Kind = Violation['kind']

/** How many cuts of each library are tried where not all are. */
const shortSample = 140

const measuredInTime: readonly Kind[] = [
  'unreached',
  'lost slot',
  'hang',
  'open transaction',
  'leaked socket',
  'unresolved',
]

/** A kind of server, and the libraries that are tried on it. */
interface Group {
  readonly server: Server
  readonly libraries: readonly Library[]
  readonly units: readonly Unit[]
  /** A server of this kind. */
  acquire(conditions: Conditions): Promise<{ readonly url: string; stop(): Promise<void> }>
}

const groups: readonly Group[] = [
  {
    server: postgres,
    libraries,
    units: unitsFor(postgres),
    acquire: async ({ url }) => ({ url, stop: async () => {} }),
  },
  { server: mysql, libraries: mysqlLibraries, units: unitsFor(mysql), acquire: acquireMariadb },
]

/**
 * Options: `--library=<name>`, `--unit=<name>`, `--every=<n>` (of all cases one in n), `--concurrency=<n>`, `--case=<id>` (that one
 * alone), `--mutants=only` or `none`.
 */
export const cuts: Harness = {
  name: 'cuts',
  title: 'the connection is cut at every message on the wire',
  async run(conditions) {
    const id = conditions.option('case')
    const wanted = id === undefined ? conditions.option('library') : id.split('/')[0]
    const report: Report = { rows: [], planted: [], failures: [] }
    const chosen = groups.filter((each) => each.libraries.some(({ name }) => name === (wanted ?? name)))
    if (chosen.length === 0) throw new Error(`There is no library '${wanted}'.`)
    for (const group of chosen) {
      const { url, stop } = await group.acquire(conditions)
      const lab = await openLab(group.server, url)
      try {
        const part = await (id === undefined ? runAll(lab, group, conditions) : runAlone(lab, group, id))
        for (const list of ['rows', 'planted', 'failures'] as const) {
          ;(report[list] as unknown[]).push(...part[list]) // of the same kind
        }
      } finally {
        await lab.close()
        await stop()
      }
    }
    return report
  },
}

async function runAll(lab: Lab, group: Group, conditions: Conditions): Promise<Report> {
  const rows: Row[] = []
  const failures: Failure[] = []
  const only = conditions.option('mutants')
  const planted: Planted[] = []
  if (only !== 'none') {
    // One after the other: at once they would keep each other from being seen.
    for (const mutant of [control, ...mutants]) planted.push(...(await runMutant(lab, group, mutant)))
  }
  const library = conditions.option('library')
  if (only !== 'only') {
    for (const each of group.libraries.filter(({ name }) => name === (library ?? name))) {
      rows.push(await runLibrary(lab, group, each, conditions, failures))
      console.log(`${each.name}: ${rows.at(-1)?.runs} cases in ${rows.at(-1)?.seconds} s`)
    }
  }
  return { rows, planted, failures }
}

async function runLibrary(
  lab: Lab,
  { units }: Group,
  library: Library,
  { size, time, option }: Conditions,
  failures: Failure[],
): Promise<Row> {
  const startedAt = performance.now()
  const wanted = option('unit')
  const chosen = units.filter(({ name }) => name === (wanted ?? name))
  const undisturbed = chosen.map((unit) => ({ library, unit }))
  const uncut = await runCases(lab.run, undisturbed, { atOnce: 6, mayBeLoad })
  const all = chosen.map((_, index) => cutsOf(uncut[index]?.boundaries ?? []))
  const sample = size === 'short' ? Math.ceil(all.flat().length / shortSample) : 1
  const every = Number(option('every') ?? sample)
  const cases = chosen.flatMap((unit, index): Case[] => {
    const cuts = all[index] ?? []
    return cuts.filter((_, each) => each % every === index % every).map((cut) => ({ library, unit, cut }))
  })
  const atOnce = Number(option('concurrency') ?? 12)
  const results = [...uncut, ...(await runCases(lab.run, cases, { atOnce, deadline: startedAt + time, mayBeLoad }))]
  const failed = results.filter(({ violations }) => violations.length > 0)
  failures.push(...failed.map(failureOf))
  return {
    subject: library.name,
    runs: results.length,
    violations: failed.length,
    seconds: Math.round((performance.now() - startedAt) / 1000),
    figures: {
      left: uncut.length + cases.length - results.length,
      units: chosen.length,
      boundaries: uncut.reduce((sum, { boundaries }) => sum + boundaries.length, 0),
      'wrong outcomes': count(results, 'wrong outcome'),
      unknowns: results.filter(({ unknowns }) => unknowns > 0).length,
      resolved: results.filter(({ resolved }) => resolved > 0).length,
      unresolved: count(results, 'unresolved'),
      'not justified': count(results, 'unjustified unknown', 'missed unknown'),
      uncaught: count(results, 'uncaught'),
      'lost slots': count(results, 'lost slot'),
      'left open': count(results, 'open transaction', 'leaked socket'),
      hangs: count(results, 'hang'),
      'never reached': count(results, 'unreached'),
      'only under load': results.filter(({ violations, loaded }) => loaded && violations.length === 0).length,
    },
  }
}

/** In how many cases there was one of `kinds`, and in how many one that the documentation of the adapter declares. */
function count(results: readonly Result[], ...kinds: Kind[]): string | number {
  const among = (list: 'violations' | 'declared') =>
    results.filter((result) => result[list].some(({ kind }) => kinds.includes(kind))).length
  return among('declared') > 0 ? `${among('violations')} (${among('declared')} declared)` : among('violations')
}

function failureOf({ id, violations, summary }: Result): Failure {
  const found = [...violations.map(({ kind, text }) => `${kind}: ${text}`), `said: ${summary}`].join('\n')
  return { id, found, again: commandOf('cuts', { case: id }) }
}

/** The faults are put in at the driver, so they are run where the engine is its pool. */
async function runMutant(
  lab: Lab,
  { server, libraries, units }: Group,
  { name, mutate, units: names, labels, tags, lookups, shows }: Mutant,
): Promise<Planted[]> {
  const rows: Planted[] = []
  if (tags && !server.tags) return rows
  const subjects = libraries.filter(({ limits, resolvable }) => !limits.uncaught && (!lookups || resolvable))
  for (const library of subjects) {
    const cases: Case[] = []
    for (const unit of units.filter((each) => names.includes(each.name))) {
      cases.push({ library, unit, mutate })
      const { boundaries } = await lab.run({ library, unit, mutate })
      const cuts = cutsOf(boundaries.filter(({ label }) => labels.test(label)))
      for (const cut of cuts) if (!cut.fate.endsWith('stall')) cases.push({ library, unit, cut, mutate })
    }
    const results = await runCases(lab.run, cases, { atOnce: 4, mayBeLoad })
    const caught = results.filter(({ violations }) => violations.some(({ kind }) => kind === shows)).length
    const planted = mutants.some((each) => each.name === name)
    rows.push({ fault: name, subject: library.name, runs: cases.length, caught, ...(planted && { seenAs: shows }) })
  }
  return rows
}

/**
 * On a busy machine a unit may run into its short timeouts before it comes to the message, and clean-up may take longer than
 * allowed: such cases are run again, alone, and counted if they pass then.
 */
function mayBeLoad({ violations }: Result, { mutate }: Case): boolean {
  if (mutate) return false // it is to fail
  return violations.length > 0 && violations.every(({ kind }) => measuredInTime.includes(kind))
}

async function runAlone(lab: Lab, { libraries, units }: Group, id: string): Promise<Report> {
  const startedAt = performance.now()
  const [libraryName, unitName] = id.split('/')
  const library = libraries.find(({ name }) => name === libraryName)
  const unit = units.find(({ name }) => name === unitName)
  if (!library || !unit) throw new Error(`There is no unit '${unitName}' or no library '${libraryName}'.`)
  const uncut = await lab.run({ library, unit })
  const subjects = cutsOf(uncut.boundaries).map((cut): Case => ({ library, unit, cut }))
  const subject = subjects.find((each) => idOf(each) === id)
  if (!subject && id !== uncut.id) throw new Error(`There is no such boundary: ${id}`)
  const result = subject ? await lab.run(subject) : uncut
  console.log(`said: ${result.summary}`)
  for (const { kind, text } of result.declared) console.log(`declared: ${kind}: ${text}`)
  const failed = result.violations.length > 0
  const seconds = Math.round((performance.now() - startedAt) / 1000)
  const row: Row = { subject: library.name, runs: 1, violations: failed ? 1 : 0, seconds, figures: {} }
  return { rows: [row], planted: [], failures: failed ? [failureOf(result)] : [] }
}
