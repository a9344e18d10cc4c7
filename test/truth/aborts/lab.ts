import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { type ContextEvent, detach, type SessionEvent, type TransactionEvent } from '../../../src/index.ts'
import type { Mutate } from '../cuts/mutants.ts'
import { postgres } from '../cuts/postgres.ts'
import { describe } from '../cuts/stage.ts'
import type { Library } from '../libraries.ts'
import { settlesWithin, sleep } from '../waiting.ts'
import { takeClock } from './clock.ts'
import { Course, followPromises, type Point } from './course.ts'
import { openFront } from './front.ts'
import type { Piece } from './piece.ts'
import { AbortStage, type Finding, kindOf, type Run, type Way } from './stage.ts'
import type { AbortUnit } from './units.ts'
import { Wire } from './wire.ts'
import { openWitness } from './witness.ts'

/** After which nothing of what was aborted may be left. */
const bound = 100
/** In which a unit of work must have settled, whatever happens. */
const hangBound = 8000

/** Long enough for a busy machine: nothing is stalled here. */
const timeouts = { acquireTimeout: 2000, settleTimeout: 2000, blockTimeout: 4000 }

/** What a driver throws where nobody listens. */
const lossOfConnection = /ECONNRESET|EPIPE|Connection terminated/

export interface Case {
  readonly library: Library
  readonly unit: AbortUnit
  readonly way: Way
  /** Absent: the unit runs undisturbed. */
  readonly point?: Point
  readonly mutate?: Mutate
  /** A planted fault: the promise alone is aborted. */
  readonly onlyRejects?: true
}

export interface Result {
  readonly id: string
  readonly findings: readonly Finding[]
  /** What would be found, if the documentation of the adapter did not declare it. */
  readonly declared: readonly Finding[]
  readonly summary: string
  readonly points: readonly Point[]
}

/** By which a case can be run alone. */
function idOf({ library, unit, way, point }: Case): string {
  const where = point ? `/${point.awaits}/${point.occurrence}/${point.label}` : ''
  return `${library.name}/${way}/${unit.name}${where}`
}

/** Databases with marker rows, and connections to them that no code under test knows of. */
export interface Lab {
  run(subject: Case): Promise<Result>
  close(): Promise<void>
}

