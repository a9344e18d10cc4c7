import { EventEmitter } from 'node:events'
import { Pool, type PoolClient, type QueryConfig } from 'pg'
import { type Adapter, type NativeBlock, overDriver, type Statements, type TransactionSettings } from '../adapter.ts'
import { currentScope, runInScope, type Scope } from '../context.ts'
import { type AmbientDatabase, handleOver } from '../database.ts'
import { AmbientError } from '../errors.ts'
import { controlRefused, parseTransactionControl } from '../sql.ts'

/** What every Prisma client has, whatever its schema and extensions. */
interface PrismaClientLike {
  readonly $transaction: (...args: never[]) => Promise<unknown>
}

/**
 * The adapter for Prisma 7 with `@prisma/adapter-pg`, over `pgAdapter`. Each operation finds the session when it is awaited, and is
 * one statement of it, however much SQL Prisma makes of it; `db.$transaction()`, with a callback or a list, is a savepoint of
 * the session. Whatever else is built on the driver shares the session and the transaction.
 *
 * Errors are Prisma's own, with the error of the driver as `cause`; what the session refuses is an `AmbientError`, as everywhere.
 *
 * @param driver a `pgAdapter`.
 * @param build makes the client, once, on a `PrismaPg` over the pool that it gets.
 * @example
 * ```ts
 * import { PrismaPg } from '@prisma/adapter-pg'
 * import { defineDatabase, newContext } from 'ambient-db'
 * import { pgAdapter } from 'ambient-db/pg'
 * import { prismaAdapter } from 'ambient-db/prisma'
 * import { Pool } from 'pg'
 * import { PrismaClient } from './generated/prisma/client.js'
 *
 * const main = defineDatabase({
 *   name: 'main',
 *   adapter: prismaAdapter(
 *     pgAdapter(() => new Pool({ connectionString: process.env.DATABASE_URL })),
 *     (pool) => new PrismaClient({ adapter: new PrismaPg(pool) }),
 *   ),
 * })
 * await newContext(() => main.db.user.create({ data: { name: 'Ada' } }))
 * ```
 */
export function prismaAdapter<Engine extends Pool, Client extends PrismaClientLike>(
  driver: Adapter<Pool, Engine, PoolClient>,
  build: (pool: Pool) => Client,
): Adapter<Client, Engine, PoolClient> {
  let client: Client | undefined // of all handles: it takes milliseconds to make, and holds no connection
  return {
    ...overDriver(driver, (statements, pool) => {
      client ??= build(virtualPool(pool))
      return createHandle(client, { statements })
    }),
    capabilities: (engine) => ({ ...driver.capabilities(engine), streaming: false }),
  }
}

/**
 * One more handle over a database of `pgAdapter`, in the same session and transaction.
 *
 * @example
 * ```ts
 * import { PrismaPg } from '@prisma/adapter-pg'
 * import { defineDatabase } from 'ambient-db'
 * import { pgAdapter } from 'ambient-db/pg'
 * import { prismaHandle } from 'ambient-db/prisma'
 * import { Pool } from 'pg'
 * import { PrismaClient } from './generated/prisma/client.js'
 *
 * const main = defineDatabase({ name: 'main', adapter: pgAdapter(() => new Pool()) })
 * export const db = prismaHandle(main, (pool) => new PrismaClient({ adapter: new PrismaPg(pool) }))
 * ```
 */
export function prismaHandle<Client extends PrismaClientLike>(
  main: AmbientDatabase<Pool, unknown>,
  build: (pool: Pool) => Client,
): Client {
  const client = build(virtualPool(main.db))
  return handleOver(main, (statements) => createHandle(client, { statements: statements as Statements<PoolClient> })) // of a database on pg
}

/** Where the operations of a handle run. */
interface Place {
  readonly statements: Statements<PoolClient>
  /** The transaction of Prisma's that the handle is of. */
  readonly block?: NativeBlock
}

/** A client, the client of a transaction, or a model of one: their members differ from schema to schema. */
type Members = Record<PropertyKey, unknown>
type Method = (...args: unknown[]) => unknown

/** What of Prisma's transactions is used: documented, and the types of clients hide it behind their schema. */
interface Transactor {
  $transaction(
    work: (transaction: Members) => Promise<never>,
    options: { maxWait: number; timeout: number },
  ): Promise<never>
}

