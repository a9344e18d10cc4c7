import { beforeAll, describe, expect, it } from 'vitest'
import { runShort } from '../short-run.ts'
import { mutants } from './mutants.ts'

/** `npm run truth -- aborts` runs all cases; here the libraries share the units and ways, at every 61st place. */
describe('aborts', () => {
  let report: Awaited<ReturnType<typeof runShort>>
  beforeAll(async () => {
    report = await runShort('aborts')
  }, 180_000)

  it('C8 H4 leave nothing behind, wherever they come, and the truth is told', () => {
    const { rows, failures, output } = report
    expect(failures, output).toEqual([])
    expect(rows.map(({ subject }) => subject)).toEqual(['pg', 'kysely-pg', 'kysely-bare', 'drizzle-pg'])
    const sum = (counts: readonly unknown[]) => counts.reduce<number>((total, each) => total + Number(each), 0)
    expect(sum(rows.map(({ figures }) => figures['units and ways']))).toBeGreaterThan(200)
    expect(sum(rows.map(({ figures }) => figures.places))).toBeGreaterThan(20_000)
    expect(sum(rows.map(({ runs }) => runs))).toBeGreaterThan(500)
    for (const { runs, violations, figures } of rows) {
      expect(violations).toBe(0)
      expect(figures['only under load']).toBeLessThan(runs / 5)
      expect(figures['never reached']).toBeLessThan(runs / 20)
    }
  })

  it('are no use unless planted faults are seen', () => {
    const { planted, output } = report
    expect(
      planted.filter(({ caught }) => caught === 0),
      output,
    ).toEqual([])
    expect(planted).toHaveLength(3 * mutants.length)
  })
})
