/**
 * A hunt for one kind of lie. It runs as long as its size says, and reports what it looked at, what it found, and whether it
 * found the faults that were planted for it. To add one: a folder with the harness and its short test, and a line in `harnesses.ts`.
 */
export interface Harness {
  /** `npm run truth -- <name>` runs it alone. */
  readonly name: string
  /** What is looked for, as the caption of its table. */
  readonly title: string
  run(conditions: Conditions): Promise<Report>
}

export interface Conditions {
  /** The connection string of a PostgreSQL server, where databases may be created. */
  readonly url: string
  /** `'short'` is what `npm test` runs, `'long'` what `npm run truth` runs. */
  readonly size: 'short' | 'long'
  /** What is random follows from it. */
  readonly seed: number
  /** Time for each subject, in ms; what does not fit is counted as left. */
  readonly time: number
  /** The value of `--<name>=<value>`, for what one harness alone understands. */
  option(name: string): string | undefined
}

/** What was looked at, and found. */
export interface Report {
  readonly rows: readonly Row[]
  readonly planted: readonly Planted[]
  readonly failures: readonly Failure[]
}

export interface Row {
  /** A library, a framework, an engine. */
  readonly subject: string
  /** How many cases, sequences, statements or requests there were. */
  readonly runs: number
  /** How many of them were not what the library promises. */
  readonly violations: number
  readonly seconds: number
  /** What else was counted, by the title of its column. */
  readonly figures: Readonly<Record<string, string | number>>
}

/** What came of a planted fault: a harness that never caught one would prove nothing. */
export interface Planted {
  readonly fault: string
  /** What it was planted in. */
  readonly subject: string
  readonly runs: number
  /** In how many of them the harness said what it must say of it. */
  readonly caught: number
  /** What it must be seen as; absent for a control without a fault, of which nothing may be said. */
  readonly seenAs?: string
}

/** Something that is not as promised. */
export interface Failure {
  /** By which it can be run alone. */
  readonly id: string
  readonly found: string
  /** The command that shows it again. */
  readonly again: string
}

/** Whether everything is as promised, and every planted fault was seen. */
export function holds({ rows, planted, failures }: Report): boolean {
  const told = ({ seenAs, caught }: Planted) => (seenAs === undefined ? caught === 0 : caught > 0)
  return failures.length === 0 && rows.every(({ violations }) => violations === 0) && planted.every(told)
}

/** The command that runs one harness with `options`. */
export function commandOf(harness: string, options: Readonly<Record<string, string | number>>): string {
  const given = Object.entries(options).map(([name, value]) => ` ${quoted(`--${name}=${value}`)}`)
  return `npm run truth -- ${harness}${given.join('')}`
}

function quoted(text: string): string {
  return /^[\w./=-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`
}
