import { type Course, endOf, Machine, type Task, until, untilQuiet, untilTurn, type Wait } from './machine.ts'
import type { Act, ContextWays, Limit, Mode, Program, Step } from './program.ts'

/** What an engine is like, as far as the rules care. */
export interface Nature {
  /** A failed statement leaves nothing but a rollback (S4). */
  readonly failedStatementAborts: boolean
  /** Its handle has a transaction method that takes a callback (A4). */
  readonly native: boolean
  /** One transaction at a time (S11, S13). */
  readonly singleConnection: boolean
}

/** An error, by what a user sees of it. */
class Fault {
  readonly says: string

  constructor(says: string) {
    this.says = says
  }
}

const fault = (code: string) => new Fault(`AMBIENT_${code}`)
const aborted = (cause: Fault) => fault(`TRANSACTION_ABORTED < ${cause.says}`)

interface Hook {
  readonly path: string
  readonly body: readonly Step[]
  readonly order: number
}

class Hooks {
  beforeCommit: (Hook & { readonly at: Place })[] = []
  afterCommit: Hook[] = []
  afterRollback: Hook[] = []

  moveTo(other: Hooks): void {
    other.beforeCommit.push(...this.beforeCommit.splice(0))
    other.afterCommit.push(...this.afterCommit.splice(0))
    other.afterRollback.push(...this.afterRollback.splice(0))
  }
}

/** The transaction itself, or a savepoint in it. */
class Level {
  readonly parent: Level | undefined
  readonly hooks = new Hooks()
  rows: string[] = []
  /** It holds a row because of which COMMIT is refused. */
  orphan = false
  /** Because of which nothing but a rollback can follow. */
  failure: Fault | undefined
  /** What comes too late is refused with it. */
  refusal: Fault | undefined

  constructor(parent?: Level) {
    this.parent = parent
  }
}

interface Transaction {
  readonly root: Level
  opened: boolean
}

/** One thing at a time, in the order of issue (S8); a block takes one turn, and has a lane of its own (A3). */
class Lane {
  #current: Turn | undefined
  #waiting: Turn[] = []
  #refusal: Fault | undefined
  #joining = false
  #failure: Fault | undefined

  get busy(): boolean {
    return this.#current !== undefined
  }

