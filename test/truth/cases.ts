/** How cases are run. */
export interface RunOptions<Case, Result> {
  /** How many at a time. */
  readonly atOnce: number
  /** When no more are begun, by `performance.now()`. Default is never. */
  readonly deadline?: number
  /** Whether the result may come of a busy machine only: then the case is run again, alone, up to three times. */
  readonly mayBeLoad: (result: Result, subject: Case) => boolean
}

/** A result, and whether it came only when the case was run again, alone. */
export type Loaded<Result> = Result & { readonly loaded: boolean }

/** Runs several cases at a time; results come in the order of the cases, without those that there was no time for. */
export async function runCases<Case, Result extends object>(
  run: (subject: Case) => Promise<Result>,
  cases: readonly Case[],
  { atOnce, deadline = Number.POSITIVE_INFINITY, mayBeLoad }: RunOptions<Case, Result>,
): Promise<Loaded<Result>[]> {
  const results: Loaded<Result>[] = []
  const waiting = spread(cases.length)
  const worker = async () => {
    for (let index = waiting.pop(); index !== undefined; index = waiting.pop()) {
      results[index] = { ...(await run(cases[index] as Case)), loaded: false }
      if (performance.now() > deadline) return
    }
  }
  await Promise.all(Array.from({ length: Math.min(atOnce, cases.length) }, worker))
  for (const [index, subject] of cases.entries()) {
    for (let again = 1; again <= 3; again++) {
      const result = results[index]
      if (!result || !mayBeLoad(result, subject)) break
      results[index] = { ...(await run(subject)), loaded: true }
    }
  }
  return results.filter(Boolean)
}

/** All numbers below `count`, neighbours far from each other: whatever is run when the time is up is a fair sample. */
function spread(count: number): number[] {
  const golden = (index: number) => (index * 0.6180339887498949) % 1
  return Array.from({ length: count }, (_, index) => index).sort((one, other) => golden(one) - golden(other))
}
