import type { CommitStatus } from './adapter.ts'

/** Sends one statement and resolves with its rows. */
export type PostgresQuery = (sql: string, values?: string[]) => Promise<{ readonly rows: unknown[] }>

/** Whose transaction it is: copies and successors of a server have the same. */
const system = '(select system_identifier::text from pg_control_system())'

/**
 * After a crash, and on a standby that was promoted, ids that were given out but never reached the disk are given out again.
 * A promotion begins a new timeline, and a crash costs a server its statistics; a restart keeps both.
 * https://www.postgresql.org/docs/current/monitoring-stats.html
 */
const era = `left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) || '/' ||
  extract(epoch from pg_stat_get_bgwriter_stat_reset_time())`

/** {@link Adapter.identifyTransaction} for PostgreSQL: the id, if one was assigned, and the server that assigned it. */
export async function identifyTransaction(query: PostgresQuery): Promise<string | undefined> {
  // A standby has no ids, and no position to write at.
  const { rows } = await query(`select concat_ws(' ', id, ${system}, ${era}) as identity
    from pg_current_xact_id_if_assigned() id where id is not null`)
  return (rows as { identity: string }[])[0]?.identity
}

/** {@link Adapter.lookUpTransaction} for PostgreSQL, on a connection that is used for nothing else. */
export async function lookUpTransaction(query: PostgresQuery, identity: string): Promise<CommitStatus> {
  const [id = '', itsSystem, itsEra] = identity.split(' ')
  await query('begin') // behind a pooler, what follows is asked of one server
  const { rows } = await query(`select ${system} as system, case when not pg_is_in_recovery() then ${era} end as era`)
  const [server] = rows as { system: string; era: string | null }[]
  if (server?.system !== itsSystem) return 'unknown'
  if (server?.era === null) return 'pending' // a standby, which knows only what it was told, and may be promoted
  const status = await statusOf(query, id)
  if (status === 'in progress') return 'pending' // also while it waits for a trigger or a standby, its client gone
  // Had it committed, no other could have got its id: whatever the id means now, this one is lost.
  if (status === 'aborted' || status === 'in the future') return 'rolled-back'
  return status === 'committed' && server?.era === itsEra ? 'committed' : 'unknown'
}

/** `null`: so long ago that it was forgotten. */
async function statusOf(query: PostgresQuery, id: string): Promise<string | null | undefined> {
  try {
    const { rows } = await query('select pg_xact_status($1::xid8) as status', [id])
    return (rows as { status: string | null }[])[0]?.status
  } catch (error) {
    if ((error as { code?: unknown } | null)?.code === '22023') return 'in the future'
    throw error
  }
}
