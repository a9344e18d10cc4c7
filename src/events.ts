import { channel } from 'node:diagnostics_channel'

interface Common {
  /** Number of the context, unique in the process; absent for a session outside any context. */
  readonly contextId?: number | undefined
}

/** Published on `ambient-db:context`. */
export interface ContextEvent extends Common {
  readonly type: 'opened' | 'committed' | 'rolled-back' | 'failed'
  /** Milliseconds since the context was opened. */
  readonly duration?: number
  /** Why it did not commit, or what failed while it ended. */
  readonly error?: unknown
}

/** Published on `ambient-db:session`. */
export interface SessionEvent extends Common {
  readonly type: 'opened' | 'acquired' | 'released' | 'destroyed' | 'closed' | 'refused' | 'statement' | 'hook-failed'
  readonly sessionId: number
  readonly database: string
  /** Milliseconds: waited for a connection (`acquired`), held it (`released`), ran (`statement`). */
  readonly duration?: number
  readonly error?: unknown
}

/** Published on `ambient-db:transaction`. */
export interface TransactionEvent extends Common {
  readonly type: 'begun' | 'committed' | 'rolled-back' | 'failed' | 'unknown' | 'cleanup-failed'
  readonly sessionId: number
  readonly database: string
  /** Milliseconds since BEGIN was sent (`begun`: that BEGIN took). */
  readonly duration?: number
  readonly error?: unknown
}

/**
 * The channels of `node:diagnostics_channel` that every step is published on, by the type of their messages.
 * While nobody listens a step costs one property read. No message ever holds SQL text, parameters or connection settings.
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
