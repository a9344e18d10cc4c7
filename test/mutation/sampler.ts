import { appendFileSync } from 'node:fs'

/** A mutant, where Stryker speaks of it. */
export interface Mutant {
  readonly id: string
  readonly fileName: string
  readonly mutatorName: string
  readonly replacement: string
  readonly location: { readonly start: Position; readonly end: Position }
  /** It changes code that runs when its module is loaded. */
  readonly static?: boolean
  /** Tests that reach it. */
  readonly coveredBy?: readonly string[]
}

/** Counted from 0 in a plan, from 1 in a result. */
interface Position {
  readonly line: number
  readonly column: number
}

/** What Stryker found out about a mutant. */
export interface MutantResult extends Mutant {
  readonly status: 'Killed' | 'Timeout' | 'Survived' | 'NoCoverage' | 'RuntimeError' | 'Ignored'
  /** For a mutant that was killed: the message of the test. */
  readonly statusReason?: string
  readonly killedBy?: readonly string[]
  readonly duration?: number
}

interface Plan {
  readonly plan: 'Run' | 'EarlyResult'
  readonly mutant: Mutant
  readonly runOptions?: { readonly activeMutant: { readonly id: string }; reloadEnvironment: boolean }
}

/** What a run is to do; handed over in the environment as `MUTATION_ORDER`. */
export interface Order {
  /** A file of lines: first {@link Planned}, then a {@link MutantResult} each. */
  readonly results: string
  readonly seed: number
  /** How many mutants are drawn; all if absent. */
  readonly sample?: number
  /** One run without any mutant is mixed in for so many with one. */
  readonly controls: number
}

/** What the run is going to do. */
export interface Planned {
  /** The number of mutants that the sample was drawn from. */
  readonly population: number
  /** The ids of the sample, in the order in which they are run, with those of the controls. */
  readonly ids: readonly string[]
}

/** Begins the id of a control: a run like that of a mutant, with no mutant in it, which must survive. */
export const controlPrefix = 'control '

/**
 * A reporter of Stryker that draws the sample: it sees the plan before anything is run, and shuffles and cuts it. What is
 * left undone when the time is up is thus a random part too.
 */
class Sampler {
  readonly #order: Order = JSON.parse(process.env.MUTATION_ORDER ?? '')

  onMutationTestingPlanReady({ mutantPlans }: { mutantPlans: Plan[] }): void {
    const { seed, sample, controls } = this.#order
    const random = generator(seed)
    const population = mutantPlans.length
    shuffle(mutantPlans, random)
    if (sample !== undefined) mutantPlans.length = Math.min(sample, population)
    const reached = mutantPlans.filter(({ plan, mutant }) => plan === 'Run' && mutant.coveredBy?.length)
    const count = reached.length === 0 ? 0 : Math.ceil(mutantPlans.length / controls)
    for (let number = 1; number <= count; number++) {
      const like = reached[Math.floor(random() * reached.length)] as Plan
      mutantPlans.splice(Math.floor(random() * mutantPlans.length), 0, controlOf(like, number))
    }
    // Each test file has a process of its own, so there is nothing to reload; Stryker would put these last.
    for (const { runOptions } of mutantPlans) if (runOptions) runOptions.reloadEnvironment = false
    this.#write({ population, ids: mutantPlans.map(({ mutant }) => mutant.id) } satisfies Planned)
  }

  onMutantTested(result: MutantResult): void {
    this.#write(result)
  }

  #write(line: Planned | MutantResult): void {
    appendFileSync(this.#order.results, `${JSON.stringify(line)}\n`)
  }
}

function controlOf({ mutant, runOptions, ...plan }: Plan, number: number): Plan {
  const id = `${controlPrefix}${number}`
  if (!runOptions) throw new Error('A plan without a run has no control.')
  return { ...plan, mutant: { ...mutant, id }, runOptions: { ...runOptions, activeMutant: { id } } }
}

/** Fisher and Yates. */
function shuffle(items: unknown[], random: () => number): void {
  for (let last = items.length - 1; last > 0; last--) {
    const chosen = Math.floor(random() * (last + 1))
    ;[items[last], items[chosen]] = [items[chosen], items[last]]
  }
}

/** Random numbers below 1 that a seed brings back (mulberry32). */
function generator(seed: number): () => number {
  let state = seed
  return () => {
    state = (state + 0x6d2b79f5) | 0
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state)
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32
  }
}

/** How Stryker finds it. */
export const strykerPlugins = [{ kind: 'Reporter', name: 'sampler', injectableClass: Sampler }]
