import { execFile, spawn } from 'node:child_process'
import { mkdtemp, readdir, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { createDatabase, type TestDatabase } from '../../../test/support/postgres.ts'
import { postgresPassword } from '../../../test/support/postgres-server.ts'

const sections = [
  '1. An order is placed',
  '2. Something is out of stock',
  '3. A handler throws',
  '4. The database refuses at COMMIT',
  '5. Five customers want the last lamp, all at once',
  '6. A client hangs up',
  '7. Slow work after an early commit',
]
const success = /^✓ All 7 steps showed what they should \(\d+ checks\)\.$/m

let postgres: TestDatabase
/** Where the quickstart makes its temporary folder. */
let temporary: string

beforeAll(async () => {
  postgres = await createDatabase()
})
afterAll(() => postgres.drop())

beforeEach(async () => {
  temporary = await mkdtemp(join(tmpdir(), 'ambient-db-quickstart-'))
})
afterEach(async () => {
  expect(await readdir(temporary), 'what the quickstart left behind').toEqual([])
  expect(await postgres.witness.rows("select from pg_namespace where nspname like 'ambient%'")).toEqual([])
  await rm(temporary, { recursive: true })
})

/** Starts the quickstart as a program of its own, without a terminal. */
function start({ args = [] as string[], ...variables }: { args?: string[]; [name: string]: unknown } = {}) {
  const { DATABASE_URL: _, FORCE_COLOR: __, NO_COLOR: ___, NODE_OPTIONS: ____, ...inherited } = process.env
  const preload = new URL('from-source.ts', import.meta.url).href
  const program = new URL('../quickstart.ts', import.meta.url).pathname
  const child = spawn(process.execPath, ['--import', preload, program, ...args], {
    env: { ...inherited, TMPDIR: temporary, ...variables } as NodeJS.ProcessEnv,
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  const output = { stdout: '', stderr: '' }
  for (const name of ['stdout', 'stderr'] as const) {
    child[name].setEncoding('utf8').on('data', (text: string) => {
      output[name] += text
    })
  }
  const ended = new Promise<{ code: number | null; stdout: string; stderr: string }>((resolve) => {
    child.once('close', (code) => resolve({ code, ...output }))
  })
  /** Resolves with what was printed once `pattern` is there. */
  async function printed(pattern: RegExp): Promise<string> {
    while (!pattern.test(output.stdout)) {
      const more = new Promise((resolve) => child.stdout.once('data', resolve))
      if ((await Promise.race([more, ended.then(() => 'ended')])) === 'ended') throw new Error(JSON.stringify(output))
    }
    return output.stdout
  }
  return { ended, printed, kill: (signal: NodeJS.Signals) => child.kill(signal) }
}

describe.each([
  ['SQLite', () => ({})],
  ['PostgreSQL', () => ({ DATABASE_URL: postgres.url })],
])('the quickstart on %s', { timeout: 60_000 }, (engine, variables) => {
  it('shows every step, finds all as it should be, and ends with 0', async () => {
    const { code, stdout, stderr } = await start(variables()).ended
    expect(stdout).toMatch(`An order service: Express, Kysely and ${engine}\n`)
    expect(sections.filter((section) => !stdout.includes(`\n${section}\n`))).toEqual([])
    expect(stdout).toMatch(success)
    expect(stdout).not.toContain('✗')
    expect(stdout).not.toContain('\x1b')
    expect(stderr.replaceAll(/^.*(ExperimentalWarning|--trace-warnings).*\n/gm, '')).toBe('') // of node:sqlite in Node 22
    expect(code).toBe(0)
  })

  it('finds a service that commits what it should roll back, and ends with 1', async () => {
    const { code, stdout } = await start({ ...variables(), FAULT: 'commit-always' }).ended
    expect(stdout).toMatch(/✗ \d+ of \d+ checks failed:\n {3}step 2: the database holds what it held before\n/)
    expect(stdout).not.toMatch(success)
    expect(code).toBe(1)
  })

  it('with --serve goes on until a signal comes, then ends with 0', async () => {
    const { ended, printed, kill } = start({ ...variables(), args: ['--serve'] })
    const text = await printed(/delivery -H.*\n/)
    expect(text).toMatch(success)
    const url = /^curl (http:\S+)\/stock$/m.exec(text)?.[1]
    const response = await fetch(`${url}/stock`)
    expect(await response.json()).toContainEqual({ item: 'lamp', pieces: 0 })
    kill(engine === 'SQLite' ? 'SIGTERM' : 'SIGINT')
    expect(await ended).toMatchObject({ code: 0, stdout: expect.stringMatching(/\nStopping\.\n$/) })
  })
})

describe('the quickstart', { timeout: 60_000 }, () => {
  it('runs again on the same PostgreSQL, also where an earlier run was killed', async () => {
    const { ended, printed, kill } = start({ DATABASE_URL: postgres.url })
    await printed(/\n2\. /)
    kill('SIGKILL')
    await ended
    expect(await start({ DATABASE_URL: postgres.url }).ended).toMatchObject({
      code: 0,
      stdout: expect.stringMatching(success),
    })
    for (const left of await readdir(temporary)) await rm(join(temporary, left), { recursive: true }) // by the first
  })

  it('is coloured where colours are wanted', async () => {
    expect((await start({ FORCE_COLOR: '1' }).ended).stdout).toContain('\x1b[32m✓\x1b[39m')
  })

  it('prints curl lines that do what the words above them say', async (context) => {
    const run = promisify(execFile)
    if (!(await run('curl', ['--version']).catch(() => undefined))) context.skip('curl is not installed')
    const { ended, printed, kill } = start({ args: ['--serve'] })
    const lines = (await printed(/delivery -H.*\n/)).match(/^curl .*$/gm) ?? []
    const answers: string[] = []
    for (const line of lines) {
      const { stdout } = await run('sh', ['-c', `${line} -s`]).catch(({ code }) => ({
        stdout: `curl ended with ${code}`,
      }))
      answers.push(stdout.split('\r\n')[0] ?? '')
    }
    kill('SIGTERM')
    await ended
    expect(answers).toEqual([
      expect.stringContaining('{"item":"teapot","pieces":4}'),
      expect.stringContaining('"customer":"Ada"'),
      'HTTP/1.1 201 Created',
      'HTTP/1.1 409 Conflict',
      'HTTP/1.1 500 Internal Server Error',
      'curl ended with 28', // its own timeout
      'HTTP/1.1 201 Created',
    ])
  })

  it.each([
    [
      'cannot be reached',
      () => `postgres://someone:${postgresPassword}@127.0.0.1:1/nothing`,
      /127\.0\.0\.1:1\/nothing .*ECONNREFUSED/,
    ],
    ['does not exist', () => `${postgres.url}_not`, /database "\w+_not" does not exist/],
    [
      'is of an unknown kind',
      () => `mysql://someone:${postgresPassword}@127.0.0.1/nothing`,
      /DATABASE_URL is neither postgres:/,
    ],
    ['has a malformed URL', () => `postgres:/${postgresPassword}@`, /DATABASE_URL|cannot be used/],
  ])('says so and ends with 1 if the database %s', async (_, url, message) => {
    const { code, stdout, stderr } = await start({ DATABASE_URL: url() }).ended
    expect(stderr).toMatch(message)
    expect(stdout + stderr).not.toContain(postgresPassword)
    expect(stderr).not.toMatch(/^\s+at /m)
    expect(code).toBe(1)
  })

  it('refuses an option that it does not know', async () => {
    expect(await start({ args: ['--server'] }).ended).toMatchObject({
      code: 1,
      stderr: expect.stringContaining('--server'),
    })
  })
})
