import type { Pool } from 'pg'
import type { WireProxy } from '../../support/proxy.ts'
import { sleep } from '../waiting.ts'
import type { Order } from './app.ts'
import { type Connection, type Exchange, openConnection } from './clients.ts'
import type { Counts, Explanation, Sight } from './judge.ts'
import { type Plan, randomOf, unitOf } from './plan.ts'
import type { Saboteur } from './saboteur.ts'
import { type DatabaseName, styleOf } from './styles.ts'

/** Connections of clients at the same time. */
const clients = 24
/** After so many requests one backend is ended, whatever it does. */
const killEvery = 40

export interface LoadOptions {
  readonly plans: readonly Plan[]
  readonly seed: number
  readonly port: number
  readonly protocol: keyof typeof openConnection
  readonly proxy: WireProxy
  readonly saboteur: Saboteur
  /** Connections that the library does not know of. */
  readonly witnesses: Readonly<Record<DatabaseName, Pool>>
  /** Milliseconds in which every request must have its answer. */
  readonly bound: number
  /** When no more requests are sent, as `performance.now()`. */
  readonly deadline: number
}

/** Sends all requests, many at a time, and resolves with what their clients saw, in no order. */
export async function runLoad(options: LoadOptions): Promise<Sight[]> {
  const { plans, seed, proxy, saboteur } = options
  const visits = visitsOf(plans)
  const sights: Sight[] = []
  const random = randomOf(seed)
  const third = Math.floor(plans.length / 3) // all connections are cut after each but the last
  let sent = 0
  const onSent = () => {
    sent++
    if (sent % killEvery === 0) saboteur.killOne(random)
    if (sent === third || sent === 2 * third) proxy.cut('reset')
  }
  const worker = async () => {
    for (let visit = visits.shift(); visit && performance.now() < options.deadline; visit = visits.shift()) {
      await new Visit(options, onSent).run(visit, sights)
    }
  }
  await Promise.all(Array.from({ length: clients }, worker))
  return sights
}

/**
 * Its handlers give the answer up, and the connection with it, so that later requests on it have no answer. One that waits for its
 * turn in a pipeline is given up by Node without closing the connection: its client would wait for ever.
 */
const giveUp = 'stream that fails'

/** What one socket is used for: pieces of one or several requests each, sent together. */
function visitsOf(plans: readonly Plan[]): Plan[][][] {
  const visits: Plan[][][] = []
  for (const plan of plans) {
    const visit = visits.at(-1)
    const piece = visit?.at(-1)
    if (!visit || !piece || plan.opens) visits.push([[plan]])
    else if (plan.pipelined && piece.at(-1)?.style !== giveUp && plan.style !== giveUp) piece.push(plan)
    else visit.push([plan])
  }
  return visits
}

class Visit {
  readonly #options: LoadOptions
  readonly #onSent: () => void
  #connection: Connection | undefined

  constructor(options: LoadOptions, onSent: () => void) {
    this.#options = options
    this.#onSent = onSent
  }

  async run(visit: readonly Plan[][], sights: Sight[]): Promise<void> {
    for (const piece of visit) {
      const { port, protocol, saboteur } = this.#options
      this.#connection ??= await openConnection[protocol](port)
      const commits = piece.map(({ request, leaves }) =>
        leaves === 'at commit' ? saboteur.commitOf(request) : undefined,
      )
      const exchanges = this.#connection.ask(...piece.map(askOf))
      for (const [index, plan] of piece.entries()) {
        this.#onSent()
        const gone = this.#connection === undefined
        const exchange = exchanges[index] as Exchange // one for each
        sights.push(gone ? { plan, end: 'left' } : await this.#follow(exchange, plan, commits[index]))
      }
    }
    this.#leave()
  }

  async #follow(exchange: Exchange, plan: Plan, commit: Promise<void> | undefined): Promise<Sight> {
    const { leaves, request } = plan
    if (leaves === 'once sent') {
      await sleep(request % 9)
      return this.#left(plan)
    }
    if (commit) {
      await this.#inTime(Promise.race([commit, exchange.firstByte().catch(() => {})]))
      return this.#left(plan)
    }
    const status = await this.#inTime(exchange.firstByte()).catch(() => 'closed' as const)
    if (status === 'late' || status === 'closed') {
      this.#leave()
      return { plan, end: status === 'late' ? 'hung' : 'closed' }
    }
    const visible = await this.#look(plan)
    if (leaves === 'at the first byte' || leaves === 'in the body') {
      if (leaves === 'in the body') await sleep(request % 9)
      return { ...this.#left(plan), status, visible }
    }
    const answer = await this.#inTime(exchange.answer()).catch(() => 'cut off' as const)
    if (answer === 'late' || answer === 'cut off') {
      this.#leave()
      return { plan, end: answer === 'late' ? 'hung' : 'cut off', status, visible }
    }
    if (leaves) this.#leave()
    const explanation = answer.status < 400 ? undefined : explained(answer.body)
    return { plan, end: 'answered', status: answer.status, visible, explanation }
  }

  #left(plan: Plan): Sight {
    this.#leave()
    return { plan, end: 'left' }
  }

  #leave(): void {
    this.#connection?.destroy()
    this.#connection = undefined
  }

  async #inTime<Result>(promise: Promise<Result>): Promise<Result | 'late'> {
    let timer: NodeJS.Timeout | undefined
    const late = new Promise<'late'>((resolve) => {
      timer = setTimeout(resolve, this.#options.bound, 'late')
    })
    try {
      return await Promise.race([promise, late])
    } finally {
      clearTimeout(timer)
    }
  }

  /** The rows of the request, as other connections see them now. */
  async #look({ request, style }: Plan): Promise<Counts> {
    const { parts } = styleOf(style)
    const databases = [...new Set(parts.map(({ database }) => database))]
    const counts = databases.map(async (database) => {
      const units = parts.filter((part) => part.database === database).map(({ name }) => unitOf(request, name))
      return countRows(database, this.#options.witnesses[database], units)
    })
    return new Map((await Promise.all(counts)).flatMap((each) => [...each]))
  }
}

/** Rows in a database, by key: all, or those of some units. */
export async function countRows(database: DatabaseName, witness: Pool, units?: readonly string[]): Promise<Counts> {
  const some = units ? 'where unit = any($1)' : ''
  const sql = `select unit, count(*)::int as count from entries ${some} group by unit`
  const { rows } = await witness.query<{ unit: string; count: number }>(sql, units && [units])
  return new Map(rows.map(({ unit, count }) => [`${database} ${unit}`, count]))
}

/** The app answers failures by JSON; what else there is was made by others, and says what it is. */
function explained(body: string): Explanation {
  try {
    return JSON.parse(body)
  } catch {
    return { message: body }
  }
}

function askOf({ request, style, rows, spoils }: Plan): { path: string; body: string } {
  const order: Order = { rows, spoils }
  const contended = Object.values(spoils).some((each) => each.includes('contended'))
  const path = `/${encodeURIComponent(style)}/${request}${contended ? '?serializable' : ''}`
  return { path, body: JSON.stringify(order) }
}
