import { Client, Pool } from 'pg'
import type { Server } from './server.ts'
import type { DatabaseName } from './stage.ts'

export const postgres: Server = {
  name: 'PostgreSQL',
  tags: true,
  insert: 'insert into markers (run, label) values ($1, $2)',
  conflict: "do $$ begin raise sqlstate '40001'; end $$",
  sleep: 'select pg_sleep(0.3)',
  spoilCommit: 'insert into deferred (id) values (1), (1)',

  async open(serverUrl) {
    const name = `truth_${process.pid}_${Date.now()}`
    const urls = { main: urlOf(serverUrl, name), other: urlOf(serverUrl, `${name}_other`) }
    for (const database of [name, `${name}_other`]) await administer(serverUrl, `create database ${database}`)
    const witnesses: Record<DatabaseName, Pool> = {
      main: new Pool({ connectionString: urls.main, application_name: 'witness', max: 3 }),
      other: new Pool({ connectionString: urls.other, application_name: 'witness', max: 2 }),
    }
    for (const witness of Object.values(witnesses)) {
      witness.on('error', () => {}) // it says that it has ended before its connections have
      await witness.query('create table markers (run text, label text, primary key (run, label))')
      await witness.query('create table numbers as select n from generate_series(1, 40) n')
      await witness.query('create table deferred (id int unique deferrable initially deferred)')
    }
    return {
      url: urls.main,
      makePool({ url, run, database, size, log, more }) {
        const stream = log.socketFor(database)
        return new Pool({
          ...{ connectionString: url, application_name: `${run}-${database}`, max: size, stream },
          ...more,
        })
      },
      async rowsOf(run) {
        const rows = await Promise.all(
          (['main', 'other'] as const).map(async (database) => {
            const result = await witnesses[database].query('select label from markers where run = $1', [run])
            return result.rows.map(({ label }) => `${database}:${label}`)
          }),
        )
        return new Set(rows.flat())
      },
      async busy(run) {
        const { rows } = await witnesses.main.query(
          `select state, query from pg_stat_activity where application_name in ($1, $2)
              and (xact_start is not null or state <> 'idle')`,
          [`${run}-main`, `${run}-other`],
        )
        return rows.map(({ state, query }) => `${state}: ${query}`)
      },
      async close() {
        for (const witness of Object.values(witnesses)) await witness.end()
        for (const database of [name, `${name}_other`]) {
          await administer(serverUrl, `drop database if exists ${database} with (force)`)
        }
      },
    }
  },
}

function urlOf(serverUrl: string, database: string): string {
  const url = new URL(serverUrl)
  url.pathname = `/${database}`
  return url.href
}

async function administer(serverUrl: string, sql: string): Promise<void> {
  const client = new Client({ connectionString: serverUrl })
  await client.connect()
  try {
    await client.query(sql)
  } finally {
    await client.end()
  }
}
