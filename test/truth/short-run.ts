import { execFile } from 'node:child_process'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { inject } from 'vitest'
import type { Report } from './harness.ts'

/**
 * Runs a harness in its short form, in a process of its own: it counts uncaught exceptions, which would be failures of the
 * test runner. `output` is what it printed.
 */
export async function runShort(name: string, ...options: string[]): Promise<Report & { readonly output: string }> {
  const directory = await mkdtemp(join(tmpdir(), 'ambient-db-truth-'))
  const json = join(directory, 'report.json')
  const { NODE_OPTIONS: _, ...inherited } = process.env
  const mysql = inject('mysqlServer')
  const env = { ...inherited, DATABASE_URL: inject('postgresUrl'), ...('url' in mysql && { MYSQL_URL: mysql.url }) }
  try {
    const command = ['test/truth/run.ts', name, '--short', `--json=${json}`, ...options]
    const output = await promisify(execFile)(process.execPath, command, { env, maxBuffer: 64 << 20 }).then(
      ({ stdout, stderr }) => stdout + stderr,
      ({ stdout, stderr }) => `${stdout}${stderr}`,
    )
    const reports = await readFile(json, 'utf8').catch(() => {
      throw new Error(`The run did not end:\n${output}`)
    })
    return { ...(JSON.parse(reports) as Record<string, Report>)[name], output } as Report & { output: string } // one was run
  } finally {
    await rm(directory, { recursive: true, force: true })
  }
}
