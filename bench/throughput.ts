import { newContext } from 'ambient-db'
import type { Bench, Measure } from './measure.ts'
import { insert, insertByHand, insertByHandPipelined, kyselyTarget, pgTarget } from './targets.ts'

const goal = 0.97

/** A unit of one insert: a context here, acquire, BEGIN, INSERT, COMMIT and release by hand there. */
export async function throughput(bench: Bench): Promise<Measure[]> {
  const pg = await pgTarget(bench)
  const pipelined = await pgTarget(bench, { pipeline: true })
  const { main, kysely } = await kyselyTarget(bench)
  const kinds = [
    {
      name: 'pg',
      baseline: { operation: () => insertByHand(pg.pool) },
      subject: { operation: () => newContext(() => pg.main.db.query(insert, ['ambient'])) },
    },
    {
      name: 'pg, pipeline: true',
      baseline: { operation: () => insertByHandPipelined(pipelined.pool) },
      subject: { operation: () => newContext(() => pipelined.main.db.query(insert, ['ambient'])) },
    },
    {
      name: 'Kysely',
      baseline: {
        operation: () =>
          kysely.transaction().execute((trx) => trx.insertInto('bench_rows').values({ name: 'by hand' }).execute()),
      },
      subject: {
        operation: () => newContext(() => main.db.insertInto('bench_rows').values({ name: 'ambient' }).execute()),
      },
    },
  ]
  return kinds.flatMap(({ name, ...sides }) =>
    [1, 10].map((concurrency): Measure => {
      const title = `throughput: one insert, ${name}, ${concurrency} at once`
      return { kind: 'comparison', name: title, shows: 'throughput', goal, concurrency, ...sides }
    }),
  )
}
