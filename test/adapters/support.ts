import type { AmbientDatabase } from 'ambient-db'
import {
  type AdapterHarness,
  adapterSuite,
  type EngineProbe,
  type GateProbe,
  type HarnessOptions,
} from 'ambient-db/conformance'
import { Pool, type PoolConfig } from 'pg'
import { it } from 'vitest'
import type { Capabilities } from '../../src/adapter.ts'
import { type DatabaseGate, databaseGate, until } from '../support/gate.ts'
import type { TestDatabase } from '../support/postgres.ts'
import { startProxy, type WireProxy } from '../support/proxy.ts'

/** Lets vitest run the suite. `harness` is called inside of each test. */
export function itHoldsTheSuite<Handle>(harness: () => AdapterHarness<Handle>): void {
  for (const { name, run } of adapterSuite) {
    it(name, async (test) => {
      const result = await run(harness())
      if (result) test.skip(result.skipped)
    })
  }
}

const postgresCapabilities: Capabilities = {
  savepoints: true,
  streaming: true,
  cancelling: true,
  failedStatementAborts: true,
  transactionStatus: true,
  pipelining: false,
  lossDetection: true,
  commitLookup: true,
  singleConnection: false,
}

/** What a harness for PostgreSQL needs to know of one library, whose engine is a pool of pg's unless it says so. */
export interface PostgresSubject<Handle, Engine = Pool>
  extends Pick<AdapterHarness<Handle>, 'transaction' | 'beginTransaction' | 'stream' | 'driverError'> {
  readonly capabilities?: Partial<Capabilities>
  define(make: (host?: string) => Engine, options: HarnessOptions<Handle>): AmbientDatabase<Handle, unknown>
  query(handle: Handle, sql: string, parameters?: unknown[]): Promise<{ rows: unknown[] }>
}

/** An engine as a harness sees it. */
export interface PostgresProbe extends EngineProbe {
  /** Connections that the client has not seen the end of. */
  readonly living: number
}

/** Makes an engine of so many connections, and what looks at it. */
export type MakeEngine<Engine> = (
  url: string,
  connections: number,
  host?: string,
) => { readonly engine: Engine; readonly probe: PostgresProbe }

/** A pool and what became of its clients. */
class PoolProbe implements PostgresProbe {
  readonly host: string | undefined
  readonly pool: Pool
  readonly #living = new Set<unknown>()

  constructor(host: string | undefined, pool: Pool) {
    this.host = host
    this.pool = pool
    pool.on('connect', (client) => {
      this.#living.add(client)
      client.once('end', () => this.#living.delete(client))
    })
  }

  get open(): number {
    return this.pool.totalCount
  }

  get busy(): number {
    return this.pool.totalCount - this.pool.idleCount
  }

  get closed(): boolean {
    return this.pool.ended
  }

  get living(): number {
    return this.#living.size
  }
}

type PostgresHarness<Handle> = AdapterHarness<Handle> & { readonly wire: WireProxy; close(): Promise<void> }

/** Creates the tables of the suite and the harness; `close` stops its proxy. */
export function postgresHarness<Handle>(
  database: TestDatabase,
  subject: PostgresSubject<Handle>,
  config: PoolConfig = {},
): Promise<PostgresHarness<Handle>> {
  return postgresHarnessOver(database, subject, (url, max, host) => {
    const engine = new Pool({ connectionString: url, max, ...config })
    if (subject.capabilities?.lossDetection === false) engine.on('connect', (client) => client.on('error', () => {}))
    engine.on('error', () => {})
    return { engine, probe: new PoolProbe(host, engine) }
  })
}

/** The same over other engines. */
export async function postgresHarnessOver<Handle, Engine>(
  database: TestDatabase,
  subject: PostgresSubject<Handle, Engine>,
  makeEngine: MakeEngine<Engine>,
): Promise<PostgresHarness<Handle>> {
  const { rows } = database.witness
  await rows('create table items (id int primary key, n int not null default 0)')
  await rows('create table orphans (item int references items deferrable initially deferred)')
  await rows(`create table gates (key int);
    create function pass_gate() returns trigger language plpgsql as
      'begin perform pg_advisory_xact_lock_shared(new.key); return null; end';
    create constraint trigger gate after insert on gates deferrable initially deferred
      for each row execute function pass_gate()`)
  const wire = await startProxy(database.url)
  let probes: PostgresProbe[] = []
  const probe = ({ key, open }: DatabaseGate, pass: GateProbe<Handle>['pass']): GateProbe<Handle> => {
    const waiting = async () => {
      const locks = await rows(
        `select 1 from pg_locks join pg_database on pg_database.oid = database
          where datname = current_database() and locktype = 'advisory' and objid = $1 and not granted`,
        [key],
      )
      return locks.length > 0
    }
    return {
      pass,
      reached: () => until(waiting, 'a statement at the gate'),
      left: () => until(async () => !(await waiting()), 'the gate to be left'),
      open,
    }
  }
  const { capabilities, query, define, ...operations } = subject
  return {
    ...operations,
    wire,
    close: () => wire.close(),
    capabilities: { ...postgresCapabilities, ...capabilities },
    define({ connections = 10, ...options } = {}) {
      const make = (host?: string) => {
        const made = makeEngine(wire.url, connections, host)
        probes.push(made.probe)
        return made.engine
      }
      return define(make, options)
    },
    async reset() {
      probes = []
      await rows('truncate items, orphans')
    },
    engines: () => probes,
    insert: (handle, id) => query(handle, 'insert into items (id) values ($1)', [id]),
    ids: async (handle) => {
      const result = await query(handle, 'select id from items order by id')
      return (result.rows as { id: number }[]).map(({ id }) => id)
    },
    fail: (handle) => query(handle, 'select * from missing'),
    witness: async () => (await rows<{ id: number }>('select id from items order by id')).map(({ id }) => id),
    spoilCommit: (handle) => query(handle, 'insert into orphans values (-1)'),
    endBehindTheBack: (handle) => query(handle, 'select 1; commit'),
    change: (handle, id) => query(handle, 'update items set n = n + 1 where id = $1', [id]),
    changeElsewhere: (id) => rows('update items set n = n + 1 where id = $1', [id]),
    async gate() {
      const gate = await databaseGate(database.url)
      return probe(gate, (handle) => query(handle, gate.sql))
    },
    async gateAtCommit() {
      const gate = await databaseGate(database.url)
      return probe(gate, (handle) => query(handle, 'insert into gates values ($1)', [gate.key]))
    },
    async kill() {
      const gates = "application_name <> 'gate'"
      await rows(
        `select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid() and ${gates}`,
      )
      await until(() => probes.every(({ living }) => living === 0), 'the clients to notice')
    },
    loseCommit: () => wire.at('< C COMMIT', 'reset'),
    cutAtCommit: (when) => wire.at(/^> [QP] commit/i, 'reset', { when }),
    cutAtBegin: (times) => wire.at(/^> [QP] (?:begin|start)/i, 'reset', { times }),
  }
}
