import { DatabaseSync } from 'node:sqlite'
import BetterSqlite from 'better-sqlite3'
import { Client } from 'pg'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { notFromServer, postgresErrorTraits, sqliteErrorTraits } from '../../src/traits.ts'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'
import { failure } from './wire.ts'

/** An error as `pg` makes it of the server's message. */
const postgres = (code: unknown, severity: unknown = 'ERROR') => Object.assign(new Error('x'), { severity, code })

describe('an error of PostgreSQL', () => {
  let database: TestDatabase
  beforeAll(async () => {
    database = await createDatabase()
  })
  afterAll(() => database.drop())

  it('S4 was answered', async () => {
    const error = await failure(database.witness.rows('select 1/0'))
    expect(postgresErrorTraits(error)).toEqual({ reply: 'answered', retryable: false })
  })

  it('S5 is no answer when the server goes away with it', async () => {
    const client = new Client({ connectionString: database.url })
    client.on('error', () => {})
    await client.connect()
    const error = await failure(client.query('select pg_terminate_backend(pg_backend_pid())'))
    expect(postgresErrorTraits(error)).toEqual({ reply: 'unanswered', retryable: false })
    await client.end()
  })

  it('S5 is none where the driver sends nothing on a connection that is gone', async () => {
    const client = new Client({ connectionString: database.url })
    const lost = new Promise((resolve) => client.once('error', resolve))
    await client.connect()
    const { rows } = await client.query('select pg_backend_pid() as pid')
    await database.witness.rows('select pg_terminate_backend($1)', [rows[0].pid])
    client.on('error', () => {})
    await lost
    const error = await failure(client.query('commit'))
    expect(postgresErrorTraits(error)).toEqual({ reply: 'unsent', retryable: false, lost: true })
  })

  it.each(['40001', '40P01'])('A5 may be tried again: %s', (code) => {
    expect(postgresErrorTraits(postgres(code))).toEqual({ reply: 'answered', retryable: true })
  })

  it.each(['23505', '25P02', '57014', '57P04', '40002', 'A8000', '5708A', '0A000'])('A5 may not: %s', (code) => {
    expect(postgresErrorTraits(postgres(code))).toEqual({ reply: 'answered', retryable: false })
  })

  it.each(['40003', '08000', '08006', '57P01', '57P02', '57P03'])('S5 leaves the outcome open: %s', (code) => {
    expect(postgresErrorTraits(postgres(code))).toEqual({ reply: 'unanswered', retryable: false })
  })

  it.each(['FATAL', 'PANIC'])('S5 leaves the outcome open: %s', (severity) => {
    expect(postgresErrorTraits(postgres('23505', severity))).toEqual({ reply: 'unanswered', retryable: false })
  })

  it.each([
    ['a SQLSTATE of another form', postgres('2350')],
    ['a longer one', postgres('235055')],
    ['one in small letters', postgres('2350a')],
    ['a code that is no text', postgres(23505)],
    ['an errno', Object.assign(new Error('x'), { code: 'ECONNRESET' })],
    ['no severity', postgres('23505', null)],
    ['nothing at all', undefined],
    ['null', null],
    ['a text', 'is not queryable'],
    ['a text in the middle', new Error('it is not queryable, so what')],
  ])('S5 is not one with %s', (_, error) => {
    expect(postgresErrorTraits(error)).toEqual({ reply: 'unanswered', retryable: false })
  })
})

describe('an error of SQLite', () => {
  const thrown = (act: () => unknown): unknown => {
    try {
      act()
    } catch (error) {
      return error
    }
    throw new Error('It was to throw.')
  }

  it('S4 was answered, whichever driver throws it', () => {
    const answered = { reply: 'answered', retryable: false, busy: false }
    expect(sqliteErrorTraits(thrown(() => new DatabaseSync(':memory:').exec('select * from missing')))).toEqual(
      answered,
    )
    expect(sqliteErrorTraits(thrown(() => new BetterSqlite(':memory:').exec('select * from missing')))).toEqual(
      answered,
    )
  })

  it.each([
    { code: 'ERR_SQLITE_ERROR', errcode: 5 },
    { code: 'ERR_SQLITE_ERROR', errcode: 517 }, // SQLITE_BUSY_SNAPSHOT
    { code: 'SQLITE_BUSY' },
    { code: 'SQLITE_BUSY_SNAPSHOT' },
  ])('S13 is busy: %j', (details) => {
    const error = Object.assign(new Error('locked'), details)
    expect(sqliteErrorTraits(error)).toEqual({ reply: 'answered', retryable: true, busy: true })
  })

  it.each([
    { code: 'ERR_SQLITE_ERROR', errcode: 6 },
    { code: 'ERR_SQLITE_ERROR', errcode: 1 },
    { code: 'ERR_SQLITE_ERROR', errcode: '5' },
    { code: 'ERR_SQLITE_ERROR' },
    { code: 'SQLITE_LOCKED' },
    { code: 'SQLITE_CONSTRAINT_UNIQUE' },
  ])('S13 is not busy: %j', (details) => {
    const error = Object.assign(new Error('x'), details)
    expect(sqliteErrorTraits(error)).toEqual({ reply: 'answered', retryable: false, busy: false })
  })

  it.each([undefined, null, new Error('x'), { code: 5 }, { code: 'ERR_INVALID_STATE' }, { code: 'NOT_SQLITE_BUSY' }])(
    'S5 is not one: %s',
    (error) => {
      expect(sqliteErrorTraits(error)).toEqual({ reply: 'unanswered', retryable: false })
    },
  )
})

describe('an error of no server', () => {
  it.each([new TypeError('x'), new RangeError('x')])('S4 of bad arguments was never sent: %s', (error) => {
    const unsent = { reply: 'unsent', retryable: false }
    expect(notFromServer(error)).toEqual(unsent)
    expect(postgresErrorTraits(error)).toEqual(unsent)
    expect(sqliteErrorTraits(error)).toEqual(unsent)
  })

  it.each([new Error('x'), new SyntaxError('x'), 'x', null])(
    'S5 of another kind leaves open what was done: %s',
    (error) => {
      expect(notFromServer(error)).toEqual({ reply: 'unanswered', retryable: false })
    },
  )
})
