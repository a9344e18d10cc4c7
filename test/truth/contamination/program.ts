import { type Random, randomOf } from '../pools/random.ts'

/** How code comes to run later. */
export type Later = 'timer' | 'immediate' | 'tick' | 'microtask'

export type BlockMode = 'commit' | 'rollback' | 'append' | 'savepoint' | 'join' | 'native'

/** How a stretch of work ends; `'abort'` is by its own signal. */
export type End = 'return' | 'throw' | 'abort'

/** What a unit of work does, one step after the other. */
export type Step =
  | { readonly do: 'write' | 'read' | 'slow' | 'commit' | 'rollback' | 'throw' | 'abort' | 'forget' | 'outer' | 'emit' }
  | { readonly do: 'fail'; readonly swallow: boolean }
  | { readonly do: 'close'; readonly outcome: 'commit' | 'rollback' }
  | { readonly do: 'pause'; readonly later: Later; readonly ms: number }
  | { readonly do: 'callback'; readonly later: Later; readonly ms: number; readonly steps: readonly Step[] }
  | { readonly do: 'float'; readonly steps: readonly Step[] }
  | { readonly do: 'all'; readonly branches: readonly (readonly Step[])[] }
  | { readonly do: 'stream'; readonly stop: number | undefined }
  | { readonly do: 'block'; readonly mode: BlockMode; readonly end: End; readonly steps: readonly Step[] }
  | {
      readonly do: 'context'
      readonly end: End
      readonly detached: boolean
      readonly awaited: boolean
      readonly steps: readonly Step[]
    }
  | { readonly do: 'session'; readonly end: End; readonly hold: boolean; readonly steps: readonly Step[] }
  | { readonly do: 'listen'; readonly bound: boolean }
  | { readonly do: 'leak'; readonly how: Leak }

/** What comes to run once its surroundings have ended, and what it then tries. */
export type Leak = 'promise' | 'timer' | 'listener' | 'atomic' | 'commit' | 'stream' | 'session'

export interface Program {
  readonly opened: 'newContext' | 'openContext'
  readonly autocommit: boolean
  readonly unawaited: 'join' | 'error'
  readonly timeout: number | undefined
  /** It gets a signal. */
  readonly abortable: boolean
  /** After how many ms from the first answer the signal fires. */
  readonly signal: number | undefined
  readonly steps: readonly Step[]
  /** Nothing in it fails, so it must be committed. */
  readonly peaceful: boolean
}

/** What a library can be asked for. */
export interface Able {
  readonly streams: boolean
  /** What runs in a block that is aborted is cancelled; otherwise its connection is destroyed. */
  readonly cancels: boolean
}

/** The program of unit `number`: it follows from these numbers alone. */
export function programOf(seed: number, number: number, able: Able): Program {
  return new Composer(randomOf(Math.imul(seed, 0x9e3779b1) ^ Math.imul(number, 0x85ebca6b)), able).program()
}

/** Where steps are composed. */
interface Where {
  readonly depth: number
  /** Inside of a block, which commits nothing by hand. */
  readonly block: boolean
  /** Beside other branches. */
  readonly beside: 'nothing' | 'plain branches' | 'branches'
  /** What is refused or ends with the unit alone is asked for. */
  readonly session?: true
}

class Composer {
  readonly #random: Random
  readonly #able: Able
  #peaceful = true
  #budget: number

  constructor(random: Random, able: Able) {
    this.#random = random
    this.#able = able
    this.#budget = random.whole(4, 34)
  }

