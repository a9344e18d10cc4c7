import type { PGlite, PGliteInterface, Transaction } from '@electric-sql/pglite'
import { type Adapter, callFactory, type Statements } from '../adapter.ts'
import { AmbientError } from '../errors.ts'
import { LeasedTransaction } from '../leased.ts'
import { checkDeferredOnPostgres, controlRefused, parseTransactionControl, transactionModes } from '../sql.ts'
import { notFromServer, postgresErrorTraits } from '../traits.ts'

/**
 * The adapter for PGlite, PostgreSQL in the process. The handle is a `PGlite` of which every query runs in the session;
 * `transaction()` is a savepoint of it, and a `Kysely` or Drizzle that is built on it shares the session. There is one
 * connection, so transactions wait for each other. What concerns the whole database (`listen`, `dumpDataDir`, `close`) is done
 * with `connect()`.
 *
 * @param factory makes the database at first use; gets the host if one is configured.
 * @example
 * ```ts
 * import { PGlite } from '@electric-sql/pglite'
 * import { defineDatabase, newContext } from 'ambient-db'
 * import { pgliteAdapter } from 'ambient-db/pglite'
 *
 * const main = defineDatabase({ name: 'main', adapter: pgliteAdapter(() => new PGlite('./data')) })
 * await newContext(() => main.db.query('insert into visits (path) values ($1)', ['/']))
 * ```
 */
export function pgliteAdapter<Engine extends PGliteInterface>(
  factory: (host: string) => Engine | Promise<Engine>,
): Adapter<PGlite, Engine, PGliteConnection> {
  return {
    capabilities: () => ({
      savepoints: true,
      streaming: false,
      cancelling: false,
      failedStatementAborts: true,
      transactionStatus: true,
      pipelining: false,
      lossDetection: false,
      commitLookup: false,
      singleConnection: true,
    }),
    createEngine: (host) => callFactory(factory, host),
    closeEngine: (engine) => engine.close(),
    acquire: async (engine) => new PGliteConnection(engine),
    release() {},
    begin: (connection, settings) => connection.begin(transactionModes(settings)),
    commit: (connection) => connection.commit(),
    rollback: (connection) => connection.rollback(),
    savepoint: (connection, name) => connection.exec(`SAVEPOINT ${name}`),
    rollbackTo: (connection, name) => connection.exec(`ROLLBACK TO SAVEPOINT ${name}`),
    releaseSavepoint: (connection, name) => connection.exec(`RELEASE SAVEPOINT ${name}`),
    checkDeferred: (connection) => connection.exec(checkDeferredOnPostgres),
    transactionStatus: (connection) => connection.status,
    traits(error) {
      const closed = error instanceof Error && error.message === 'PGlite is closed'
      return closed ? { ...notFromServer(error), reply: 'unsent' } : postgresErrorTraits(error)
    },
    createHandle: (statements) => createHandle(statements),
  }
}

/** The Sync message of the protocol, which is answered by the status of the transaction. */
const sync = new Uint8Array([0x53, 0, 0, 0, 4])
const statuses: Record<string, 'open' | 'aborted' | 'none'> = { T: 'open', E: 'aborted', I: 'none' }

/** The one connection of an engine, in a transaction of PGlite's own: whoever uses the engine itself waits for its end. */
export class PGliteConnection {
  readonly #engine: PGliteInterface
  #transaction: Transaction | undefined
  /** Ends the transaction: it is committed, unless it was rolled back. */
  #end: () => void = () => {}
  #ended: Promise<void> = Promise.resolve()
  status: 'open' | 'aborted' | 'none' = 'none'

  constructor(engine: PGliteInterface) {
    this.#engine = engine
  }

