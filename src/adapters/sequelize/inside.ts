import type { TransactionOptions } from 'sequelize'
import { AmbientError } from '../../errors.ts'

/** What is used of a connection: one of pg's or of mysql2's. */
export interface RawConnection {
  release?(broken?: Error): void
  destroy?(): void
  end(): unknown
  readonly connectionParameters?: object
  readonly config?: object
}

export interface ConnectionManager {
  readonly lib: { readonly Client: unknown }
  getConnection(options: object): Promise<RawConnection>
  releaseConnection(connection: object): void
  destroyConnection(connection: object): Promise<void>
  _refreshDynamicOIDs?(connection?: unknown): Promise<void>
}

/** What is used of a Sequelize; most of it is not in its types. */
export interface Inside {
  readonly options: {
    readonly dialect: string
    readonly native: boolean
    readonly hooks: object
  }
  readonly connectionManager: ConnectionManager
  readonly dialect: object
  readonly queryInterface: object
  readonly modelManager: { readonly models: readonly unknown[]; readonly constructor: unknown }
  readonly constructor: unknown
  query(sql: unknown, options?: QueryOptions): Promise<unknown>
  addHook(type: string, ...hook: unknown[]): unknown
  hasHook(name: string): boolean
}

export interface QueryOptions {
  readonly transaction?: object | null | undefined
}

/** What is used of its class. */
export interface SequelizeClass {
  readonly Transaction: new (sequelize: object, options?: object) => NativeTransaction
  readonly _cls?: { get(key: string): object | undefined; set(key: string, value: unknown): void }
  _clsRun<Result>(work: () => Promise<Result>): Promise<Result>
}

/** What is used of its transactions. */
export interface NativeTransaction {
  readonly id: string
  readonly name: string
  readonly options: TransactionOptions
  readonly parent?: object
  finished?: string
  setDeferrable(): Promise<unknown>
}

export function inside(sequelize: object): Inside {
  return sequelize as Inside
}

export function unsupported(what: string): AmbientError {
  return new AmbientError('AMBIENT_UNSUPPORTED', what)
}
