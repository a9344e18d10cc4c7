import { globSync, readFileSync } from 'node:fs'
import {
  AmbientError,
  type AmbientErrorCode,
  defineDatabase,
  isAmbientError,
  newContext,
  openContext,
} from 'ambient-db'
import { pgAdapter } from 'ambient-db/pg'
import { Pool } from 'pg'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { attachCleanupError, catalogue, stateOutcome } from '../../src/errors.ts'
import { createDatabase, type TestDatabase } from '../support/postgres.ts'

const codes = Object.keys(catalogue) as AmbientErrorCode[]

describe('the catalogue', () => {
  const page = readFileSync('docs/errors.md', 'utf8')
  const sections = new Map(
    page
      .split(/^## /m)
      .slice(1)
      .map((section) => [section.slice(0, section.indexOf('\n')), section] as const),
  )
  /** Where codes are provoked: test files, and the suites that they run. */
  const tests = globSync(['test/**/*.test.ts', 'src/conformance/**/*.ts']).map((file) => readFileSync(file, 'utf8'))
  const sources = globSync('src/**/*.ts', { exclude: ['src/errors.ts', 'src/conformance/**'] }).map((file) =>
    readFileSync(file, 'utf8').replaceAll(/\/\*\*[\s\S]*?\*\//g, ''),
  )
  const quoted = (text: string, code: string) => new RegExp(`['"\`/]${code}\\b`).test(text)

  it('has a section in docs/errors.md for each code, in the same order, and no section without a code', () => {
    expect([...sections.keys()]).toEqual(codes)
    expect(codes).toEqual(codes.toSorted())
  })

  it.each(codes)('%s: its section shows the message and says what happened, why, and what to do', (code) => {
    const section = sections.get(code) ?? ''
    const [, message = ''] = /^```text\n(.*)\n```$/m.exec(section) ?? []
    expect(message.endsWith(` ${catalogue[code]}`), message).toBe(true)
    const parts = ['**What happened.** ', '**Why.** ', '**What to do.** '].map((part) => section.indexOf(part))
    expect(parts).toEqual(parts.toSorted((one, other) => one - other))
    expect(parts).not.toContain(-1)
  })

  it.each(codes)('%s is thrown somewhere in the sources', (code) => {
    expect(sources.some((text) => quoted(text, code))).toBe(true)
  })

  it.each(codes)('%s is provoked by a test', (code) => {
    expect(tests.some((text) => quoted(text, code))).toBe(true)
  })

  it('would notice a code that nobody throws or provokes', () => {
    const code = ['AMBIENT', 'NOT', 'THERE'].join('_')
    expect([...sources, ...tests].some((text) => quoted(text, code))).toBe(false)
    expect(quoted(`{ code: '${code}' }`, code)).toBe(true)
  })

  it('is a table of remedies: each a sentence for the reader', () => {
    for (const [code, remedy] of Object.entries(catalogue)) expect(remedy, code).toMatch(/^[A-Z`].*\.$/)
  })
})

describe('an error', () => {
  it('names the database, says what happened and what to do, and keeps its cause', () => {
    const cause = new Error('cut')
    const error = new AmbientError('AMBIENT_STREAM_OPEN', 'It happened.', { database: 'main', cause, statusCode: 503 })
    expect(error.message).toBe(`Database 'main': It happened. ${catalogue.AMBIENT_STREAM_OPEN}`)
    expect(error).toMatchObject({ name: 'AmbientError', database: 'main', statusCode: 503, outcome: undefined })
    expect(error.cause).toBe(cause)
    expect(String(error)).toMatch(/^AmbientError: Database 'main'/)
    const bare = new AmbientError('AMBIENT_TIMEOUT', 'It took long.')
    expect(bare.message).toBe(`It took long. ${catalogue.AMBIENT_TIMEOUT}`)
    expect('cause' in bare).toBe(false)
  })

  it('is recognised by isAmbientError, with its code and without', () => {
    const error = new AmbientError('AMBIENT_TIMEOUT', 'It took long.')
    expect(isAmbientError(error)).toBe(true)
    expect(isAmbientError(error, 'AMBIENT_TIMEOUT')).toBe(true)
    expect(isAmbientError(error, 'AMBIENT_ABORTED')).toBe(false)
    const imitation = Object.assign(new Error('no'), { code: 'AMBIENT_TIMEOUT', name: 'AmbientError' })
    for (const other of [imitation, null, undefined, 'AMBIENT_TIMEOUT', 7, () => {}]) {
      expect(isAmbientError(other)).toBe(false)
    }
  })

  it('takes errors of clean-up along, whatever was thrown, and never twice or in its own place', () => {
    const first = new Error('first') as Error & { cleanupErrors?: unknown[] }
    const [second, third] = [new Error('second'), new Error('third')]
    attachCleanupError(first, second)
    attachCleanupError(first, third)
    attachCleanupError(first, first)
    expect(first.cleanupErrors).toEqual([second, third])
    expect(Object.keys(first)).toEqual([])
    const frozen = Object.freeze(new Error('frozen'))
    for (const thrown of [frozen, undefined, null, 'text', 7]) {
      expect(() => attachCleanupError(thrown, second)).not.toThrow()
    }
    expect('cleanupErrors' in frozen).toBe(false)
  })

  it('says rolled-back only where nothing else was known', () => {
    const fresh = new AmbientError('AMBIENT_TIMEOUT', 'x')
    const unknown = new AmbientError('AMBIENT_COMMIT_UNKNOWN', 'x', { outcome: 'unknown' })
    const foreign = new Error('x')
    for (const error of [fresh, unknown, foreign, undefined]) stateOutcome(error, true)
    expect([fresh.outcome, unknown.outcome, 'outcome' in foreign]).toEqual(['rolled-back', 'unknown', false])
  })
})

describe('what a caller does wrong', () => {
  let database: TestDatabase
  let main: ReturnType<typeof define>

  function define(url: string) {
    return defineDatabase({ name: 'main', adapter: pgAdapter(() => new Pool({ connectionString: url })) })
  }
  beforeAll(async () => {
    database = await createDatabase()
    await database.witness.rows('create table notes (id int primary key)')
    main = define(database.url)
  })
  afterAll(async () => {
    await main.shutdown()
    await database.drop()
  })

  const definitions: [string, unknown, string][] = [
    ['no options', undefined, '`name`'],
    ['no name', { adapter: pgAdapter(() => new Pool()) }, '`name`'],
    ['an empty name', { name: '', adapter: pgAdapter(() => new Pool()) }, '`name`'],
    ['no adapter', { name: 'main' }, '`adapter`'],
    ['a pool for an adapter', { name: 'main', adapter: {} }, '`adapter`'],
  ]
  for (const key of ['acquireTimeout', 'blockTimeout', 'settleTimeout']) {
    for (const value of [0, -1, Number.NaN, Number.POSITIVE_INFINITY, 2 ** 31, '5', null]) {
      const options = { name: 'main', adapter: pgAdapter(() => new Pool()), [key]: value }
      definitions.push([`${key} ${String(value)}`, options, `\`${key}\``])
    }
  }

  it.each(definitions)('AMBIENT_INVALID_ARGUMENT refuses a definition with %s', (_, options, what) => {
    const refused = { code: 'AMBIENT_INVALID_ARGUMENT', message: expect.stringContaining(what) }
    expect(() => defineDatabase(options as never)).toThrow(expect.objectContaining(refused)) // as from JavaScript
  })

  it.each([Number.NaN, Number.POSITIVE_INFINITY, 2 ** 31, '5'])(
    'AMBIENT_INVALID_ARGUMENT refuses a timeout of %s, at which a timer would fire at once',
    async (value) => {
      const refused = { code: 'AMBIENT_INVALID_ARGUMENT', message: expect.stringContaining('`timeout`') }
      const options = { timeout: value as number } // as from JavaScript
      const insert = () => main.db.query('insert into notes (id) values (3)')
      await expect(newContext(insert, options)).rejects.toMatchObject(refused)
      expect(() => openContext(options)).toThrow(expect.objectContaining(refused))
      await expect(main.newSession((session) => session.begin(), options)).rejects.toMatchObject(refused)
      await newContext(() => expect(main.atomic(insert, options)).rejects.toMatchObject(refused))
      expect(await database.witness.rows('select id from notes where id = 3')).toEqual([])
    },
  )

  it('AMBIENT_UNSUPPORTED keeps the handle from ending what is not its own', async () => {
    await newContext(async () => {
      await main.db.query('insert into notes (id) values (1)')
      await expect(main.db.end()).rejects.toMatchObject({ code: 'AMBIENT_UNSUPPORTED' })
      const client = await main.db.connect()
      const end = (client as unknown as { end(): Promise<void> }).end() // not in the type of a client from a pool
      await expect(end).rejects.toMatchObject({ code: 'AMBIENT_UNSUPPORTED' })
      client.release()
    })
    expect(await database.witness.rows('select id from notes')).toEqual([{ id: 1 }])
  })

  it('AMBIENT_TRANSACTION_CONTROL refuses SQL that would end the transaction of the session, unsent', async () => {
    await newContext(async () => {
      await main.db.query('insert into notes (id) values (2)')
      for (const sql of ['COMMIT', 'rollback', 'BEGIN ISOLATION LEVEL SERIALIZABLE', 'end', 'savepoint a']) {
        await expect(main.db.query(sql), sql).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_CONTROL' })
      }
      expect(await database.witness.rows('select id from notes where id = 2')).toEqual([])
    })
    expect(await database.witness.rows('select id from notes where id = 2')).toEqual([{ id: 2 }])
  })
})
