import type { TransactionSettings } from './adapter.ts'
import { AmbientError } from './errors.ts'

/** SQL text that begins or ends a transaction or savepoint. */
export type TransactionControl =
  | { readonly kind: 'begin'; readonly settings: TransactionSettings }
  | { readonly kind: 'commit' }
  | { readonly kind: 'rollback' }
  | { readonly kind: 'other' }
  | { readonly kind: 'savepoint'; readonly name: string }
  | { readonly kind: 'rollback to'; readonly name: string }
  | { readonly kind: 'release'; readonly name: string }

/** What may stand before a statement: space, comments (but not those that MySQL executes), empty statements. */
const leading = /^(?:[\s;]|(?:--|#)[^\n]*(?:\n|$)|\/\*(?!M?!)(?:[^*]|\*(?!\/))*\*\/)+/
const candidate = /^(?:begin|start|commit|end|rollback|abort|savepoint|release)\b/i
const noise = /(?: (?:work|transaction))?(?: and no chain)?$/
const savepoint = /^(savepoint|rollback to|release)(?: savepoint)? (?:(["`])([^"`]+)\2|(\w+))$/
const modes =
  /^(?:isolation level (?:serializable|repeatable read|read committed|read uncommitted)|read only|read write|(?:not )?deferrable)$/

/** The statement without what may stand before it. */
export function withoutLeading(text: string): string {
  return text.replace(leading, '')
}

/** Reads one statement of transaction control; `undefined` for any other SQL. `'other'` is control that a session cannot do. */
export function parseTransactionControl(text: string): TransactionControl | undefined {
  const start = withoutLeading(text)
  if (!candidate.test(start)) return undefined
  const sql = start.trim().replace(/\s*;$/, '').replace(/\s+/g, ' ')
  if (sql.includes(';')) return undefined
  const lower = sql.toLowerCase()
  const named = savepoint.exec(lower)
  if (named) {
    const quoted = /["`]([^"`]+)["`]$/.exec(sql)?.[1] // its case counts
    const name = quoted ?? (named[4] as string) // one of both matched
    return { kind: named[1] as 'savepoint' | 'rollback to' | 'release', name }
  }
  const verb = lower.replace(noise, '')
  if (verb === 'commit' || verb === 'end') return { kind: 'commit' }
  if (verb === 'rollback' || verb === 'abort') return { kind: 'rollback' }
  const settings = /^(?:begin|start)(?: transaction| work)?(?: (.*))?$/.exec(lower)
  return settings ? beginning(settings[1]) : { kind: 'other' }
}

function beginning(text = ''): TransactionControl {
  const words = text.split(/(?<!not),? (?=isolation|read (?:only|write)|(?:not )?deferrable)|, /).filter(Boolean)
  if (!words.every((word) => modes.test(word))) return { kind: 'other' }
  const level = words.find((word) => word.startsWith('isolation level '))?.slice('isolation level '.length)
  const settings = {
    ...(level && { isolationLevel: level as NonNullable<TransactionSettings['isolationLevel']> }), // `modes` has checked it
    ...((words.includes('read only') || words.includes('read write')) && { readOnly: words.includes('read only') }),
    ...((words.includes('deferrable') || words.includes('not deferrable')) && {
      deferrable: words.includes('deferrable'),
    }),
  }
  return { kind: 'begin', settings }
}

/** The error for control of the transaction where the session has it. */
export function controlRefused(database: string): AmbientError {
  const what = 'SQL that begins or ends a transaction was refused unsent.'
  return new AmbientError('AMBIENT_TRANSACTION_CONTROL', what, { database })
}

/** The modes of BEGIN or SET TRANSACTION in standard SQL, with a space before each. */
export function transactionModes({ isolationLevel, readOnly, deferrable }: TransactionSettings): string {
  let modes = ''
  if (isolationLevel !== undefined) modes += ` ISOLATION LEVEL ${isolationLevel.toUpperCase()}`
  if (readOnly !== undefined) modes += readOnly ? ' READ ONLY' : ' READ WRITE'
  if (deferrable !== undefined) modes += deferrable ? ' DEFERRABLE' : ' NOT DEFERRABLE'
  return modes
}

/**
 * Makes PostgreSQL check what is deferred, as COMMIT would, and defers again what was. Which constraints those are is looked up
 * each time: a test may have made some.
 */
export const checkDeferredOnPostgres = `DO $$
  DECLARE deferred record;
  BEGIN
    SET CONSTRAINTS ALL IMMEDIATE;
    FOR deferred IN
      SELECT DISTINCT nspname, conname FROM pg_constraint JOIN pg_namespace ON pg_namespace.oid = connamespace WHERE condeferred
    LOOP
      EXECUTE format('SET CONSTRAINTS %I.%I DEFERRED', deferred.nspname, deferred.conname);
    END LOOP;
  END
$$`
