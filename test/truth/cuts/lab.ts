import { AsyncLocalStorage } from 'node:async_hooks'
import { type Fate, startProxy } from '../../support/proxy.ts'
import type { Library } from '../libraries.ts'
import { settlesWithin, sleep } from '../waiting.ts'
import type { Mutate } from './mutants.ts'
import type { Server } from './server.ts'
import { describe, Stage, type Violation } from './stage.ts'
import type { Unit } from './units.ts'
import { type Boundary, sameInEveryRun, WireLog } from './wire-log.ts'

export const fates = ['reset', 'end', 'short stall', 'long stall'] as const
export const sides = ['before', 'after'] as const

/** Shorter than every timeout, and longer. */
const stalls = { 'short stall': 100, 'long stall': 1000 }
/** In which a unit of work must have settled, whatever happens to its connection. */
const hangBound = 8000
/** Where a hang is declared, it is not waited for. */
const declaredHangBound = 3000
/** In which the pool must be whole again. */
const recoveryBound = 1000

/** What a driver throws where nobody listens. */
const lossOfConnection = /ECONNRESET|EPIPE|Connection terminated unexpectedly/

/** One cut: where, on which side of the message, and how. */
export interface Cut {
  readonly boundary: Boundary
  readonly when: (typeof sides)[number]
  readonly fate: (typeof fates)[number]
}

export interface Case {
  readonly library: Library
  readonly unit: Unit
  /** Absent: the unit runs undisturbed. */
  readonly cut?: Cut
  readonly mutate?: Mutate
}

export interface Result {
  readonly id: string
  readonly library: string
  readonly unit: string
  readonly violations: Violation[]
  /** What would be violations, if the documentation of the adapter did not declare them. */
  readonly declared: Violation[]
  /** Errors that said that the outcome is unknown. */
  readonly unknowns: number
  /** How many of them were found out. */
  readonly resolved: number
  readonly summary: string
  readonly boundaries: Boundary[]
}

/** By which a case can be run alone. */
export function idOf({ library, unit, cut }: Case): string {
  if (!cut) return `${library.name}/${unit.name}`
  const { boundary, when, fate } = cut
  return `${library.name}/${unit.name}/${when}/${fate}/${boundary.occurrence}/${boundary.label}`
}

/** Databases with marker rows, and a connection to each that no code under test knows of. */
export interface Lab {
  run(subject: Case): Promise<Result>
  close(): Promise<void>
}

export async function openLab(server: Server, serverUrl: string): Promise<Lab> {
  const place = await server.open(serverUrl)
  let runs = 0
  const current = new AsyncLocalStorage<string[]>()
  const strays: string[] = []
  const onStray = (error: unknown) => (current.getStore() ?? strays).push(describe(error))
  process.on('uncaughtException', onStray)
  process.on('unhandledRejection', onStray)

  async function perform(subject: Case, uncaught: string[]): Promise<Result> {
    const { library, unit, cut, mutate = (adapter) => adapter } = subject
    const run = `run${++runs}`
    const proxy = await startProxy(place.url, { record: false })
    const log = new WireLog(proxy)
    const { trap, over } = setTrap(proxy, cut)
    const lenience = cut?.fate.endsWith('stall') ? 50 : 0
    const stage = new Stage({ library, server, place, run, proxy, log, pool: unit.pool ?? {}, mutate, lenience })
    const violations: Violation[] = stage.violations
    const violate = (kind: Violation['kind'], text: string) => violations.push({ kind, text })

    const work = unit.run(stage).catch(() => {}) // what was said is in the claims
    const mayHang = library.limits.streams && unit.streams
    const bound = mayHang ? declaredHangBound : hangBound
    const settled = await settlesWithin(work, bound)
    if (!settled) violate('hang', `not settled within ${bound} ms`)
    else if (!(await settlesWithin(stage.reported(), hangBound))) violate('hang', 'something of it has not settled')
    const boundaries = log.boundaries()
    stage.settled()
    trap?.remove()
    if (cut && trap?.count === 0) violate('unreached', 'the message never came')
    await over()

    const restored = performance.now()
    const busyFor = async () => {
      for (;;) {
        const found = await place.busy(run)
        if (found.length === 0 || performance.now() - restored > recoveryBound) return found
        await sleep(10)
      }
    }
    const open = await busyFor()
    if (open.length > 0) violate('open transaction', open.join('; '))
    for (let attempt = 1; ; attempt++) {
      const failure = await stage.occupy().catch((error) => error ?? new Error('nothing was thrown'))
      if (!failure) break
      if (attempt < 2 || performance.now() - restored < recoveryBound) continue
      violate('lost slot', `pool not full after ${recoveryBound} ms: ${describe(failure)}`)
      break
    }
    await stage.resolve()
    stage.judge(await place.rowsOf(run))

    const closing = stage.shutdown().catch((error) => violate('hang', `shutdown(): ${describe(error)}`))
    const closed = await settlesWithin(closing, 2000)
    if (!closed) violate('hang', 'shutdown() did not end within 2000 ms')
    for (let waited = 0; proxy.open > 0 && waited < 500; waited += 10) await sleep(10)
    if (proxy.open > 0) violate('leaked socket', `${proxy.open} connections are open after shutdown()`)
    await proxy.close()
    await sleep(0)
    for (const text of uncaught) violate('uncaught', text)
    const isDeclared = ({ kind, text }: Violation) =>
      kind === 'uncaught'
        ? library.limits.uncaught && lossOfConnection.test(text)
        : mayHang && (kind === 'hang' || kind === 'lost slot' || kind === 'leaked socket')
    return {
      ...{ id: idOf(subject), library: library.name, unit: unit.name, boundaries },
      violations: violations.filter((each) => !isDeclared(each)),
      declared: violations.filter(isDeclared),
      ...{ unknowns: stage.unknowns, resolved: stage.resolved, summary: stage.summary() },
    }
  }

  return {
    run(subject) {
      const uncaught: string[] = []
      return current.run(uncaught, () => perform(subject, uncaught))
    },
    async close() {
      await place.close()
      await sleep(50) // what the last connections have to say
      process.off('uncaughtException', onStray)
      process.off('unhandledRejection', onStray)
      if (strays.length > 0) throw new Error(`Uncaught, and of no case: ${strays.join('; ')}`)
    },
  }
}

/** Sets the fate of the connection; `over` resolves when a stall has passed. */
function setTrap(proxy: Awaited<ReturnType<typeof startProxy>>, cut: Cut | undefined) {
  if (!cut) return { trap: undefined, over: async () => {} }
  const { boundary, when, fate } = cut
  const stall = fate === 'reset' || fate === 'end' ? 0 : stalls[fate]
  const way: Fate = fate === 'reset' || fate === 'end' ? fate : { stall }
  let count = 0
  const match = ({ label }: { label: string }) =>
    sameInEveryRun(label) === boundary.label && ++count === boundary.occurrence
  const trap = proxy.at(match, way, { when })
  let passed: Promise<unknown> = Promise.resolve()
  void trap.caught.then(() => {
    passed = sleep(stall + 5)
  })
  return { trap, over: () => passed }
}

/** All cuts of a unit whose uncut run had these boundaries. */
export function cutsOf(boundaries: readonly Boundary[]): Cut[] {
  return boundaries.flatMap((boundary) => sides.flatMap((when) => fates.map((fate) => ({ boundary, when, fate }))))
}
