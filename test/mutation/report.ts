import { readFileSync } from 'node:fs'
import { basename } from 'node:path'
import { controlPrefix, type MutantResult, type Planned } from './sampler.ts'

/** What came of a mutant. `'timeout'` counts as killed: a test waited in vain, for itself or for the whole run. */
type Fate = 'killed' | 'timeout' | 'survived' | 'no coverage' | 'error'

export interface Row {
  readonly file: string
  readonly mutants: number
  readonly counts: Readonly<Record<Fate, number>>
}

export interface Report {
  /** The number of mutants in the files. */
  readonly population: number
  /** How many of them were to be tested, and how many were before the time was up. */
  readonly planned: number
  readonly tested: number
  /** Runs without a mutant, and those of them in which a test failed all the same. */
  readonly controls: { readonly run: number; readonly failed: readonly string[] }
  readonly rows: readonly Row[]
  /** All mutants that were tested. */
  readonly mutants: readonly Tested[]
}

export interface Tested {
  readonly fate: Fate
  readonly file: string
  readonly line: number
  readonly column: number
  readonly mutator: string
  readonly original: string
  readonly replacement: string
  readonly static: boolean
  /** The test that killed it, and its message. */
  readonly killedBy?: string | undefined
  readonly reason?: string | undefined
}

/** Reads what a run has written so far. `sources` are the texts of the files that it mutated, by name. */
export function read(results: string, sources: ReadonlyMap<string, string>): Report {
  const [first, ...lines] = readFileSync(results, 'utf8').trimEnd().split('\n')
  if (!first) throw new Error('The run ended before it had a plan.')
  const { population, ids }: Planned = JSON.parse(first)
  const byId = new Map(
    lines.map((line): [string, MutantResult] => {
      const result: MutantResult = JSON.parse(line)
      return [result.id, result]
    }),
  )
  // What is fast comes back first. Only what lies before the first that is missing is as random as the order.
  const missing = ids.findIndex((id) => !byId.has(id))
  const done = (missing < 0 ? ids : ids.slice(0, missing)).flatMap((id) => byId.get(id) ?? [])
  const isControl = ({ id }: MutantResult) => id.startsWith(controlPrefix)
  const controls = done.filter(isControl)
  const mutants = done.filter((result) => !isControl(result)).map((result) => testedOf(result, sources))
  const files = [...new Set(mutants.map(({ file }) => file))].sort()
  return {
    population,
    planned: ids.filter((id) => !id.startsWith(controlPrefix)).length,
    tested: mutants.length,
    controls: {
      run: controls.length,
      failed: controls
        .filter(({ status }) => status !== 'Survived')
        .map(({ status, statusReason }) => statusReason ?? status),
    },
    rows: [
      ...files.map((file) =>
        rowOf(
          file,
          mutants.filter((each) => each.file === file),
        ),
      ),
      rowOf('all', mutants),
    ],
    mutants,
  }
}

function testedOf(result: MutantResult, sources: ReadonlyMap<string, string>): Tested {
  const { fileName, location, statusReason } = result
  const file = basename(fileName)
  return {
    fate: fateOf(result.status, statusReason),
    file,
    line: location.start.line,
    column: location.start.column,
    mutator: result.mutatorName,
    original: excerpt(sources.get(file) ?? '', location),
    replacement: result.replacement,
    static: result.static ?? false,
    killedBy: result.killedBy?.[0],
    reason: statusReason,
  }
}

function excerpt(text: string, { start, end }: MutantResult['location']): string {
  const lines = text.split('\n').slice(start.line - 1, end.line)
  lines[lines.length - 1] = lines.at(-1)?.slice(0, end.column - 1) ?? ''
  lines[0] = lines[0]?.slice(start.column - 1) ?? ''
  return lines.join('\n')
}

/** A test that only waited in vain has said nothing about what it guards. */
const waitedInVain = /^(?:(?:Test|Hook) timed out in|Waited in vain for|Hit limit reached)/

function fateOf(status: MutantResult['status'], reason = ''): Fate {
  if (status === 'Killed') return waitedInVain.test(reason) ? 'timeout' : 'killed'
  if (status === 'Timeout') return 'timeout'
  if (status === 'Survived') return 'survived'
  return status === 'NoCoverage' ? 'no coverage' : 'error'
}

function rowOf(file: string, mutants: readonly Tested[]): Row {
  const counts = { killed: 0, timeout: 0, survived: 0, 'no coverage': 0, error: 0 }
  for (const { fate } of mutants) counts[fate]++
  return { file, mutants: mutants.length, counts }
}

/** The table of a report. */
export function tableOf({ rows, population, tested }: Report): string {
  const titles = ['file', 'mutants', 'killed', 'timeout', 'survived', 'no coverage', 'error', 'score']
  const cells = rows.map((row) => {
    const { killed, timeout, survived, 'no coverage': missed, error } = row.counts
    return [row.file, row.mutants, killed, timeout, survived, missed, error, scoreOf(row, tested < population)]
  })
  return [titles, titles.map(() => '---'), ...cells].map((line) => `| ${line.join(' | ')} |`).join('\n')
}

/** Killed of all that can be; of a sample, with the 95 % interval of Wilson. Errors are left out, as Stryker does. */
function scoreOf({ counts }: Row, sampled: boolean): string {
  const killed = counts.killed + counts.timeout
  const all = killed + counts.survived + counts['no coverage']
  if (all === 0) return '–'
  const share = killed / all
  const percent = (value: number) => Math.abs(value * 100).toFixed(1)
  if (!sampled) return `${percent(share)} %`
  const z = 1.96
  const middle = (share + z ** 2 / (2 * all)) / (1 + z ** 2 / all)
  const half = (z / (1 + z ** 2 / all)) * Math.sqrt((share * (1 - share)) / all + z ** 2 / (4 * all ** 2))
  return `${percent(share)} % (${percent(middle - half)}–${percent(middle + half)})`
}
