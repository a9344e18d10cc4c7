import {
  type AmbientDatabase,
  type AmbientSession,
  type AtomicOptions,
  type ContextOptions,
  defineDatabase,
  isAmbientError,
  newContext,
  openContext,
} from '../../../src/index.ts'
import { driverError } from '../libraries.ts'
import type { Alarms } from './alarms.ts'
import type { Engine, Ground, Mutate } from './engines.ts'
import type { Act, ContextWays, Limit, Program, Step } from './program.ts'
import type { Prediction } from './rules.ts'

type Main = AmbientDatabase<unknown, unknown>
type Work = () => Promise<void>
/** What has hooks, a handle and an end: the ambient session by its database, or one beside it. */
type Subject = Pick<
  AmbientSession<unknown>,
  'db' | 'begin' | 'commit' | 'rollback' | 'beforeCommit' | 'afterCommit' | 'afterRollback'
>

/** What a program does to the library; a planted fault stands between the two. */
export interface Hands {
  newContext(work: Work, options: ContextOptions): Promise<void>
  atomic(work: Work, options: AtomicOptions): Promise<void>
  statement(db: unknown, sql: string): Promise<unknown>
  hook(subject: Subject, when: 'beforeCommit' | 'afterCommit' | 'afterRollback', hook: Work): void
}

/** A fault that is planted for a run. */
export interface Sabotage {
  readonly mutate?: Mutate
  readonly hands?: (hands: Hands) => Hands
}

/** The database under test, which the programs of a run have in common. */
export interface Scene {
  readonly engine: Engine
  readonly ground: Ground
  readonly alarms: Alarms
  readonly main: Main
  readonly hands: Hands
  /** How long what must happen may take, in ms. */
  readonly patience: number
  /** Who hears of hooks that failed. */
  onHookError: (error: unknown) => void
  close(): Promise<void>
}

/** So that what a fault leaves behind comes to its end; later than it is seen. */
const leftBehind = { acquireTimeout: 2000, blockTimeout: 2000, settleTimeout: 2000 }

export function openScene(engine: Engine, ground: Ground, alarms: Alarms, sabotage?: Sabotage): Scene {
  const adapter = engine.library.adapter(ground.pool)
  const main = defineDatabase({
    name: 'main',
    adapter: sabotage?.mutate?.(adapter) ?? adapter,
    ...(sabotage && leftBehind),
    onHookError: (error) => scene.onHookError(error),
  })
  const honest: Hands = {
    newContext,
    atomic: (work, options) => main.atomic(work, options),
    statement: (db, sql) => engine.library.execute(db, sql, []),
    hook: (subject, when, hook) => subject[when](hook),
  }
  const hands = sabotage?.hands?.(honest) ?? honest
  const patience = sabotage ? 500 : 5000 // the machine may be busy, and a fault that is missed for want of time is run again
  const scene: Scene = { engine, ground, alarms, main, hands, patience, onHookError: () => {}, close: main.shutdown }
  return scene
}

interface Place {
  readonly beside: AmbientSession<unknown> | undefined
  readonly limits: readonly { fire(): void }[]
}

class Boom extends Error {}
class GivenUp extends Error {}

let runs = 0

/** Runs one program, a turn at a time, and notes what the library says and does. */
export class Stage {
  readonly #scene: Scene
  readonly #run = ++runs
  /** What each step ended with: nothing, or an error, which is told later: a library may be behind its driver. */
  readonly #log = new Map<string, { readonly error?: unknown }>()
  readonly #gates = new Map<string, { open(): void; giveUp(): void }>()
  readonly #hooks: string[] = []
  readonly #reported: string[] = []
  /** Errors of the database, by the step that first met them. */
  readonly #origins = new WeakMap<object, string>()
  #givenUp = false
  #rows: ReadonlySet<string> = new Set()
  #raced = false
  #wake = () => {}
  #ended: Promise<void> = Promise.resolve()

  constructor(scene: Scene) {
    this.#scene = scene
    scene.onHookError = (error) => {
      this.#reported.push(this.#describe(error))
      this.#wake()
    }
  }

  start({ body, limit, ...ways }: Program): void {
    this.#ended = this.#logged('n', this.#newContext([], ways, limit, body, 'n'))
  }

  /** Lets the branch at this gate take its step. */
  open(gate: string): void {
    const at = this.#gates.get(gate)
    this.#gates.delete(gate)
    at?.open()
  }