  *run<Result>(turn: Turn, work: () => Course<Result>): Course<Result> {
    if (this.#refusal) throw this.#failed(this.#refusal)
    if (this.#current) {
      this.#waiting.push(turn)
      yield* untilTurn(() => this.#current === turn || turn.refusal !== undefined)
      if (turn.refusal) throw this.#failed(turn.refusal)
    }
    this.#current = turn
    try {
      return yield* work()
    } catch (error) {
      if (error !== turn.rolledBack) this.#failed(error as Fault)
      throw error
    } finally {
      this.#current = this.#waiting.shift()
      if (this.#current) yield* until(() => true) // whose turn it is begins before anything comes of the end of the last
    }
  }

  #failed(error: Fault): Fault {
    if (this.#joining) this.#failure ??= error
    return error
  }

  /** Awaits what is under way and what follows from it; a failure in it is part of the outcome (C4, C5, A6). */
  *quiet(given: Given, machine: Machine): Course {
    this.#joining = true
    const early = !this.busy && !given.up && machine.early()
    if (early) yield* machine.race('after')
    if (!early || this.busy) yield* untilQuiet(() => !this.busy || given.up !== undefined)
    this.#joining = false
    if (given.up) throw given.up
    const failure = this.#failure
    this.#failure = undefined
    if (failure) throw failure
  }

  close(refusal: Fault): void {
    this.#refusal ??= refusal
    for (const turn of this.#waiting.splice(0)) turn.refusal = this.#refusal
    this.#current?.inner?.close(refusal)
  }
}

interface Turn {
  refusal?: Fault
  inner?: Lane
  /** Because of which a native transaction is rolled back: no failure, its library tells whoever began it. */
  rolledBack?: Fault
}

/** Whether something was given up, and with what: the signal or deadline of a unit or block (C8). */
interface Given {
  readonly up: Fault | undefined
}

const never: Given = { up: undefined }

class Expiry implements Given {
  up: Fault | undefined
  #over = false
  readonly #kind: 'signal' | 'timeout'
  readonly #onFire: () => void

  constructor(kind: 'signal' | 'timeout', onFire = () => {}) {
    this.#kind = kind
    this.#onFire = onFire
  }

  fire(): void {
    if (this.#over || this.up) return
    this.up = fault(this.#kind === 'signal' ? 'ABORTED' : 'TIMEOUT')
    this.#onFire()
  }

  /** What it was for has ended. */
  stop(): void {
    this.#over = true
  }
}

class Block {
  readonly session: Session
  readonly level: Level
  readonly hook: boolean
  readonly lane = new Lane()
  live = true

  constructor(session: Session, level: Level, hook = false) {
    this.session = session
    this.level = level
    this.hook = hook
    session.blocks.add(this)
  }
}

class Session {
  readonly unit: Unit
  readonly lane = new Lane()
  transaction: Transaction = { root: new Level(), opened: false }
  closed: Fault | undefined
  /** Those whose code has not ended: that of an aborted one may go on when the session is gone. */
  readonly blocks = new Set<Block>()
  /** It keeps its connection between its transactions (S3). */
  hold = false
  /** Hooks from outside the block that has a transaction to itself. */
  outside: Hooks | undefined
  due: Hook[] = []

  constructor(unit: Unit) {
    this.unit = unit
  }

  get hooks(): Hooks {
    return this.outside ?? this.transaction.root.hooks
  }

  reunite(): void {
    const { outside } = this
    this.outside = undefined
    outside?.moveTo(this.hooks)
  }

  takeDue(): Hook[] {
    return this.due.splice(0)
  }
}

/** What ends once: a context, or a session beside one with what it owns. */
class Unit {
  readonly beside: boolean
  /** Where its work runs, and its hooks before COMMIT. */
  readonly scope: Scope
  session: Session | undefined
  fenced = false
  sealed = false
  settlement: Task | undefined
  expiry: Expiry | undefined
  unawaited: 'error' | undefined
  due: Hook[] = []

  /** In `around`; with `beside`, a session beside the context there, which stays the current one. */
  constructor(around: Scope | undefined, beside?: Scope) {
    this.beside = beside !== undefined
    if (beside) this.session = new Session(this)
    this.scope = { parent: around, unit: beside?.unit ?? this, session: this.session }
  }

  get ended(): Fault {
    return fault(this.beside ? 'SESSION_CLOSED' : 'CONTEXT_ENDED')
  }
}

/** Where code runs (the async context). */
interface Scope {
  readonly parent: Scope | undefined
  readonly unit: Unit
  readonly block?: Block
  readonly session?: Session | undefined
}

/** Where a step is: its scope, and what the program around it holds in its hands. */
interface Place {
  readonly scope: Scope
  /** The session of `newSession`, which the steps in it use. */
  readonly beside: Session | undefined
  readonly limits: readonly Expiry[]
}

/** Where a branch waits for its turn. */
interface Gate {
  readonly wait: Wait
  open(): void
}

/** How the context of a hook is made. */
const ordinary: ContextWays = { by: 'newContext', unawaited: undefined }

/** What the model says of a program, after each turn. */
export interface Prediction {
  /** What each step and each hook ended with, by its path. */
  readonly log: ReadonlyMap<string, string>
  /** The branches that are about to take their next step. */
  readonly gates: readonly string[]
  /** The rows that another connection sees. */
  readonly rows: ReadonlySet<string>
  /** The hooks that began to run, in groups of which the order is promised. */
  readonly hooks: readonly (readonly string[])[]
  readonly reported: readonly string[]
}

/** DESIGN's rules for one database, as a program meets them. */
export class Model implements Prediction {
  readonly log = new Map<string, string>()
  readonly rows = new Set<string>()
  readonly hooks: string[][] = []
  readonly reported: string[] = []
  readonly #choices: readonly boolean[]
  readonly #machine: Machine
  readonly #gates = new Map<string, Gate>()
  readonly #nature: Nature
  /** Who has the only connection, and who waits for it. */
  #holder: Session | undefined
  #queue: Session[] = []
  #hookCount = 0

  /** `choices` decide what is anybody's, such as whether a statement or the end of its context comes first. */
  constructor(nature: Nature, choices: readonly boolean[]) {
    this.#nature = nature
    this.#choices = choices
    this.#machine = new Machine(choices)
  }

  /** How many choices there were so far. */
  get asked(): number {
    return this.#machine.asked
  }

  /** How each of them was decided. */
  get choices(): boolean[] {
    return Array.from({ length: this.asked }, (_, index) => this.#choices[index] ?? false)
  }

  get gates(): string[] {
    return [...this.#gates.keys()]
  }

  /** Nothing is left, so that a program without gates waits for itself. */
  get ended(): boolean {
    return this.#machine.idle
  }

  start({ body, limit, ...ways }: Program): void {
    this.#machine.start(this.#logged('n', this.#newContext(undefined, [], ways, limit, body, 'n')))
    this.#machine.run()
  }

  /** Lets the branches at these gates take their steps, and everybody do what follows from it. */
  open(gates: readonly string[]): void {
    for (const gate of gates) {
      const at = this.#gates.get(gate)
      if (!at) throw new Error(`Nobody is at gate ${gate}.`)
      at.open()
      this.#machine.requeue(at.wait)
      this.#gates.delete(gate)
    }
    this.#machine.run()
  }

  // Programs

  *#logged(path: string, course: Course): Course {
    try {
      yield* course
      this.log.set(path, 'ok')
    } catch (error) {
      if (!(error instanceof Fault)) throw error
      this.log.set(path, error.says)
    }
  }

  *#body(steps: readonly Step[], path: string, at: Place): Course {
    for (const [index, { act, swallow }] of steps.entries()) {
      const here = `${path}.${index}`
      let open = false
      const gate: Gate = {
        wait: { over: () => open },
        open: () => {
          open = true
        },
      }
      this.#gates.set(here, gate)
      yield gate.wait
      yield* this.#machine.race('after')
      try {
        yield* this.#act(act, here, at)
        this.log.set(here, 'ok')
      } catch (error) {
        if (!(error instanceof Fault)) throw error
        yield* this.#machine.race('after') // the lane is told at once, the caller a moment later
        this.log.set(here, error.says)
        if (!swallow) throw error
      }
    }
  }

  *#act(act: Act, path: string, at: Place): Course {
    switch (act.do) {
      case 'write':
        for (let count = 0; count < act.times; count++) {
          yield* this.#statement(at, (level) => level.rows.push(`${path}#${count}`))
        }
        return
      case 'fail':
        return yield* this.#statement(at, (level) => {
          const error = new Fault(`database ${path}`)
          if (this.#nature.failedStatementAborts) level.failure ??= error
          throw error
        })
      case 'orphan':
        return yield* this.#statement(at, (level) => {
          level.orphan = true
        })
      case 'begin':
        return yield* this.#statement(at, () => {})
      case 'throw':
        throw new Fault(`boom ${path}`)
      case 'commit':
        return yield* this.#outside(at, (session) => this.#commitByHand(session, at))
      case 'rollback':
        return yield* this.#outside(at, (session) => this.#rollbackByHand(session))
      case 'close':
        if (at.beside?.closed) return
        return yield* this.#outside(at, (session) => this.#close(session, at, act.outcome))
      case 'atomic':
        return yield* at.beside
          ? this.#atomic(at, 'savepoint', undefined, act.body, path)
          : this.#atomic(at, act.mode, act.limit, act.body, path)
      case 'savepoint':
        return yield* this.#atomic(at, 'savepoint', undefined, act.body, path)
      case 'native':
        return yield* this.#atomic(at, this.#nature.native ? 'native' : 'savepoint', undefined, act.body, path)
      case 'context':
        return yield* this.#newContext(at.scope, at.limits, act, act.limit, act.body, path)
      case 'session':
        return yield* this.#newSession(at, act.limit, act.hold, act.body, path)
      case 'branches':
        return yield* this.#branches(at, act.how, act.bodies, path)
      case 'hook':
        return this.#register(at, act.when, act.body, path)
      case 'expire': {
        const { limits } = at
        limits[limits.length - 1 - (act.outward % limits.length)]?.fire()
        yield* this.#machine.race('after') // whom it ends hears of it when it may
      }
    }
  }

  *#branches(
    at: Place,
    how: 'all' | 'settled' | 'unawaited',
    bodies: readonly (readonly Step[])[],
    path: string,
  ): Course {
    let first: Fault | undefined
    let running = bodies.length
    const branch = function* (course: Course): Course {
      try {
        yield* course
      } catch (error) {
        if (!(error instanceof Fault)) throw error
        first ??= error
      }
      running--
    }
    for (const [number, body] of bodies.entries()) {
      this.#machine.start(branch(this.#body(body, `${path}.${number}`, at)))
    }
    if (how === 'unawaited') return
    yield* until(() => running === 0 || (how === 'all' && first !== undefined))
    if (how === 'all' && first) throw first
  }

  // Units of work

  *#newContext(
    parent: Scope | undefined,
    limits: readonly Expiry[],
    { by, unawaited }: ContextWays,
    limit: Limit,
    body: readonly Step[],
    path: string,
  ): Course {
    const unit = new Unit(parent)
    const expiry = this.#limitOf(unit, limit)
    const at = { scope: unit.scope, beside: undefined, limits: expiry ? [...limits, expiry] : limits }
    unit.unawaited = unawaited
    const work = () => this.#body(body, path, at)
    yield* by === 'newContext' ? this.#unit(unit, work) : this.#openedUnit(unit, work)
  }

