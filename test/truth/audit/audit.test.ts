import { beforeAll, describe, expect, it } from 'vitest'
import { runShort } from '../short-run.ts'

const subjects = [
  'node:http',
  'node:http2',
  'Express 4',
  'Express 5',
  'Fastify 5',
  'NestJS 12 on Express',
  'NestJS 12 on Fastify',
  'Koa 3',
  'Hono 4',
  'h3 2',
  'fetch',
]

/** `npm run truth -- audit` sends 10,000 requests through each framework; here it is 100. */
describe('the acknowledgement audit', () => {
  let report: Awaited<ReturnType<typeof runShort>>
  beforeAll(async () => {
    report = await runShort('audit')
  }, 300_000)

  it('H1 H2 H3 H4 C6 S5 K2 tells every client the truth, on the first byte, and leaves nothing open', () => {
    const { rows, failures, output } = report
    expect(failures, output).toEqual([])
    expect(rows.map(({ subject }) => subject)).toEqual(subjects)
    for (const { runs, violations, figures } of rows) {
      expect([runs, violations, figures.left]).toEqual([100, 0, 0])
      expect(figures['units acknowledged']).toBeGreaterThan(20)
      expect(figures['wire faults']).toBeGreaterThan(3)
      expect(figures.kills).toBeGreaterThan(0)
    }
  })

  it('is no use unless planted faults are seen', () => {
    const { planted, output } = report
    expect(
      planted.filter(({ caught }) => caught === 0),
      output,
    ).toEqual([])
    expect(planted).toHaveLength(14)
  })
})
