import type { Planted, Report, Row } from './harness.ts'
import { table, withSection } from './page.ts'

/** What the last long run of each harness came to, by its name: `test/truth/figures.json`. */
export type Figures = Readonly<Record<string, Recorded>>

export interface Recorded extends Report {
  readonly title: string
  /** The day of the run. */
  readonly date: string
  readonly node: string
  readonly postgres: string
  /** The command of the run, with its seed. */
  readonly command: string
}

/** The page with `figures` in the place of those that it had. */
export function withFigures(page: string, figures: Figures): string {
  return withSection(page, 'figures', 'npm run truth -- --record', Object.entries(figures).map(render).join('\n\n'))
}

export function rowsTable(rows: readonly Row[]): string {
  return tableOf(
    rows.map(({ subject, runs, violations, seconds, figures }) => ({ subject, runs, ...figures, violations, seconds })),
  )
}

export function plantedTable(planted: readonly Planted[]): string {
  return tableOf(
    planted.map(({ fault, subject, runs, caught, seenAs }) => ({
      'planted fault': fault,
      ...{ subject, runs, caught, 'seen as': seenAs ?? '(no fault)' },
    })),
  )
}

export function tableOf(rows: readonly Readonly<Record<string, string | number>>[]): string {
  const titles = [...new Set(rows.flatMap((row) => Object.keys(row)))]
  const text = (value: string | number | undefined) =>
    typeof value === 'number' ? value.toLocaleString('en') : (value ?? '')
  return table(
    titles,
    rows.map((row) => titles.map((title) => text(row[title]))),
  )
}

function render([name, { title, date, node, postgres, command, rows, planted, failures }]: [string, Recorded]): string {
  return [
    `### ${name}: ${title}`,
    `\`${command}\`, ${date}, Node ${node}, PostgreSQL ${postgres}.`,
    rowsTable(rows),
    plantedTable(planted),
    ...(failures.length > 0 ? [`${failures.length} failures.`] : []),
  ].join('\n\n')
}