  *#newSession(around: Place, limit: Limit, hold: boolean, body: readonly Step[], path: string): Course {
    const unit = new Unit(around.scope, around.scope)
    if (unit.session) unit.session.hold = hold
    const expiry = this.#limitOf(unit, limit)
    const limits = expiry ? [...around.limits, expiry] : around.limits
    const at = { scope: unit.scope, beside: unit.session, limits }
    yield* this.#unit(unit, () => this.#body(body, path, at))
  }

  #limitOf(unit: Unit, limit: Limit): Expiry | undefined {
    if (!limit) return undefined
    unit.expiry = new Expiry(limit, () => {
      unit.settlement ??= this.#machine.start(this.#settle(unit, 'rollback')) // at once (C8)
    })
    return unit.expiry
  }

  *#unit(unit: Unit, work: () => Course): Course {
    try {
      yield* this.#raced(unit.expiry, work)
    } catch (error) {
      unit.settlement ??= this.#machine.start(this.#settle(unit, 'rollback'))
      yield* endOf(unit.settlement)
      throw error
    }
    unit.settlement ??= this.#machine.start(this.#settle(unit, 'commit'))
    yield* endOf(unit.settlement)
  }

  /** Settled by hand: an abort ends it, and not the work, which hears of it at the end. */
  *#openedUnit(unit: Unit, work: () => Course): Course {
    try {
      yield* work()
    } catch (error) {
      unit.settlement ??= this.#machine.start(this.#settle(unit, 'rollback'))
      yield* endOf(unit.settlement)
      throw error
    }
    unit.settlement ??= this.#machine.start(this.#settle(unit, 'commit'))
    yield* endOf(unit.settlement)
    if (unit.expiry?.up) throw unit.expiry.up
  }

  /** Whoever waits for `work` goes on when it is given up, and the work does not stop. */
  *#raced<Result>(given: Given | undefined, work: () => Course<Result>): Course<Result> {
    if (!given) return yield* work()
    if (given.up) throw given.up
    const task = this.#machine.start(work())
    yield* until(() => task.ended || given.up !== undefined)
    if (given.up) throw given.up
    return task.result()
  }

  /** C4, C5, C8, K1. */
  *#settle(unit: Unit, outcome: 'commit' | 'rollback'): Course {
    let failure: Fault | undefined
    try {
      if (outcome === 'rollback') yield* this.#rollBackUnit(unit)
      else yield* this.#commitUnit(unit)
    } catch (error) {
      if (!(error instanceof Fault)) throw error
      failure = error
    }
    if (unit.session) {
      if (unit.session.due.length > 0) yield* this.#machine.race('after') // whose COMMIT it was may take them
      unit.due.push(...unit.session.takeDue())
      this.#closeSession(unit.session, unit.ended)
    }
    unit.expiry?.stop()
    yield* this.#runAfterHooks(unit.due.splice(0))
    if (failure) throw failure
  }

  *#commitUnit(unit: Unit): Course {
    try {
      for (let again = true; again; ) {
        yield* this.#joinUnit(unit)
        unit.fenced = true
        const { session } = unit
        again = session !== undefined && (yield* this.#raced(unit.expiry, () => this.#prepare(session)))
      }
    } catch (error) {
      yield* this.#rollBackUnit(unit)
      throw error
    }
    if (unit.session) yield* this.#sendCommit(unit.session, unit.session.transaction)
  }

  *#joinUnit(unit: Unit): Course {
    const unawaited = unit.unawaited === 'error' && unit.session?.lane.busy
    do {
      if (unit.session) yield* unit.session.lane.quiet(unit.expiry ?? never, this.#machine)
      else yield* this.#machine.race('after')
    } while (unit.session?.lane.busy)
    if (unawaited) throw fault('UNAWAITED_WORK')
  }

  *#rollBackUnit(unit: Unit): Course {
    unit.fenced = true
    unit.sealed = true
    const { session } = unit
    if (!session) return
    if (session.lane.busy) session.lane.close(unit.ended)
    session.reunite()
    session.transaction.root.refusal ??= unit.ended
    yield* this.#rollBack(session, session.transaction)
  }

  #closeSession(session: Session, refusal: Fault): void {
    session.closed ??= refusal
    if (this.#holder === session) this.#holder = undefined
    session.lane.close(session.closed)
    for (const block of session.blocks) block.live = false
    if (session.unit.session === session) session.unit.session = undefined
  }

  // Sessions

  /** The one of the context, made if there is none (C1, C4). */
  #session({ scope, beside }: Place): Session {
    if (beside) return beside
    const { unit } = scope
    if (unit.session) return unit.session
    if (refuses(unit, scope)) throw unit.ended
    unit.session = new Session(unit)
    return unit.session
  }

  /** S6, C4. */
  #assertAccepts(session: Session, { scope }: Place): void {
    if (session.closed) throw session.closed
    if (refuses(session.unit, scope)) throw session.unit.ended
  }

  *#statement(at: Place, act: (level: Level) => void): Course {
    const session = this.#session(at)
    const block = blockAround(session, at.scope)
    this.#assertAccepts(session, at)
    const race = (likely: 'before' | 'after') => this.#machine.race(likely)
    const open = () => this.#open(session, at)
    yield* (block?.lane ?? session.lane).run({}, function* () {
      const level = block?.level ?? session.transaction.root
      yield* race('after')
      assertUsable(level)
      if (!session.transaction.opened) {
        yield* open()
        yield* race('before')
        assertUsable(level)
      }
      try {
        act(level)
      } finally {
        yield* race('before')
      }
    })
  }

  /** BEGIN, which waits for the only connection, unless the unit that waits is inside the one that holds it (S2, S11). */
  *#open(session: Session, { scope }: Place): Course {
    const { transaction } = session
    if (this.#nature.singleConnection && this.#holder !== session) {
      const queue = this.#queue
      const inside = () => this.#holder !== undefined && surrounds(this.#holder, session, scope)
      if (!inside()) {
        queue.push(session)
        yield* until(() => inside() || (this.#holder === undefined && queue[0] === session))
        queue.splice(queue.indexOf(session), 1)
      }
      if (inside()) throw transaction.root.refusal ?? fault('SELF_DEADLOCK')
      this.#holder = session
    }
    if (transaction.root.refusal) {
      this.#release(session)
      throw transaction.root.refusal
    }
    transaction.opened = true
  }

  #release(session: Session): void {
    if (this.#holder === session && !session.hold) this.#holder = undefined
  }

  /** Commit, rollback and close by hand, outside any block (A2); hooks that come due run when the session is free again (K2). */
  *#outside(at: Place, work: (session: Session) => Course): Course {
    const session = this.#session(at)
    this.#assertAccepts(session, at)
    const block = blockAround(session, at.scope)
    if (block) throw fault(block.live ? 'ATOMIC_NESTING' : 'BLOCK_ENDED')
    yield* this.#inTurn(session, session.lane, {}, () => work(session))
  }

  *#inTurn(session: Session, lane: Lane, turn: Turn, work: () => Course): Course {
    let due: Hook[] = []
    try {
      yield* lane.run(turn, function* () {
        try {
          yield* work()
        } finally {
          if (lane === session.lane) due = session.takeDue()
        }
      })
    } finally {
      yield* this.#runAfterHooks(due)
    }
  }

  *#commitByHand(session: Session, at: Place): Course {
    const { transaction } = session
    yield* this.#machine.race('after')
    if (transaction.opened) yield* this.#commit(session, transaction, at)
  }

  *#rollbackByHand(session: Session): Course {
    const { transaction } = session
    yield* this.#machine.race('after')
    if (transaction.opened) yield* this.#rollBack(session, transaction)
  }

  *#close(session: Session, at: Place, outcome: 'commit' | 'rollback' | undefined): Course {
    const { transaction } = session
    if (transaction.opened && outcome === undefined) throw fault('TRANSACTION_OPEN')
    yield* this.#machine.race('after')
    if (outcome === 'rollback') yield* this.#rollBack(session, transaction)
    else yield* this.#commit(session, transaction, at)
    yield* this.#machine.race('after')
    this.#closeSession(session, fault('SESSION_CLOSED'))
  }

  // How transactions end

  /** Hooks, then COMMIT. What cannot commit stays for a rollback (S4), a veto rolls back (K1). */
  *#commit(session: Session, transaction: Transaction, at: Place, given?: Given): Course {
    for (let again = true; again; ) {
      assertUsable(transaction.root)
      try {
        again = yield* this.#raced(given, () => this.#prepare(session))
        this.#assertAccepts(session, at)
      } catch (error) {
        yield* this.#rollBack(session, transaction)
        throw error
      }
    }
    yield* this.#sendCommit(session, transaction)
  }

  /** The hooks that are due, each in a block of its own; tells whether there were any. */
  *#prepare(session: Session): Course<boolean> {
    const { root } = session.transaction
    assertUsable(root)
    const due = root.hooks.beforeCommit.splice(0)
    const ran = this.#group()
    for (const { path, body, at } of due) {
      const block = new Block(session, root, true)
      const parent = session.unit.scope
      const scope: Scope = { parent, unit: parent.unit, block }
      const place = { scope, beside: at.beside, limits: at.limits }
      ran.push(path)
      yield* this.#inBlock(block, () => this.#body(body, `${path}!`, place))
      if (root.failure || root.refusal) break
    }
    return due.length > 0
  }

  *#sendCommit(session: Session, transaction: Transaction): Course {
    const { root } = transaction
    const failure =
      root.refusal ??
      (root.failure && aborted(root.failure)) ??
      (root.orphan ? new Fault('database orphan') : undefined)
    if (transaction.opened && transaction === session.transaction) this.#release(session)
    if (!failure && transaction.opened) for (const row of root.rows) this.rows.add(row)
    this.#renew(session, transaction, failure ? 'afterRollback' : 'afterCommit')
    if (transaction.opened) yield* this.#machine.race('before')
    if (failure) throw failure
  }

  *#rollBack(session: Session, transaction: Transaction): Course {
    transaction.root.refusal ??= fault('BLOCK_ENDED')
    if (transaction.opened && transaction === session.transaction) this.#release(session)
    this.#renew(session, transaction, 'afterRollback')
    if (transaction.opened) yield* this.#machine.race('before')
  }

  #renew(session: Session, transaction: Transaction, when: 'afterCommit' | 'afterRollback'): void {
    if (transaction !== session.transaction) return
    const { root } = transaction
    root.refusal ??= fault('BLOCK_ENDED')
    session.transaction = { root: new Level(), opened: false }
    session.due.push(...root.hooks[when])
  }

  // Blocks

  /** A native transaction is a savepoint also of a transaction that is not open yet (A4). */
  *#atomic(at: Place, asked: Mode | 'native' | undefined, limit: Limit, body: readonly Step[], path: string): Course {
    const session = this.#session(at)
    const enclosing = blockAround(session, at.scope)
    this.#assertAccepts(session, at)
    const mode = asked ?? (enclosing ? 'savepoint' : 'commit')
    if (enclosing?.live && mode !== 'savepoint' && mode !== 'join' && mode !== 'native') {
      throw fault(mode === 'raise' ? 'TRANSACTION_OPEN' : 'ATOMIC_NESTING')
    }
    const expiry = limit && new Expiry(limit)
    const turn: Turn = {}
    const lane = enclosing?.lane ?? session.lane
    let started = false
    const attempt = (level: Level): Course => {
      if (expiry?.up) throw expiry.up
      this.#assertAccepts(session, at)
      const block = new Block(session, level)
      turn.inner = block.lane
      const scope: Scope = { parent: at.scope, unit: at.scope.unit, block }
      const place = { scope, beside: at.beside, limits: expiry ? [...at.limits, expiry] : at.limits }
      const work = () => this.#body(body, path, place)
      return this.#inBlock(block, () => (mode === 'native' ? this.#native(turn, work) : work()), expiry)
    }
    const run = () => {
      started = true
      return this.#takeTurn(session, at, enclosing, mode, expiry, attempt)
    }
    try {
      const running = this.#machine.start(this.#inTurn(session, lane, turn, run))
      yield* until(() => running.ended || (!started && expiry?.up !== undefined))
      if (!running.ended) throw expiry?.up
      running.result()
    } finally {
      expiry?.stop()
    }
  }

  *#native(turn: Turn, work: () => Course): Course {
    try {
      yield* work()
    } catch (error) {
      turn.rolledBack = error as Fault
      throw error
    }
  }

  *#takeTurn(
    session: Session,
    at: Place,
    enclosing: Block | undefined,
    mode: Mode | 'native',
    expiry: Expiry | undefined,
    attempt: (level: Level) => Course,
  ): Course {
    if (expiry?.up) throw expiry.up
    const { transaction } = session
    const outer = enclosing?.level ?? transaction.root
    yield* this.#machine.race('after')
    const open = enclosing !== undefined || transaction.opened
    if (open && mode === 'raise') throw fault('TRANSACTION_OPEN')
    if (open && mode === 'commit') yield* this.#commit(session, transaction, at)
    if (open && mode === 'rollback') yield* this.#rollBack(session, transaction)
    if (mode === 'join') return yield* this.#join(session, enclosing, outer, attempt)
    if (mode === 'native' || (open && mode === 'savepoint')) return yield* this.#savepoint(outer, attempt)
    if (open && mode === 'append') {
      assertUsable(outer)
      return yield* this.#owning(session, at, expiry, attempt)
    }
    session.outside = new Hooks()
    try {
      yield* this.#owning(session, at, expiry, attempt)
    } finally {
      session.reunite()
    }
  }

  /** The block ends the transaction (A1). */
  *#owning(session: Session, at: Place, expiry: Expiry | undefined, attempt: (level: Level) => Course): Course {
    const { transaction } = session
    let ran = false
    try {
      yield* attempt(transaction.root)
      ran = true
      yield* this.#commit(session, transaction, at, expiry)
    } catch (error) {
      if (!ran || session.transaction === transaction) yield* this.#rollBack(session, transaction)
      throw error
    }
  }

  /** Only the outside ends it, and a throw dooms what is nearest around it (A1). */
  *#join(session: Session, enclosing: Block | undefined, outer: Level, attempt: (level: Level) => Course): Course {
    assertUsable(outer)
    try {
      yield* attempt(outer)
    } catch (error) {
      if (error instanceof Fault && (session.transaction.opened || enclosing)) outer.failure ??= error
      throw error
    } finally {
      if (!enclosing && !session.transaction.opened) outer.failure = undefined // nothing is there to be doomed
    }
  }

  /** Its work and hooks go to what surrounds it, or are gone (S4, K2). */
  *#savepoint(outer: Level, attempt: (level: Level) => Course): Course {
    assertUsable(outer)
    const level = new Level(outer)
    try {
      yield* attempt(level)
      assertUsable(level)
      outer.rows.push(...level.rows)
      outer.orphan ||= level.orphan
      level.hooks.moveTo(outer.hooks)
    } finally {
      level.refusal ??= fault('BLOCK_ENDED')
    }
  }

  /** Joins its statements and inner blocks, then refuses what comes later (A6). */
  *#inBlock(block: Block, work: () => Course, expiry?: Expiry): Course {
    try {
      yield* this.#raced(expiry, work)
      yield* block.lane.quiet(expiry ?? never, this.#machine)
    } finally {
      block.live = false
      block.session.blocks.delete(block)
      block.lane.close(fault('BLOCK_ENDED'))
    }
  }

  // Hooks

  #register(
    at: Place,
    when: 'beforeCommit' | 'afterCommit' | 'afterRollback',
    body: readonly Step[],
    path: string,
  ): void {
    const session = this.#session(at)
    this.#assertAccepts(session, at)
    const block = blockAround(session, at.scope)
    if (block && (!block.live || hasEnded(block.level))) throw fault('BLOCK_ENDED')
    const hooks = block ? block.level.hooks : session.hooks
    hooks[when].push({ path, body, order: ++this.#hookCount, at })
  }

  /** In the order of registration, each in a context of its own; failures change nothing (K2). */
  *#runAfterHooks(hooks: Hook[]): Course {
    const ran = this.#group()
    for (const { path, body } of hooks.sort((one, other) => one.order - other.order)) {
      ran.push(path)
      try {
        yield* this.#newContext(undefined, [], ordinary, undefined, body, `${path}!`)
      } catch (error) {
        if (!(error instanceof Fault)) throw error
        this.reported.push(error.says)
      }
    }
  }

  #group(): string[] {
    const group: string[] = []
    this.hooks.push(group)
    return group
  }
}

/** Ended or ending; its hooks before COMMIT may still use it (C4, K1). */
function refuses(unit: Unit, scope: Scope): boolean {
  if (!unit.fenced) return false
  if (unit.sealed) return true
  for (const { block } of outward(scope)) {
    if (block?.hook && block.live && block.session.unit === unit) return false
  }
  return true
}

/** Throws if it, or what surrounds it, has ended or failed. */
function assertUsable(level: Level): void {
  for (let each: Level | undefined = level; each; each = each.parent) {
    if (each.refusal) throw each.refusal
    if (each.failure) throw aborted(each.failure)
  }
}

function hasEnded(level: Level): boolean {
  for (let each: Level | undefined = level; each; each = each.parent) if (each.refusal) return true
  return false
}

function blockAround(session: Session, scope: Scope): Block | undefined {
  for (const { block } of outward(scope)) if (block?.session.unit === session.unit) return block
  return undefined
}

function surrounds(holder: Session, session: Session, scope: Scope): boolean {
  if (holder === session) return false
  for (const each of outward(scope)) if (each.session === holder || each.unit.session === holder) return true
  return false
}

function* outward(scope: Scope): Generator<Scope, void, void> {
  for (let each: Scope | undefined = scope; each; each = each.parent) yield each
}
