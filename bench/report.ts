import type { Comparison, Outcome, Spread } from './harness.ts'
import type { Count } from './measure.ts'

/** A line of the table, and of the results for machines. */
export interface Row {
  readonly name: string
  readonly goal: string
  readonly figure: string
  /** From the first quartile to the third. */
  readonly spread: string
  readonly cpu: string
  /** Time per operation, of the baseline and of the subject. */
  readonly times: string
  /** `undefined` where there is no goal. */
  readonly met: boolean | undefined
  readonly outcome: Outcome | number
}

const columns = { name: 50, goal: 9, figure: 10, spread: 18, cpu: 22, times: 24 } as const

const ratio = (value: number) => value.toFixed(3)
const percent = (value: number) => `${value < 0 ? '' : '+'}${(value * 100).toFixed(1)} %`
const microseconds = (value: number) =>
  value < 1 ? `${(value * 1000).toFixed(0)} ns` : `${Number(value.toFixed(2))} µs`

/** How each kind of figure follows from the outcome, reads, and meets its goal. */
const kinds = {
  throughput: {
    of: ({ wall }: Outcome): Spread => ({ low: 1 / wall.high, median: 1 / wall.median, high: 1 / wall.low }),
    text: ratio,
    goalText: String,
    sign: '≥',
  },
  overhead: {
    of: ({ wall }: Outcome): Spread => ({ low: wall.low - 1, median: wall.median - 1, high: wall.high - 1 }),
    text: percent,
    goalText: (value: number) => `${value * 100} %`,
    sign: '≤',
  },
  cpu: { of: ({ cpu }: Outcome): Spread => cpu, text: ratio, goalText: String, sign: '≤' },
  time: { of: ({ subject }: Outcome): Spread => subject, text: microseconds, goalText: microseconds, sign: '≤' },
} as const

export function rowOf({ name, shows, goal }: Comparison, outcome: Outcome): Row {
  const { of, text, goalText, sign } = kinds[shows]
  const { low, median, high } = of(outcome)
  const { cpu, baseline, subject } = outcome
  return {
    name,
    goal: goal === undefined ? '' : `${sign} ${goalText(goal)}`,
    figure: text(median),
    spread: `${text(low)} … ${text(high)}`,
    cpu: `${ratio(cpu.median)} (${ratio(cpu.low)} … ${ratio(cpu.high)})`,
    times: `${microseconds(baseline.median)} → ${microseconds(subject.median)}`,
    met: goal === undefined ? undefined : sign === '≥' ? median >= goal : median <= goal,
    outcome,
  }
}

export function rowOfCount({ name, goal, unit }: Count, value: number): Row {
  const figure = `${Number(value.toFixed(2))} ${unit}`.trim()
  return { name, goal: `≤ ${goal}`, figure, spread: '', cpu: '', times: '', met: value <= goal, outcome: value }
}

export function printTitles(): void {
  print({
    name: 'measure',
    goal: 'goal',
    figure: 'median',
    spread: 'quartiles',
    cpu: 'CPU',
    times: 'by hand → ambient',
    met: 'met',
  })
}

export function printRow(row: Row): void {
  print({ ...row, met: row.met === undefined ? '' : row.met ? 'yes' : 'NO' })
}

function print(cells: Record<keyof typeof columns | 'met', string>): void {
  const padded = (Object.keys(columns) as (keyof typeof columns)[]).map((key) => cells[key].padEnd(columns[key]))
  console.log(`${padded.join(' ')} ${cells.met}`)
}