  program(): Program {
    const chance = (percent: number) => this.#chance(percent)
    const autocommit = chance(4)
    const opened = chance(25) ? 'openContext' : 'newContext'
    const abortable = opened === 'newContext' && chance(14)
    const timeout = abortable && chance(50) ? this.#random.pick([1, 5, 20, 100, 400, 1500, 3000]) : undefined
    const signal =
      abortable && timeout === undefined && chance(80) ? this.#random.pick([0, 2, 10, 50, 200, 1000, 3000]) : undefined
    const unawaited = chance(10) ? 'error' : 'join'
    if (abortable || unawaited === 'error') this.#peaceful = false
    const steps = autocommit
      ? this.#plain(this.#random.whole(2, 8))
      : this.#steps(this.#random.whole(2, 9), { depth: 0, block: false, beside: 'nothing' })
    if (abortable && timeout === undefined && chance(40)) steps.splice(this.#at(steps), 0, { do: 'abort' })
    if (chance(15)) steps.splice(this.#at(steps), 0, { do: 'leak', how: this.#leak() })
    if (chance(12)) steps.push({ do: 'forget' })
    if (chance(9)) {
      steps.push({ do: 'throw' })
      this.#peaceful = false
    }
    return {
      opened,
      autocommit,
      unawaited,
      timeout,
      abortable: abortable && timeout === undefined,
      signal,
      steps,
      peaceful: this.#peaceful,
    }
  }

  #chance(percent: number): boolean {
    return this.#random.whole(1, 100) <= percent
  }

  #at(steps: readonly unknown[]): number {
    return this.#random.whole(0, steps.length)
  }

