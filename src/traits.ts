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

/** The connection goes away, perhaps after the work was done: shutdown, killed (MariaDB, MySQL), idle for too long. */
const mysqlFarewells = [1053, 1927, 3169, 4031]
/** Lock wait timeout, and a row that has changed since the snapshot (MariaDB). Deadlocks have SQLSTATE 40001. */
const mysqlConflicts = [1205, 1020]

/** Reads an error of a MySQL or MariaDB server, as mysql2 throws it; anything without errno and SQLSTATE is none. */
export function mysqlErrorTraits(error: unknown): ErrorTraits {
  const { errno, sqlState } = (error ?? {}) as { errno?: unknown; sqlState?: unknown }
  if (typeof errno !== 'number' || typeof sqlState !== 'string') {
    const lost = error instanceof Error && error.message === "Can't add new command when connection is in closed state"
    // An error of the client's may come in the middle of an answer: that it was never sent shows only where it is thrown at once.
    return lost ? { reply: 'unsent', retryable: false, lost } : { reply: 'unanswered', retryable: false }
  }
  const doubtful = mysqlFarewells.includes(errno) || sqlState.startsWith('08')
  const retryable = mysqlConflicts.includes(errno) || sqlState === '40001'
  return { reply: doubtful ? 'unanswered' : 'answered', retryable }
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
