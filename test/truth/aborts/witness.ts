import { Pool } from 'pg'
import { postgres } from '../cuts/postgres.ts'
import type { Place } from '../cuts/server.ts'
import { borrowing, type Finding } from './stage.ts'

/** A COMMIT may take its time, and so may the BEGIN of the next borrower. */
const itsBusiness = `^commit$|isolation level ${borrowing.transaction.isolationLevel}$`

/** The databases of the lab, and what looks at them from outside. */
export interface Witness {
  readonly place: Place
  /**
   * What connections of a run are in a transaction, at work, or hold locks, without those of the next borrowers, and of a second
   * database that waits for the COMMIT of the first, behind which no abort counts (C8).
   */
  busy(run: string): Promise<Finding[]>
  /** A lock that somebody else has: for a moment, or until it is released if the unit was `aborted` meanwhile. */
  lockFor(key: number, aborted: () => boolean): Lock
  close(): Promise<void>
}

interface Lock {
  release(): void
  /** Lets it be taken; resolves with SQL that waits for it. */
  wait(): Promise<string>
}

export async function openWitness(serverUrl: string): Promise<Witness> {
  const place = await postgres.open(serverUrl)
  const looking = new Pool({ connectionString: place.url, application_name: 'witness', max: 4 })
  const lockers = new Pool({ connectionString: place.url, application_name: 'witness', max: 40 })
  for (const pool of [looking, lockers]) pool.on('error', () => {}) // it says that it has ended before its connections have
  await looking.query(`
    create table slow_commits (seconds float);
    create function commit_slowly() returns trigger language plpgsql as
      $$ begin perform pg_sleep(new.seconds); return null; end $$;
    create constraint trigger slow_commit after insert on slow_commits deferrable initially deferred
      for each row execute function commit_slowly()`)
  return {
    place,
    async busy(run) {
      const { rows } = await looking.query(
        `with locks as (select * from pg_locks where locktype <> 'virtualxid')
         select state, query, (select count(*) from locks where pid = a.pid) as locks
           from pg_stat_activity a
          where application_name in ($1, $2) and state <> 'starting' and query !~* $3
            and not exists (select from locks where pid = a.pid and locktype = 'advisory' and classid = $4)
            and (xact_start is not null or state <> 'idle' or exists (select from locks where pid = a.pid))
            and not (application_name = $2 and state = 'idle in transaction' and exists (
              select from pg_stat_activity where application_name = $1 and state = 'active' and query ~* '^commit$'))`,
        [`${run}-main`, `${run}-other`, itsBusiness, borrowing.lock],
      )
      return rows.map(({ state, query, locks }): Finding => {
        const kind = state === 'active' ? 'still running' : state === 'idle' ? 'kept lock' : 'open transaction'
        return { kind, text: `${state}, ${locks} locks: ${query}` }
      })
    },
    lockFor(key, aborted) {
      let release = () => {}
      const released = new Promise<void>((resolve) => {
        release = resolve
      })
      let holding: Promise<void> | undefined
      const hold = async () => {
        const client = await lockers.connect()
        await client.query('select pg_advisory_lock($1)', [key])
        setTimeout(() => aborted() || release(), 30)
        void released.then(async () => {
          await client.query('select pg_advisory_unlock($1)', [key])
          client.release()
        })
      }
      return {
        release: () => release(),
        async wait() {
          holding ??= hold()
          await holding
          return `select pg_advisory_xact_lock_shared(${key})`
        },
      }
    },
    async close() {
      await lockers.end()
      await looking.end()
      await place.close()
    },
  }
}