export async function openLab(serverUrl: string): Promise<Lab> {
  const witness = await openWitness(serverUrl)
  const { places, stop } = followPromises<Run, Piece>()
  const clock = takeClock(places)
  const strays: string[] = []
  const onStray = (error: unknown) => (places.getStore()?.run.uncaught ?? strays).push(describe(error))
  process.on('uncaughtException', onStray)
  process.on('unhandledRejection', onStray)
  const contexts = new Map<number, Run>()
  const onContext = (message: unknown) => {
    const event = message as ContextEvent
    const place = places.getStore()
    if (place && event.type === 'opened') contexts.set(event.contextId, place.run)
    const run = contexts.get(event.contextId) // the end of a socket is of no run
    run?.heard(event, place?.piece)
    run?.course.mark(`context ${event.type}`)
    if (event.type !== 'opened') contexts.delete(event.contextId)
  }
  const onStep = (message: unknown) => {
    const { type } = message as SessionEvent | TransactionEvent
    places.getStore()?.run.course.mark(type)
  }
  subscribe('ambient-db:context', onContext)
  subscribe('ambient-db:session', onStep)
  subscribe('ambient-db:transaction', onStep)

  let runs = 0

  async function perform(subject: Case): Promise<Result> {
    const { library, unit, way, point, mutate = (adapter) => adapter } = subject
    const number = ++runs
    const run = `abort${number}`
    const uncaught: string[] = []
    const findings: Finding[] = []
    const find = (kind: Finding['kind'], text: string) => findings.push({ kind, text })
    let borrowers: Promise<void> | undefined
    const course = new Course(point, () => {
      try {
        inside(() => stage.abort())
      } catch (error) {
        uncaught.push(describe(error))
      }
      setImmediate(() => {
        borrowers = inside(() => stage.borrow())
      })
    })
    const at: Run = { course, uncaught, heard: (event, piece) => stage.heard(event, piece) }
    const inside = <Value>(act: () => Value): Value => detach(() => places.run({ run: at }, act))
    const wire = new Wire({
      passed: (label) => course.mark(label),
      written: () => stage.written(),
      outOfStep: (sql) => find('out of step', `sent before the last answer came: ${sql}`),
      piece: () => places.getStore()?.piece,
    })
    const lock = witness.lockFor(number, () => stage.aborted)
    const framework = way === 'node-http' || way === 'express' ? way : undefined
    const front = framework && (await inside(() => openFront(framework)))
    const stage: AbortStage = new AbortStage({
      ...{ library, run, way, at, places, wire, front, mutate, wait: lock.wait, lenience: 0 },
      onlyRejects: subject.onlyRejects === true,
      deadlines: { timeout: clock.timeout, reach: (each) => clock.reach(at, each) },
      ...{ server: postgres, place: witness.place, proxy: { url: witness.place.url } },
      log: {
        socketFor: () => wire.socket,
        tap: () => () => () => {},
        unanswered: () => ({ commits: 0, begins: 0 }), // nothing is cut, so all is answered
      },
      pool: { ...unit.pool, ...wire.poolOptions },
      database: { ...timeouts, ...unit.database },
    })

    const work = inside(() => unit.run(stage)).catch(() => {}) // what was said is in the claims
    const settled = settlesWithin(work, hangBound)
    // A block leaves its context alone, so that is looked at when it has ended.
    const since = kindOf(way) === 'block' ? settled : Promise.race([stage.gone, settled])
    const left = since.then(async () => {
      await sleep(point ? bound : 0)
      for (let waited = 0; !stage.quiet && waited < 3000; waited += 5) await sleep(5)
      return witness.busy(run)
    })
    if (!(await settled)) find('hang', `not settled within ${hangBound} ms`)
    const points = framework ? course.events() : course.points()
    if (point && !course.reached) find('unreached', 'the place was not come to')
    findings.push(...(await left))
    if (borrowers && !(await settlesWithin(borrowers, timeouts.acquireTimeout * 2))) find('hang', 'the next borrowers')
    lock.release()
    for (let waited = 0; waited < 3000 && (await witness.busy(run)).length > 0; waited += 20) await sleep(20)
    if (!(await settlesWithin(stage.reported(), 3000))) find('hang', 'something of it has not settled')
    const failure = await inside(() => stage.occupy()).then(
      () => undefined,
      (error) => error ?? new Error('nothing was thrown'),
    )
    if (failure) find('lost slot', `the pool is not full: ${describe(failure)}`)
    stage.settled()
    stage.judge(await witness.place.rowsOf(run))
    const closing = inside(() => stage.shutdown()).catch((error) => find('hang', `shutdown(): ${describe(error)}`))
    if (!(await settlesWithin(closing, 3000))) find('hang', 'shutdown() did not end within 3000 ms')
    for (let waited = 0; wire.sockets > 0 && waited < 500; waited += 10) await sleep(10)
    if (wire.sockets > 0) find('leaked socket', `${wire.sockets} connections are open after shutdown()`)
    await front?.close()
    await sleep(0)
    for (const text of uncaught) find('uncaught', text)
    wire.destroy()
    findings.push(...stage.findings, ...stage.violations)
    const isDeclared = ({ kind, text }: Finding) =>
      (kind === 'uncaught' && library.limits.uncaught && lossOfConnection.test(text)) ||
      (kind === 'still running' && library.limits.cancelling && unit.long)
    return {
      ...{ id: idOf(subject), summary: stage.summary(), points },
      findings: findings.filter((each) => !isDeclared(each)),
      declared: findings.filter(isDeclared),
    }
  }

  return {
    run: perform,
    async close() {
      await witness.close()
      await sleep(50) // what the last connections have to say
      stop()
      clock.giveBack()
      unsubscribe('ambient-db:context', onContext)
      unsubscribe('ambient-db:session', onStep)
      unsubscribe('ambient-db:transaction', onStep)
      process.off('uncaughtException', onStray)
      process.off('unhandledRejection', onStray)
      if (strays.length > 0) throw new Error(`Uncaught, and of no case: ${strays.join('; ')}`)
    },
  }
}
