import { AsyncLocalStorage, AsyncResource } from 'node:async_hooks'
import { EventEmitter } from 'node:events'
import {
  type AmbientContext,
  type AmbientSession,
  detach,
  isAmbientError,
  newContext,
  openContext,
} from '../../../src/index.ts'
import { driverError } from '../libraries.ts'
import { type Account, accountOf, type Entry, Part } from './ledger.ts'
import type { End, Leak, Program, Step } from './program.ts'
import {
  describe,
  Extent,
  type Frame,
  fateBy,
  type Kind,
  type Line,
  lateCodes,
  later,
  mostSteps,
  rowOf,
  type Scene,
  Thrown,
} from './scene.ts'

export class Unit {
  readonly number: number
  outcome: 'committed' | 'rolled back' | 'unknown' | undefined
  account: Account | undefined
  readonly #scene: Scene
  /** Forgotten in the end, as are the entries: there are many units. */
  #program: Program | undefined
  #entries: Entry[] = []
  #steps = 0
  #parts = 0
  #underWay = 0
  /** Connections of its own that it waits for. */
  #nesting = 0
  #abort: AbortController | undefined
  #firstAnswer: (() => void) | undefined

  constructor(scene: Scene, number: number, program: Program) {
    this.#scene = scene
    this.number = number
    this.#program = program
  }

