import { newContext } from 'ambient-db'
import { startProxy } from '../test/support/proxy.ts'
import type { Bench, Measure } from './measure.ts'
import { insert, pgTarget } from './targets.ts'

/** What passes between the pool and the server, counted by a proxy between them. */
export async function roundTrips(bench: Bench): Promise<Measure[]> {
  const proxy = await startProxy(bench.url, { record: false })
  bench.atEnd(() => proxy.close())
  const proxied = { ...bench, url: proxy.url }
  const waiting = await pgTarget(proxied)
  const pipelined = await pgTarget(proxied, { pipeline: true })
  let checkOuts = 0
  waiting.pool.on('acquire', () => checkOuts++)

  const unit = ({ main }: typeof waiting, queries: number) =>
    newContext(async () => {
      for (let query = 0; query < queries; query++) await main.db.query(insert, ['ambient'])
    })
  const roundTripsOf = async (target: typeof waiting, queries: number) => {
    await unit(target, queries) // connects
    proxy.reset()
    await unit(target, queries)
    return proxy.traffic.roundTrips
  }
  const ofEmptyContext = async (variant: 'real' | 'planted', count: () => number) => {
    await unit(waiting, 1)
    proxy.reset()
    checkOuts = 0
    await newContext(async () => {
      const session = waiting.main.session()
      if (variant === 'planted') await session.begin()
    })
    return count()
  }
  const round = { kind: 'count', unit: 'round trips' } as const
  return [
    {
      ...round,
      name: 'round trips: one insert, pg',
      goal: 3,
      measure: (variant) => roundTripsOf(waiting, variant === 'real' ? 1 : 2),
    },
    {
      ...round,
      name: 'round trips: one insert, pg, pipeline: true',
      goal: 2,
      measure: (variant) => roundTripsOf(pipelined, variant === 'real' ? 1 : 2),
    },
    {
      kind: 'count',
      name: 'context: empty, check-outs',
      unit: '',
      goal: 0,
      measure: (variant) => ofEmptyContext(variant, () => checkOuts),
    },
    {
      kind: 'count',
      name: 'context: empty, sent to the server',
      unit: 'bytes',
      goal: 0,
      measure: (variant) => ofEmptyContext(variant, () => proxy.traffic.sent),
    },
  ]
}
