import { type ChildProcess, spawn } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { SkippedTest, VitestReport } from './vitest-reporter.ts'

/** What a stage came to: one check, or as many as it ran tests. */
export interface Outcome {
  readonly passed: number
  readonly failed: number
  readonly skipped: readonly SkippedTest[]
  /** Shown in full if something failed. */
  readonly output: string
  /** What there is to say in one line. */
  readonly text: string
}

interface Finished {
  readonly name: string
  readonly outcome: Outcome
}

const finished: Finished[] = []

/** Runs one stage, with a line that says how it went and how long it took. A stage that failed stops no other. */
export async function stage(name: string, run: () => Promise<Outcome>): Promise<void> {
  process.stdout.write(`${name} … `)
  const start = performance.now()
  const outcome = await run()
  const seconds = ((performance.now() - start) / 1000).toFixed(1)
  console.log(`${outcome.failed === 0 ? 'ok' : 'FAILED'} in ${seconds} s${outcome.text && `: ${outcome.text}`}`)
  if (outcome.failed > 0) console.log(`\n${outcome.output.trimEnd()}\n`)
  finished.push({ name, outcome })
}

/** Commands that count as one check together. All must end with 0; the first that does not is the last to run. */
export async function check(...commands: string[][]): Promise<Outcome> {
  let output = ''
  for (const command of commands) {
    const result = await execute(command)
    output += `$ ${command.join(' ')}\n${result.output}`
    if (result.code !== 0) return { passed: 0, failed: 1, skipped: [], output, text: '' }
  }
  return { passed: 1, failed: 0, skipped: [], output, text: '' }
}

/** One run of Vitest. That no test ran is a failure, and so is an exit code without a failed test. */
export async function vitest(args: string[], runner: string[] = []): Promise<Outcome> {
  const directory = mkdtempSync(join(tmpdir(), 'ambient-db-report-'))
  const path = join(directory, 'report.json')
  try {
    const reporters = ['--reporter=default', '--reporter=./scripts/vitest-reporter.ts']
    const command = [...runner, 'vitest', 'run', '--silent=passed-only', '--allowOnly=false', ...reporters, ...args]
    const { code, output } = await execute(command, { VITEST_REPORT: path })
    const report = readReport(path)
    if (report === undefined) return { passed: 0, failed: 1, skipped: [], output, text: 'Vitest did not finish' }
    const { passed, skipped } = report
    const ran = passed + report.failed
    const failed = ran === 0 || (code !== 0 && report.failed === 0) ? 1 : report.failed
    const text = ran === 0 ? 'no test ran' : `${passed} passed, ${failed} failed, ${skipped.length} skipped`
    return { passed, failed, skipped, output, text }
  } finally {
    rmSync(directory, { recursive: true, force: true })
  }
}

function readReport(path: string): VitestReport | undefined {
  try {
    return JSON.parse(readFileSync(path, 'utf8'))
  } catch {
    return undefined
  }
}

/** Says what failed and what was skipped and why, and ends with the one line that counts them. */
export function summarize(): void {
  const all = finished.map(({ outcome }) => outcome)
  const passed = all.reduce((sum, outcome) => sum + outcome.passed, 0)
  const failed = all.reduce((sum, outcome) => sum + outcome.failed, 0)
  const skipped = all.flatMap((outcome) => outcome.skipped)
  const bad = finished.filter(({ outcome }) => outcome.failed > 0)
  console.log('')
  for (const { name, reason } of skipped) console.log(`skipped: ${name} (${reason})`)
  for (const { name, outcome } of bad) console.log(`failed: ${name}${outcome.text && `: ${outcome.text}`}`)
  console.log(`${passed} passed, ${failed} failed, ${skipped.length} skipped`)
  process.exitCode = failed === 0 && passed > 0 ? 0 : 1
}

let running: ChildProcess | undefined

for (const signal of ['SIGTERM', 'SIGHUP'] as const) {
  process.once(signal, () => {
    running?.kill(signal)
    process.kill(process.pid, signal)
  })
}

async function execute([command = '', ...args]: string[], variables: Record<string, string> = {}) {
  const { FORCE_COLOR: _, ...inherited } = process.env
  const colors = process.stdout.isTTY ? { FORCE_COLOR: '1' } : { NO_COLOR: '1' }
  const env = { ...inherited, ...colors, ...variables }
  const child = spawn(command, args, { env, stdio: ['ignore', 'pipe', 'pipe'] })
  running = child
  let output = ''
  for (const stream of [child.stdout, child.stderr]) {
    stream.setEncoding('utf8').on('data', (text: string) => {
      output += text
    })
  }
  const code = await new Promise<number>((resolve) => {
    child.once('error', (error) => {
      output += `${error.message}\n`
      resolve(1)
    })
    child.once('close', (status) => resolve(status ?? 1))
  })
  return { code, output }
}
