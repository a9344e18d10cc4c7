import type { Pool } from 'pg'
import type { Message, WireProxy } from '../../support/proxy.ts'
import { type Plan, requestOf, unitIn, unitOf, type WireFault } from './plan.ts'

/** How long a stalled connection is held, in ms; a backend that the server ends meanwhile is gone by then. */
const stall = 60

/** What is known of a connection through the proxy. */
interface Link {
  /** The backend at its other end. */
  pid: number
  /** What its transaction has written. */
  units: string[]
  /** What the statement writes that is being sent. */
  unit: string | undefined
  /** The transaction behind a COMMIT that was passed on. */
  committing: string[]
  /** What is due at the message that is passing. */
  due: WireFault | undefined
}

/** Does to connections what the plans of the requests say, when the statements of the request come by. */
export class Saboteur {
  readonly #plans: ReadonlyMap<number, Plan>
  readonly #server: Pool
  readonly #applicationName: string
  readonly #links = new Map<number, Link>()
  readonly #done = new Set<Plan>()
  readonly #atCommit = new Map<number, () => void>()
  #kills = 0

  /** `server` reaches the server past the proxy; `applicationName` is that of the connections through it. */
  constructor(proxy: WireProxy, plans: readonly Plan[], server: Pool, applicationName: string) {
    this.#plans = new Map(plans.map((plan) => [plan.request, plan]))
    this.#server = server
    this.#applicationName = applicationName
    const watch = (message: Message) => {
      this.#read(message)
      return false
    }
    proxy.at(watch, 'reset')
    for (const when of ['before', 'after'] as const) {
      const isDue = (way: WireFault['way']) => (message: Message) => {
        const due = this.#linkOf(message).due
        return due?.way === way && due.when === when
      }
      const options = { when, times: Number.POSITIVE_INFINITY }
      proxy.at(isDue('reset'), 'reset', options)
      proxy.at(isDue('end'), 'end', options)
      proxy.at(isDue('stall'), { stall }, options)
      proxy.at(isDue('kill'), { stall }, options)
    }
  }

  /** How many plans of the wire came true. */
  get faults(): number {
    return this.#done.size
  }

  /** How many backends were ended by {@link killOne}. */
  get kills(): number {
    return this.#kills
  }

  /** Resolves when a COMMIT of the request passes. */
  commitOf(request: number): Promise<void> {
    return new Promise((resolve) => this.#atCommit.set(request, resolve))
  }

  /** Ends one of the backends that are open, whatever it does. */
  killOne(random: () => number): void {
    const links = [...this.#links.values()].slice(-24) // those before are gone
    const link = links[Math.floor(random() * links.length)]
    if (!link) return
    this.#kills++
    this.#kill(link)
  }

  #kill({ pid }: Link): void {
    // The backend may be gone, and its number that of another one.
    const sql = 'select pg_terminate_backend(pid) from pg_stat_activity where pid = $1 and application_name = $2'
    void this.#server.query(sql, [pid, this.#applicationName])
  }

  #linkOf({ connection }: Message): Link {
    let link = this.#links.get(connection)
    if (!link) {
      link = { pid: 0, units: [], unit: undefined, committing: [], due: undefined }
      this.#links.set(connection, link)
    }
    return link
  }

  #read(message: Message): void {
    const { label, bytes } = message
    const link = this.#linkOf(message)
    link.due = undefined
    if (label === '< K') link.pid = bytes.readInt32BE(5)
    else if (label.startsWith('> Q BEGIN')) link.units = []
    else if (label === '> B') {
      link.unit = unitIn(bytes.toString('latin1'))
      if (link.unit && !link.units.includes(link.unit)) link.units.push(link.unit)
    } else if (label === '> S' && link.unit) {
      link.due = this.#take([link.unit], 'statement') // with it the statement is complete
    } else if (label === '> Q COMMIT') {
      link.committing = link.units
      link.due = this.#take(link.units, 'commit')
      for (const unit of link.units) this.#atCommit.get(requestOf(unit))?.()
    } else if (label === '< C COMMIT') {
      link.due = this.#take(link.committing, 'answer')
    }
    if (link.due?.way === 'kill') this.#kill(link)
  }

  /** What one of the `units` has planned for this moment. */
  #take(units: readonly string[], at: WireFault['at']): WireFault | undefined {
    for (const unit of units) {
      const plan = this.#plans.get(requestOf(unit))
      const { wire } = plan ?? {}
      if (!plan || !wire || wire.at !== at || unit !== unitOf(plan.request, wire.part) || this.#done.has(plan)) continue
      this.#done.add(plan)
      return wire
    }
    return undefined
  }
}
