import { CompiledQuery, type Kysely } from 'kysely'
import type { PostgresSubject } from './support.ts'

/** The tables of the suite. */
export interface Tables {
  items: { id: number; n: number | undefined }
  orphans: { item: number }
}

/** How the suite uses a Kysely handle, whatever its dialect. */
export const kyselyOperations = {
  query: (handle, sql, parameters = []) => handle.executeQuery(CompiledQuery.raw(sql, parameters)),
  async *stream(handle) {
    for await (const { id } of handle.selectFrom('items').select('id').orderBy('id').stream(1)) yield id
  },
  transaction: (handle, work) =>
    handle
      .transaction()
      .execute((transaction) =>
        work({ insert: (id) => transaction.insertInto('items').values({ id, n: 0 }).execute() }),
      ),
  async beginTransaction(handle) {
    const transaction = await handle.startTransaction().execute()
    return {
      insert: (id) => transaction.insertInto('items').values({ id, n: 0 }).execute(),
      commit: () => transaction.commit().execute(),
      rollback: () => transaction.rollback().execute(),
    }
  },
} satisfies Omit<PostgresSubject<Kysely<Tables>>, 'define'>
