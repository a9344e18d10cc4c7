import { table, withSection } from '../page.ts'
import type { Answers } from './field.ts'
import type { Finding } from './truth.ts'

/** What a run came to: `bench/field/results.json`. */
export interface Results {
  /** The day of the run. */
  readonly date: string
  readonly node: string
  readonly postgres: string
  readonly truths: readonly { readonly id: string; readonly title: string; readonly scene: string }[]
  readonly stacks: readonly StackResults[]
}

export interface StackResults {
  readonly name: string
  /** The releases, the judged one first. */
  readonly packages: Readonly<Record<string, string>>
  readonly documentation: string
  readonly answers: Answers
}

/** The page with the results in the place of those that it had. */
export function withResults(page: string, results: Results): string {
  return withSection(page, 'results', 'npm run field', render(results))
}

const short: Record<Finding['verdict'], string> = {
  holds: 'yes',
  partly: 'partly',
  broken: '**no**',
  'not applicable': '–',
}

function render({ date, node, postgres, truths, stacks }: Results): string {
  const verdicts = stacks.map(({ name, answers }) => [name, ...truths.map(({ id }) => short[verdictOf(answers, id)])])
  const details = truths.flatMap(({ id, title, scene }) => [
    `### ${id} ${title}`,
    scene,
    table(
      ['stack', 'holds', 'what was said, what was there'],
      stacks.map(({ name, answers }) => [name, short[verdictOf(answers, id)], answers[id]?.text ?? '']),
    ),
  ])
  const releases = stacks.map(({ name, packages, documentation }) => [
    name,
    Object.entries(packages)
      .map((pair) => pair.join(' '))
      .join(', '),
    documentation,
  ])
  return [
    `${date}, Node ${node}, PostgreSQL ${postgres}.`,
    table(['', ...truths.map(({ id }) => id)], verdicts),
    ...details,
    '### Releases',
    table(['stack', 'releases', 'used as in'], releases),
  ].join('\n\n')
}

function verdictOf(answers: Answers, id: string): Finding['verdict'] {
  const answer = answers[id]
  if (!answer) throw new Error(`There is no answer to ${id}.`)
  return answer.verdict
}
