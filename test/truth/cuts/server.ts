import type { DatabaseName } from './stage.ts'
import type { WireLog } from './wire-log.ts'

/** A kind of server: what differs between them where units of work play and are judged. */
export interface Server {
  readonly name: string
  /** COMMIT is answered with what the server did. */
  readonly tags?: true
  /** Writes a marker row; its parameters are the run and the label. */
  readonly insert: string
  /** Fails as a conflict does that may be gone the next time. */
  readonly conflict: string
  /** Takes 0.3 s. */
  readonly sleep: string
  /** Makes the COMMIT behind it fail. Absent: nothing does. */
  readonly spoilCommit?: string
  /** Creates two databases with the tables that units use. */
  open(serverUrl: string): Promise<Place>
}

/** The databases of a lab, and connections to them that no code under test knows of. */
export interface Place {
  /** The connection string of the database `main`; that of `other` is called the same, with `_other` behind it. */
  readonly url: string
  /** Makes a pool of the driver. */
  makePool(options: PoolOptions): unknown
  /** The marker rows of a run, as `database:label`. */
  rowsOf(run: string): Promise<Set<string>>
  /** Connections of a run that are in a transaction, or at work. */
  busy(run: string): Promise<string[]>
  close(): Promise<void>
}

export interface PoolOptions {
  /** The connection string of the database, with a proxy in its place. */
  readonly url: string
  readonly run: string
  readonly database: DatabaseName
  readonly size: number
  /** Hears what passes at the sockets. */
  readonly log: Pick<WireLog, 'socketFor' | 'tap'>
  /** What a unit asks for. */
  readonly more: object
}