  async begin(modes: string): Promise<void> {
    let begun: (transaction: Transaction) => void = () => {}
    const beginning = new Promise<Transaction>((resolve) => {
      begun = resolve
    })
    this.#ended = this.#engine.transaction(async (transaction) => {
      begun(transaction)
      await new Promise<void>((resolve) => {
        this.#end = resolve
      })
    })
    this.#ended.catch(() => {}) // whoever ends it hears of it
    this.#transaction = await Promise.race([beginning, this.#ended.then(() => beginning)])
    this.status = 'open'
    if (modes) await this.#transaction.exec(`SET TRANSACTION${modes}`)
  }

  async commit(): Promise<'committed' | 'rolled-back'> {
    try {
      await this.#close()
      return 'committed'
    } catch (error) {
      // PGlite's own, for a COMMIT that was answered by ROLLBACK.
      if ((error as Error | undefined)?.message === 'Transaction was rolled back instead of committed')
        return 'rolled-back'
      throw error
    }
  }

  async rollback(): Promise<void> {
    if (!this.#transaction) return
    try {
      await this.#transaction.rollback()
    } finally {
      await this.#close()
    }
  }

  #close(): Promise<void> {
    this.#transaction = undefined
    this.status = 'none'
    this.#end()
    return this.#ended
  }

  /** Runs a statement, in the transaction if there is one. */
  async run<Result>(statement: (queries: Queries) => Promise<Result>): Promise<Result> {
    if (!this.#transaction) return statement(this.#engine)
    try {
      return await statement(this.#transaction)
    } finally {
      await this.#readStatus()
    }
  }

  exec(sql: string): Promise<unknown> {
    return this.run((queries) => queries.exec(sql))
  }

  async #readStatus(): Promise<void> {
    const { messages } = await this.#engine.runExclusive(() => this.#engine.execProtocol(sync, { syncToFs: false }))
    for (const { status } of messages as { status?: string }[]) this.status = statuses[status ?? ''] ?? this.status
  }
}

/** What a database of PGlite and a transaction on it have in common. */
type Queries = Pick<PGlite, 'query' | 'sql' | 'exec'>

/** Queries in the session; `lease` is the transaction that they belong to. */
function queriesIn(statements: Statements<PGliteConnection>, lease?: LeasedTransaction<PGliteConnection>): Queries {
  const run = async <Result>(text: string, nothing: Result, statement: (queries: Queries) => Promise<Result>) => {
    const control = parseTransactionControl(text)
    if (!control) return statements.run((connection) => connection.run(statement), lease?.block)
    if (!lease) throw controlRefused(statements.name)
    await lease.control(control)
    return nothing
  }
  const none = { rows: [], fields: [], affectedRows: 0 }
  return {
    query: (text, parameters, options) => run(text, { ...none }, (queries) => queries.query(text, parameters, options)),
    sql: (parts, ...values) => run(parts[0] ?? '', { ...none }, (queries) => queries.sql(parts, ...values)),
    exec: (text, options) => run(text, [], (queries) => queries.exec(text, options)),
  }
}

/** What is not of a session: it goes by the engine, `await connect()`. */
const unsupported = [
  'close',
  'describeQuery',
  'execProtocol',
  'execProtocolRaw',
  'execProtocolRawStream',
  'runExclusive',
  'listen',
  'unlisten',
  'onNotification',
  'offNotification',
  'dumpDataDir',
  'refreshArrayTypes',
  'clone',
] as const

function createHandle(statements: Statements<PGliteConnection>): PGlite {
  const refusals = unsupported.map((name) => [
    name,
    () => {
      const what = `The ambient PGlite has no ${name}(); that of the engine is reached by \`connect()\`.`
      throw new AmbientError('AMBIENT_UNSUPPORTED', what)
    },
  ])
  const handle = {
    ...Object.fromEntries(refusals),
    ...queriesIn(statements),
    ready: true,
    closed: false,
    debug: 0,
    waitReady: Promise.resolve(),
    transaction: (work: (transaction: Transaction) => Promise<unknown>) => transact(statements, work),
  }
  return handle as unknown as PGlite // it has the members of one that sessions allow
}

/** A transaction as of PGlite: a savepoint of the session. */
async function transact<Result>(
  statements: Statements<PGliteConnection>,
  work: (transaction: Transaction) => Promise<Result>,
): Promise<Result> {
  const lease = new LeasedTransaction(statements)
  let closed = false
  const transaction: Transaction = {
    ...queriesIn(statements, lease),
    async rollback() {
      closed = true
      await lease.control({ kind: 'rollback' })
    },
    async listen() {
      throw new AmbientError('AMBIENT_UNSUPPORTED', 'A session cannot listen; the engine can, by `connect()`.')
    },
    get closed() {
      return closed
    },
  }
  try {
    return await lease.run({}, () => work(transaction))
  } finally {
    closed = true
  }
}
