import { nextNumber } from './context.ts'
import type { AmbientError } from './errors.ts'

/** A function that runs before or after the end of a transaction. */
export type Hook = () => unknown

/** A hook that runs after everything has settled. */
export interface AfterHook {
  readonly order: number
  readonly run: Hook
  /** Milliseconds that it may take. */
  readonly timeout: number
  /** What its context is aborted with then. */
  readonly late: () => AmbientError
  /** Takes its failure, which never changes the outcome. */
  readonly onError: (error: unknown) => void
  /** Tells its database, whose shutdown waits for it, that it has run or never will. */
  readonly leave?: () => void
}

/** The hooks of one transaction or savepoint, in the order of registration. */
export interface Hooks {
  readonly beforeCommit: Hook[]
  readonly afterCommit: AfterHook[]
  readonly afterRollback: AfterHook[]
}

export function noHooks(): Hooks {
  return { beforeCommit: [], afterCommit: [], afterRollback: [] }
}

export function afterHook(run: Hook, more: Pick<AfterHook, 'timeout' | 'late' | 'onError'>): AfterHook {
  return { order: nextNumber(), run, ...more }
}

/** Sorts after-hooks, also of several databases, in the order in which they were registered. */
export function byRegistration(one: AfterHook, other: AfterHook): number {
  return one.order - other.order
}

export function copyHooks({ beforeCommit, afterCommit, afterRollback }: Hooks): Hooks {
  return { beforeCommit: [...beforeCommit], afterCommit: [...afterCommit], afterRollback: [...afterRollback] }
}

/** Hands the hooks of a savepoint that was released to what surrounds it. */
export function moveHooks(from: Hooks, to: Hooks): void {
  to.beforeCommit.push(...from.beforeCommit.splice(0))
  to.afterCommit.push(...from.afterCommit.splice(0))
  to.afterRollback.push(...from.afterRollback.splice(0))
}

/** Forgets the hooks of a savepoint that was rolled back (K2). */
export function dropHooks({ beforeCommit, afterCommit, afterRollback }: Hooks): void {
  beforeCommit.length = 0
  afterCommit.length = 0
  afterRollback.length = 0
}