/** What was asked of a client and is not run yet. */
interface Operation {
  readonly client: object
  /** It may be several statements, of which all are to be done or none. */
  readonly writes: boolean
  /** Prisma makes one query of those that come in one tick. */
  readonly batched: boolean
  /** Does it on the client of a transaction, also calls on its result (`db.user.findUnique(…).posts()`). */
  run(transaction: Members): unknown
}

const operations = new WeakMap<object, Operation>()
const rawMethods = new Set<PropertyKey>([
  '$queryRaw',
  '$queryRawUnsafe',
  '$queryRawTyped',
  '$executeRaw',
  '$executeRawUnsafe',
])
const ofWholeClient = new Set<PropertyKey>(['$connect', '$disconnect', '$extends', '$on'])
const writing = /^(?:create|update|upsert|delete)/

/** A client of which every operation runs at `place`. */
function createHandle<Client extends object>(client: Client, place: Place): Client {
  const models = new Map<PropertyKey, unknown>()
  const handle: Client = new Proxy(client, {
    get(_, key) {
      const value = (client as Members)[key]
      if (place.block && ofWholeClient.has(key)) return undefined // as in a transaction of Prisma's
      if (key === '$transaction') {
        return async (work: unknown, options?: TransactionConfig) => transact(client, place, work, options)
      }
      if (key === '$extends')
        return (extension: unknown) => createHandle((value as Method).call(client, extension) as object, place)
      if (key === '$disconnect') return async () => Promise.reject(disconnectRefused(place))
      if (typeof key === 'symbol' || key.startsWith('_')) return value
      if (rawMethods.has(key)) {
        return (...args: unknown[]) => {
          const run = (transaction: Members) => (transaction[key] as Method)(...args)
          return record((value as Method).apply(client, args), { client, writes: false, batched: false, run }, place)
        }
      }
      if (key === '$connect' || key === '$on') return (value as Method).bind(client)
      if (typeof value !== 'object' || value === null) return value // methods of extensions find the handle as `this`
      const known = models.get(key)
      if (known) return known
      const made = createModel(client, key, value as Members, handle, place)
      models.set(key, made)
      return made
    },
  })
  return handle
}

function createModel(client: object, name: string, model: Members, handle: object, place: Place): object {
  const proxy: object = new Proxy(model, {
    get(_, key) {
      if (key === '$parent') return handle
      const value = model[key]
      if (typeof value !== 'function') return value
      return (...args: unknown[]) => {
        const run = (transaction: Members) => ((transaction[name] as Members)[key] as Method)(...args)
        const [writes, batched] = [writing.test(String(key)), String(key).startsWith('findUnique')]
        return record(Reflect.apply(value, proxy, args), { client, writes, batched, run }, place)
      }
    },
  })
  return proxy
}

/** The promise of an operation, as Prisma made it, but what it starts runs at `place`. */
function record(promise: unknown, operation: Operation, place: Place): unknown {
  if (!isPrismaPromise(promise) || operations.has(promise)) return promise // of a method that an extension made
  let running: Promise<unknown> | undefined
  const start = () => {
    running ??= perform(operation, place)
    return running
  }
  const proxy = new Proxy(promise, {
    get(target, key) {
      if (key === 'then' || key === 'catch' || key === 'finally') {
        return (...args: unknown[]) => (start()[key] as Method).apply(start(), args)
      }
      const value = target[key]
      if (typeof value !== 'function' || key === 'requestTransaction') return value
      return (...args: unknown[]) => {
        const run = (transaction: Members) => ((operation.run(transaction) as Members)[key] as Method)(...args)
        return record(value(...args), { ...operation, run }, place)
      }
    },
  })
  operations.set(proxy, operation)
  return proxy
}

function isPrismaPromise(value: unknown): value is Members {
  return (value as Members | null | undefined)?.[Symbol.toStringTag] === 'PrismaPromise'
}

/** What Prisma sends in the turn of one operation. */
class Turn {
  readonly connection: PoolClient
  readonly statements: Statements<PoolClient>
  live = true
  /** What the first of its statements failed with. */
  failure: unknown
  readonly #operations = new Set<Promise<readonly Outcome[]>>()
  #sent: Promise<unknown> = Promise.resolve()

  constructor(connection: PoolClient, statements: Statements<PoolClient>) {
    this.connection = connection
    this.statements = statements
  }

