import { detach } from '../../../src/index.ts'
import type { Stall } from '../../support/proxy.ts'
import { sleep } from '../waiting.ts'
import type { End, Stage, Timeouts } from './stage.ts'

export interface Scenario {
  readonly name: string
  /** Default are {@link shortTimeouts}. */
  readonly timeouts?: Partial<Timeouts>
  /** The pool is of no use afterwards, for this reason. */
  readonly ends?: 'ended by the user' | 'shut down'
  run(stage: Stage): Promise<void>
}

/** Short, so that a server can be slower; the bound of what must not hang is far behind them. */
export const shortTimeouts: Timeouts = { acquireTimeout: 500, settleTimeout: 1500 }
/** Where nobody is to be refused. */
const enough = { acquireTimeout: 20_000, settleTimeout: 20_000 }

const many = (count: number, make: (index: number) => Promise<End>) =>
  Promise.all(Array.from({ length: count }, (_, index) => make(index)))

/** A unit that writes and then has a few more statements and pauses. */
async function work(stage: Stage, label: string): Promise<void> {
  await stage.write(label)
  for (let more = stage.random.whole(0, 2); more > 0; more--) await stage.execute('select 1')
  if (stage.random.whole(0, 3) === 0) await sleep(stage.random.whole(1, 8))
}

/** What a unit may fail with that finds no connection in time. */
function exhausted(stage: Stage, ends: readonly End[]): void {
  for (const { label, error } of ends) if (error) stage.expectError(label, error, 'AMBIENT_ACQUIRE_TIMEOUT')
}

/** Everybody holds connections, and waits for one more: none can be had until somebody gives up. */
const inner: Scenario = {
  name: 'inner contexts',
  timeouts: { acquireTimeout: 1000 },
  async run(stage) {
    const { random } = stage
    await stage.expectFullPool() // so that the connections are there
    const shares: number[] = []
    for (let left = stage.size; left > 0; left -= shares.at(-1) as number)
      shares.push(random.whole(1, Math.min(3, left)))
    const everybodyHolds = stage.meeting(shares.length)
    const everybodyWaited = stage.meeting(shares.length)
    /** Holds so many connections, one in each context inside the other, and wants one more. */
    const hold = (connections: number, more: () => Promise<End>): Promise<End> => {
      const swallows = random.pick([true, false])
      return stage.unit(async (label) => {
        await stage.write(label).catch((error) => {
          stage.violate('not served', `a holder: ${error}`)
          for (const each of [everybodyHolds, everybodyWaited]) each.dissolve()
          throw error
        })
        const { error } = connections === 1 ? await more() : await hold(connections - 1, more)
        if (error && !swallows) throw error
      }, 3 * stage.bound())
    }
    const ends = await Promise.all(
      shares.map((share) =>
        hold(share, async () => {
          await everybodyHolds.come()
          const end = await stage.unit((label) => stage.write(label))
          await everybodyWaited.come()
          if (everybodyHolds.dissolved) return end
          const text = new RegExp(`this context and its parents hold ${share} of them`)
          stage.expectError('an inner context', end.error, 'AMBIENT_ACQUIRE_TIMEOUT')
          stage.expectError('an inner context', end.error, text)
          return end
        }),
      ),
    )
    exhausted(stage, ends)
  },
}

const manyUnits: Scenario = {
  name: 'many units, and time enough',
  timeouts: enough,
  async run(stage) {
    const units = stage.random.whole(150, 300)
    stage.served(await many(units, () => stage.unit((label) => work(stage, label))))
  },
}

const tooMany: Scenario = {
  name: 'many units, and too little time',
  async run(stage) {
    await stage.occupy()
    const pause = stage.promised.acquireTimeout / stage.random.whole(2, 5)
    const holds = async (label: string) => {
      await stage.write(label)
      await sleep(pause)
    }
    const ends = await many(stage.random.whole(100, 200), () => stage.unit(holds, stage.bound(pause)))
    exhausted(stage, ends)
    if (ends.filter(({ error }) => !error).length < stage.size)
      stage.violate('not served', 'not even the first ones were')
    if (ends.every(({ error }) => !error)) stage.violate('not served', 'nobody had to wait: the case shows nothing')
  },
}

