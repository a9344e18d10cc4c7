import type { AdapterHarness } from 'ambient-db/conformance'
import { knexAdapter } from 'ambient-db/knex'
import type { Knex } from 'knex'
import { type OwnPoolProbe, withOwnPools } from './own-pools.ts'

/** Sends SQL now, as the operations of the suite are to do. */
export function sendRaw(handle: Knex, sql: string, parameters: unknown[] = []): Promise<unknown> {
  return handle.raw(sql, parameters as Knex.RawBinding[]).then((result: unknown) => result)
}

/** How the suite uses a Knex, whatever its dialect. */
export const knexOperations = {
  async *stream(handle) {
    for await (const { id } of handle('items').select('id').orderBy('id').stream({ highWaterMark: 1 })) yield id
  },
  transaction: (handle, work) =>
    handle.transaction((trx) => work({ insert: async (id) => await trx('items').insert({ id }) })),
  async beginTransaction(handle) {
    const trx = await handle.transaction()
    return {
      insert: async (id) => await trx('items').insert({ id }),
      commit: async () => await trx.commit(),
      rollback: async () => await trx.rollback(),
    }
  },
} satisfies Partial<AdapterHarness<Knex>>

/** An engine with the pool of Knex, and what became of its connections. */
class KnexProbe implements OwnPoolProbe {
  readonly host: string | undefined
  readonly living: Set<unknown> = new Set()
  readonly #knex: Knex
  readonly #pool: { numUsed(): number; readonly free: readonly { readonly resource: { __knex__disposed?: unknown } }[] }

  constructor(host: string | undefined, made: Knex) {
    this.host = host
    this.#knex = made
    this.#pool = made.client.pool
  }

  get open(): number {
    // Knex forgets one that it is not to use any more when it looks for the next.
    return this.busy + this.#pool.free.filter(({ resource }) => !resource.__knex__disposed).length
  }

  get busy(): number {
    return this.#pool.numUsed()
  }

  get closed(): boolean {
    return this.#knex.client.pool === undefined
  }
}

type Made = (connections: number, afterCreate: NonNullable<Knex.PoolConfig['afterCreate']>) => Knex

/** A harness for a driver, with engines over the pool of Knex. */
export function withKnexPools<Harness extends AdapterHarness<Knex>>(base: Harness, make: Made): Harness {
  return withOwnPools(base, knexAdapter<Knex>, (connections, host) => {
    const watch = (connection: NodeJS.EventEmitter, done: (error: null, connection: unknown) => void) => {
      probe.living.add(connection)
      const gone = () => probe.living.delete(connection)
      connection.on('end', gone).on('error', gone)
      done(null, connection)
    }
    const engine = make(connections, watch)
    const probe = new KnexProbe(host, engine)
    return { engine, probe }
  })
}
