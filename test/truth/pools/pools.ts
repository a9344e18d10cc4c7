import { type Conditions, commandOf, type Failure, type Harness, type Planted, type Row } from '../harness.ts'
import { type Fault, faults } from './faults.ts'
import { type Case, idOf, type Lab, openLab, type Result, type Subject, subjects } from './lab.ts'
import type { Violation } from './stage.ts'

const measuredInTime: readonly Violation['kind'][] = ['late', 'not served']

/**
 * Options: `--library=<name>`, `--scenario=<name>`, `--rounds=<n>` (each with another seed, hence other sizes and interleavings),
 * `--concurrency=<n>`, `--faults=only` or `none`.
 */
export const pools: Harness = {
  name: 'pools',
  title: 'pools are exhausted, slow, refused, ended and shut down under load',
  async run(conditions) {
    const library = conditions.option('library')
    const scenario = conditions.option('scenario')
    const chosen = subjects.filter((each) => each.library.name === (library ?? each.library.name))
    const known = chosen.flatMap((each) => each.scenarios.map(({ name }) => name))
    if (!known.includes(scenario ?? known[0] ?? '')) throw new Error(`There is no such library or scenario.`)
    const lab = openLab(conditions.url)
    const only = conditions.option('faults')
    const failures: Failure[] = []
    const runOne = async (subject: Subject) => {
      const row = await runSubject(lab, subject, conditions, failures)
      console.log(`${row.subject}: ${row.runs} cases in ${row.seconds} s`)
      return row
    }
    const noFaults = only === 'none' || scenario !== undefined
    // Mostly they wait, so all may be at the same time.
    const planting = noFaults ? [] : plantAll(lab, chosen, conditions)
    const [planted, rows] = await Promise.all([planting, Promise.all(only === 'only' ? [] : chosen.map(runOne))])
    const strays = await lab.close()
    if (strays.length > 0) {
      failures.push({
        id: 'uncaught, and of no case',
        found: strays.join('\n'),
        again: commandOf('pools', { seed: conditions.seed }),
      })
    }
    return { rows, planted, failures }
  },
}

async function runSubject(lab: Lab, subject: Subject, conditions: Conditions, failures: Failure[]): Promise<Row> {
  const startedAt = performance.now()
  const { size, seed, time, option } = conditions
  const rounds = Number(option('rounds') ?? (size === 'short' ? 1 : 1000))
  const wanted = option('scenario')
  const chosen = subject.scenarios.filter(({ name }) => name === (wanted ?? name))
  const cases = Array.from({ length: rounds }, (_, round) =>
    chosen.map((scenario): Case => ({ subject, scenario, seed: seed + round })),
  ).flat()
  const results = await runCases(lab, cases, Number(option('concurrency') ?? 4), startedAt + time)
  const failed = results.filter(({ violations }) => violations.length > 0)
  failures.push(...failed.map(failureOf))
  const count = (...kinds: Violation['kind'][]) =>
    results.filter(({ violations }) => violations.some(({ kind }) => kinds.includes(kind))).length
  return {
    subject: subject.library.name,
    runs: results.length,
    violations: failed.length,
    seconds: Math.round((performance.now() - startedAt) / 1000),
    figures: {
      left: cases.length - results.length,
      scenarios: chosen.length,
      units: results.reduce((sum, { units }) => sum + units, 0),
      acknowledged: results.reduce((sum, { acknowledged }) => sum + acknowledged, 0),
      'wrong outcomes': count('wrong outcome', 'too early'),
      'wrong errors': count('wrong error'),
      'not served': count('not served', 'shutdown'),
      hangs: count('hang', 'late'),
      'lost slots': count('lost slot'),
      'left open': count('open transaction', 'leaked connection'),
      uncaught: count('uncaught'),
      'only under load': results.filter(({ violations, loaded }) => loaded && violations.length === 0).length,
    },
  }
}

function failureOf({ case: subject, violations }: Result): Failure {
  const { scenario, seed } = subject
  const found = [...new Set(violations.map(({ kind, text }) => `${kind}: ${text}`))]
  const shown = found.length > 12 ? [...found.slice(0, 12), `… and ${found.length - 12} more`] : found
  const again = { library: subject.subject.library.name, scenario: scenario.name, seed, rounds: 1 }
  return { id: idOf(subject), found: shown.join('\n'), again: commandOf('pools', again) }
}

/** Runs several cases at a time, each with a database, pools and proxies of its own. */
async function runCases(
  lab: Lab,
  cases: readonly Case[],
  atOnce: number,
  deadline: number,
): Promise<(Result & { readonly loaded: boolean })[]> {
  const results: (Result & { readonly loaded: boolean })[] = []
  let next = 0
  const worker = async () => {
    while (next < cases.length && (next < atOnce || performance.now() < deadline)) {
      const index = next++
      results[index] = { ...(await lab.run(cases[index] as Case)), loaded: false }
    }
  }
  await Promise.all(Array.from({ length: Math.min(atOnce, cases.length) }, worker))
  for (const [index, result] of results.entries()) {
    if (!result || !mayBeLoad(result)) continue
    console.log(`run again: ${idOf(result.case)}: ${result.violations[0]?.kind}: ${result.violations[0]?.text}`)
    results[index] = { ...(await lab.run(result.case)), loaded: true }
  }
  return results.filter(Boolean)
}

/** On a busy machine a unit may run into its short timeouts: such a case is run once more, alone, and counted if it passes then. */
function mayBeLoad({ violations }: Result): boolean {
  return violations.length > 0 && violations.every(({ kind }) => measuredInTime.includes(kind))
}

/** The faults are put in at the driver, so they are run where the engine is its pool. */
async function plantAll(lab: Lab, chosen: readonly Subject[], { seed }: Conditions): Promise<Planted[]> {
  const open = chosen.filter(({ library }) => !library.limits.uncaught)
  const planted = faults.flatMap((fault) =>
    open.filter(({ wire }) => wire !== (fault.single === true)).map((subject) => ({ fault, subject })),
  )
  const results: Planted[] = []
  const waiting = [...planted.entries()]
  const worker = async () => {
    for (let each = waiting.shift(); each; each = waiting.shift()) {
      const [index, { fault, subject }] = each
      results[index] = await plant(lab, subject, fault, seed)
    }
  }
  await Promise.all(Array.from({ length: 8 }, worker)) // mostly they wait
  return results
}

/** On a busy machine the moment may pass in which the fault can be seen: it gets another one. */
async function plant(lab: Lab, subject: Subject, fault: Fault, seed: number): Promise<Planted> {
  const scenario = subject.scenarios.find(({ name }) => name === fault.scenario)
  if (!scenario) throw new Error(`There is no scenario '${fault.scenario}'.`)
  const { sabotage, shows } = fault
  const bounds = { hang: shows === 'hang' ? 4000 : 20_000, recovery: 1500 }
  for (let runs = 1; ; runs++) {
    const run: Case = { subject, scenario, seed: seed + runs - 1, sabotage, bounds }
    const { violations } = await lab.run(run)
    const caught = violations.some(({ kind }) => kind === shows) ? 1 : 0
    const found = violations.map(({ kind, text }) => `${kind}: ${text}`).join('; ')
    if (!caught) console.log(`missed: ${fault.name}, ${idOf(run)}: ${found}`)
    if (caught || runs === 3) return { fault: fault.name, subject: subject.library.name, runs, caught, seenAs: shows }
  }
}
