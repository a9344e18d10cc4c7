/** What became of a transaction or savepoint, by what the library said. */
export type Fate = 'kept' | 'undone' | 'unknown'

/** A transaction of a session, or a savepoint in one, as the unit of work believes it to be. */
export class Part {
  readonly unit: number
  /** Of a transaction; savepoints have that of theirs. */
  readonly number: number
  readonly outer: Part | undefined
  /** Of its context: what is over there holds no connection, though some may not know yet. */
  readonly #extent: { readonly over: boolean }
  fate: Fate | undefined
  /** How many statements were issued in it, and how many of them were answered. */
  issued = 0
  answered = 0
  xid: number | undefined
  pid: number | undefined

  constructor(unit: number, number: number, extent: { readonly over: boolean }, outer?: Part) {
    this.unit = unit
    this.number = number
    this.#extent = extent
    this.outer = outer
  }

  get over(): boolean {
    return this.fate !== undefined || this.#extent.over
  }

  get root(): Part {
    return this.outer?.root ?? this
  }

  /** The first word counts. */
  tell(fate: Fate): void {
    this.fate ??= fate
  }

  /** Its fate with that of all around it. */
  get end(): Fate | undefined {
    const outer = this.outer ? this.outer.end : 'kept'
    if (this.fate === 'undone' || outer === 'undone') return 'undone'
    if (this.fate === 'unknown' || outer === 'unknown') return 'unknown'
    return this.fate && outer
  }

  toString(): string {
    return `${this.unit}.${this.number}`
  }
}

/** A row that was to be written. */
export interface Entry {
  readonly step: number
  readonly part: Part
  /** Whether it was answered well; `undefined` where nobody asked. */
  ok: boolean | undefined
}

/** What must be there of a unit, as a bit for each step. */
export interface Account {
  readonly must: bigint
  /** Of each, all is there or nothing. */
  readonly either: readonly bigint[]
}

export function accountOf(entries: readonly Entry[]): Account {
  let must = 0n
  const either = new Map<Part, bigint>()
  for (const { step, part, ok } of entries) {
    if (ok === false) continue
    const bit = 1n << BigInt(step)
    if (part.end === 'kept') must |= bit
    else if (part.end === 'unknown') either.set(part.root, (either.get(part.root) ?? 0n) | bit)
  }
  return { must, either: [...either.values()] }
}

/** What is wrong with the rows that are there. */
export function disagreement({ must, either }: Account, there: bigint): string | undefined {
  let rest = there & ~must
  for (const all of either) if ((rest & all) === all) rest &= ~all
  const lost = must & ~there
  if (lost !== 0n) return `rows that were told to be committed are not there: steps ${stepsOf(lost)}`
  if (rest !== 0n) return `rows are there that were not told to be committed: steps ${stepsOf(rest)}`
  return undefined
}

function stepsOf(bits: bigint): string {
  return [...bits.toString(2)]
    .reverse()
    .flatMap((bit, step) => (bit === '1' ? [step] : []))
    .join(', ')
}

/** To whom each transaction and connection belongs, as the answers of all statements tell. */
export class Ledger {
  readonly #owners = new Map<number, string>()
  readonly #holders = new Map<number, Part>()
  readonly #complain: (unit: number, text: string) => void

  constructor(complain: (unit: number, text: string) => void) {
    this.#complain = complain
  }

  get transactions(): number {
    return this.#owners.size
  }

  /** A statement of `part` ran in transaction `xid`, on connection `pid`. */
  answered(part: Part, xid: number | undefined, pid: number | undefined): void {
    part.answered++
    const root = part.root
    if (xid !== undefined) this.#transaction(root, xid)
    if (pid !== undefined) this.#connection(root, pid)
  }

  #transaction(part: Part, xid: number): void {
    if (part.xid === xid) return
    if (part.xid !== undefined) {
      this.#complain(
        part.unit,
        `part ${part} ran in transaction ${part.xid}, then in ${xid} of ${this.#owners.get(xid)}`,
      )
    }
    const owner = this.#owners.get(xid)
    if (owner !== undefined) this.#complain(part.unit, `part ${part} ran in transaction ${xid} of part ${owner}`)
    part.xid ??= xid
    if (owner === undefined) this.#owners.set(xid, String(part))
  }

  #connection(part: Part, pid: number): void {
    if (part.pid !== undefined && part.pid !== pid) {
      this.#complain(part.unit, `part ${part} ran on connection ${part.pid}, then on ${pid}`)
    }
    part.pid = pid
    const holder = this.#holders.get(pid)
    if (holder === part) return
    if (holder && !holder.over) {
      this.#complain(part.unit, `part ${part} ran on connection ${pid}, which part ${holder} holds`)
    }
    if (!part.over) this.#holders.set(pid, part)
  }
}
