import { setTimeout as sleep } from 'node:timers/promises'
import type { Pool, RowDataPacket } from 'mysql2/promise'

/** A connection as the server knows it. */
export interface MysqlConnection {
  readonly id: number
  readonly user: string
  readonly inTransaction: boolean
  /** It is in a transaction, or at work. */
  readonly busy: boolean
  /** What it does. */
  readonly text: string
}

const activity = `select p.id, p.user, p.command, t.trx_id is not null as inTransaction,
         concat(p.command, ' ', coalesce(p.info, t.trx_state, '')) as text
    from information_schema.processlist p left join information_schema.innodb_trx t on t.trx_mysql_thread_id = p.id
   where p.id <> connection_id()`

/**
 * Looks at the server for all who ask at the same time: it shows what it showed before to whoever asks again within 100 ms.
 * The answer is from after the question.
 */
export function lookAt(witness: Pool): () => Promise<MysqlConnection[]> {
  let next: Promise<MysqlConnection[]> | undefined
  let last: Promise<unknown> = Promise.resolve()
  return () => {
    next ??= last
      .then(() => sleep(110))
      .then(async () => {
        next = undefined
        const [rows] = await witness.query<RowDataPacket[]>(activity)
        return rows.map(({ id, user, command, inTransaction, text }) => ({
          ...{ id, user, text, inTransaction: inTransaction === 1 },
          busy: inTransaction === 1 || command !== 'Sleep',
        }))
      })
    last = next.catch(() => {})
    return next
  }
}
