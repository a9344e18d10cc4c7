import { EventEmitter } from 'node:events'
import { defineDatabase, newContext } from '../../../src/index.ts'
import type { Library } from '../libraries.ts'
import { settlesWithin, sleep } from '../waiting.ts'
import type { Sabotage } from './faults.ts'
import { disagreement, Ledger } from './ledger.ts'
import type { Place } from './place.ts'
import { type Able, type Program, programOf, textOf } from './program.ts'
import { describe, type Kind, type Scene } from './scene.ts'
import { Unit } from './unit.ts'

const poolSize = 10

/** For the end of what is under way, in ms. */
const longPatience = 120_000

/** A library on a server. */
export interface Subject extends Able {
  readonly name: string
  readonly library: Library
  open(): Promise<Place>
}

export interface Load {
  readonly subject: Subject
  readonly seed: number
  /** No unit is begun once so many statements were issued, or later than that by `performance.now()`. */
  readonly statements: number
  readonly deadline: number
  readonly atOnce: number
  /** This unit alone. */
  readonly unit?: number | undefined
  readonly sabotage?: Sabotage
  /** In which whatever is under way must have come to its end, once no more is begun, in ms. */
  readonly patience?: number
}

export interface Violation {
  readonly kind: Kind
  readonly unit: number
  readonly text: string
}

export interface Outcome {
  readonly violations: readonly Violation[]
  readonly units: number
  readonly committed: number
  readonly rolledBack: number
  readonly unknown: number
  readonly statements: number
  readonly transactions: number
  readonly contexts: number
  readonly refused: number
  readonly rows: number
  readonly seconds: number
}

/** What a driver throws where nobody listens, when a connection is destroyed whose pool is out of reach. */
const lossOfConnection = /ECONNRESET|EPIPE|Connection terminated/

/** Runs units of work, `atOnce` at a time, and judges what is there when all of them have ended. */
export async function run(load: Load): Promise<Outcome> {
  const { subject, sabotage = {}, patience = longPatience } = load
  const { library } = subject
  const startedAt = performance.now()
  const place = await subject.open()
  const violations: Violation[] = []
  const complain = (kind: Kind, unit: number, text: string) => violations.push({ kind, unit, text })
  const adapter = library.adapter(() => place.makePool(poolSize) as never) // each library gets a pool of its driver
  const timeouts = { acquireTimeout: patience, blockTimeout: patience, settleTimeout: patience }
  const scene: Scene = {
    ...{ library, place, sabotage, complain },
    database: defineDatabase({ name: 'main', adapter: sabotage.mutate?.(adapter) ?? adapter, ...timeouts }),
    ledger: new Ledger((unit, text) => complain('foreign transaction', unit, text)),
    bus: new EventEmitter().setMaxListeners(0),
    tokens: { free: 4 },
    counts: { statements: 0, refused: 0, contexts: 0 },
  }
  const onStray = (error: unknown) => {
    const text = describe(error)
    if (!(library.limits.uncaught && lossOfConnection.test(text))) complain('uncaught', 0, text)
  }
  process.on('uncaughtException', onStray)
  process.on('unhandledRejection', onStray)
  try {
    const units = await work(scene, load)
    await ended(units, patience, complain)
    const rows = await judge(scene, units, patience)
    const count = (outcome: Unit['outcome']) => units.filter((unit) => unit.outcome === outcome).length
    return {
      violations,
      units: units.length,
      committed: count('committed'),
      rolledBack: count('rolled back'),
      unknown: count('unknown'),
      ...scene.counts,
      transactions: scene.ledger.transactions,
      rows,
      seconds: Math.round((performance.now() - startedAt) / 1000),
    }
  } finally {
    const closing = scene.database.shutdown().catch((error) => complain('left open', 0, describe(error)))
    if (!(await settlesWithin(closing, patience))) complain('left open', 0, 'shutdown() did not end')
    await sleep(20) // what the last connections have to say
    process.off('uncaughtException', onStray)
    process.off('unhandledRejection', onStray)
    await place.close()
  }
}

