import { spin } from './spin.ts'

/** One of the two things that are compared. */
export interface Side {
  /** Does the thing once. */
  operation(): unknown
  /** Runs a slice of operations, with what they need around them; only what happens inside `slice` is counted. */
  around?(slice: () => Promise<void>): Promise<unknown>
}

/** Two ways to the same end, measured in turns on one machine in one run. */
export interface Comparison {
  readonly kind: 'comparison'
  readonly name: string
  /** What stands behind the figure: how the two did as a ratio, or how long the subject took. */
  readonly shows: 'throughput' | 'overhead' | 'cpu' | 'time'
  /** The least throughput, or the most of anything else. `time` is in µs. */
  readonly goal?: number
  readonly baseline: Side
  readonly subject: Side
  /** Operations that are under way at once. Default is one. */
  readonly concurrency?: number
  /** How often one operation does what is to be shown. Default is once. */
  readonly repeats?: number
  /** The CPU time that the operations have used so far, in ms. Default is that of this process. */
  readonly cpu?: () => number | Promise<number>
  /** The baseline made slower by `delay` ms per operation. Default is to keep the CPU busy after each. */
  readonly planted?: (delay: number) => Side
}

/** How long to measure. */
export interface Budget {
  readonly rounds: number
  /** Roughly how long each side runs in each round, in ms. */
  readonly slice: number
  /** How often each side runs before, and for how long at most, in ms: V8 takes tens of thousands of calls to compile all well. */
  readonly warm: { readonly operations: number; readonly most: number }
}

/** Median and quartiles, and the range that the true median lies in with a confidence of 95 %. */
export interface Spread {
  readonly low: number
  readonly median: number
  readonly high: number
  readonly atLeast: number
  readonly atMost: number
}

/** The subject over the baseline, round by round, and the times per operation in µs. */
export interface Outcome {
  readonly wall: Spread
  readonly cpu: Spread
  readonly baseline: Spread
  readonly subject: Spread
}

interface Times {
  readonly wall: number
  readonly cpu: number
}

/** Runs both sides in turns, each first in every other round, and compares them within each round. */
export async function compare(comparison: Comparison, budget: Budget, subject = comparison.subject): Promise<Outcome> {
  const { baseline, repeats = 1 } = comparison
  const count = await calibrate(comparison, baseline, budget.slice)
  for (const side of [baseline, subject]) await warm(comparison, side, count, budget)
  const rounds: { baseline: Times; subject: Times }[] = []
  for (let round = 0; round < budget.rounds; round++) {
    const first = await time(comparison, round % 2 ? subject : baseline, count)
    const second = await time(comparison, round % 2 ? baseline : subject, count)
    rounds.push(round % 2 ? { baseline: second, subject: first } : { baseline: first, subject: second })
  }
  const microseconds = 1000 / count / repeats
  return {
    wall: spread(rounds.map((round) => round.subject.wall / round.baseline.wall)),
    cpu: spread(rounds.map((round) => round.subject.cpu / round.baseline.cpu)),
    baseline: spread(rounds.map((round) => round.baseline.wall * microseconds)),
    subject: spread(rounds.map((round) => round.subject.wall * microseconds)),
  }
}

/** The baseline against itself, and against itself with a delay of a tenth: what the harness must be able to tell apart. */
export async function compareWithPlanted(
  comparison: Comparison,
  budget: Budget,
): Promise<{ same: Outcome; slow: Outcome }> {
  const { baseline, shows } = comparison
  const same = await compare(comparison, budget, baseline)
  const count = await calibrate(comparison, baseline, budget.slice)
  const slices: number[] = []
  while (slices.length < budget.rounds) {
    const { wall, cpu } = await time(comparison, baseline, count)
    slices.push(shows === 'cpu' ? cpu : wall)
  }
  const delay = (0.1 * spread(slices).median) / count
  const slow = comparison.planted?.(delay) ?? {
    ...baseline,
    operation() {
      const result = baseline.operation()
      if (result instanceof Promise) return result.then(() => spin(delay))
      return spin(delay)
    },
  }
  return { same, slow: await compare(comparison, budget, slow) }
}

/** How many operations fill a slice. */
async function calibrate(comparison: Comparison, side: Side, slice: number): Promise<number> {
  let count = comparison.concurrency ?? 1
  for (;;) {
    const { wall } = await time(comparison, side, count)
    if (wall >= slice / 2) return Math.max(1, Math.round((count * slice) / wall))
    count *= 2
  }
}

async function warm(comparison: Comparison, side: Side, count: number, budget: Budget): Promise<void> {
  const { operations, most } = budget.warm
  const { repeats = 1 } = comparison
  const busy = { ...comparison, concurrency: Math.max(10, comparison.concurrency ?? 1) }
  const end = performance.now() + most
  for (let done = 0; done < operations && performance.now() < end; done += count * repeats) {
    await time(side.around ? comparison : busy, side, count)
  }
}

async function time({ concurrency = 1, cpu = ownCpu }: Comparison, side: Side, count: number): Promise<Times> {
  const times = { wall: 0, cpu: 0 }
  const slice = async () => {
    const cpuBefore = await cpu()
    const before = performance.now()
    if (concurrency === 1) await repeat(side, count)
    else await Promise.all(Array.from({ length: concurrency }, () => repeat(side, Math.ceil(count / concurrency))))
    times.wall = performance.now() - before
    times.cpu = (await cpu()) - cpuBefore
  }
  await (side.around ? side.around(slice) : slice())
  return times
}

async function repeat(side: Side, count: number): Promise<void> {
  for (let done = 0; done < count; done++) await side.operation()
}

function ownCpu(): number {
  const { user, system } = process.cpuUsage()
  return (user + system) / 1000
}

function spread(values: number[]): Spread {
  const sorted = values.toSorted((one, other) => one - other)
  const at = (share: number) => sorted[Math.round((sorted.length - 1) * Math.min(1, Math.max(0, share)))] as number
  const doubt = 0.98 / Math.sqrt(sorted.length) // half the width of the range, from the binomial distribution of ranks
  return { low: at(0.25), median: at(0.5), high: at(0.75), atLeast: at(0.5 - doubt), atMost: at(0.5 + doubt) }
}