  execute(operations: readonly Operation[]): Promise<readonly Outcome[]> {
    const outcomes = execute(operations, this)
    this.#operations.add(outcomes)
    const over = () => this.#operations.delete(outcomes)
    outcomes.then(over, over)
    return outcomes
  }

  /** Resolves when nobody runs anything in it: an extension may have started more than it waits for. */
  async join(): Promise<void> {
    while (this.#operations.size > 0) await Promise.allSettled(this.#operations)
  }

  /** Sends one statement at a time: pg is to stop queuing them. */
  send(query: QueryConfig | string): Promise<unknown> {
    if (!this.live) return Promise.reject(operationOver())
    const answer = this.#sent.then(() => this.connection.query(query as QueryConfig))
    this.#sent = answer.catch((error) => {
      this.failure ??= error
    })
    return answer
  }

  /** Resolves when all that was sent is answered. */
  async quiet(): Promise<void> {
    let sent: unknown
    while (sent !== this.#sent) {
      sent = this.#sent
      await sent
    }
  }
}

/** An operation that runs: it is found by the scope it runs in. */
interface Running {
  readonly turn: Turn
  client?: VirtualClient
}

const running = new WeakMap<Scope, Running>()

type Outcome = { readonly value: unknown } | { readonly error: unknown }

/** Operations that have one turn: one, or calls of `findUnique` in one tick, which Prisma makes one query of. */
class Group {
  readonly place: Place
  readonly scope: Scope | undefined
  readonly operations: Operation[]
  turn: Turn | undefined
  outcomes: readonly Outcome[] | undefined
  /** More of its kind may join, until the tick is over or something else is asked for. */
  open: boolean
  readonly done: Promise<void>
  readonly #full: Promise<void> | undefined

  constructor(first: Operation, place: Place, scope: Scope | undefined) {
    this.place = place
    this.scope = scope
    this.operations = [first]
    this.open = first.batched
    if (first.batched) this.#full = new Promise((resolve) => process.nextTick(resolve)).then(() => this.#close())
    this.done = this.#run()
  }

  takes({ client, batched }: Operation, { statements, block }: Place, scope: Scope | undefined): boolean {
    if (!batched || !this.open || this.operations[0]?.client !== client) return false
    return this.scope === scope && this.place.statements === statements && this.place.block === block
  }

  async #run(): Promise<void> {
    const { statements, block } = this.place
    const statement = async (connection: PoolClient) => {
      if (this.#full) await this.#full
      const turn = new Turn(connection, statements)
      this.turn = turn
      this.outcomes = await turn.execute(this.operations)
      await turn.join()
      turn.live = false
      if (turn.failure !== undefined) throw turn.failure // which the session judges, and not what Prisma made of it
    }
    await statements.run(statement, block).catch((error) => {
      if (!this.outcomes || error !== this.turn?.failure) throw error
    })
  }

  #close(): void {
    this.open = false
    if (latest === this) latest = undefined
  }
}

/** What others may join: nothing was asked for since. */
let latest: Group | undefined

/** Runs an operation as one statement of the session, or as part of one. */
async function perform(operation: Operation, place: Place): Promise<unknown> {
  const scope = currentScope()
  const around = scope && running.get(scope)?.turn
  // An extension asks for more in the middle of an operation, which has the turn of both.
  if (around?.live && around.statements === place.statements) {
    const [outcome] = await around.execute([operation])
    return unwrap(outcome as Outcome, around) // one for each
  }
  // As in Prisma, what an operation writes belongs together: without a transaction around it, it gets one.
  if (operation.writes && !(place.block ?? place.statements.createBlock()).inTransaction) {
    return inBlock(place, {}, (inner) => perform(operation, inner))
  }
  const joined = latest?.takes(operation, place, scope) ? latest : undefined
  const index = joined ? joined.operations.push(operation) - 1 : 0
  const group = joined ?? new Group(operation, place, scope)
  latest = group.open ? group : undefined
  await group.done
  return unwrap(group.outcomes?.[index] as Outcome, group.turn) // a group that is done has one for each
}

function unwrap(outcome: Outcome, turn: Turn | undefined): unknown {
  if ('value' in outcome) return outcome.value
  const { error } = outcome
  const failure = turn?.failure
  if (failure !== undefined && error !== failure && error instanceof Error && error.cause === undefined) {
    Object.defineProperty(error, 'cause', { value: failure, writable: true, configurable: true })
  }
  throw error
}

