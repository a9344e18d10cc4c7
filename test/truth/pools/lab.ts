import { AsyncLocalStorage } from 'node:async_hooks'
import { DatabaseSync } from 'node:sqlite'
import { SqliteDialect } from 'kysely'
import { createPool } from 'mysql2/promise'
import { Pool } from 'pg'
import { kyselyAdapter } from '../../../src/adapters/kysely.ts'
import { forKysely } from '../../support/sqlite.ts'
import { kyselyHandles, type Library, libraries, type Tables } from '../libraries.ts'
import { mysqlLibraries } from '../mysql-libraries.ts'
import { settlesWithin, sleep } from '../waiting.ts'
import { openMysql, openPostgres, openSqlite, type Server } from './place.ts'
import { randomOf } from './random.ts'
import { type Scenario, scenarios, shortTimeouts, singleScenarios } from './scenarios.ts'
import { describe, type Sabotage, Stage, type Violation } from './stage.ts'

/** What must happen within so many ms. */
interface Bounds {
  /** A scenario has come to its end, whatever happens. */
  readonly hang: number
  /** The pool is full again, or a pool that nobody uses is closed. */
  readonly recovery: number
}

const generous: Bounds = { hang: 40_000, recovery: 5000 }
/** What a driver throws where nobody listens. */
const lossOfConnection = /ECONNRESET|EPIPE|Connection terminated unexpectedly/

/** A library on an engine, and what is tried with it. */
export interface Subject {
  readonly library: Library
  readonly scenarios: readonly Scenario[]
  readonly wire: boolean
  open(serverUrl: string): Promise<Server>
  makePool(options: { url: string; run: string; size: number }): unknown
  /** The size of the pool, at least and at most. */
  readonly sizes: readonly [number, number]
}

const sqlite: Library = {
  name: 'kysely-sqlite',
  limits: {},
  adapter: (database: () => DatabaseSync) =>
    kyselyAdapter<Tables>(() => new SqliteDialect({ database: forKysely(database()) })),
  ...kyselyHandles,
} as unknown as Library // it sees only its own handles

export const subjects: readonly Subject[] = [
  ...libraries.map(
    (library): Subject => ({
      ...{ library, scenarios, wire: true, open: openPostgres, sizes: [2, 5] },
      makePool: ({ url, run, size }) => new Pool({ connectionString: url, application_name: run, max: size }),
    }),
  ),
  ...mysqlLibraries.map(
    (library): Subject => ({
      ...{ library, scenarios, wire: true, open: openMysql, sizes: [2, 5] },
      makePool: ({ url, size }) => createPool({ uri: url, connectionLimit: size }),
    }),
  ),
  {
    ...{ library: sqlite, scenarios: singleScenarios, wire: false, open: openSqlite, sizes: [1, 1] },
    makePool: ({ url }) => new DatabaseSync(url),
  },
]

export interface Case {
  readonly subject: Subject
  readonly scenario: Scenario
  readonly seed: number
  readonly sabotage?: Sabotage
  /** Shorter where a fault is waited for. */
  readonly bounds?: Bounds
}

export interface Result {
  readonly case: Case
  readonly violations: readonly Violation[]
  readonly units: number
  readonly acknowledged: number
}

/** By which a case can be run alone. */
export function idOf({ subject, scenario, seed }: Case): string {
  return `${subject.library.name}/${scenario.name}/${seed}`
}

export interface Lab {
  run(subject: Case): Promise<Result>
  /** What was uncaught, and belongs to no case that still ran. */
  close(): Promise<readonly string[]>
}

export function openLab(serverUrl: string): Lab {
  let runs = 0
  const servers = new Map<Subject['open'], Promise<Server>>()
  const serverOf = ({ open }: Subject) => {
    const server = servers.get(open) ?? open(serverUrl)
    servers.set(open, server)
    return server
  }
  const current = new AsyncLocalStorage<string[]>()
  const strays: string[] = []
  const onStray = (error: unknown) => (current.getStore() ?? strays).push(describe(error))
  process.on('uncaughtException', onStray)
  process.on('unhandledRejection', onStray)
  return {
    run(subject) {
      const uncaught: string[] = []
      return current.run(uncaught, async () =>
        perform(subject, await serverOf(subject.subject), `run${++runs}`, uncaught),
      )
    },
    async close() {
      await sleep(50) // what the last connections have to say
      for (const server of servers.values()) await (await server).close()
      process.off('uncaughtException', onStray)
      process.off('unhandledRejection', onStray)
      return strays
    },
  }
}

async function perform(subject: Case, server: Server, run: string, uncaught: string[]): Promise<Result> {
  const { library, makePool, wire, sizes } = subject.subject
  const { scenario, seed, sabotage = {}, bounds = generous } = subject
  const { hang, recovery } = bounds
  const place = await server.open(run)
  const random = randomOf(seed)
  const size = random.whole(...(sizes as [number, number]))
  const timeouts = { ...shortTimeouts, ...scenario.timeouts }
  const stage = await Stage.open({ library, place, run, random, makePool, size, timeouts, wire, sabotage, recovery })
  const violate = stage.violate.bind(stage)
  try {
    let givenUp = false
    const running = scenario.run(stage).catch((error) => {
      if (!givenUp) violate('wrong error', `the scenario failed: ${describe(error)}`)
    })
    const hangs = !(await settlesWithin(running, hang))
    if (hangs) {
      violate('hang', `the scenario did not end within ${hang} ms`)
      givenUp = true
      stage.giveUp()
    }
    if (!(await settlesWithin(stage.settled(), hang))) violate('hang', `not everything settled within ${hang} ms`)
    if (!scenario.ends && !hangs) await stage.expectFullPool()
    await stage.expectNoTransaction()
    const closing = stage.shutdown().catch((error) => {
      const known = scenario.ends === 'ended by the user' && /more than once|closed state/.test(String(error)) // by the user, and now
      if (!known) violate('wrong error', `shutdown(): ${describe(error)}`)
    })
    if (!(await settlesWithin(closing, recovery))) violate('hang', `shutdown() did not end within ${recovery} ms`)
    await stage.expectNoConnection()
    const acknowledged = await stage.judge()
    await sleep(0)
    for (const text of uncaught) {
      if (!(library.limits.uncaught && lossOfConnection.test(text))) violate('uncaught', text)
    }
    return { case: subject, violations: stage.violations, units: stage.units, acknowledged }
  } finally {
    stage.giveUp()
    for (const proxy of stage.proxies) await proxy.close()
    await place.close()
  }
}
