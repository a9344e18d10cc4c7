import { type AmbientDatabase, type DatabaseOptions, defineDatabase } from 'ambient-db'
import { pgAdapter } from 'ambient-db/pg'
import { Client, Pool, type PoolClient, type PoolConfig } from 'pg'
import { createDatabase, type TestDatabase } from './postgres.ts'

/** A database under test with a table of notes, and what a test needs to act and to look. */
export interface Subject {
  readonly main: AmbientDatabase<Pool, Pool>
  readonly database: TestDatabase
  /** Every text that was sent to the server, in order. */
  readonly sent: string[]
  /** What was sent on a connection that had not answered the statement before. */
  readonly overlapping: string[]
  /** One more database under test over the same server. */
  define(options?: SubjectOptions): AmbientDatabase<Pool, Pool>
  /** Adds a note in the session of the context. */
  note(text: string): Promise<unknown>
  /** What is committed, in the order of the alphabet. */
  notes(): Promise<string[]>
  /** What the transaction of a failed statement sees: an error of the server's own. */
  fail(): Promise<unknown>
  /** The number of connections that are in a transaction. */
  openTransactions(): Promise<number>
  /** Empties the table, `sent` and `overlapping`. */
  clear(): Promise<void>
  close(): Promise<void>
}

/** Options of the database under test, and of its pool. */
export type SubjectOptions = Partial<Omit<DatabaseOptions<Pool, Pool, PoolClient>, 'adapter'>> & {
  readonly pool?: PoolConfig
}

/** Creates a database and defines `main` over it. */
export async function createSubject(options: SubjectOptions = {}): Promise<Subject> {
  const database = await createDatabase()
  await database.witness.rows('create table notes (text text primary key)')
  const sent: string[] = []
  const overlapping: string[] = []
  class RecordingClient extends Client {
    #running = 0
    override query(...args: unknown[]): never {
      const [config] = args
      const text = typeof config === 'string' ? config : String((config as { text?: unknown }).text)
      sent.push(text)
      if (this.#running > 0) overlapping.push(text)
      const answer: unknown = super.query(...(args as [string]))
      if (answer instanceof Promise) {
        const answered = () => {
          this.#running--
        }
        this.#running++
        answer.then(answered, answered)
      }
      return answer as never // the overloads of pg.Client stand for it
    }
  }
  const defined: AmbientDatabase<Pool, Pool>[] = []
  const define = ({ pool, ...rest }: SubjectOptions = {}) => {
    const config = { connectionString: database.url, Client: RecordingClient, ...pool } as PoolConfig
    const subject = defineDatabase({ name: 'main', adapter: pgAdapter(() => new Pool(config)), ...rest })
    defined.push(subject)
    return subject
  }
  const main = define(options)
  return {
    main,
    database,
    sent,
    overlapping,
    define,
    note: (text) => main.db.query('insert into notes values ($1)', [text]),
    notes: async () => {
      const rows = await database.witness.rows<{ text: string }>('select text from notes order by text')
      return rows.map(({ text }) => text)
    },
    fail: () => main.db.query('select * from missing'),
    openTransactions: async () => {
      return (await database.backends()).filter(({ transactionStart }) => transactionStart !== null).length
    },
    clear: async () => {
      await database.witness.rows('truncate notes')
      sent.length = 0
      overlapping.length = 0
    },
    close: async () => {
      await Promise.all(defined.map(({ shutdown }) => shutdown()))
      await database.drop()
    },
  }
}
