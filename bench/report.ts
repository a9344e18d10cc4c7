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
  /** `unclear` where the machine was too busy to tell; empty where there is no goal. */
  readonly met: 'yes' | 'NO' | 'unclear' | ''
  readonly outcome: Outcome | number
}

const columns = { name: 54, goal: 8, figure: 9, spread: 22, cpu: 23, times: 24 } as const

const ratio = (value: number) => value.toFixed(3)
const percent = (value: number) => `${value < 0 ? '' : '+'}${(value * 100).toFixed(1)} %`
const microseconds = (value: number) =>
  value < 1 ? `${(value * 1000).toFixed(0)} ns` : `${Number(value.toFixed(2))} µs`

function mapped(spread: Spread, map: (value: number) => number): Spread {
  const { median, ...ends } = spread
  const [low, high] = [map(ends.low), map(ends.high)]
  const [atLeast, atMost] = [map(ends.atLeast), map(ends.atMost)]
  const inOrder =
    low <= high ? { low, high, atLeast, atMost } : { low: high, high: low, atLeast: atMost, atMost: atLeast }
  return { median: map(median), ...inOrder }
}

/** How each kind of figure follows from the outcome, reads, and meets its goal. */
const kinds = {
  throughput: {
    of: ({ wall }: Outcome) => mapped(wall, (value) => 1 / value),
    text: ratio,
    goalText: String,
    sign: '≥',
  },
  overhead: {
    of: ({ wall }: Outcome) => mapped(wall, (value) => value - 1),
    text: percent,
    goalText: (value: number) => `${value * 100} %`,
    sign: '≤',
  },
  cpu: { of: ({ cpu }: Outcome): Spread => cpu, text: ratio, goalText: String, sign: '≤' },
  time: { of: ({ subject }: Outcome): Spread => subject, text: microseconds, goalText: microseconds, sign: '≤' },
} as const

export function rowOf({ name, shows, goal }: Comparison, outcome: Outcome): Row {
  const { of, text, goalText, sign } = kinds[shows]
  const { low, median, high, atLeast, atMost } = of(outcome)
  const { cpu, baseline, subject } = outcome
  return {
    name,
    goal: goal === undefined ? '' : `${sign} ${goalText(goal)}`,
    figure: text(median),
    spread: `${text(low)} … ${text(high)}`,
    cpu: `${ratio(cpu.median)} (${ratio(cpu.low)} … ${ratio(cpu.high)})`,
    times: `${microseconds(baseline.median)} → ${microseconds(subject.median)}`,
    met: goal === undefined ? '' : verdict(sign === '≥' ? [goal, atLeast, atMost] : [-goal, -atMost, -atLeast]),
    outcome,
  }
}

function verdict([goal, atLeast, atMost]: [number, number, number]): Row['met'] {
  if (atLeast >= goal) return 'yes'
  return atMost < goal ? 'NO' : 'unclear'
}

export function rowOfCount({ name, goal, unit }: Count, value: number): Row {
  const figure = `${Number(value.toFixed(2))} ${unit}`.trim()
  return {
    name,
    goal: `≤ ${goal}`,
    figure,
    spread: '',
    cpu: '',
    times: '',
    met: value <= goal ? 'yes' : 'NO',
    outcome: value,
  }
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
  print(row)
}

function print(cells: Record<keyof typeof columns | 'met', string>): void {
  const padded = (Object.keys(columns) as (keyof typeof columns)[]).map((key) => cells[key].padEnd(columns[key]))
  console.log(`${padded.join(' ')} ${cells.met}`)
}