/** Connections that come late, or whose BEGIN or COMMIT has a late answer: in time all the same, or too late. */
const slow = (what: 'start-up' | 'BEGIN' | 'COMMIT', label: RegExp, length: 'in time' | 'too late'): Scenario => ({
  name: `${what} is answered late, ${length === 'in time' ? 'but in time' : 'too late'}`,
  ...(length === 'in time' && { timeouts: { acquireTimeout: 5000, settleTimeout: 5000 } }), // far more than the stall
  async run(stage) {
    const { acquireTimeout, settleTimeout } = stage.promised
    const limit = what === 'COMMIT' ? settleTimeout : acquireTimeout
    const fate: Stall = { stall: length === 'in time' ? 300 : 2 * limit }
    const times = stage.random.whole(1, stage.size)
    if (what !== 'start-up') await stage.occupy() // so that the connections are there
    const trap = stage.proxy.at(label, fate, { times })
    const served = stage.bound(settleTimeout)
    const ends = await many(2 * stage.size, () => stage.unit((mine) => work(stage, mine), served))
    trap.remove()
    const errors =
      what === 'COMMIT' ? ['AMBIENT_COMMIT_UNKNOWN', 'AMBIENT_ACQUIRE_TIMEOUT'] : ['AMBIENT_ACQUIRE_TIMEOUT']
    if (length === 'in time') stage.served(ends)
    else for (const { label: by, error } of ends) if (error) stage.expectError(by, error, ...errors)
    if (trap.count < times)
      stage.violate('not served', `${trap.count} of ${times} were slow: the case shows too little`)
    if (length === 'too late' && ends.every(({ error }) => !error)) stage.violate('wrong error', 'nobody was refused')
    await sleep(fate.stall) // what comes late has come then
  },
})

/** Of PostgreSQL; of MariaDB and MySQL by the number of connections and by the account. */
const refusals = [
  '53300',
  'ER_USER_LIMIT_REACHED',
  'ER_TOO_MANY_USER_CONNECTIONS',
  'ER_ACCOUNT_HAS_BEEN_LOCKED',
  /locked/,
]

/** More connections than the server admits. */
const refused: Scenario = {
  name: 'a server that refuses',
  timeouts: { acquireTimeout: 5000 },
  async run(stage) {
    const admitted = stage.random.whole(0, stage.size - 1)
    await stage.place.admit(admitted)
    const everybody = () => many(stage.random.whole(10, 30), () => stage.unit((label) => work(stage, label)))
    const ends = await everybody()
    for (const { label, error } of ends) if (error) stage.expectError(label, error, ...refusals)
    if (ends.every(({ error }) => !error)) stage.violate('not served', 'nobody was refused: the case shows nothing')
    await stage.place.admit()
    stage.served(await everybody())
  },
}

/** The load that goes on until `stop`: so many workers, one unit after the other. */
function load(stage: Stage, workers: number, each: (label: string) => Promise<unknown>) {
  const ends: End[] = []
  let going = true
  const worker = async () => {
    while (going) {
      const end = await stage.unit(each)
      ends.push(end)
      if (end.error) await sleep(5)
    }
  }
  const over = Promise.all(Array.from({ length: workers }, worker))
  return {
    ends,
    stop: async () => {
      going = false
      await over
      return ends
    },
  }
}

const ended: Scenario = {
  name: 'ended by the user under load',
  ends: 'ended by the user',
  async run(stage) {
    const running = load(stage, stage.size * 3, (label) => work(stage, label))
    await sleep(stage.random.whole(30, 120))
    const engine = (await stage.database.connect()) as { end?(): Promise<void>; destroy?(): Promise<void> }
    const ending = engine.end?.() ?? engine.destroy?.()
    await sleep(stage.random.whole(20, 100))
    const ends = await running.stop()
    await ending
    const errors = ['AMBIENT_ACQUIRE_TIMEOUT', 'AMBIENT_TRANSACTION_ABORTED', 'AMBIENT_COMMIT_UNKNOWN']
    const ofDriver =
      /after calling end on the pool|Pool is closed|driver has already been destroyed|Connection terminated|Client was closed|closed state/
    for (const { label, error } of ends) if (error) stage.expectError(label, error, ...errors, ofDriver)
    if (ends.every(({ error }) => !error)) stage.violate('not served', 'nobody noticed: the case shows nothing')
    const late = await stage.unit((label) => stage.write(label))
    stage.expectError('a unit afterwards', late.error, 'AMBIENT_ACQUIRE_TIMEOUT', ofDriver)
  },
}