/** Units that have not ended when there is no patience left are in the list all the same. */
async function work(scene: Scene, load: Load): Promise<Unit[]> {
  const { subject, seed, statements, deadline, atOnce, unit, patience = longPatience } = load
  const units: Unit[] = []
  const begin = async (number: number) => {
    const one = new Unit(scene, number, programOf(seed, number, subject))
    units.push(one)
    await one.run()
  }
  const wanted = () => scene.counts.statements < statements && performance.now() < deadline
  let working = unit === undefined ? atOnce : 1
  let next = 0
  const worker = async () => {
    if (unit !== undefined) await begin(unit)
    else while (wanted()) await begin(++next)
    working--
  }
  for (let started = working; started > 0; started--) void worker()
  let since = performance.now()
  while (working > 0 && performance.now() - since < patience) {
    await sleep(20)
    if (unit === undefined && wanted()) since = performance.now()
  }
  return units
}

/** Nothing is under way any more. */
async function ended(units: readonly Unit[], patience: number, complain: Scene['complain']): Promise<void> {
  const since = performance.now()
  while (units.some(({ account }) => !account) && performance.now() - since < patience) await sleep(20)
  for (const { account, number } of units) if (!account) complain('hang', number, 'not all of it came to an end')
}

/** Compares what was said with what another connection sees; resolves with the number of rows. */
async function judge(scene: Scene, units: readonly Unit[], patience: number): Promise<number> {
  const { place, complain } = scene
  await fullPool(scene, Math.min(patience, 20_000))
  await noTransaction(scene, Math.min(patience, 5000))
  for (const text of await place.mixed()) complain('foreign transaction', Number(/\d+(?=\.)/.exec(text)?.[0]), text)
  const late = await place.late()
  if (late > 0) complain('late', 0, `${late} late statements came to the server`)
  const held = new Map((await place.held()).map((each) => [each.unit, each]))
  let rows = 0
  for (const { number, account } of units) {
    const { steps = 0n, rows: found = 0 } = held.get(number) ?? {}
    held.delete(number)
    rows += found
    const wrong = account && disagreement(account, steps)
    if (wrong) complain('wrong rows', number, wrong)
    const different = [...steps.toString(2)].filter((bit) => bit === '1').length
    if (different !== found) complain('wrong rows', number, `${found} rows are there for ${different} steps`)
  }
  for (const unit of held.keys()) complain('wrong rows', unit, 'there are rows of a unit that was not begun')
  return rows
}

/** All connections of the pool can be used at the same time. */
async function fullPool({ database, library, place, complain }: Scene, patience: number): Promise<void> {
  let come = 0
  let open = () => {}
  const all = new Promise<void>((resolve) => {
    open = resolve
  })
  const hold = () =>
    newContext(
      async () => {
        await library.execute(database.db, place.sql.read, [])
        if (++come === poolSize) open()
        await all
      },
      { timeout: patience },
    )
  const held = await Promise.allSettled(Array.from({ length: poolSize }, hold))
  const failed = held.find((each) => each.status === 'rejected')
  if (failed)
    complain('lost slot', 0, `${come} of ${poolSize} could be had at the same time: ${describe(failed.reason)}`)
}

/** The server may take a moment to notice that a connection was destroyed. */
async function noTransaction({ place, complain }: Scene, patience: number): Promise<void> {
  const since = performance.now()
  for (;;) {
    const found = await place.open()
    if (found.length === 0) return
    if (performance.now() - since > patience) return complain('open transaction', 0, found.join('; '))
    await sleep(50)
  }
}

/** What the unit is, for whoever looks into a failure. */
export function describeUnit({ subject, seed }: Load, number: number): string {
  const program: Program = programOf(seed, number, subject)
  return `unit ${number}: ${textOf(program)}`
}
