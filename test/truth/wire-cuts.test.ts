import { execFile } from 'node:child_process'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { beforeAll, describe, expect, inject, it } from 'vitest'
import type { Report } from './run.ts'

/**
 * The harness runs in a process of its own: it counts uncaught exceptions, which would be failures of the test runner.
 * `npm run truth` runs all cases; here it is every 97th, so that each unit is cut in several places and ways.
 */
async function truth(...args: string[]): Promise<Report & { readonly output: string }> {
  const directory = await mkdtemp(join(tmpdir(), 'ambient-db-truth-'))
  const json = join(directory, 'report.json')
  const { NODE_OPTIONS: _, ...inherited } = process.env
  const env = { ...inherited, DATABASE_URL: inject('postgresUrl') }
  try {
    const command = ['test/truth/run.ts', `--json=${json}`, ...args]
    const output = await promisify(execFile)(process.execPath, command, { env, maxBuffer: 64 << 20 }).then(
      ({ stdout, stderr }) => stdout + stderr,
      ({ stdout, stderr }) => `${stdout}${stderr}`,
    )
    const report = await readFile(json, 'utf8').catch(() => {
      throw new Error(`The run did not end:\n${output}`)
    })
    return { ...(JSON.parse(report) as Report), output }
  } finally {
    await rm(directory, { recursive: true, force: true })
  }
}

describe('wire cuts', () => {
  let report: Awaited<ReturnType<typeof truth>>
  beforeAll(async () => {
    report = await truth('--every=97')
  }, 120_000)

  it('S4 S5 S7 C6 K2 never lie about what the database did, lose no pool slot and catch every exception', () => {
    const { rows, failures, output } = report
    expect(failures, output).toEqual([])
    expect(rows.map(({ library }) => library)).toEqual(['pg', 'kysely-pg', 'kysely-bare'])
    for (const { units, cases, unknowns, underLoad } of rows) {
      expect(units).toBeGreaterThanOrEqual(30)
      expect(cases).toBeGreaterThan(150)
      expect(unknowns).toBeGreaterThan(0)
      expect(underLoad).toBeLessThan(cases / 10)
    }
    const declared = rows.map((row) => Object.keys(row.declared).length > 0)
    expect(declared).toEqual([false, false, true])
  })

  it('are no use unless planted faults are seen', () => {
    const { mutants, output } = report
    const missed = mutants.filter(({ planted, caught }) => (planted ? caught === 0 : caught > 0))
    expect(missed, output).toEqual([])
    expect(mutants.filter(({ planted }) => planted)).toHaveLength(10)
  })
})
