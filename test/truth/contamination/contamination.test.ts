import { beforeAll, describe, expect, it } from 'vitest'
import { runShort } from '../short-run.ts'
import { faults } from './faults.ts'

/** `npm run truth -- contamination` issues a million statements for each library; here a few thousand. */
describe('contamination', () => {
  let report: Awaited<ReturnType<typeof runShort>>
  beforeAll(async () => {
    report = await runShort('contamination')
  }, 180_000)

  it('C1 C4 A3 A6 S12 lets a row into no transaction but its own, and none behind the end', () => {
    const { rows, failures, output } = report
    expect(failures, output).toEqual([])
    const onPostgres = ['pg', 'pg, pipelined', 'kysely-pg', 'kysely-bare', 'drizzle-pg']
    const onMariadb = /MySQL .* left out/.test(output) ? [] : ['mysql2', 'kysely-mysql2', 'drizzle-mysql2']
    expect(rows.map(({ subject }) => subject)).toEqual([...onPostgres, ...onMariadb])
    for (const { runs, violations, figures } of rows) {
      expect(violations).toBe(0)
      expect(runs).toBeGreaterThanOrEqual(1200)
      expect(figures.committed).toBeGreaterThan(50)
      expect(figures['rolled back']).toBeGreaterThan(20)
      expect(figures['late, refused']).toBeGreaterThan(40)
    }
  })

  it('is no use unless planted faults are seen', () => {
    const { planted, output } = report
    expect(
      planted.filter(({ caught }) => caught === 0),
      output,
    ).toEqual([])
    expect(planted).toHaveLength(faults.length)
  })
})
