import { detach } from 'ambient-db'
import { expectNoOpenSessions, type Sandbox, sandbox } from 'ambient-db/testing'
import type { Subject } from '../real-commit/scenarios.contract.ts'

/** The scenarios in a transaction that is rolled back after each of them. */
export function sandboxed(url: string, close: () => Promise<void>): Subject {
  let box: Sandbox<unknown> | undefined
  const load = () => import('../database.ts') // which reads DATABASE_URL when it is loaded
  return {
    url,
    looksInside: false,
    async journal() {
      const { main } = await load()
      const rows = await detach(() => main.db.selectFrom('journal').select('text').orderBy('id').execute())
      return rows.map(({ text }) => text)
    },
    async clear() {
      await box?.rollback()
      const { main } = await load()
      box = sandbox(main)
      await box.begin()
    },
    async openTransactions() {
      const { main } = await load()
      try {
        expectNoOpenSessions(main)
        return 0
      } catch {
        return 1
      }
    },
    leave: async () => box?.rollback(),
    close,
  }
}
