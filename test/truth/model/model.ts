import fc from 'fast-check'
import { type Conditions, commandOf, type Failure, type Harness, type Planted, type Row } from '../harness.ts'
import { type Alarms, takeAlarms } from './alarms.ts'
import { type Engine, engines, type Ground } from './engines.ts'
import { type Mutant, mutants } from './mutants.ts'
import { type Program, printed, programs } from './program.ts'
import { openScene, type Sabotage } from './stage.ts'
import { tryOut } from './trial.ts'

/** Programs for all engines together. */
const sizes = { short: 300, long: 5000 }
/** How long a counter-example is made smaller, in ms. */
const shrinkingTime = 30_000
/** So many programs may pass a planted fault by. */
const mostUnseen = 400

/**
 * Options: `--engine=<name>`, `--runs=<n>` (for each engine), `--path=<path>` (of a counter-example, with its `--seed` and `--engine`),
 * `--faults=only` or `none`.
 */
export const model: Harness = {
  name: 'model',
  title: 'random programs of all that the library does, against a small model of its rules, turn by turn',
  async run(conditions) {
    const wanted = conditions.option('engine')
    const chosen = engines.filter(({ library }) => library.name === (wanted ?? library.name))
    if (chosen.length === 0) throw new Error(`There is no engine '${wanted}'.`)
    const only = conditions.option('faults')
    const path = conditions.option('path')
    const alarms = takeAlarms()
    const rows: Row[] = []
    const planted: Planted[] = []
    const failures: Failure[] = []
    try {
      for (const engine of chosen) {
        const ground = await engine.open(conditions.url)
        try {
          // Each gets other programs; the seed of a counter-example is that of its engine.
          const seed = wanted === undefined ? conditions.seed + engines.indexOf(engine) : conditions.seed
          if (only !== 'only') rows.push(await explore(engine, ground, alarms, { ...conditions, seed }, failures))
          if (only !== 'none' && path === undefined)
            planted.push(...(await plantAll(engine, ground, alarms, conditions)))
        } finally {
          await ground.close()
        }
      }
    } finally {
      alarms.giveBack()
    }
    return { rows, planted, failures }
  },
}

/** What came of many programs. */
interface Exploration {
  runs: number
  turns: number
  /** Programs of which nothing can be said. */
  'waits for itself': number
  'too many ways': number
  /** The first program that was not as the model says, made small. */
  readonly counterexample?: { readonly program: Program; readonly path: string; readonly found: string }
}

async function explore(
  engine: Engine,
  ground: Ground,
  alarms: Alarms,
  conditions: Conditions,
  failures: Failure[],
): Promise<Row> {
  const startedAt = performance.now()
  const { seed, size, time, option } = conditions
  const { name } = engine.library
  const path = option('path')
  const numRuns = Number(option('runs') ?? Math.ceil(sizes[size] / engines.length))
  const parameters = { seed, numRuns, interruptAfterTimeLimit: time, ...(path !== undefined && { path }) }
  const { counterexample, ...counts } = await check(engine, ground, alarms, parameters)
  if (counterexample) {
    failures.push({
      id: `${name}, seed ${seed}, path ${counterexample.path}`,
      found: `${printed(counterexample.program)}\n${counterexample.found}`,
      again: commandOf('model', { engine: name, seed, path: counterexample.path }),
    })
  }
  const seconds = Math.round((performance.now() - startedAt) / 1000)
  console.log(`${name}: ${counts.runs} programs in ${seconds} s`)
  const { runs, ...figures } = counts
  return { subject: name, runs, violations: counterexample ? 1 : 0, seconds, figures }
}

async function check(
  engine: Engine,
  ground: Ground,
  alarms: Alarms,
  parameters: fc.Parameters<[Program]>,
  sabotage?: Sabotage,
): Promise<Exploration> {
  const uncaught: unknown[] = []
  const onUncaught = (error: unknown) => uncaught.push(error)
  process.on('uncaughtException', onUncaught)
  process.on('unhandledRejection', onUncaught)
  const counts = { runs: 0, turns: 0, 'waits for itself': 0, 'too many ways': 0 }
  let scene = openScene(engine, ground, alarms, sabotage)
  const renew = () => {
    ground.forget()
    scene = openScene(engine, ground, alarms, sabotage)
  }
  let failedAt = Number.POSITIVE_INFINITY
  const property = fc.asyncProperty(programs, async (program) => {
    if (performance.now() > failedAt + shrinkingTime) return
    const { turns, divergence, left } = await tryOut(program, scene)
    counts.runs++
    counts.turns += turns
    if (left) counts[left]++
    const found = divergence ?? (uncaught.length > 0 ? `uncaught: ${uncaught.join(', ')}` : undefined)
    uncaught.length = 0
    if (left || found) renew()
    if (!found) return
    failedAt = Math.min(failedAt, performance.now())
    throw new Divergence(found)
  })
  try {
    const { counterexample, counterexamplePath, errorInstance } = await fc.check(property, parameters)
    if (!counterexample) return counts
    const found = errorInstance instanceof Divergence ? errorInstance.message : String((errorInstance as Error).stack)
    return { ...counts, counterexample: { program: counterexample[0], path: counterexamplePath ?? '', found } }
  } finally {
    await scene.close()
    ground.forget()
    process.off('uncaughtException', onUncaught)
    process.off('unhandledRejection', onUncaught)
  }
}

class Divergence extends Error {}

async function plantAll(engine: Engine, ground: Ground, alarms: Alarms, { seed }: Conditions): Promise<Planted[]> {
  const results: Planted[] = []
  for (const mutant of mutants.filter(({ only }) => only?.(engine.library.name) ?? true)) {
    results.push(await plant(engine, ground, alarms, seed, mutant))
  }
  return results
}

async function plant(
  engine: Engine,
  ground: Ground,
  alarms: Alarms,
  seed: number,
  { name, sabotage }: Mutant,
): Promise<Planted> {
  const parameters = { seed, numRuns: mostUnseen, endOnFailure: true }
  const { runs, counterexample } = await check(engine, ground, alarms, parameters, sabotage)
  if (!counterexample) console.log(`missed: ${name}, ${engine.library.name}`)
  return { fault: name, subject: engine.library.name, runs, caught: counterexample ? 1 : 0, seenAs: 'divergence' }
}
