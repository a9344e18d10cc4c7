import { Pool } from 'pg'
import { createDatabaseAt, type TestDatabase } from '../../support/database.ts'
import { startProxy } from '../../support/proxy.ts'
import { type Conditions, commandOf, type Failure, type Harness, type Planted, type Row } from '../harness.ts'
import { sleep } from '../waiting.ts'
import { AppProcess } from './app-process.ts'
import { type Fault, faults } from './faults.ts'
import { type Framework, frameworks } from './frameworks.ts'
import { type Counts, judge, type Kind, type Sight, type Verdict, type Violation } from './judge.ts'
import { countRows, runLoad } from './load.ts'
import { databaseNames, type Plan, planOf } from './plan.ts'
import { Saboteur } from './saboteur.ts'
import type { DatabaseName } from './styles.ts'

/**
 * Options: `--framework=<name>`, `--writes=<n>` for each framework, `--request=<n>` (that one alone), `--faults=only` or `none`.
 */
export const audit: Harness = {
  name: 'audit',
  title: 'what clients were told over HTTP is compared with the rows',
  async run(conditions) {
    const { option } = conditions
    const wanted = option('framework')
    const chosen = frameworks.filter(({ name }) => name === (wanted ?? name))
    if (chosen.length === 0) throw new Error(`There is no framework '${wanted}'.`)
    const only = option('faults')
    const atOnce = conditions.size === 'short' ? 3 : 1
    const planted = only === 'none' || option('request') ? [] : await plantAll(conditions)
    const reports =
      only === 'only' ? [] : await each(chosen, atOnce, (framework) => auditFramework(framework, conditions))
    return { rows: reports.map(({ row }) => row), planted, failures: reports.flatMap(({ failures }) => failures) }
  },
}

async function auditFramework(
  framework: Framework,
  conditions: Conditions,
): Promise<{ readonly row: Row; readonly failures: Failure[] }> {
  const { url, size, seed, time, option } = conditions
  const startedAt = performance.now()
  const writes = Number(option('writes') ?? (size === 'short' ? 100 : 10_000))
  const numbers = option('request')?.split(',').map(Number) ?? Array.from({ length: writes }, (_, index) => index + 1)
  const plans = numbers.map((request) => planOf(seed, request))
  const app = new AppProcess()
  const result = await auditApp(app, {
    framework,
    fault: undefined,
    url,
    plans,
    seed,
    bound: 60_000,
    patience: 20_000,
    deadline: startedAt + time,
  })
  if (!(await app.end(20_000))) result.violations.push({ kind: 'left open', text: 'the process did not end by itself' })
  const { sights, violations, unknowns } = result
  const seconds = Math.round((performance.now() - startedAt) / 1000)
  if (unknowns.length > 0) {
    const each = unknowns.map(({ request, part, there }) => `${request} ${part} ${there ? 'there' : 'gone'}`)
    console.log(`${framework.name}: COMMIT sent and not answered, by request: ${each.join(', ')}`)
  }
  console.log(`${framework.name}: ${sights.length} requests in ${seconds} s`)
  const statuses = (test: (status: number) => boolean) => sights.filter(({ status }) => status && test(status)).length
  const count = (...kinds: Kind[]) => violations.filter(({ kind }) => kinds.includes(kind)).length
  const row: Row = {
    subject: framework.name,
    runs: sights.length,
    violations: violations.length,
    seconds,
    figures: {
      left: plans.length - sights.length,
      successes: statuses((status) => status < 400),
      failures: statuses((status) => status >= 400),
      unheard: sights.filter(({ status }) => status === undefined).length,
      'units acknowledged': result.acknowledged,
      unknown: `${unknowns.length} (${unknowns.filter(({ there }) => there).length} there)`,
      'units unheard': `${result.unheard} (${result.unheardThere} there)`,
      'units in the database': result.units,
      'wire faults': result.faults,
      kills: result.kills,
      'not visible': count('not visible'),
      'success without rows': count('success without rows'),
      'failure with rows': count('failure with rows', 'half of the rows', 'stray rows'),
      'not justified': count('unjustified unknown', 'missed unknown'),
      'no answer': count('no answer', 'hang'),
      uncaught: count('uncaught'),
      'left open': count('lost slot', 'open transaction', 'left open'),
    },
  }
  const failures = violations.map((violation) => failureOf(framework, violation, { seed, writes }))
  return { row, failures }
}

