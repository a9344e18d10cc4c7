import type { EventEmitter } from 'node:events'
import { type AmbientDatabase, type AmbientSession, isAmbientError } from '../../../src/index.ts'
import type { Library } from '../libraries.ts'
import type { Sabotage } from './faults.ts'
import type { Fate, Ledger, Part } from './ledger.ts'
import type { Place } from './place.ts'
import type { Later } from './program.ts'

export type Kind =
  | 'foreign transaction' // a statement ran in a transaction, or on a connection, of another part
  | 'wrong rows' // the rows are not what was said
  | 'late' // something ran after the end of what it belongs to, or was refused by nobody
  | 'not served' // nothing in the unit fails, and it was not committed
  | 'wrong error' // neither of the unit's own, nor of the library, nor what a statement fails with
  | 'hang'
  | 'open transaction'
  | 'lost slot'
  | 'left open' // `shutdown()` failed, or did not end
  | 'uncaught'

/** What units of work share. */
export interface Scene {
  readonly library: Library
  readonly database: AmbientDatabase<unknown, unknown>
  readonly place: Place
  readonly ledger: Ledger
  readonly sabotage: Sabotage
  /** What units tell each other by. */
  readonly bus: EventEmitter
  /** Who may wait for a connection while he holds one; else those who hold all of them would wait for each other. */
  readonly tokens: { free: number }
  readonly counts: { statements: number; refused: number; contexts: number }
  complain(kind: Kind, unit: number, text: string): void
}

/** More steps than there are bits for are not written. */
export const mostSteps = 62

/** An error of the unit's own. */
export class Thrown extends Error {}

/** A stretch of code with an end. */
export class Extent {
  over = false
  readonly outer: Extent | undefined
  readonly ended: Promise<void>
  #end: () => void = () => {}

  constructor(outer?: Extent) {
    this.outer = outer
    this.ended = new Promise((resolve) => {
      this.#end = resolve
    })
  }

  end(): void {
    this.over = true
    this.#end()
  }

  get late(): boolean {
    return this.over || (this.outer?.late ?? false)
  }
}

/** A session, as the unit believes it to be: one transaction after the other, in the order of issue. */
export interface Line {
  current: Part
  /** Of its context. */
  readonly extent: Extent
  readonly autocommit: boolean
  /** Of a session beside the context's. */
  readonly session?: AmbientSession<unknown>
  /** Absent unless a fault is planted: into the block that runs. */
  inside?: ((run: () => Promise<unknown>) => Promise<unknown>) | undefined
}

/** Where a step runs. */
export interface Frame {
  readonly line: Line
  /** The block around it. */
  readonly part?: Part
  readonly extent: Extent
  /** What surrounds a session beside the context's. */
  readonly outer?: Frame
  /** A native transaction. */
  readonly execute?: (sql: string, parameters: unknown[]) => Promise<unknown>
}

/** What refuses whatever comes too late. */
export const lateCodes: readonly string[] = [
  'AMBIENT_CONTEXT_ENDED',
  'AMBIENT_BLOCK_ENDED',
  'AMBIENT_SESSION_CLOSED',
  'AMBIENT_ABORTED',
  'AMBIENT_TIMEOUT',
]

export function fateBy(error: unknown): Fate {
  return isAmbientError(error) && error.outcome === 'unknown' ? 'unknown' : 'undone'
}

export function later(how: Later, ms: number, run: () => void): void {
  if (how === 'timer') setTimeout(run, ms)
  else if (how === 'immediate') setImmediate(run)
  else if (how === 'tick') process.nextTick(run)
  else queueMicrotask(run)
}

/** The one row of a result, of whichever library. */
export function rowOf(result: unknown): { readonly xid: unknown; readonly pid: unknown } {
  const rows = Array.isArray(result) ? result[0] : (result as { rows: unknown[] }).rows
  return (rows as { xid: unknown; pid: unknown }[])[0] as { xid: unknown; pid: unknown } // each has one
}

export function describe(error: unknown): string {
  if (!(error instanceof Error)) return String(error)
  const { code } = error as { code?: string }
  return `${code ?? error.name} ${error.message.split('\n')[0]?.slice(0, 160)}`
}