/**
 * Runs operations on the client of a transaction of Prisma's, whose statements all come to one client of the virtual pool,
 * whatever Prisma does with those of other operations (its batches of `findUnique` are across requests, and run in the context
 * of the first).
 */
async function execute(operations: readonly Operation[], turn: Turn): Promise<readonly Outcome[]> {
  const { client } = operations[0] as Operation // there is one at least, and all are of one client
  let link: Link
  try {
    link = takeLink(client, turn.connection) ?? (await openLink(client, turn))
  } catch (error) {
    return operations.map(() => ({ error }))
  }
  const parent = currentScope()
  const scope: Scope = { parent, context: parent?.context }
  running.set(scope, { turn, client: link.client })
  link.client.turn = turn
  const settle = async ({ run }: Operation): Promise<Outcome> => {
    try {
      return { value: await run(link.transaction) }
    } catch (error) {
      return { error: link.client.refusal ?? error }
    }
  }
  const outcomes = await runInScope(scope, () => Promise.all(operations.map(settle)))
  link.client.turn = undefined
  await turn.quiet()
  running.delete(scope)
  // Where all went well nothing of it is left that could come late, but for what an extension may have begun.
  const clean = turn.failure === undefined && outcomes.every((each) => 'value' in each)
  if (clean && !isExtended(client) && !links.has(turn.connection)) links.set(turn.connection, link)
  else link.end()
  return outcomes
}

/** A transaction of Prisma's, which is none at the database. */
interface Link {
  readonly of: object
  readonly transaction: Members
  readonly client: VirtualClient
  end(): void
}

/** What operations have left for those that follow while the connection is the session's. */
const links = new WeakMap<PoolClient, Link>()

function takeLink(client: object, connection: PoolClient): Link | undefined {
  const link = links.get(connection)
  if (link?.of !== client) return undefined
  links.delete(connection)
  return link
}

function dropLink(connection: PoolClient): void {
  links.get(connection)?.end()
  links.delete(connection)
}

const unlimited = 2 ** 31 - 1

function openLink(client: object, turn: Turn): Promise<Link> {
  const scope: Scope = { parent: undefined, context: undefined } // it outlives the operation, and is to pin nothing
  const own: Running = { turn }
  running.set(scope, own)
  return new Promise((resolve, reject) => {
    const work = (transaction: Members) =>
      new Promise<never>((_, fail) => {
        running.delete(scope)
        const end = () => fail(operationOver())
        if (own.client) resolve({ of: client, transaction, client: own.client, end })
        else fail(misbuilt(turn))
      })
    const options = { maxWait: unlimited, timeout: unlimited }
    runInScope(scope, () => (client as Transactor).$transaction(work, options)).catch((error) => {
      running.delete(scope)
      reject(own.client?.refusal ?? error)
    })
  })
}

/** Prisma's own sign of it: only a client that was constructed has `$on`. */
function isExtended(client: object): boolean {
  return (client as Members).$on === undefined
}

/** What `PrismaPg` takes for a pool: its clients are the turns of operations. */
class VirtualPool extends Pool {
  override connect(): Promise<PoolClient>
  override connect(callback: (error: Error | undefined) => void): undefined
  override connect(callback?: (error: Error | undefined) => void): Promise<PoolClient> | undefined {
    if (callback) {
      callback(outsideOfHandle())
      return undefined
    }
    return this.#connect()
  }

  async #connect(): Promise<PoolClient> {
    const scope = currentScope()
    const own = scope && running.get(scope)
    if (!own || own.client) throw outsideOfHandle()
    own.client = new VirtualClient(own.turn.statements.name)
    return own.client as unknown as PoolClient // what PrismaPg uses of one
  }

  override query(): never {
    return Promise.reject(outsideOfHandle()) as never // the overloads of pg.Pool stand for it
  }

  override async end(): Promise<void> {}
}

function virtualPool(pool: Pool): Pool {
  pool.on('release', (_, connection) => dropLink(connection as PoolClient)) // of a pool they are all that
  return new VirtualPool()
}

/** What `PrismaPg` takes for a client of the pool, for the operations on one connection. */
class VirtualClient extends EventEmitter {
  /** That of the operation that runs; without one there is only what begins and ends a transaction. */
  turn: Turn | undefined
  refusal: AmbientError | undefined
  readonly #database: string

