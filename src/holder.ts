import { enclosingScopes } from './context.ts'
import type { DatabaseCore } from './database.ts'
import type { Lease } from './engine.ts'
import { AmbientError } from './errors.ts'
import type { SessionEvent } from './events.ts'
import type { Session } from './session.ts'

/** What a holder needs of its session. */
export interface HolderSession {
  readonly closed: boolean
  /** The sandbox of the test that it belongs to, if there are several. */
  readonly sandbox: object | undefined
  publish(type: SessionEvent['type'], more: Partial<SessionEvent>): void
}

/** The way of a session to its connection: taken for a transaction and given back after it, or pinned until the end (S3). */
export class Holder<Connection> {
  readonly #session: HolderSession
  readonly #database: DatabaseCore<Connection>
  readonly #hold: boolean
  #prepared = false
  #pinned: Lease<Connection> | undefined
  /** What a pinned connection was lost with: another one would not have its state. */
  #lost: Error | undefined
  #since = 0

  constructor(session: HolderSession, database: DatabaseCore<Connection>, hold: boolean) {
    this.#session = session
    this.#database = database
    this.#hold = hold
  }

  /** Between transactions too. */
  get holding(): boolean {
    return this.#pinned !== undefined
  }

  /** `wanted` tells whether the connection is still of use when it is there. */
  async lease(wanted: () => boolean): Promise<Lease<Connection>> {
    if (this.#pinned) return this.#pinned
    if (this.#lost) {
      const what = 'The pinned connection was lost, and its session state with it.'
      throw new AmbientError('AMBIENT_TRANSACTION_ABORTED', what, { database: this.#database.name, cause: this.#lost })
    }
    const startedAt = performance.now()
    try {
      if (!this.#prepared) await this.#database.prepare()
      this.#prepared = true
      const lease = await this.#database.engines.acquire(this.#session, this.#surrounding, wanted)
      this.#since = performance.now()
      this.#session.publish('acquired', { duration: this.#since - startedAt })
      if (this.#hold && !this.#session.closed) this.#pinned = lease // one that comes too late is released like any other
      return lease
    } catch (error) {
      this.#session.publish('acquire-failed', { duration: performance.now() - startedAt, error })
      throw error
    }
  }

  /** Gives the connection back; `broken` destroys it. */
  async release(lease: Lease<Connection>, broken?: Error): Promise<void> {
    if (this.#pinned === lease && !broken && !lease.lost) return
    if (this.#pinned === lease) {
      this.#pinned = undefined
      this.#lost = broken ?? lease.lost
    }
    const releasing = lease.release(broken)
    if (releasing) await releasing
    const type = broken ? 'destroyed' : 'released'
    this.#session.publish(type, { duration: performance.now() - this.#since, error: broken })
  }

  /** Session state must not reach the next borrower of a pinned connection. */
  end(): Promise<void> | undefined {
    const lease = this.#pinned
    return lease && this.release(lease, new Error('The connection of a session with `hold` is not used again.'))
  }

  /** Sessions of this database around the running code (S11). */
  #surrounding = (): Session<unknown>[] => {
    const sessions = new Set<Session<unknown>>()
    for (const scope of enclosingScopes()) {
      for (const session of [scope.beside?.session, scope.context?.peek(this.#database)] as (
        | Session<unknown>
        | undefined
      )[]) {
        if (session?.database === this.#database) sessions.add(session)
      }
    }
    return [...sessions]
  }
}
