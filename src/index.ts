export type { AbortOptions } from './abortion.ts'
export type {
  Adapter,
  Capabilities,
  CommitStatus,
  ErrorTraits,
  NativeBlock,
  OpenStream,
  Statements,
  TransactionOptions,
  TransactionSettings,
  UnitOfWork,
} from './adapter.ts'
export type { AtomicOptions, CurrentTransaction } from './atomic.ts'
export type { AmbientContext, ContextOptions, ContextState } from './context.ts'
export { contextSignal, detach, hasContext, newContext, openContext } from './context.ts'
export type { AmbientDatabase, DatabaseHooks, DatabaseOptions, NewSessionOptions } from './database.ts'
export { defineDatabase } from './database.ts'
export type {
  AmbientErrorCode,
  CommitOutcome,
  DatabaseOutcomes,
  Outcome,
  Resolve,
  ResolveOptions,
} from './errors.ts'
export { AmbientError, isAmbientError } from './errors.ts'
export type { AmbientEvents, ContextEvent, SessionEvent, TransactionEvent } from './events.ts'
export type { Hook } from './hooks.ts'
export type { AmbientSession } from './session.ts'