function failureOf(
  { name: framework }: Framework,
  { kind, request, text }: Violation,
  load: { seed: number; writes: number },
): Failure {
  const again = commandOf('audit', { framework, ...load, faults: 'none' })
  if (request === undefined) return { id: framework, found: `${kind}: ${text}`, again }
  const alone = commandOf('audit', { framework, seed: load.seed, request })
  const plan = JSON.stringify(planOf(load.seed, request))
  return { id: `${framework}/${request}`, found: `${kind}: ${text}\nplan: ${plan}\nalone: ${alone}`, again }
}

/** Runs each planted fault on a few requests in which it shows. */
async function plantAll({ url, seed, option }: Conditions): Promise<Planted[]> {
  const framework = frameworks.find(({ name }) => name === 'Express 5') as Framework
  const wanted = option('fault')
  const chosen = Object.entries(faults).filter(([name]) => name === (wanted ?? name))
  const plant = async (app: AppProcess, name: string, { on, shows }: Fault): Promise<Planted> => {
    const plans: Plan[] = []
    for (let request = 1; plans.length < 20; request++) plans.push(...[planOf(seed, request)].filter(on))
    const bounds = { bound: 4_000, patience: 2_000, deadline: Number.POSITIVE_INFINITY }
    const { violations } = await auditApp(app, { framework, fault: name, url, plans, seed, ...bounds })
    const kinds = new Set(violations.map(({ kind }) => kind))
    console.log(`planted '${name}': ${[...kinds].join(', ') || 'nothing'}`)
    const caught = violations.filter(({ kind }) => kind === shows).length
    return { fault: name, subject: framework.name, runs: plans.length, caught, seenAs: shows }
  }
  const apps = Array.from({ length: 3 }, () => new AppProcess(formerAsyncContext))
  const planted = await each(chosen, apps.length, async ([name, fault]) => {
    const app = apps.pop() as AppProcess // one for each that is planted at once
    try {
      return await plant(app, name, fault)
    } finally {
      apps.push(app)
    }
  })
  await Promise.all(apps.map((app) => app.end(0)))
  return planted
}

/** The async context that Node had before version 24: what a request enters for good leaks to later ones of the socket. */
const formerAsyncContext = process.allowedNodeEnvironmentFlags.has('--async-context-frame')
  ? ['--no-async-context-frame']
  : []

interface Subject {
  readonly framework: Framework
  readonly fault: string | undefined
  readonly url: string
  readonly plans: readonly Plan[]
  readonly seed: number
  /** Milliseconds for each answer. */
  readonly bound: number
  /** Milliseconds for what must come to an end in the app. */
  readonly patience: number
  readonly deadline: number
}

type Result = Verdict & {
  readonly violations: Violation[]
  readonly sights: readonly Sight[]
  /** Parts of requests whose rows are there. */
  readonly units: number
  readonly faults: number
  readonly kills: number
}