  constructor(database: string) {
    super()
    this.#database = database
  }

  async query(query: QueryConfig): Promise<unknown> {
    const { text } = query
    if (this.turn) {
      if (!parseTransactionControl(text)) return this.turn.send(query)
      this.refusal ??= controlRefused(this.#database)
    } else if (text === 'BEGIN') {
      return { fields: [], rows: [], rowCount: 0 } // the session begins
    } else if (text.startsWith('SET TRANSACTION')) {
      const what = 'An isolation level was given to the client (`transactionOptions`).'
      const details = { database: this.#database }
      this.refusal ??= new AmbientError('AMBIENT_UNSUPPORTED', `${what} \`defineDatabase\` takes it.`, details)
    }
    throw this.refusal ?? operationOver() // Prisma tells nobody of a ROLLBACK that failed
  }

  release(): void {}
}

/** The options of `$transaction`. */
interface TransactionConfig {
  readonly isolationLevel?: string
  readonly timeout?: number
}

const levels = {
  ReadUncommitted: 'read uncommitted',
  ReadCommitted: 'read committed',
  RepeatableRead: 'repeatable read',
  Serializable: 'serializable',
} as const

/** A transaction of Prisma's: a block of the session. */
async function transact(
  client: object,
  place: Place,
  work: unknown,
  options: TransactionConfig = {},
): Promise<unknown> {
  const { name } = place.statements
  return inBlock(place, settingsOf(options, name), (inner) =>
    within(options.timeout, name, () =>
      typeof work === 'function' ? work(createHandle(client, inner)) : performAll(work as unknown[], inner),
    ),
  )
}

async function inBlock<Result>(
  { statements, block: around }: Place,
  settings: TransactionSettings,
  work: (place: Place) => Promise<Result>,
): Promise<Result> {
  const block = statements.createBlock()
  const begin = async () => {
    await block.begin(settings)
    try {
      const result = await work({ statements, block })
      await block.commit()
      return result
    } catch (error) {
      await block.rollback()
      throw error
    } finally {
      block.release()
    }
  }
  return around ? around.enter(() => block.enter(begin)) : block.enter(begin)
}

function settingsOf({ isolationLevel }: TransactionConfig, database: string): TransactionSettings {
  if (isolationLevel === undefined) return {}
  const level = levels[isolationLevel as keyof typeof levels]
  if (level) return { isolationLevel: level }
  throw new AmbientError('AMBIENT_UNSUPPORTED', `Isolation level '${isolationLevel}' is not supported.`, { database })
}

async function performAll(promises: unknown[], place: Place): Promise<unknown[]> {
  const all = promises.map((promise) => operations.get(promise as object))
  const results: unknown[] = []
  for (const each of all) {
    if (!each)
      throw new TypeError('All elements of the array need to be operations of this client that were not awaited.')
    results.push(await perform(each, place))
  }
  return results
}

/** Rejects when `work` takes longer than what its caller has given it. */
async function within<Result>(
  timeout: number | undefined,
  database: string,
  work: () => Result,
): Promise<Awaited<Result>> {
  if (timeout === undefined) return await work()
  let timer: NodeJS.Timeout | undefined
  const late = new Promise<never>((_, reject) => {
    const what = `A transaction of Prisma's took longer than its \`timeout\` of ${timeout} ms.`
    timer = setTimeout(() => reject(new AmbientError('AMBIENT_TIMEOUT', what, { database })), timeout)
  })
  try {
    return await Promise.race([work(), late])
  } finally {
    clearTimeout(timer)
  }
}

function operationOver(): Error {
  return new Error('The operation is over.')
}

function disconnectRefused({ statements }: Place): AmbientError {
  const what = 'The ambient client cannot be disconnected; `shutdown()` closes the pool.'
  return new AmbientError('AMBIENT_UNSUPPORTED', what, { database: statements.name })
}

function outsideOfHandle(): AmbientError {
  const what =
    'A client of Prisma was used that is none of the session: use the handle (`main.db`), also in extensions.'
  return new AmbientError('AMBIENT_UNSUPPORTED', what)
}

function misbuilt({ statements }: Turn): AmbientError {
  const what = 'The client was not built on a `PrismaPg` over the pool that was given to do so.'
  return new AmbientError('AMBIENT_INVALID_ARGUMENT', what, { database: statements.name })
}
