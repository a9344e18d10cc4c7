import { beforeAll, describe, expect, it } from 'vitest'
import { runShort } from '../short-run.ts'

/** `npm run truth -- cuts` runs all cases; here it is a sample of each library's, such that each unit is cut in several places and ways. */
describe('wire cuts', () => {
  let report: Awaited<ReturnType<typeof runShort>>
  beforeAll(async () => {
    report = await runShort('cuts')
  }, 300_000)

  it('S4 S5 S7 C6 K2 never lie about what the database did, lose no pool slot and catch every exception', () => {
    const { rows, failures, output } = report
    expect(failures, output).toEqual([])
    const subjects = ['pg', 'kysely-pg', 'kysely-bare', 'drizzle-pg', 'mysql2', 'kysely-mysql2', 'drizzle-mysql2']
    expect(rows.map(({ subject }) => subject)).toEqual(subjects)
    for (const { runs, violations, figures } of rows) {
      expect(violations).toBe(0)
      expect(figures.units).toBeGreaterThanOrEqual(30)
      expect(runs).toBeGreaterThan(150)
      expect(figures.unknowns).toBeGreaterThan(0)
      expect(figures.unresolved).toBe(0)
      expect(figures['only under load']).toBeLessThan(runs / 10)
    }
    const declares = rows.map(({ figures }) => /declared/.test(JSON.stringify(figures)))
    expect(declares).toEqual([false, false, true, false, false, false, false])
    expect(rows.map(({ figures }) => Number(figures.resolved) > 0)).toEqual([
      true,
      true,
      false,
      true,
      false,
      false,
      false,
    ])
  })

  it('are no use unless planted faults are seen', () => {
    const { planted, output } = report
    const missed = planted.filter(({ seenAs, caught }) => (seenAs === undefined ? caught > 0 : caught === 0))
    expect(missed, output).toEqual([])
    expect(planted.filter(({ seenAs }) => seenAs !== undefined)).toHaveLength(30)
  })
})
