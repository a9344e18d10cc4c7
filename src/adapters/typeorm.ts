import type { Pool as MysqlPool } from 'mysql2/promise'
import type { Pool } from 'pg'
import { DataSource, EntityManager, type QueryFailedError, type QueryRunner } from 'typeorm'
import { type Adapter, callFactory, type Statements, type TransactionSettings } from '../adapter.ts'
import { detach } from '../context.ts'
import { byDriver, type ChosenDriver } from '../driver-choice.ts'
import { AmbientError } from '../errors.ts'
import { inLease, LeasedTransaction, offerBlock } from '../leased.ts'
import { controlRefused, parseTransactionControl } from '../sql.ts'

/**
 * The adapter for TypeORM, on `postgres`, `mysql` and `mariadb`. The handle is an EntityManager; repositories, entities that save
 * themselves (`BaseEntity`), query builders and query runners of the data source find the session just so. `transaction()` is a
 * savepoint of the session.
 *
 * A data source knows its entities only when it is initialized, which connects: `await main.connect()` at start does it. It also is
 * what puts the repositories of the data source into sessions. What `connect()` resolves with runs outside of any: for migrations.
 *
 * @param factory makes the data source, without initializing it; gets the host if one is configured.
 * @example
 * ```ts
 * import { defineDatabase, newContext } from 'ambient-db'
 * import { typeormAdapter } from 'ambient-db/typeorm'
 * import { Column, DataSource, Entity, PrimaryGeneratedColumn } from 'typeorm'
 *
 * @Entity()
 * class User {
 *   @PrimaryGeneratedColumn()
 *   id!: number
 *   @Column('text')
 *   name!: string
 * }
 *
 * const main = defineDatabase({
 *   name: 'main',
 *   adapter: typeormAdapter(
 *     () => new DataSource({ type: 'postgres', url: process.env.DATABASE_URL ?? 'postgres://localhost/app', entities: [User] }),
 *   ),
 * })
 * await main.connect()
 * await newContext(() => main.db.save(User, { name: 'Ada' }))
 * ```
 */
export function typeormAdapter(factory: (host: string) => DataSource): Adapter<EntityManager, DataSource, object> {
  const sources = new Map<string | undefined, DataSource>()
  let ambient: Statements<object> | undefined
  const sourceFor = (host: string | undefined) => {
    const known = sources.get(host)
    if (known) return known
    const made = detach(() => callFactory(factory, host))
    sources.set(host, made)
    return made
  }
  const engineOf = (engine: DataSource) => engines.get(engine) as Engine // createEngine has set it
  const driver = byDriver(engineOf)
  return {
    ...driver,
    async createEngine(host) {
      const source = sourceFor(host)
      const choose = await driverOf(source)
      if (!source.isInitialized) await source.initialize()
      const engine = outsideOfSessions(source)
      const chosen = await choose()
      for (const each of [engine, source]) engines.set(each, chosen)
      if (ambient) {
        Object.assign(source, { createQueryRunner: queryRunners(source, ambient, source) })
        scopeTransactions(source.manager, ambient)
      }
      return engine
    },
    async closeEngine(engine) {
      const { source } = engineOf(engine)
      for (const [host, each] of sources) if (each === source) sources.delete(host)
      if (source.isInitialized) await source.destroy()
    },
    traits: (error) => driver.traits((error as Partial<QueryFailedError> | undefined)?.driverError ?? error),
    createHandle(statements) {
      ambient ??= statements // the first one is that of the database
      return createManager(statements, () => sourceFor(statements.host()))
    },
  }
}

interface Engine extends ChosenDriver {
  readonly source: DataSource
  /** A client of the session, which can stream. */
  client(statements: Statements<object>): Promise<unknown>
}

/** Of data sources that were initialized, and of what stands for them outside of sessions. */
const engines = new WeakMap<DataSource, Engine>()

type IsolationLevel = Parameters<QueryRunner['startTransaction']>[0]

