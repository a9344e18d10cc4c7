import { Client } from 'pg'
import { startProxy, type WireProxy } from '../../support/proxy.ts'
import { sleep } from '../waiting.ts'
import type { OpenStack, Stack } from './stack.ts'
import { within } from './told.ts'

/** `transaction` tells which transaction wrote a row. A label that begins with `refused` lets COMMIT fail, as a deferred constraint does. */
const schema = `
  create table marks (label text primary key, transaction text not null default pg_current_xact_id());
  create function refuse() returns trigger language plpgsql as $$ begin raise 'refused at COMMIT' using errcode = '23514'; end $$;
  create constraint trigger refuse after insert on marks deferrable initially deferred
    for each row when (new.label like 'refused%') execute function refuse();
`

/** A row as another connection sees it. */
export interface Mark {
  readonly label: string
  readonly transaction: string
}

/** A database of its own for one process, and a connection to it that no stack knows of. */
export interface Database {
  readonly url: string
  readonly witness: Client
  drop(): Promise<void>
}

export async function createDatabase(serverUrl: string): Promise<Database> {
  const name = `field_${process.pid}_${Date.now()}`
  await administer(serverUrl, `create database ${name}`)
  const url = new URL(serverUrl)
  url.pathname = `/${name}`
  const witness = new Client({ connectionString: url.href, application_name: 'witness' })
  await witness.connect()
  await witness.query(schema)
  return {
    url: url.href,
    witness,
    async drop() {
      await witness.end()
      await administer(serverUrl, `drop database ${name} with (force)`)
    },
  }
}

/** Where one stack is asked one truth: an empty table, and the wire between. */
export interface Stage {
  readonly proxy: WireProxy
  /** What nobody caught: each would have ended the process. */
  readonly uncaught: string[]
  open(poolSize: number): Promise<OpenStack>
  /** What the table holds, straight from the server. */
  marks(): Promise<readonly Mark[]>
  has(label: string): Promise<boolean>
  /** Resolves when sockets that were cut have said so. */
  quiet(): Promise<void>
  close(): Promise<void>
}

export async function openStage(stack: Stack, { url, witness }: Database, uncaught: string[]): Promise<Stage> {
  await witness.query('truncate marks')
  const proxy = await startProxy(url)
  const opened: OpenStack[] = []

  async function marks(): Promise<Mark[]> {
    const { rows } = await witness.query<Mark>('select label, transaction from marks order by label')
    return rows
  }

  return {
    proxy,
    uncaught,
    marks,
    async open(poolSize) {
      const open = await stack.open({ url: proxy.url, poolSize })
      opened.push(open)
      return open
    },
    has: async (label) => (await marks()).some((mark) => mark.label === label),
    quiet: () => sleep(150),
    async close() {
      for (const open of opened) await within(open.close(), 2000)
      await proxy.close()
      await sleep(150) // what the end brings about is no answer to the next question
      uncaught.length = 0
    },
  }
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
