import { beforeAll, describe, expect, it } from 'vitest'
import { runShort } from '../short-run.ts'

/** `npm run truth -- pools` goes on with other seeds; here each scenario is run once for each library. */
describe('pools', () => {
  let report: Awaited<ReturnType<typeof runShort>>
  beforeAll(async () => {
    report = await runShort('pools')
  }, 300_000)

  it('S11 D3 D4 let nobody wait for ever, lose no slot, and never lie about what the database did', () => {
    const { rows, failures, output } = report
    expect(failures, output).toEqual([])
    expect(rows.map(({ subject, runs }) => [subject, runs])).toEqual([
      ['pg', 14],
      ['kysely-pg', 14],
      ['kysely-bare', 14],
      ['drizzle-pg', 14],
      ['mysql2', 14],
      ['kysely-mysql2', 14],
      ['drizzle-mysql2', 14],
      ['kysely-sqlite', 5],
    ])
    for (const { violations, figures } of rows) {
      expect(violations).toBe(0)
      expect(figures.acknowledged).toBeGreaterThan(150)
    }
  })

  it('are no use unless planted faults are seen', () => {
    const { planted, output } = report
    expect(
      planted.filter(({ caught }) => caught === 0),
      output,
    ).toEqual([])
    expect(planted).toHaveLength(49)
  })
})