async function auditApp(
  app: AppProcess,
  { framework, fault, url, plans, seed, bound, patience, deadline }: Subject,
): Promise<Result> {
  const stage = await setStage(url)
  const { proxy, urls, witnesses } = stage
  const violations: Violation[] = []
  const violate = (kind: Kind, texts: readonly string[]) => violations.push(...texts.map((text) => ({ kind, text })))
  try {
    const saboteur = new Saboteur(proxy, plans, witnesses.main, stage.name)
    const port = await app.call('start', {
      framework: framework.name,
      fault,
      urls,
      applicationName: stage.name,
      patience,
    })
    const { protocol } = framework
    const sights = await runLoad({ plans, seed, port, protocol, proxy, saboteur, witnesses, bound, deadline })
    violate('left open', await app.call('rest'))
    violate('open transaction', await stage.openTransactions())
    const account = await app.call('account')
    violate('lost slot', account.lostSlots)
    const rows = await stage.rows()
    const verdict = judge(sights, account, rows)
    const { leftOpen, uncaught } = await app.call('close')
    violate('left open', leftOpen)
    violate('uncaught', uncaught)
    for (const until = Date.now() + 2_000; proxy.open > 0 && Date.now() < until; ) await sleep(10)
    if (proxy.open > 0) violate('left open', [`${proxy.open} connections to the database`])
    const { faults, kills } = saboteur
    return { ...verdict, violations: [...verdict.violations, ...violations], sights, units: rows.size, faults, kills }
  } finally {
    await stage.close()
  }
}

interface Stage {
  readonly name: string
  readonly proxy: Awaited<ReturnType<typeof startProxy>>
  /** Through the proxy. */
  readonly urls: Record<DatabaseName, string>
  readonly witnesses: Record<DatabaseName, Pool>
  /** All rows of all requests. */
  rows(): Promise<Counts>
  /** Connections of the app that are in a transaction, or at work. */
  openTransactions(): Promise<string[]>
  close(): Promise<void>
}

async function setStage(serverUrl: string): Promise<Stage> {
  const databases: Record<DatabaseName, TestDatabase> = {
    main: await createDatabaseAt(serverUrl),
    other: await createDatabaseAt(serverUrl),
  }
  const { name, url } = databases.main
  const proxy = await startProxy(url, { record: false })
  const pool = (database: DatabaseName) =>
    new Pool({ connectionString: databases[database].url, max: 26 }).on('error', () => {}) // it says that it has ended before its clients have
  const witnesses = { main: pool('main'), other: pool('other') }
  const other = new URL(proxy.url)
  other.pathname = `/${databases.other.name}`
  for (const { witness } of Object.values(databases)) {
    await witness.rows('create table entries (unit text, n int, primary key (unit, n))')
    await witness.rows('create table parents (id int primary key)')
    await witness.rows('create table doomed (parent int references parents deferrable initially deferred)')
    await witness.rows('create table counters as select id, 0 as n from generate_series(0, 15) id')
    await witness.rows('create table slow (seconds float)')
    await witness.rows(
      `create function take_time() returns trigger language plpgsql
         as $$ begin perform pg_sleep(new.seconds); return null; end $$`,
    )
    await witness.rows(
      `create constraint trigger take_time after insert on slow deferrable initially deferred
         for each row execute function take_time()`,
    )
  }
  return {
    name,
    proxy,
    urls: { main: proxy.url, other: other.href },
    witnesses,
    async rows() {
      const counts = await Promise.all(databaseNames.map((each) => countRows(each, witnesses[each])))
      return new Map(counts.flatMap((each) => [...each]))
    },
    async openTransactions() {
      const find = async () => {
        const sql = `select state, query from pg_stat_activity
                      where application_name = $1 and (xact_start is not null or state <> 'idle')`
        const { rows } = await witnesses.main.query<{ state: string; query: string }>(sql, [name])
        return rows.map(({ state, query }) => `${state}: ${query}`)
      }
      let found = await find()
      for (const until = Date.now() + 2_000; found.length > 0 && Date.now() < until; found = await find())
        await sleep(20)
      return found
    },
    async close() {
      await Promise.all([witnesses.main.end(), witnesses.other.end(), proxy.close()])
      await Promise.all([databases.main.drop(), databases.other.drop()])
    },
  }
}

/** Does it to all items, so many at a time; the results come in their order. */
async function each<Item, Result>(
  items: readonly Item[],
  atOnce: number,
  act: (item: Item) => Promise<Result>,
): Promise<Result[]> {
  const results: Result[] = []
  const entries = items.entries()
  const workers = Array.from({ length: atOnce }, async () => {
    for (const [index, item] of entries) results[index] = await act(item)
  })
  await Promise.all(workers)
  return results
}