  #leak(): Leak {
    return this.#random.pick(['promise', 'timer', 'listener', 'atomic', 'commit', 'stream', 'session'])
  }

  #end(): End {
    return this.#random.pick(['return', 'return', 'return', 'return', 'throw', 'abort'])
  }

  #later(): { later: Later; ms: number } {
    return {
      later: this.#random.pick(['timer', 'immediate', 'immediate', 'tick', 'microtask', 'microtask']),
      ms: this.#random.whole(0, 3),
    }
  }

  #steps(count: number, where: Where): Step[] {
    const steps: Step[] = []
    for (let left = count; left > 0 && this.#budget > 0; left--) steps.push(...this.#step(where))
    return steps
  }

  /** Statements and pauses alone. */
  #plain(count: number): Step[] {
    return Array.from({ length: count }, (): Step => {
      this.#budget--
      const kind = this.#random.whole(1, 10)
      if (kind <= 6) return { do: 'write' }
      if (kind <= 8) return { do: 'read' }
      return { do: 'pause', ...this.#later() }
    })
  }

  /** What is composed here is kept small: blocks nest, and each holds its connection for as long as it takes. */
  #step(where: Where): Step[] {
    this.#budget--
    const kind = this.#random.whole(1, 100)
    const inner = { ...where, depth: where.depth + 1 }
    const deep = where.depth >= 3
    if (kind <= 30) return [{ do: 'write' }]
    if (kind <= 38) return [{ do: 'read' }]
    if (kind <= 43) return [{ do: 'pause', ...this.#later() }]
    if (kind <= 46 || deep) return this.#plain(2)
    if (kind <= 50) return [{ do: 'callback', ...this.#later(), steps: this.#steps(this.#random.whole(1, 2), inner) }]
    if (kind <= 53) return [{ do: 'float', steps: this.#plain(this.#random.whole(1, 3)) }]
    if (kind <= 55) return [{ do: 'listen', bound: this.#chance(50) }]
    if (kind <= 57) return [{ do: 'emit' }]
    if (kind <= 66) return [this.#all(where)]
    if (kind <= 82) return this.#block(where)
    if (kind <= 84) return [{ do: 'leak', how: where.block ? 'promise' : this.#leak() }]
    if (kind <= 86) return [{ do: 'slow' }]
    if (kind <= 88) return this.#failing()
    if (kind <= 92) return this.#stream(where)
    if (kind <= 96) return this.#beside(where)
    return this.#byHand(where)
  }

  #all(where: Where): Step {
    const beside = where.beside === 'plain branches' || this.#chance(40) ? 'plain branches' : 'branches'
    const branch = () =>
      beside === 'plain branches'
        ? this.#plain(this.#random.whole(1, 3))
        : this.#steps(this.#random.whole(1, 3), { ...where, depth: where.depth + 1, beside })
    return { do: 'all', branches: Array.from({ length: this.#random.whole(2, 4) }, branch) }
  }

  #block(where: Where): Step[] {
    const nested: readonly BlockMode[] = ['savepoint', 'savepoint', 'join', ...this.#native(where)]
    const free: readonly BlockMode[] = ['commit', 'commit', 'commit', 'append', 'rollback', ...nested]
    const some: readonly BlockMode[] = where.session ? ['savepoint'] : where.block ? nested : free
    const mode = this.#random.pick(some)
    // A throw in what joined, or a native transaction, has no signal of its own.
    let end = this.#end()
    if (end === 'abort' && (mode === 'native' || where.session)) end = 'throw'
    if ((mode === 'join' && end !== 'return') || (end === 'abort' && !this.#able.cancels)) this.#peaceful = false
    const inside: Where = { ...where, depth: where.depth + 1, block: true, beside: 'nothing' }
    const steps = this.#steps(this.#random.whole(1, 4), inside)
    const before: Step[] = mode === 'savepoint' || mode === 'native' ? [{ do: 'write' }] : []
    return [...before, { do: 'block', mode, end, steps }]
  }

  /** While one is open that can't be told from others' work, those are refused. */
  #native({ beside }: Where): BlockMode[] {
    return beside === 'nothing' ? ['native'] : []
  }

  #failing(): Step[] {
    this.#peaceful = false
    return [{ do: 'fail', swallow: this.#chance(60) }]
  }

  #stream({ beside }: Where): Step[] {
    if (!this.#able.streams || beside !== 'nothing') return this.#plain(2)
    const stream: Step = { do: 'stream', stop: this.#chance(30) ? this.#random.whole(1, 30) : undefined }
    if (!this.#chance(20)) return [stream]
    this.#peaceful = false // the branches beside it are refused
    return [{ do: 'all', branches: [[stream], this.#plain(2)] }]
  }

  /** A context or session of its own beside what surrounds it. */
  #beside(where: Where): Step[] {
    if (where.session || where.depth > 1) return this.#plain(2)
    const before: Step[] = where.block || where.beside !== 'nothing' ? [] : [{ do: 'commit' }]
    const end = this.#end()
    const inner: Where = { depth: where.depth + 1, block: false, beside: 'nothing' }
    if (this.#chance(35)) {
      const steps = this.#steps(this.#random.whole(1, 4), { ...inner, depth: 2, session: true })
      steps.splice(this.#at(steps), 0, { do: 'outer' })
      if (this.#chance(50)) steps.splice(this.#at(steps), 0, { do: this.#random.pick(['commit', 'rollback'] as const) })
      return [...before, { do: 'session', end, hold: this.#chance(4), steps }]
    }
    const context = (): Step => ({
      ...{ do: 'context', end: this.#end(), detached: this.#chance(30), awaited: this.#chance(75) },
      steps: this.#steps(this.#random.whole(1, 4), inner),
    })
    return this.#chance(30) ? [...before, { do: 'all', branches: [[context()], [context()]] }] : [...before, context()]
  }

  #byHand(where: Where): Step[] {
    if (where.block) return this.#plain(2)
    const act = this.#random.pick(['commit', 'commit', 'rollback', 'close'] as const)
    if (act !== 'close') return [{ do: act }]
    if (where.beside !== 'nothing' || where.session) return [{ do: 'commit' }]
    this.#peaceful = false // a branch that nobody awaits may be refused
    return [{ do: 'close', outcome: this.#random.pick(['commit', 'rollback']) }]
  }
}

/** A program as one line of text. */
export function textOf({ steps, ...options }: Program): string {
  const said = Object.entries(options).filter(([, value]) => value !== undefined && value !== false)
  return `${said.map(([name, value]) => `${name}=${value}`).join(' ')}: ${listOf(steps)}`
}

function listOf(steps: readonly Step[]): string {
  return steps.map(textOfStep).join(', ')
}

function textOfStep(step: Step): string {
  const { do: what, ...more } = step
  const options = Object.entries(more)
    .filter(([, value]) => value !== undefined && value !== false && typeof value !== 'object')
    .map(([name, value]) => (value === true ? name : String(value)))
  const name = [what, ...options].join(' ')
  if ('branches' in step) return `${name} [${step.branches.map(listOf).join(' | ')}]`
  return 'steps' in step ? `${name} {${listOf(step.steps)}}` : name
}
