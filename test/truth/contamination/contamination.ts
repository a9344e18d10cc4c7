import { acquireMariadb } from '../../support/mariadb-server.ts'
import { type Conditions, commandOf, type Failure, type Harness, type Planted, type Row } from '../harness.ts'
import { type Library, libraries } from '../libraries.ts'
import { mysqlLibraries } from '../mysql-libraries.ts'
import { type Fault, faults } from './faults.ts'
import { describeUnit, type Load, type Outcome, run, type Subject, type Violation } from './lab.ts'
import { isMariadb, openMariadb, openPostgres } from './place.ts'
import type { Kind } from './scene.ts'

/** How much each library has to do, and with how many units at once. */
const sizes = { short: { statements: 1200, atOnce: 100 }, long: { statements: 1_000_000, atOnce: 1000 } } as const

/**
 * Options: `--library=<name>`, `--statements=<n>`, `--concurrency=<n>` (units at once), `--unit=<n>` (that one alone, without
 * planted faults), `--faults=only` or `none`.
 */
export const contamination: Harness = {
  name: 'contamination',
  title: 'units of work by the thousand write into no transaction but their own',
  async run(conditions) {
    const { option } = conditions
    const wanted = option('library')
    const known = [...onPostgres(conditions.url), ...mysqlLibraries].some(({ name }) => name === (wanted ?? name))
    if (!known) throw new Error(`There is no library '${wanted}'.`)
    const needsMariadb = mysqlLibraries.some(({ name }) => name === (wanted ?? name))
    const mariadb = needsMariadb ? await acquireMariadb() : undefined
    try {
      const more = mariadb && (await isMariadb(mariadb.url)) ? onMariadb(mariadb.url) : []
      if (mariadb && more.length === 0) console.log('MySQL has no sequences, so its libraries are left out.')
      const chosen = [...onPostgres(conditions.url), ...more].filter(({ name }) => name === (wanted ?? name))
      const planted: Planted[] = []
      if (option('faults') !== 'none' && option('unit') === undefined) {
        for (const subject of chosen) {
          for (const fault of faultsFor(subject, conditions)) planted.push(await plant(subject, fault, conditions))
        }
      }
      const rows: Row[] = []
      const failures: Failure[] = []
      for (const subject of option('faults') === 'only' ? [] : chosen) {
        rows.push(await runSubject(subject, conditions, failures))
        console.log(`${subject.name}: ${rows.at(-1)?.runs} statements in ${rows.at(-1)?.seconds} s`)
      }
      return { rows, planted, failures }
    } finally {
      await mariadb?.stop()
    }
  },
}

function onPostgres(url: string): Subject[] {
  const subject = (library: Library, pipeline = false): Subject => ({
    ...{ library, name: pipeline ? `${library.name}, pipelined` : library.name },
    streams: library.limits.streams !== true && !pipeline,
    cancels: library.limits.cancelling !== true,
    open: () => openPostgres(url, pipeline),
  })
  return libraries.flatMap((each) => (each.name === 'pg' ? [subject(each), subject(each, true)] : [subject(each)]))
}

function onMariadb(url: string): Subject[] {
  const able = { streams: true, cancels: true }
  return mysqlLibraries.map((library) => ({ library, name: library.name, ...able, open: () => openMariadb(url) }))
}

/** In short, the first library alone gets them. */
function faultsFor({ name, library }: Subject, { size, option }: Conditions): readonly Fault[] {
  if (size === 'short' && option('faults') !== 'only' && name !== 'pg') return []
  return faults.filter(({ onPostgres: there }) => !there || libraries.includes(library))
}

async function plant(subject: Subject, fault: Fault, { size, seed }: Conditions): Promise<Planted> {
  const load: Load = {
    ...{ subject, seed, statements: size === 'short' ? 1000 : 3000, atOnce: 50, patience: 1500 },
    deadline: performance.now() + 5000,
    sabotage: fault.sabotage(),
  }
  const { violations, units } = await run(load)
  const caught = violations.filter(({ kind }) => fault.shows.includes(kind)).length
  if (caught === 0)
    console.log(`missed: ${fault.name}, ${subject.name}: ${violations.slice(0, 5).map(textOf).join('; ')}`)
  return { fault: fault.name, subject: subject.name, runs: units, caught, seenAs: fault.shows.join(' or ') }
}

async function runSubject(subject: Subject, conditions: Conditions, failures: Failure[]): Promise<Row> {
  const { size, seed, time, option } = conditions
  const unit = option('unit')
  const load: Load = {
    ...{ subject, seed },
    statements: Number(option('statements') ?? sizes[size].statements),
    atOnce: Number(option('concurrency') ?? sizes[size].atOnce),
    deadline: performance.now() + time,
    unit: unit === undefined ? undefined : Number(unit),
  }
  const outcome = await run(load)
  failures.push(...failuresOf(load, outcome))
  const {
    violations,
    statements,
    seconds,
    units,
    committed,
    rolledBack,
    unknown,
    transactions,
    contexts,
    rows,
    refused,
  } = outcome
  const count = (...kinds: Kind[]) => violations.filter(({ kind }) => kinds.includes(kind)).length
  return {
    ...{ subject: subject.name, runs: statements, violations: violations.length, seconds },
    figures: {
      left: Math.max(0, load.unit === undefined ? load.statements - statements : 0),
      'at once': load.atOnce,
      ...{ units, contexts, transactions, rows, committed, 'rolled back': rolledBack, unknown },
      'late, refused': refused,
      'foreign transactions': count('foreign transaction'),
      'late, sent': count('late'),
      'wrong rows': count('wrong rows'),
      'left open': count('open transaction', 'lost slot'),
      'not served': count('not served', 'wrong error'),
      uncaught: count('uncaught'),
      hangs: count('hang'),
    },
  }
}

/** One for each unit that something is wrong with; unit 0 stands for all of them. */
function failuresOf(load: Load, { violations }: Outcome): Failure[] {
  const byUnit = new Map<number, Violation[]>()
  for (const each of violations) byUnit.set(each.unit, [...(byUnit.get(each.unit) ?? []), each])
  const { subject, seed, statements, atOnce } = load
  const whole = { library: subject.name, seed, statements, concurrency: atOnce, faults: 'none' }
  return [...byUnit].map(([unit, found]) => {
    const texts = [...new Set(found.map(textOf))].slice(0, 12)
    const alone = commandOf('contamination', { library: subject.name, seed, unit })
    return {
      id: `${subject.name}/${seed}/${unit}`,
      found: [...texts, ...(unit > 0 ? [describeUnit(load, unit), `alone: ${alone}`] : [])].join('\n'),
      again: commandOf('contamination', whole),
    }
  })
}

function textOf({ kind, text }: Violation): string {
  return `${kind}: ${text}`
}
