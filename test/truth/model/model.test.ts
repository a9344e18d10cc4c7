import { beforeAll, describe, expect, it } from 'vitest'
import { runShort } from '../short-run.ts'

/** `npm run truth -- model` runs 5,000 programs, others each time. */
describe('the model', () => {
  let report: Awaited<ReturnType<typeof runShort>>
  beforeAll(async () => {
    report = await runShort('model', '--seed=1')
  }, 300_000)

  it('C4 C5 C8 S4 S6 A1 A2 A3 A4 A6 K1 K2 says of 300 programs what the library does, turn by turn', () => {
    const { rows, failures, output } = report
    expect(failures, output).toEqual([])
    expect(rows.map(({ subject, runs }) => [subject, runs])).toEqual([
      ['pg', 75],
      ['kysely-pg', 75],
      ['drizzle-pg', 75],
      ['kysely-sqlite', 75],
    ])
    for (const { figures } of rows) expect(figures.turns).toBeGreaterThan(300)
  })

  it('is no use unless planted faults are seen', () => {
    const { planted, output } = report
    expect(
      planted.filter(({ caught }) => caught === 0),
      output,
    ).toEqual([])
    expect(planted).toHaveLength(52)
  })
})