/** What is used of the drivers of TypeORM beside their types. */
interface Pools {
  /** PostgreSQL. */
  readonly master?: Pool
  /** MySQL; none where there are replicas. */
  readonly pool?: { promise(): MysqlPool }
}

/** Finds the driver before anything connects; its pool is there once the data source is initialized. */
async function driverOf(source: DataSource): Promise<() => Promise<Engine>> {
  const { type } = source.options
  const pools = source.driver as Pools
  if (type === 'postgres') {
    const { pgAdapter } = await import('./pg.ts')
    return async () => {
      const pool = pools.master as Pool
      const driver = pgAdapter(() => pool) as Adapter<Pool, unknown, object>
      await driver.createEngine(undefined)
      return { source, driver, pool, client: (statements) => driver.createHandle(statements).connect() }
    }
  }
  if ((type === 'mysql' || type === 'mariadb') && !('replication' in source.options && source.options.replication)) {
    const { mysql2Adapter } = await import('./mysql2.ts')
    return async () => {
      const pool = (pools.pool as NonNullable<Pools['pool']>).promise()
      const driver = mysql2Adapter(() => pool) as Adapter<MysqlPool, unknown, object>
      await driver.createEngine(undefined)
      const client = async (statements: Statements<object>) =>
        (await driver.createHandle(statements).getConnection()).connection
      return { source, driver, pool, client }
    }
  }
  const what =
    "Only data sources of the types 'postgres', 'mysql' and 'mariadb', these without replication, are supported"
  throw new AmbientError('AMBIENT_UNSUPPORTED', `${what}; this one is of type '${type}'.`)
}

/** The data source as it was: its query runners take connections of the pool. */
function outsideOfSessions(source: DataSource): DataSource {
  const { createQueryRunner } = DataSource.prototype
  const native = Object.create(source) as DataSource
  const driver = Object.create(source.driver, { dataSource: { value: native } }) // whom schema builders ask
  const manager = new EntityManager(native)
  return Object.assign(native, { driver, createQueryRunner, destroy: () => source.destroy(), manager })
}

/** A manager whose data source is that of the host in force, with the query runners of the session. */
function createManager(statements: Statements<object>, source: () => DataSource): EntityManager {
  const manager = new EntityManager(undefined as never) // see `dataSource`
  const views = new WeakMap<DataSource, DataSource>()
  const dataSource = () => {
    const own = source()
    const known = views.get(own)
    if (known) return known
    const view = Object.create(own) as DataSource
    const getMetadata: DataSource['getMetadata'] = (target) => {
      if (own.isInitialized) return own.getMetadata(target)
      const what =
        'The entities are not known yet: `await connect()` of the database at start initializes the data source.'
      throw new AmbientError('AMBIENT_UNSUPPORTED', what, { database: statements.name })
    }
    Object.assign(view, { manager, getMetadata, createQueryRunner: queryRunners(view, statements, own) })
    views.set(own, view)
    return view
  }
  Object.defineProperty(manager, 'dataSource', { get: dataSource })
  scopeTransactions(manager, statements)
  for (const name of needEntities) {
    const method = manager[name] as (...args: unknown[]) => Promise<unknown>
    const initialized = () => source().isInitialized || statements.run(async () => {}) // whose connection needs it
    const waiting = async (...args: unknown[]) => {
      await initialized()
      return method.apply(manager, args)
    }
    Object.assign(manager, {
      [name]: (...args: unknown[]) => (source().isInitialized ? method.apply(manager, args) : waiting(...args)),
    })
  }
  return manager
}

const persistence = ['save', 'remove', 'softRemove', 'recover'] as const

