import { PGlite, type PGliteInterface } from '@electric-sql/pglite'
import type { AmbientDatabase } from 'ambient-db'
import type { AdapterHarness, EngineProbe, HarnessOptions } from 'ambient-db/conformance'

const selectIds = 'select id from items order by id'

/** One instance serves all engines, because it takes seconds to make one: closing such an engine closes the way to it alone. */
class PGliteInstance {
  readonly pglite = new PGlite()
  /** What is seen from outside while a transaction is open: there is no second connection to look through. */
  #committed: number[] = []
  #busy = 0

  async ids(): Promise<number[]> {
    return this.#busy > 0 ? this.#committed : this.#read()
  }

  async #read(): Promise<number[]> {
    const { rows } = await this.pglite.query<{ id: number }>(selectIds)
    return rows.map(({ id }) => id)
  }

  open(host: string | undefined): { engine: PGliteInterface; probe: EngineProbe } {
    const { pglite } = this
    let [closed, busy] = [false, 0]
    const opened = () => {
      if (closed) throw new Error('PGlite is closed')
      return pglite
    }
    const engine = {
      query: async (...args: Parameters<PGlite['query']>) => opened().query(...args),
      sql: async (...args: Parameters<PGlite['sql']>) => opened().sql(...args),
      exec: async (...args: Parameters<PGlite['exec']>) => opened().exec(...args),
      execProtocol: async (...args: Parameters<PGlite['execProtocol']>) => pglite.execProtocol(...args),
      runExclusive: (work: () => Promise<unknown>) => pglite.runExclusive(work),
      transaction: async (work: Parameters<PGlite['transaction']>[0]) => {
        return opened()
          .transaction(async (transaction) => {
            const { rows } = await transaction.query<{ id: number }>(selectIds)
            this.#committed = rows.map(({ id }) => id)
            this.#busy++
            busy++
            return work(transaction)
          })
          .finally(() => {
            this.#busy = busy = 0
          })
      },
      close: async () => {
        closed = true
      },
    }
    const probe: EngineProbe = {
      host,
      get open() {
        return closed ? 0 : 1
      },
      get busy() {
        return busy
      },
      get closed() {
        return closed
      },
    }
    return { engine: engine as unknown as PGliteInterface, probe }
  }
}

/** What a harness for PGlite needs to know of one library. */
export interface PGliteSubject<Handle> extends Pick<AdapterHarness<Handle>, 'transaction' | 'driverError'> {
  define(make: (host?: string) => PGliteInterface, options: HarnessOptions<Handle>): AmbientDatabase<Handle, unknown>
  query(handle: Handle, sql: string, parameters?: unknown[]): Promise<{ rows: unknown[] }>
  endBehindTheBack?(handle: Handle): Promise<unknown>
}

/** Makes an instance with the tables of the suite; `close` closes it. */
export async function pgliteHarness<Handle>(
  subject: PGliteSubject<Handle>,
): Promise<AdapterHarness<Handle> & { close(): Promise<void> }> {
  const instance = new PGliteInstance()
  await instance.pglite.exec(`
    create table items (id int primary key, n int not null default 0);
    create table orphans (item int references items deferrable initially deferred);
  `)
  let probes: EngineProbe[] = []
  const { query, define, ...operations } = subject
  return {
    ...operations,
    capabilities: {
      savepoints: true,
      streaming: false,
      cancelling: false,
      failedStatementAborts: true,
      transactionStatus: true,
      pipelining: false,
      lossDetection: false,
      commitLookup: false,
      singleConnection: true,
    },
    define({ connections: _, ...options } = {}) {
      const make = (host?: string) => {
        const { engine, probe } = instance.open(host)
        probes.push(probe)
        return engine
      }
      return define(make, options)
    },
    async reset() {
      probes = []
      await instance.pglite.exec('truncate items, orphans')
    },
    engines: () => probes,
    insert: (handle, id) => query(handle, 'insert into items (id) values ($1)', [id]),
    ids: async (handle) => (await query(handle, selectIds)).rows.map((row) => (row as { id: number }).id),
    fail: (handle) => query(handle, 'select * from missing'),
    witness: () => instance.ids(),
    spoilCommit: (handle) => query(handle, 'insert into orphans values (-1)'),
    close: () => instance.pglite.close(),
  }
}
