import { channel } from 'node:diagnostics_channel'

interface Common {
  /** Number of the context, unique in the process. A session beside the context is a context of its own here. */
  readonly contextId: number
}

/** Published on `ambient-db:context`. */
export interface ContextEvent extends Common {
  readonly type: 'opened' | 'committed' | 'rolled-back' | 'failed'
  /** Milliseconds since the context was opened; absent if nobody listened then. */
  readonly duration?: number | undefined
  /** Why it did not commit, or what failed while it ended. */
  readonly error?: unknown
}

/** Published on `ambient-db:session`. */
export interface SessionEvent extends Common {
  readonly type:
    | 'opened'
    | 'acquired'
    | 'acquire-failed'
    | 'statement'
    | 'released'
    | 'destroyed'
    | 'closed'
    | 'refused'
    | 'hook-failed'
  /** Number of the session, unique in the process; absent where late work found its context ended and got no session. */
  readonly sessionId?: number
  readonly database: string
  /**
   * Milliseconds: waited for a connection (`acquired`, `acquire-failed`), held it (`released`, `destroyed`), took from being
   * sent to its answer (`statement`; a stream to its end).
   */
  readonly duration?: number
  /** What failed, or what was refused with. */
  readonly error?: unknown
}

/** Published on `ambient-db:transaction`. */
export interface TransactionEvent extends Common {
  readonly type: 'begun' | 'committed' | 'rolled-back' | 'failed' | 'unknown' | 'cleanup-failed'
  readonly sessionId: number
  readonly database: string
  /** Milliseconds since BEGIN was sent (`begun`: that BEGIN took). */
  readonly duration: number
  /** Why it was rolled back, or what failed. */
  readonly error?: unknown
}

/**
 * The channels of `node:diagnostics_channel` that every step is published on, by the type of their messages.
 * While nobody listens a step costs one property read. No message holds SQL text, parameters or connection settings, except
 * what a driver's own error may quote. Subscribers are called synchronously, inside the context they are told of.
 */
export interface AmbientEvents {
  'ambient-db:context': ContextEvent
  'ambient-db:session': SessionEvent
  'ambient-db:transaction': TransactionEvent
}

interface EventChannel<Event> {
  readonly hasSubscribers: boolean
  publish(event: Event): void
}

export const contextChannel: EventChannel<ContextEvent> = channel('ambient-db:context')
export const sessionChannel: EventChannel<SessionEvent> = channel('ambient-db:session')
export const transactionChannel: EventChannel<TransactionEvent> = channel('ambient-db:transaction')
