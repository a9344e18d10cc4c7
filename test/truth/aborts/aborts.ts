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
import { type Case, type Lab, openLab, type Result } from './lab.ts'
import { type Mutant, mutants } from './mutants.ts'
import { type Finding, kindOf, ways } from './stage.ts'
import { abortUnits } from './units.ts'

type Kind = Finding['kind']

const measuredInTime: readonly Kind[] = [
  'unreached',
  'still running',
  'open transaction',
  'kept lock',
  'lost slot',
  'hang',
  'leaked socket',
]

/**
 * Options: `--library=<name>`, `--way=<way>`, `--unit=<name>`, `--every=<n>` (of all cases one in n), `--concurrency=<n>`,
 * `--case=<id>` (that one alone), `--mutants=only` or `none`.
 */
export const aborts: Harness = {
  name: 'aborts',
  title: 'the work is aborted at every await',
  async run(conditions) {
    const lab = await openLab(conditions.url)
    try {
      const id = conditions.option('case')
      return await (id === undefined ? runAll(lab, conditions) : runAlone(lab, id))
    } finally {
      await lab.close()
    }
  },
}

async function runAll(lab: Lab, conditions: Conditions): Promise<Report> {
  const rows: Row[] = []
  const failures: Failure[] = []
  const planted: Planted[] = []
  const only = conditions.option('mutants')
  const wanted = conditions.option('library')
  if (only !== 'none') {
    // The faults are put in at the driver, so they are run where the engine is its pool.
    const pools = libraries.filter(({ limits }) => !limits.uncaught)
    // One after the other: at once they would keep each other from being seen.
    for (const mutant of mutants) {
      planted.push(...(await Promise.all(pools.map((library) => runMutant(lab, library, mutant)))))
    }
  }
  for (const library of libraries.filter(({ name }) => only !== 'only' && name === (wanted ?? name))) {
    rows.push(await runLibrary(lab, library, conditions, failures))
    console.log(`${library.name}: ${rows.at(-1)?.runs} cases in ${rows.at(-1)?.seconds} s`)
  }
  return { rows, planted, failures }
}

async function runLibrary(
  lab: Lab,
  library: Library,
  { size, time, option }: Conditions,
  failures: Failure[],
): Promise<Row> {
  const startedAt = performance.now()
  const turn = libraries.indexOf(library)
  const every = Number(option('every') ?? (size === 'short' ? 61 : 1))
  const atOnce = Number(option('concurrency') ?? 8)
  const undisturbed = abortUnits.flatMap((unit) =>
    ways
      .filter((way) => unit.aborts.includes(kindOf(way)) && !(unit.noRequest && !/signal|timeout/.test(way)))
      .filter((way) => way === (option('way') ?? way) && unit.name === (option('unit') ?? unit.name))
      .map((way): Case => ({ library, unit, way })),
  )
  // In short, the libraries share the units and ways.
  const chosen = size === 'long' ? undisturbed : undisturbed.filter((_, index) => index % libraries.length === turn)
  const learned = await runCases(lab.run, chosen, { atOnce, mayBeLoad })
  const points = learned.flatMap(({ points: found }, index) =>
    found.map((point): Case => ({ ...(chosen[index] as Case), point })),
  )
  const cases = points.filter((_, index) => index % every === 0)
  const results = [...learned, ...(await runCases(lab.run, cases, { atOnce, deadline: startedAt + time, mayBeLoad }))]
  // A course that took another way than when it was learned says nothing about its place; such cases are counted.
  const failed = results.filter(({ findings }) => findings.some(({ kind }) => kind !== 'unreached'))
  failures.push(...failed.map(failureOf))
  return {
    subject: library.name,
    runs: results.length,
    violations: failed.length,
    seconds: Math.round((performance.now() - startedAt) / 1000),
    figures: {
      left: learned.length + cases.length - results.length,
      'units and ways': learned.length,
      places: points.length,
      'wrong outcomes': count(results, 'wrong outcome', 'unfounded rollback', 'unjustified unknown'),
      'late COMMITs': count(results, 'commit after the abort'),
      'still running': count(results, 'still running'),
      'left open': count(results, 'open transaction', 'kept lock', 'leaked socket'),
      'lost slots': count(results, 'lost slot'),
      'late cancels': count(results, 'late cancel'),
      'out of step': count(results, 'out of step'),
      uncaught: count(results, 'uncaught'),
      hangs: count(results, 'hang'),
      'never reached': count(results, 'unreached'),
      'only under load': results.filter(({ findings, loaded }) => loaded && findings.length === 0).length,
    },
  }
}

/** In how many cases there was one of `kinds`, and in how many one that the documentation of the adapter declares. */
function count(results: readonly Result[], ...kinds: Kind[]): string | number {
  const among = (list: 'findings' | 'declared') =>
    results.filter((result) => result[list].some(({ kind }) => kinds.includes(kind))).length
  return among('declared') > 0 ? `${among('findings')} (${among('declared')} declared)` : among('findings')
}

function failureOf({ id, findings, summary }: Result): Failure {
  const found = [...findings.map(({ kind, text }) => `${kind}: ${text}`), `said: ${summary}`].join('\n')
  return { id, found, again: commandOf('aborts', { case: id }) }
}

async function runMutant(lab: Lab, library: Library, mutant: Mutant): Promise<Planted> {
  const { name, fault, unit: unitName, way, at, times = 1, shows } = mutant
  const unit = abortUnits.find((each) => each.name === unitName)
  if (!unit) throw new Error(`There is no unit '${unitName}'.`)
  const subject: Case = { library, unit, way, ...fault }
  const { points } = await lab.run(subject)
  const cases = points
    .filter(({ label, awaits }) => awaits === 0 && at.test(label))
    .flatMap((point) => Array<Case>(times).fill({ ...subject, point }))
  const results = await runCases(lab.run, cases, { atOnce: 1, mayBeLoad: () => false })
  const caught = results.filter(({ findings }) => findings.some(({ kind }) => kind === shows)).length
  return { fault: name, subject: library.name, runs: cases.length, caught, seenAs: shows }
}

/** What is measured in time is measured again, alone. */
function mayBeLoad({ findings }: Result): boolean {
  return findings.length > 0 && findings.every(({ kind }) => measuredInTime.includes(kind))
}

async function runAlone(lab: Lab, id: string): Promise<Report> {
  const startedAt = performance.now()
  const [libraryName, wayName, ...rest] = splitId(id)
  const library = libraries.find(({ name }) => name === libraryName)
  const way = ways.find((each) => each === wayName)
  const unit = abortUnits.find(({ name }) => name === rest[0])
  if (!library || !way || !unit) throw new Error(`There is no such library, way or unit: ${id}`)
  const [, awaits, occurrence, label] = rest
  const point = label === undefined ? undefined : { label, awaits: Number(awaits), occurrence: Number(occurrence) }
  const subject: Case = { library, unit, way, ...(point && { point }) }
  const result = await lab.run(subject)
  console.log(`said: ${result.summary}`)
  for (const { kind, text } of result.declared) console.log(`declared: ${kind}: ${text}`)
  const failed = result.findings.length > 0
  const seconds = Math.round((performance.now() - startedAt) / 1000)
  const row: Row = { subject: library.name, runs: 1, violations: failed ? 1 : 0, seconds, figures: {} }
  return { rows: [row], planted: [], failures: failed ? [failureOf(result)] : [] }
}

/** The parts of an id; the label, which is the last, may hold anything. */
function splitId(id: string): string[] {
  const parts = id.split('/')
  return [...parts.slice(0, 5), ...(parts.length > 5 ? [parts.slice(5).join('/')] : [])]
}