  /** Resolves when its context has settled. */
  run(): Promise<void> {
    return this.#track(() => this.#run()).catch((error) => {
      this.#complain('wrong error', `the harness itself failed: ${describe(error)}`)
    })
  }

  async #run(): Promise<void> {
    const { opened, autocommit, unawaited, timeout, abortable, signal, steps, peaceful } = this.#program as Program // it has not begun
    const line = this.#line(autocommit)
    const frame: Frame = { line, extent: line.extent }
    if (abortable) this.#abort = new AbortController()
    if (signal !== undefined) this.#firstAnswer = () => setTimeout(() => this.#abort?.abort(), signal)
    const within = this.#scene.sabotage.within ?? ((_: number, run: () => Promise<void>) => run())
    const work = () => within(this.number, () => this.#perform(steps, frame))
    const options = {
      unawaited,
      ...(autocommit && { transaction: 'autocommit' as const }),
      ...(this.#abort && { signal: this.#abort.signal }),
      ...(timeout !== undefined && { timeout }),
    }
    await this.#context(
      frame,
      opened === 'newContext' ? newContext(work, options) : this.#openContext(work, options, frame),
    ).then(
      () => {
        this.outcome = 'committed'
      },
      (error) => {
        this.outcome = isAmbientError(error) && error.outcome === 'unknown' ? 'unknown' : 'rolled back'
        this.#expected(error)
        if (peaceful) this.#complain('not served', `nothing in it fails: ${describe(error)}`)
      },
    )
  }

  async #openContext(work: () => Promise<void>, options: object, frame: Frame): Promise<void> {
    const context: AmbientContext = openContext(options)
    const emitter = context.bind(new EventEmitter())
    emitter.once('late', () => void this.#late(frame, 'promise'))
    frame.extent.ended.then(
      () => emitter.emit('late'),
      () => {},
    )
    try {
      await context.run(work)
    } catch (error) {
      await context.settle('rollback', error)
      throw error
    }
    await context.settle('commit')
  }

  // What is believed

  #line(autocommit = false): Line {
    const extent = new Extent()
    return { current: this.#part(extent), extent, autocommit }
  }

  #part(extent: Extent, outer?: Part): Part {
    return new Part(this.number, outer ? outer.root.number : ++this.#parts, extent, outer)
  }

  /** The transaction that is open comes to its end, and what is issued from now on belongs to the next. */
  #next(line: Line): Part {
    const { current } = line
    line.current = this.#part(line.extent)
    return current
  }

  /** Counts what is under way, from before it begins; when nothing is, the unit is accounted for. */
  #track<Result>(begin: () => Promise<Result>): Promise<Result> {
    this.#underWay++
    const promise = begin()
    const over = () => {
      if (--this.#underWay > 0 || this.account) return
      this.account = accountOf(this.#entries)
      this.#entries = []
      this.#program = undefined
      this.#abort = undefined
    }
    promise.then(over, over)
    return promise
  }

  /** What runs in a context, or a session, of its own. */
  async #context(frame: Frame, running: Promise<void>): Promise<void> {
    this.#scene.counts.contexts++
    try {
      await running
      frame.line.current.tell('kept')
    } catch (error) {
      frame.line.current.tell(fateBy(error))
      throw error
    } finally {
      frame.extent.end()
    }
  }

  // Steps

  async #perform(steps: readonly Step[], frame: Frame): Promise<void> {
    for (const step of steps) await this.#step(step, frame)
  }

  #step(step: Step, frame: Frame): Promise<unknown> | undefined {
    switch (step.do) {
      case 'write':
        return this.#write(frame)
      case 'read':
        return this.#read(frame, this.#scene.place.sql.read)
      case 'slow':
        return this.#read(frame, this.#scene.place.sql.slow)
      case 'fail':
        return this.#fail(frame, step.swallow)
      case 'outer':
        return frame.outer && this.#write(frame.outer)
      case 'forget':
        return void this.#forget(frame)
      case 'throw':
        throw new Thrown('thrown')
      case 'abort':
        return void this.#abort?.abort()
      case 'pause':
        return new Promise<void>((resolve) => later(step.later, step.ms, resolve))
      case 'callback':
        return new Promise((resolve, reject) =>
          later(step.later, step.ms, () => this.#track(() => this.#perform(step.steps, frame)).then(resolve, reject)),
        )
      case 'float':
        return void this.#float(() => this.#perform(step.steps, frame))
      case 'all':
        return Promise.all(step.branches.map((branch) => this.#track(() => this.#perform(branch, frame))))
      case 'stream':
        return this.#stream(frame, step.stop)
      case 'block':
        return step.mode === 'native' ? this.#native(frame, step.end, step.steps) : this.#block(frame, step)
      case 'context':
        return this.#nested(frame, step.awaited, () => this.#newContext(frame, step))
      case 'session':
        return this.#nested(
          frame,
          true,
          () => this.#newSession(frame, step),
          step.steps.some((each) => each.do === 'outer'),
        )
      case 'commit':
      case 'rollback':
        return this.#byHand(frame, step.do, step.do)
      case 'close':
        return this.#byHand(frame, 'close', step.outcome)
      case 'listen':
        return void this.#listen(frame, step.bound)
      case 'emit':
        return void this.#scene.bus.emit(`channel ${this.number % 8}`, (write: (frame: Frame, unit: Unit) => void) =>
          write(frame, this),
        )
      case 'leak':
        return void this.#leak(frame, step.how)
    }
  }

  // Statements

  #execute(frame: Frame, sql: string, parameters: readonly number[] = []): Promise<unknown> {
    const { library, database, counts, sabotage } = this.#scene
    const { line } = frame
    counts.statements++
    const texts = parameters.map(String)
    const run = () =>
      frame.execute ? frame.execute(sql, texts) : library.execute(line.session?.db ?? database.db, sql, texts)
    return sabotage.joinsBlocks && !frame.part && line.inside ? line.inside(run) : run()
  }

  /** Where a statement belongs that is issued now. */
  #issued({ line, part }: Frame): Part {
    const own = part ?? (line.autocommit ? this.#part(line.extent) : line.current)
    own.root.issued++
    return own
  }

  #answered(part: Part, result: unknown): void {
    const { xid, pid } = rowOf(result)
    this.#scene.ledger.answered(part, this.#scene.place.xids ? Number(xid) : undefined, Number(pid))
    if (part !== part.root) part.root.answered++
    this.#firstAnswer?.()
    this.#firstAnswer = undefined
  }

  #write(frame: Frame): Promise<unknown> {
    if (frame.extent.late) return this.#late(frame, 'promise').then(() => Promise.reject(new Thrown('late')))
    if (this.#steps >= mostSteps) return this.#read(frame, this.#scene.place.sql.read)
    const part = this.#issued(frame)
    const entry: Entry = { step: this.#steps++, part, ok: false }
    this.#entries.push(entry)
    const running = this.#execute(frame, this.#scene.place.sql.write, [this.number, entry.step, part.root.number])
    return this.#track(() =>
      this.#alone(frame, part, running).then((result) => {
        entry.ok = true
        this.#answered(part, result)
      }),
    )
  }

  #read(frame: Frame, sql: string): Promise<unknown> {
    if (frame.extent.late) return this.#late(frame, 'promise').then(() => Promise.reject(new Thrown('late')))
    const part = this.#issued(frame)
    return this.#track(() =>
      this.#alone(frame, part, this.#execute(frame, sql)).then((result) => this.#answered(part, result)),
    )
  }

  /** A statement without a transaction is one by itself. */
  async #alone({ line, part: block }: Frame, part: Part, running: Promise<unknown>): Promise<unknown> {
    if (block || !line.autocommit) return running
    try {
      const result = await running
      part.tell('kept')
      return result
    } catch (error) {
      part.tell('undone')
      throw error
    }
  }

  async #fail(frame: Frame, swallow: boolean): Promise<void> {
    if (frame.extent.late) return
    this.#issued(frame)
    try {
      await this.#track(() => this.#execute(frame, this.#scene.place.sql.fail))
      this.#complain('wrong error', 'a statement that fails did not')
    } catch (error) {
      this.#expected(error)
      if (!swallow) throw error
    }
  }

  /** A write that nobody ever asks for. */
  #forget(frame: Frame): void {
    if (frame.extent.late || this.#steps >= mostSteps) return
    const part = this.#issued(frame)
    if (frame.line.autocommit) part.tell('unknown')
    const entry: Entry = { step: this.#steps++, part, ok: undefined }
    this.#entries.push(entry)
    const running = this.#execute(frame, this.#scene.place.sql.write, [this.number, entry.step, part.root.number])
    if (!this.#program?.peaceful) running.catch(() => {}) // it may be refused before anybody could answer for it
  }

  #float(begin: () => Promise<unknown>): void {
    this.#track(begin).catch((error) => this.#expected(error))
  }

  async #stream(frame: Frame, stop = Number.POSITIVE_INFINITY): Promise<void> {
    if (frame.extent.late || frame.line.session) return
    const part = this.#issued(frame)
    this.#scene.counts.statements++
    await this.#track(() => this.#readAll(part, stop))
  }

  async #readAll(part: Part, stop: number): Promise<void> {
    const { library, database, ledger, place } = this.#scene
    let count = 0
    for await (const row of library.stream(database.db)) {
      const id = Number((row as { n: unknown }).n) // the view tells it in each row
      ledger.answered(part, place.xids ? id : undefined, place.xids ? undefined : id)
      if (++count >= stop) break
    }
  }

  // Blocks

  async #block(frame: Frame, { mode, end, steps }: { mode: string; end: End; steps: readonly Step[] }): Promise<void> {
    if (frame.extent.late) return this.#late(frame, 'atomic').then(() => Promise.reject(new Thrown('late')))
    const { line } = frame
    const { current } = line
    // With nothing open a savepoint is a transaction. Whether anything will be is not known before an answer.
    if (mode === 'savepoint' && !frame.part && current.issued > 0 && current.answered === 0) {
      return void (await this.#write(frame))
    }
    const nested = frame.part !== undefined || (mode === 'savepoint' && current.answered > 0)
    const joins = mode === 'join'
    if (joins) current.issued++ // it begins what is not open, and leaves it open
    const before = nested || joins || mode === 'append' ? undefined : this.#next(line)
    const part = this.#partOf(frame, mode, nested)
    const inner: Frame = { line, part, extent: new Extent(frame.extent) }
    let started = false
    const abort = end === 'abort' ? new AbortController() : undefined
    const work = async () => {
      started = true
      before?.tell(mode === 'rollback' ? 'undone' : 'kept')
      if (this.#scene.sabotage.joinsBlocks && !frame.part) line.inside = AsyncLocalStorage.snapshot()
      try {
        await this.#perform(steps, inner)
        if (end === 'throw') throw new Thrown('thrown')
        abort?.abort()
      } finally {
        line.inside = undefined
      }
    }
    try {
      await this.#track(() =>
        line.session
          ? line.session.savepoint(work)
          : this.#scene.database.atomic(work, { current: mode as 'commit', ...(abort && { signal: abort.signal }) }),
      )
      if (!joins) part.tell('kept')
    } catch (error) {
      this.#expected(error)
      if (!joins) part.tell(fateBy(error))
      if (!started)
        before?.tell(mode === 'rollback' || isAmbientError(error, 'AMBIENT_TRANSACTION_ABORTED') ? 'undone' : 'unknown')
      if (
        error instanceof Thrown ||
        (end === 'abort' && isAmbientError(error, 'AMBIENT_ABORTED') && !this.#abort?.signal.aborted)
      )
        return
      throw error
    } finally {
      inner.extent.end()
    }
  }

  #partOf({ line, part }: Frame, mode: string, nested: boolean): Part {
    const around = part ?? line.current
    if (mode === 'join') return around
    if (mode === 'append') return this.#next(line)
    return this.#part(line.extent, nested ? around : undefined)
  }

  /** A transaction of the library's own is a savepoint. */
  async #native(frame: Frame, end: End, steps: readonly Step[]): Promise<void> {
    if (frame.extent.late || frame.line.session) return
    const part = this.#part(frame.line.extent, frame.part ?? frame.line.current)
    const work = async (execute: (sql: string, parameters?: unknown[]) => Promise<unknown>) => {
      const inner: Frame = { line: frame.line, part, extent: frame.extent, execute }
      for (const step of steps) if (step.do === 'write' || step.do === 'read') await this.#step(step, inner)
      if (end === 'throw') throw new Thrown('thrown')
    }
    try {
      await this.#track(() => this.#scene.library.transaction(this.#scene.database.db, work))
      part.tell('kept')
    } catch (error) {
      part.tell(fateBy(error))
      if (!(error instanceof Thrown)) throw error
    }
  }

  async #byHand(
    { line, part, extent }: Frame,
    act: 'commit' | 'rollback' | 'close',
    outcome: 'commit' | 'rollback',
  ): Promise<void> {
    if (part || extent.late) return
    const { database } = this.#scene
    const ending = this.#next(line)
    const subject = line.session ?? database
    const acting = act === 'close' ? database.closeSession(outcome) : subject[act]()
    try {
      await this.#track(() => acting)
      ending.tell(outcome === 'commit' ? 'kept' : 'undone')
    } catch (error) {
      ending.tell(fateBy(error))
      throw error
    }
  }

  // Contexts and sessions beside

  /** What takes a connection while the unit may hold one needs leave; without it, a statement has to do. */
  async #nested(frame: Frame, awaited: boolean, run: () => Promise<void>, holds = false): Promise<void> {
    if (frame.extent.late) return
    if (!awaited) return this.#float(run)
    const { tokens } = this.#scene
    const free = !holds && !frame.part && !frame.outer && this.#underWay === 1 && frame.line.current.issued === 0
    if (!free && tokens.free === 0) return void (await this.#write(frame))
    if (!free) tokens.free--
    this.#nesting++
    try {
      await this.#track(run)
    } finally {
      this.#nesting--
      if (!free) tokens.free++
    }
  }

  async #newContext(
    frame: Frame,
    { end, detached, steps }: { end: End; detached: boolean; steps: readonly Step[] },
  ): Promise<void> {
    const line = this.#line()
    const inner: Frame = { line, extent: line.extent }
    const abort = end === 'abort' ? new AbortController() : undefined
    const work = async () => {
      await this.#perform(steps, inner)
      if (end === 'throw') throw new Thrown('thrown')
      abort?.abort()
    }
    const run = () => newContext(work, abort ? { signal: abort.signal } : {})
    await this.#ofItsOwn(this.#context(inner, detached ? detach(run) : run()), frame)
  }

  async #newSession(
    frame: Frame,
    { end, hold, steps }: { end: End; hold: boolean; steps: readonly Step[] },
  ): Promise<void> {
    const abort = end === 'abort' ? new AbortController() : undefined
    let inner: Frame | undefined
    const line = this.#line()
    const { extent } = line
    const work = async (session: AmbientSession<unknown>) => {
      inner = { line: Object.assign(line, { session }), extent, outer: frame }
      await this.#perform(steps, inner)
      if (end === 'throw') throw new Thrown('thrown')
      abort?.abort()
    }
    const running = this.#scene.database.newSession(work, { hold, ...(abort && { signal: abort.signal }) })
    await this.#ofItsOwn(this.#context({ line, extent }, running), frame)
  }

  /** Its failure is not that of what surrounds it. */
  async #ofItsOwn(running: Promise<void>, frame: Frame): Promise<void> {
    await running.catch((error) => {
      this.#expected(error)
      if (frame.extent.late) throw error
    })
  }

  // Listeners, and what comes too late

  /** Bound, it runs where it was made; unbound, where the event is emitted. */
  #listen(frame: Frame, bound: boolean): void {
    const write = (where: Frame, unit: Unit) => {
      if (unit.#nesting === 0)
        unit.#float(() =>
          unit.#write(where).catch((error) => (error instanceof Thrown ? undefined : Promise.reject(error))),
        )
    }
    const listener = bound
      ? AsyncResource.bind(() => write(frame, this))
      : (emitted: (act: typeof write) => void) => emitted(write)
    this.#scene.bus.once(`channel ${this.number % 8}`, listener)
  }

  #leak(frame: Frame, how: Leak): void {
    const { extent, line, part } = frame
    const what = line.session || part || frame.outer ? 'promise' : how
    const held = what === 'session' && !extent.late ? this.#scene.database.session() : undefined
    const come = () => this.#late(frame, what, held)
    const running = new Promise<void>((resolve) => {
      if (what === 'timer') {
        const look = () => (extent.over ? resolve(come()) : setTimeout(look, 15))
        setTimeout(look, 0)
      } else if (what === 'listener') {
        const emitter = new EventEmitter().once(
          'over',
          AsyncResource.bind(() => resolve(come())),
        )
        const emit = () => emitter.emit('over')
        void detach(() => extent.ended.then(emit, emit))
      } else {
        extent.ended.then(() => resolve(come()), resolve)
      }
    })
    this.#float(() => running)
  }

  /** Tries something whose surroundings have ended: it must be refused before a byte is sent. */
  async #late(frame: Frame, what: Leak, held?: AmbientSession<unknown>): Promise<void> {
    const { library, database, place, counts } = this.#scene
    const { line } = frame
    counts.statements++
    const parameters = [this.number, mostSteps, 0].map(String)
    const write = (db: unknown) => library.execute(db, place.sql.late, parameters)
    try {
      if (what === 'atomic' && !line.session) await database.atomic(() => write(database.db))
      else if (what === 'commit') await database.commit()
      else if (what === 'stream') for await (const _ of library.stream(database.db)) break
      else await write(held?.db ?? line.session?.db ?? database.db)
    } catch (error) {
      if (isAmbientError(error) && lateCodes.includes(error.code)) counts.refused++
      else this.#complain('late', `${what}, after the end: ${describe(error)}`)
      return
    }
    this.#complain('late', `${what}, after the end: it was not refused`)
  }

  #complain(kind: Kind, text: string): void {
    this.#scene.complain(kind, this.number, text)
  }

  /** Errors that there may be in a unit. */
  #expected(error: unknown): void {
    const { code, errno } = Object(driverError(error)) as { code?: unknown; errno?: unknown }
    const destroyed = this.#scene.library.limits.cancelling && /Connection terminated/.test(String(error))
    const own = error instanceof Thrown || isAmbientError(error) || destroyed
    if (!own && code !== '22012' && code !== '57014' && errno !== 1644 && errno !== 1317) {
      this.#complain('wrong error', describe(error))
    }
  }
}
