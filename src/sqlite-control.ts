import type { Adapter, Capabilities, TransactionSettings } from './adapter.ts'
import { AmbientError } from './errors.ts'
import { sqliteErrorTraits } from './traits.ts'

/** What an adapter of SQLite does by text, and what it knows. */
type Control<Connection> = Omit<
  Adapter<unknown, unknown, Connection>,
  'createEngine' | 'closeEngine' | 'createHandle' | 'acquire' | 'release'
>

/** Transactions of SQLite, through whatever runs a text on a connection and resolves with its rows, if it has any. */
export function sqliteControl<Connection extends object>(
  ask: (connection: Connection, sql: string) => Promise<readonly unknown[]>,
  { streaming }: Pick<Capabilities, 'streaming'>,
): Control<Connection> {
  const setReadOnly = readOnlySwitch(ask)
  return {
    capabilities: () => ({
      savepoints: true,
      streaming,
      cancelling: false,
      failedStatementAborts: false,
      transactionStatus: false,
      pipelining: false,
      lossDetection: false,
      commitLookup: false,
      singleConnection: true,
    }),
    async begin(connection, settings) {
      assertKnown(settings)
      await ask(connection, settings.readOnly ? 'begin' : 'begin immediate')
      if (settings.readOnly) await setReadOnly(connection, true)
    },
    async commit(connection) {
      await ask(connection, 'commit')
      await setReadOnly(connection, false)
      return 'committed'
    },
    async rollback(connection) {
      await setReadOnly(connection, false)
      await ask(connection, 'rollback').catch((error: unknown) => {
        if (!isWithoutTransaction(error)) throw error
      })
    },
    savepoint: (connection, name) => ask(connection, `savepoint ${name}`),
    rollbackTo: (connection, name) => ask(connection, `rollback to ${name}`),
    releaseSavepoint: (connection, name) => ask(connection, `release ${name}`),
    probeTransaction: (connection) => probeByBegin((sql) => ask(connection, sql)),
    checkDeferred: (connection) => checkForeignKeys((sql) => ask(connection, sql)),
    traits: sqliteErrorTraits,
  }
}

/** SQLite has no read-only transactions, but connections that refuse to write. */
export function readOnlySwitch<Connection extends object>(
  ask: (connection: Connection, sql: string) => Promise<unknown>,
): (connection: Connection, on: boolean) => Promise<void> {
  const readOnly = new WeakSet<Connection>()
  return async (connection, on) => {
    if (on === readOnly.has(connection)) return
    await ask(connection, `pragma query_only = ${on ? 'on' : 'off'}`)
    if (on) readOnly.add(connection)
    else readOnly.delete(connection)
  }
}

/** BEGIN inside a transaction fails and does no harm; if it succeeds, the engine had ended the transaction. */
export async function probeByBegin(ask: (sql: string) => Promise<unknown>): Promise<'open' | 'none'> {
  try {
    await ask('begin')
  } catch {
    return 'open'
  }
  await ask('rollback')
  return 'none'
}

/** What ROLLBACK says where there is no transaction. */
export function isWithoutTransaction(error: unknown): boolean {
  return String(error).includes('no transaction is active')
}

/** SQLite's transactions are serializable, and nothing else. */
function assertKnown({ isolationLevel, deferrable }: TransactionSettings): void {
  const known = isolationLevel === undefined || isolationLevel === 'serializable'
  if (known && deferrable === undefined) return
  const what = deferrable === undefined ? `Isolation level '${isolationLevel}'` : '`deferrable`'
  throw new AmbientError('AMBIENT_UNSUPPORTED', `${what} is not known to SQLite.`)
}

/** Finds what a COMMIT would find of foreign keys that are deferred; `ask` resolves with rows. */
export async function checkForeignKeys(ask: (sql: string) => Promise<readonly unknown[]>): Promise<void> {
  const [enforced] = await ask('pragma foreign_keys')
  if (Object.values(Object(enforced))[0] !== 1) return
  const broken = await ask('pragma foreign_key_check')
  if (broken.length === 0) return
  throw Object.assign(new Error('FOREIGN KEY constraint failed'), { code: 'SQLITE_CONSTRAINT_FOREIGNKEY' }) // as SQLite says it
}