const shutDown: Scenario = {
  name: 'shutdown under load',
  timeouts: { acquireTimeout: 8000, settleTimeout: 8000 },
  ends: 'shut down',
  async run(stage) {
    const main = stage.gate()
    const idle = stage.gate()
    const everybodyHolds = stage.meeting(stage.size + 1)
    const underWay = [
      many(stage.size, () =>
        stage.unit(async (label) => {
          await stage.write(label)
          await everybodyHolds.come()
          await main.passed
          await stage.execute('select 1')
        }, 2 * stage.bound()),
      ),
    ]
    await everybodyHolds.come()
    const waiting = stage.random.whole(1, 20)
    underWay.push(many(waiting, () => stage.unit((label) => work(stage, label), 2 * stage.bound())))
    const withoutSession = many(3, () =>
      stage.unit(async (label) => {
        await idle.passed
        await stage.write(label)
      }),
    )
    await sleep(20) // all of them wait for a connection
    const shutdown = stage.shutdown().catch((error) => stage.violate('wrong error', `shutdown(): ${error}`))
    idle.open()
    const refused = [...(await withoutSession), ...(await many(5, () => stage.unit((label) => stage.write(label))))]
    for (const { label, error } of refused) stage.expectError(label, error, 'AMBIENT_SHUT_DOWN')
    await sleep(stage.random.whole(0, 50))
    main.open()
    await shutdown
    stage.nothingUnderWay()
    await stage.expectNoConnection()
    stage.served((await Promise.all(underWay)).flat())
  },
}

/** What is still under way after `settleTimeout` is rolled back; its code learns of it as soon as it goes on. */
const impatient: Scenario = {
  name: 'shutdown that has waited long enough',
  timeouts: { acquireTimeout: 8000 },
  ends: 'shut down',
  async run(stage) {
    const { passed, open } = stage.gate()
    const everybodyHolds = stage.meeting(stage.size + 1)
    const { settleTimeout } = stage.promised
    const stuck = many(stage.size, () =>
      stage.unit(
        async (label) => {
          await stage.write(label)
          await everybodyHolds.come()
          await passed
        },
        stage.bound(2 * settleTimeout),
      ),
    )
    await everybodyHolds.come()
    const startedAt = performance.now()
    await stage.shutdown()
    const ms = Math.round(performance.now() - startedAt)
    if (ms < settleTimeout - 50) stage.violate('shutdown', `it waited for ${ms} ms only`)
    if (ms > stage.bound(settleTimeout)) stage.violate('late', `shutdown() took ${ms} ms`)
    await stage.expectNoConnection()
    open()
    for (const { label, error } of await stuck) stage.expectError(label, error, 'AMBIENT_SHUT_DOWN')
  },
}

const hosts: Scenario = {
  name: 'hosts changed under load',
  timeouts: enough,
  async run(stage) {
    const { random, proxies } = stage
    const running = load(stage, stage.size * 3, (label) => work(stage, label))
    let at = 0
    for (let changes = random.whole(3, 6); changes > 0; changes--) {
      await sleep(random.whole(10, 60))
      at = random.pick([1 - at, 1 - at, at])
      await stage.database.changeHost(proxies[at]!.url)
      if (stage.database.host !== proxies[at]!.url) stage.violate('wrong error', 'changeHost() resolved without effect')
    }
    await sleep(random.whole(10, 60))
    stage.served(await running.stop())
    const left = proxies[1 - at]!
    const since = performance.now()
    while (left.open > 0 && performance.now() - since < stage.bound()) await sleep(10)
    if (left.open > 0) stage.violate('leaked connection', `${left.open} to the host that was left`)
  },
}

/** For a server, with a pool. */
export const scenarios: readonly Scenario[] = [
  inner,
  manyUnits,
  tooMany,
  ...(['in time', 'too late'] as const).flatMap((length) => [
    slow('start-up', /^> (?:startup|login)/, length),
    slow('BEGIN', /^> (?:[QP]|Query) (?:begin|start)\b/i, length),
    slow('COMMIT', /^> (?:[QP]|Query) commit\b/i, length),
  ]),
  refused,
  ended,
  shutDown,
  impatient,
  hosts,
]

const selfDeadlock: Scenario = {
  name: 'an inner context, and only one connection',
  timeouts: { acquireTimeout: 8000 },
  async run(stage) {
    const others: Promise<End>[] = []
    const outer = await stage.unit(async (label) => {
      await stage.write(label)
      for (let more = stage.random.whole(0, 10); more > 0; more--)
        others.push(detach(() => stage.unit((mine) => work(stage, mine))))
      for (const _ of [1, 2]) {
        const { error, ms } = await stage.unit((mine) => stage.write(mine))
        stage.expectError('the inner context', error, 'AMBIENT_SELF_DEADLOCK')
        if (ms > stage.promised.acquireTimeout / 2) stage.violate('late', `the inner context waited for ${ms} ms`)
      }
    })
    stage.served([outer, ...(await Promise.all(others))])
  },
}

/** For an engine with one connection. */
export const singleScenarios: readonly Scenario[] = [manyUnits, tooMany, selfDeadlock, shutDown, impatient]
