import type { ErrorTraits } from './adapter.ts'

/** Reads an error of a PostgreSQL server; anything without severity and SQLSTATE is none. */
export function postgresErrorTraits(error: unknown): ErrorTraits {
  const { severity, code } = (error ?? {}) as { severity?: unknown; code?: unknown }
  if (typeof severity !== 'string' || typeof code !== 'string' || !/^[0-9A-Z]{5}$/.test(code)) {
    // What pg says instead of sending a query on a connection that it knows to be gone.
    const lost = error instanceof Error && error.message.endsWith(' is not queryable')
    return lost ? { reply: 'unsent', retryable: false, lost } : notFromServer(error)
  }
  // 40003: completion unknown. 08, 57P01-57P03: the connection is going away, perhaps after the work was done.
  const doubtful = code === '40003' || /^(?:08|57P0[1-3])/.test(code) || severity === 'FATAL' || severity === 'PANIC'
  return { reply: doubtful ? 'unanswered' : 'answered', retryable: code === '40001' || code === '40P01' }
}

const sqliteBusy = 5

/** Reads an error of SQLite, as `node:sqlite` and better-sqlite3 throw it. */
export function sqliteErrorTraits(error: unknown): ErrorTraits {
  const { code, errcode } = (error ?? {}) as { code?: unknown; errcode?: unknown }
  if (typeof code !== 'string' || !(code === 'ERR_SQLITE_ERROR' || code.startsWith('SQLITE_')))
    return notFromServer(error)
  const busy = code.startsWith('SQLITE_BUSY') || (typeof errcode === 'number' && (errcode & 0xff) === sqliteBusy)
  return { reply: 'answered', retryable: busy, busy }
}

/** An error that no server can have sent: bad arguments never left the process, of anything else the effect is not known. */
export function notFromServer(error: unknown): ErrorTraits {
  const unsent = error instanceof TypeError || error instanceof RangeError
  return { reply: unsent ? 'unsent' : 'unanswered', retryable: false }
}
