import { writeFileSync } from 'node:fs'
import type { Reporter, SerializedError, TestModule } from 'vitest/node'

/** What one run of Vitest came to. */
export interface VitestReport {
  readonly passed: number
  /** Failed tests, and files, suites and stray errors that failed outside any test. */
  readonly failed: number
  readonly skipped: readonly SkippedTest[]
}

export interface SkippedTest {
  readonly name: string
  readonly reason: string
}

/** Writes a {@link VitestReport} to the file that `VITEST_REPORT` names. Vitest's own JSON leaves the reasons out. */
export default class SummaryReporter implements Reporter {
  onTestRunEnd(modules: readonly TestModule[], unhandled: readonly SerializedError[]): void {
    const path = process.env.VITEST_REPORT
    if (path === undefined) throw new Error('VITEST_REPORT names no file to write the report to.')
    let passed = 0
    let failed = unhandled.length
    const skipped: SkippedTest[] = []
    for (const module of modules) {
      failed += module.errors().length
      for (const suite of module.children.allSuites()) failed += suite.errors().length
      for (const test of module.children.allTests()) {
        const result = test.result()
        if (result.state === 'passed') passed++
        else if (result.state === 'skipped') {
          const reason = result.note ?? (test.options.mode === 'todo' ? 'to do' : 'no reason given')
          skipped.push({ name: `${module.relativeModuleId} > ${test.fullName}`, reason })
        } else failed++ // a test that never finished is a failure too
      }
    }
    const report: VitestReport = { passed, failed, skipped }
    writeFileSync(path, JSON.stringify(report))
  }
}