  /**
   * Waits until everything is as `likely` says, or one of `others`, and nothing more is about to happen; resolves with that one, or
   * with what is not as it must be.
   *
   * @param raced whether things have raced, so that other rows may be there though `likely` has no new ones.
   */
  async compare<Predicted extends Prediction>(
    likely: Predicted,
    raced: boolean,
    others: () => Iterable<Predicted>,
  ): Promise<Predicted | string> {
    this.#raced = raced
    const startedAt = performance.now()
    const { patience } = this.#scene
    const right = await this.#fulfilled([likely], startedAt, 20)
    if (typeof right !== 'string') return right
    const ways: Predicted[] = []
    for (const each of others()) {
      const { missing, wrong } = this.#difference(each)
      if (wrong !== undefined || (missing === undefined && (await this.#differenceOfRows(each)))) continue
      ways.push(each)
      if (missing === undefined) break // most likely it is this one
    }
    return ways.length > 0 ? this.#fulfilled(ways, startedAt, patience) : right
  }

  /** Waits until everything is as one of `predictions` says, unless that can't be any more, or `ms` after `startedAt` nothing happens. */
  async #fulfilled<Predicted extends Prediction>(
    predictions: readonly Predicted[],
    startedAt: number,
    ms: number,
  ): Promise<Predicted | string> {
    const { ground } = this.#scene
    let ways = predictions.map((prediction) => ({ prediction, ...this.#difference(prediction) }))
    for (;;) {
      const possible = ways.filter(({ wrong }) => wrong === undefined)
      if (possible.length === 0) return [...new Set(ways.map(({ wrong }) => wrong))].join('\nor ')
      ways = possible
      const right = possible.find(({ missing }) => missing === undefined)?.prediction
      if (right && !ground.busy()) {
        await nextTurn() // what must not happen would begin by now
        const { missing, wrong } = this.#difference(right)
        if (!missing && !wrong && !ground.busy()) {
          const wrongRows = await this.#differenceOfRows(right)
          if (!wrongRows) return right
          if (possible.length === 1) return wrongRows
          ways = possible.filter(({ prediction }) => prediction !== right)
          continue
        }
      } else {
        if (performance.now() - startedAt > ms && !ground.busy()) {
          return possible[0]?.missing ?? 'something is at the database that nobody waits for'
        }
        await this.#change()
      }
      ways = ways.map(({ prediction }) => ({ prediction, ...this.#difference(prediction) }))
    }
  }

  async #differenceOfRows({ rows }: Prediction): Promise<string | undefined> {
    if (this.#raced || rows.size !== this.#rows.size) this.#rows = await this.#scene.ground.rows(this.#run)
    return differenceOf(rows, this.#rows)
  }

  /** Compares the rows that are committed, as another connection sees them. */
  async compareRows({ rows }: Prediction): Promise<string | undefined> {
    return differenceOf(rows, await this.#scene.ground.rows(this.#run))
  }

  /** Lets everybody end who still can. */
  async giveUp(): Promise<void> {
    this.#givenUp = true
    for (const gate of this.#gates.values()) gate.giveUp()
    this.#gates.clear()
    await Promise.race([this.#ended, new Promise((resolve) => setTimeout(resolve, 300).unref())])
  }

  #difference(expected: Prediction): { missing?: string; wrong?: string } {
    for (const [path, end] of this.#log) {
      const said = 'error' in end ? this.#describe(end.error) : 'ok'
      const must = expected.log.get(path)
      if (must !== said) return { wrong: `${path}: ${said}, but must be: ${must ?? 'not at its end'}` }
    }
    const ran = expected.hooks.flat()
    for (const hook of this.#hooks) if (!ran.includes(hook)) return { wrong: `hook ${hook} ran` }
    for (const group of expected.hooks) {
      const order = this.#hooks.filter((hook) => group.includes(hook))
      const wrong = order.some((hook, index) => hook !== group[index])
      if (wrong) return { wrong: `hooks ran in the order ${order}, but must in the order ${group}` }
    }
    for (const gate of this.#gates.keys()) {
      if (!expected.gates.includes(gate)) return { wrong: `${gate} is about to begin, but must not be` }
    }
    for (const gate of expected.gates) if (!this.#gates.has(gate)) return { missing: `${gate} is not about to begin` }
    for (const [path, must] of expected.log) {
      if (!this.#log.has(path)) return { missing: `${path} is not at its end, which must be: ${must}` }
    }
    if (ran.length > this.#hooks.length) return { missing: `hooks that ran: ${this.#hooks}, but must have: ${ran}` }
    const [reported, must] = [this.#reported, expected.reported].map((each) => [...each].sort().join(', '))
    return reported === must ? {} : { missing: `reported of hooks: [${reported}], but must be: [${must}]` }
  }

  #change(): Promise<void> {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, 2)
      this.#wake = () => {
        clearTimeout(timer)
        setImmediate(resolve)
      }
    })
  }

  async #logged(path: string, work: Promise<void>): Promise<void> {
    try {
      await work
      this.#log.set(path, {})
    } catch (error) {
      this.#log.set(path, { error })
    } finally {
      this.#wake()
    }
  }

  async #body(steps: readonly Step[], path: string, at: Place): Promise<void> {
    for (const [index, { act, swallow }] of steps.entries()) {
      const here = `${path}.${index}`
      await this.#gate(here)
      try {
        await this.#act(act, here, at)
        this.#log.set(here, {})
      } catch (error) {
        this.#log.set(here, { error })
        if (!swallow || this.#givenUp) throw error
      } finally {
        this.#wake()
      }
    }
  }

  #gate(path: string): Promise<void> {
    if (this.#givenUp) throw new GivenUp()
    this.#wake()
    return new Promise((resolve, reject) => {
      this.#gates.set(path, { open: resolve, giveUp: () => reject(new GivenUp()) })
    })
  }

  async #act(act: Act, path: string, at: Place): Promise<void> {
    const { main, hands, engine } = this.#scene
    const subject: Subject = at.beside ?? main
    const inside = (body: readonly Step[], more?: { fire(): void }) => {
      return () => this.#body(body, path, more ? { ...at, limits: [...at.limits, more] } : at)
    }
    switch (act.do) {
      case 'write':
        for (let count = 0; count < act.times; count++) {
          await hands.statement(subject.db, `insert into markers values (${this.#run}, '${path}#${count}')`)
        }
        return
      case 'fail':
        try {
          await hands.statement(subject.db, 'select * from missing')
        } catch (error) {
          if (!isAmbientError(error)) this.#origins.set(driverError(error) as object, `database ${path}`)
          throw error
        }
        return
      case 'orphan':
        await hands.statement(subject.db, 'insert into orphans values (1)')
        return
      case 'begin':
        return subject.begin()
      case 'throw':
        throw new Boom(path)
      case 'commit':
        return subject.commit()
      case 'rollback':
        return subject.rollback()
      case 'close':
        return at.beside ? at.beside.close(act.outcome) : main.closeSession(act.outcome)
      case 'atomic': {
        if (at.beside) return at.beside.savepoint(inside(act.body))
        const { limit, options } = this.#limit(act.limit)
        return hands.atomic(inside(act.body, limit), { ...options, current: act.mode })
      }
      case 'native':
        if (engine.nature.native) {
          await engine.library.transaction(subject.db, inside(act.body))
          return
        }
        return (at.beside ?? main.session()).savepoint(inside(act.body))
      case 'savepoint':
        return (at.beside ?? main.session()).savepoint(inside(act.body))
      case 'context':
        return this.#newContext(at.limits, act, act.limit, act.body, path)
      case 'session': {
        const { limit, options } = this.#limit(act.limit)
        const limits = limit ? [...at.limits, limit] : at.limits
        return main.newSession((beside) => this.#body(act.body, path, { beside, limits }), {
          ...options,
          hold: act.hold,
        })
      }
      case 'branches': {
        const branches = act.bodies.map((body, number) => this.#body(body, `${path}.${number}`, at))
        if (act.how === 'all') await Promise.all(branches)
        const settled = Promise.allSettled(branches)
        if (act.how === 'settled') await settled
        return
      }
      case 'hook':
        return hands.hook(subject, act.when, () => {
          this.#hooks.push(path)
          const place = act.when === 'beforeCommit' ? at : { beside: undefined, limits: [] }
          return this.#body(act.body, `${path}!`, place)
        })
      case 'expire':
        at.limits[at.limits.length - 1 - (act.outward % at.limits.length)]?.fire()
    }
  }

  async #newContext(
    limits: Place['limits'],
    { by, unawaited }: ContextWays,
    limited: Limit,
    body: readonly Step[],
    path: string,
  ): Promise<void> {
    const { limit, options } = this.#limit(limited)
    const at = { beside: undefined, limits: limit ? [...limits, limit] : limits }
    const work = () => this.#body(body, path, at)
    if (by === 'newContext') return this.#scene.hands.newContext(work, { ...options, unawaited })
    const context = openContext({ ...options, unawaited })
    try {
      await context.run(work)
    } catch (error) {
      await context.settle('rollback', error)
      throw error
    }
    await context.settle('commit')
  }

  #limit(limit: Limit): { limit?: { fire(): void }; options: ContextOptions } {
    if (limit === undefined) return { options: {} }
    if (limit === 'timeout') {
      const alarm = this.#scene.alarms.set()
      return { limit: alarm, options: { timeout: alarm.timeout } }
    }
    const controller = new AbortController()
    return { limit: { fire: () => controller.abort() }, options: { signal: controller.signal } }
  }

  /** By what a user sees of it, as the model says it. */
  #describe(error: unknown): string {
    if (isAmbientError(error, 'AMBIENT_TRANSACTION_ABORTED')) return `${error.code} < ${this.#describe(error.cause)}`
    if (isAmbientError(error)) return error.code
    if (error instanceof Boom) return `boom ${error.message}`
    if (error instanceof GivenUp) return 'given up'
    const origin = this.#origins.get(driverError(error) as object)
    if (origin) return origin
    const text = String((driverError(error) as Error).message)
    return /foreign key/i.test(text) ? 'database orphan' : text
  }
}

function nextTurn(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve))
}

function differenceOf(expected: ReadonlySet<string>, seen: ReadonlySet<string>): string | undefined {
  const lost = [...expected].filter((row) => !seen.has(row))
  const there = [...seen].filter((row) => !expected.has(row))
  if (lost.length + there.length === 0) return undefined
  return `rows: not there, but must be: [${lost}]; there, but must not be: [${there}]`
}
