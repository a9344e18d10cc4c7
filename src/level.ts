import type { AmbientError } from './errors.ts'
import type { Failure } from './failure.ts'
import { type Hooks, noHooks } from './hooks.ts'

/** The transaction itself, or a savepoint in it. Opened on the server by its first statement. */
export class Level {
  readonly parent: Level | undefined
  /** The level of the transaction itself. */
  readonly root: Level
  readonly hooks: Hooks = noHooks()
  opened = false
  /** Shared by statements that need it at the same time: one of a block that was cut off, and the next. */
  opening: Promise<void> | undefined
  failure: Failure | undefined
  /** Set when it has ended: refuses what comes too late. */
  refusal: (() => AmbientError) | undefined
  /** The name of its savepoint. */
  name = ''

  constructor(parent?: Level) {
    this.parent = parent
    this.root = parent?.root ?? this
  }
}

/** Throws if it has ended. */
export function assertLive({ refusal }: Level): void {
  if (refusal) throw refusal()
}

/** Whether `level` has ended, by itself or with what surrounds it. */
export function hasEnded(level: Level | undefined): boolean {
  for (let each = level; each; each = each.parent) if (each.refusal) return true
  return false
}