/** Methods that are asynchronous, so that they can wait for the data source to be initialized. */
const needEntities = [
  ...persistence,
  ...(['preload', 'insert', 'update', 'updateAll', 'upsert', 'delete', 'deleteAll', 'softDelete', 'restore'] as const),
  ...(['increment', 'decrement', 'clear', 'exists', 'existsBy', 'count', 'countBy', 'sum', 'average'] as const),
  ...(['minimum', 'maximum', 'find', 'findBy', 'findAndCount', 'findAndCountBy', 'findOne', 'findOneBy'] as const),
  ...(['findOneOrFail', 'findOneByOrFail'] as const),
]

/** Gives each transaction that `manager` begins and ends by itself a scope and a query runner of its own. */
function scopeTransactions(manager: EntityManager, statements: Statements<object>): void {
  const scoped =
    (name: 'transaction' | (typeof persistence)[number]) =>
    async (...args: unknown[]): Promise<unknown> =>
      inLease(statements, async (block) => {
        const runner = manager.dataSource.createQueryRunner()
        const { transaction } = runner.manager
        // Its own would share the query runner, and the name of the savepoint, with those beside it.
        const inner = (...options: unknown[]) => block.enter(() => scoped('transaction')(...options))
        Object.assign(runner.manager, { transaction: inner })
        const method = (name === 'transaction' ? transaction : runner.manager[name]) as (...all: unknown[]) => unknown
        try {
          return await method.apply(runner.manager, args)
        } finally {
          await runner.release()
        }
      })
  for (const name of ['transaction', ...persistence] as const) Object.assign(manager, { [name]: scoped(name) })
}

/** A `createQueryRunner` whose query runners are of the session: its connection, and their transactions are savepoints. */
function queryRunners(
  source: DataSource,
  statements: Statements<object>,
  own: DataSource,
): DataSource['createQueryRunner'] {
  return (mode) => {
    const runner = DataSource.prototype.createQueryRunner.call(source, mode)
    const lease = new LeasedTransaction(statements)
    const native = {
      query: runner.query as (...args: unknown[]) => Promise<unknown>, // of one signature more
      stream: runner.stream,
      release: runner.release,
    }
    let connection: unknown
    /** What the transaction that begins was asked for; its SQL may be run while this is there. */
    let controlled: TransactionSettings | undefined
    let active = false
    const controls = (name: 'startTransaction' | 'commitTransaction' | 'rollbackTransaction') => {
      const method = runner[name]
      return async (level: IsolationLevel = source.options.isolationLevel) => {
        const isolationLevel = level?.toLowerCase() as TransactionSettings['isolationLevel'] // TypeORM checks it
        controlled = isolationLevel ? { isolationLevel } : {}
        try {
          await method.call(runner, level)
        } finally {
          controlled = undefined
        }
      }
    }
    const query = async (sql: string, ...args: unknown[]): Promise<unknown> => {
      const control = parseTransactionControl(sql)
      if (control && !controlled) throw controlRefused(statements.name)
      if (control) return lease.control(control.kind === 'begin' ? { ...control, settings: controlled ?? {} } : control)
      if (controlled && sql.startsWith('SET TRANSACTION')) return // BEGIN has it
      return statements.run((own) => {
        connection = own
        return native.query.call(runner, sql, ...args)
      }, lease.block)
    }
    const stream: QueryRunner['stream'] = async (...args) => {
      if (!own.isInitialized) await statements.run(async () => {})
      connection = await offerBlock(statements, lease.block, () => engines.get(own)?.client(statements))
      return native.stream.apply(runner, args)
    }
    Object.defineProperty(runner, 'isTransactionActive', {
      get: () => active || lease.block.inTransaction,
      set(value: boolean) {
        active = value
      },
    })
    return Object.assign(runner, {
      dataSource: source,
      connect: async () => connection, // what it is just before it is asked for
      query,
      stream,
      startTransaction: controls('startTransaction'),
      commitTransaction: controls('commitTransaction'),
      rollbackTransaction: controls('rollbackTransaction'),
      async release() {
        lease.release()
        await native.release.call(runner)
      },
    })
  }
}
