import { beforeAll, describe, expect, it } from 'vitest'
import { runShort } from '../short-run.ts'
import { uses } from './uses.ts'

/** `npm run truth -- memory` runs contexts by the million. */
describe('memory', () => {
  let report: Awaited<ReturnType<typeof runShort>>
  beforeAll(async () => {
    report = await runShort('memory')
  }, 180_000)

  it('C4 C8 keeps nothing of a context that has ended, whatever it was used for and whatever it left behind', () => {
    const { rows, failures, output } = report
    expect(failures, output).toEqual([])
    expect(rows.map(({ subject }) => subject)).toEqual(uses.map(({ name }) => name))
  })

  it('is no use unless planted faults are seen', () => {
    const { planted, output } = report
    expect(
      planted.map(({ caught }) => caught),
      output,
    ).toEqual([1, 1, 1])
  })
})
