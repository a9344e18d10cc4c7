import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { gunzipSync } from 'node:zlib'
import { afterAll, afterEach, beforeAll, beforeEach, expect } from 'vitest'
import { type RawAnswer, RawClient, type RawRequest } from '../../src/conformance/raw-client.ts'
import type { ContextEvent } from '../../src/events.ts'
import { createDatabases, type Databases } from './support.ts'

/** What the handlers of a test write to, and how its answers are read. */
export interface Notebook {
  /** There once the tests run. */
  readonly databases: Databases
  /** Done after the test. */
  closing(close: () => unknown): void
  /** Inserts a row through the ambient handle. */
  note(id: string): Promise<void>
  /** Inserts a row whose COMMIT fails. */
  doom(): Promise<void>
  /** What was committed, as another connection sees it. */
  notes(): Promise<unknown[]>
  /** How many contexts the test has opened, once all have ended. */
  contexts(): Promise<number>
  open(port: number): Promise<RawClient>
  ask(port: number, request: RawRequest): Promise<RawAnswer>
}

/** A database of the file's own, which is empty before each test. */
export function useNotebook(): Notebook {
  let databases: Databases
  const closing: (() => unknown)[] = []
  let [opened, ended] = [0, 0]
  const onContext = (message: unknown) => void ((message as ContextEvent).type === 'opened' ? opened++ : ended++)

  beforeAll(async () => {
    databases = await createDatabases()
    await databases.main.witness('create table notes (id text primary key)')
    await databases.main.witness('create table parents (id int primary key)')
    await databases.main.witness('create table doomed (parent int references parents deferrable initially deferred)')
  })
  beforeEach(() => {
    opened = ended = 0
    subscribe('ambient-db:context', onContext)
    return databases.main.witness('truncate notes')
  })
  afterEach(() => void unsubscribe('ambient-db:context', onContext))
  afterEach(async () => {
    for (const close of closing.splice(0).reverse()) await close()
  })
  afterAll(() => databases.close())

  async function open(port: number): Promise<RawClient> {
    const client = await RawClient.open(port)
    closing.push(() => client.destroy())
    return client
  }

  return {
    get databases() {
      return databases
    },
    closing: (close) => void closing.push(close),
    note: async (id) => void (await databases.main.query('insert into notes values ($1)', [id])),
    doom: async () => void (await databases.main.query('insert into doomed values (1)')),
    notes: async () => (await databases.main.witness('select id from notes order by id')).map(({ id }) => id),
    async contexts() {
      await expect.poll(() => ended).toBe(opened)
      return opened
    },
    open,
    async ask(port, request) {
      const client = await open(port)
      client.send(request)
      return client.answer(request.method)
    },
  }
}

/** The body, decoded as the header says: a header that is wrong makes it throw. */
export function decoded({ headers, body }: RawAnswer): string {
  const bytes = Buffer.from(body, 'latin1')
  return (headers['content-encoding']?.[0] === 'gzip' ? gunzipSync(bytes) : bytes).toString()
}
