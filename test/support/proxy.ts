import { connect, createServer, type Server, type Socket } from 'node:net'
import type { Gate } from './gate.ts'
import { MysqlReader } from './mysql-wire.ts'
import { PostgresReader } from './postgres-wire.ts'

export type Direction = 'sent' | 'received'

/** Reads the protocol of one connection. What it says is about the bytes that it has seen in order. */
export interface WireReader {
  /** The length of the message that `unread` begins with, if it can be told yet. */
  lengthOf(direction: Direction, unread: Buffer): number | undefined
  /** The label of a message. */
  read(direction: Direction, bytes: Buffer): string
}

/** The protocols, by the scheme of the URL. */
const postgres = { port: 5432, reader: () => new PostgresReader() }
const mysql = { port: 3306, reader: () => new MysqlReader() }
const protocols: Record<string, { readonly port: number; reader(): WireReader }> = {
  'postgres:': postgres,
  'postgresql:': postgres,
  'mysql:': mysql,
  'mariadb:': mysql,
}

/** One message on its way through a {@link WireProxy}. */
export interface Message {
  /** Direction, type and what the message is about: see {@link PostgresReader} and {@link MysqlReader}. */
  readonly label: string
  /** Number of its connection, from 1. */
  readonly connection: number
  readonly bytes: Buffer
}

/** The connection stays open, but nothing passes for so many ms, in either direction. */
export interface Stall {
  readonly stall: number
}

/**
 * What becomes of the connection at a message: cut with RST or FIN, or stalled (open, but nothing passes any more, or for a
 * while); or what becomes of the message: it and all behind it are held until a gate opens, or other bytes go in its place.
 */
export type Fate = 'reset' | 'end' | 'stall' | Stall | Gate | ((message: Message) => Buffer)

/** The beginning of a label, a pattern for it, or a test of the message. */
export type Match = string | RegExp | ((message: Message) => boolean)

/** A fate that waits for its message. */
export interface Trap {
  /** How often it has caught a message. */
  readonly count: number
  /** Resolves with the first message that it catches. */
  readonly caught: Promise<Message>
  remove(): void
}

/** What has passed since the start or the last {@link WireProxy.reset}. */
export interface Traffic {
  /** How often the server answered something that clients had sent. */
  readonly roundTrips: number
  /** Bytes from clients. */
  readonly sent: number
  /** Bytes to clients. */
  readonly received: number
  /** Connections that were opened. */
  readonly connections: number
  /** Labels of all messages, in order. */
  readonly labels: readonly string[]
}

/** A TCP proxy in front of a database server that reads what passes, counts it, and fails where it is told to. */
export interface WireProxy {
  /** The connection string of the server, with the proxy in its place. */
  readonly url: string
  readonly traffic: Traffic
  /** Connections that are open now. */
  readonly open: number
  /** Sets all counts to zero. */
  reset(): void
  /** Lets `fate` happen `before` (the default) or `after` a message is passed on; `times` is 1 unless given. */
  at(match: Match, fate: Fate, options?: { when?: 'before' | 'after'; times?: number }): Trap
  /** Cuts all connections that are open. */
  cut(how: 'reset' | 'end'): void
  close(): Promise<void>
}

/** Starts a proxy for the server of `url`. Without `record`, it keeps no labels: for measuring. */
export async function startProxy(url: string, { record = true } = {}): Promise<WireProxy> {
  const target = new URL(url)
  const protocol = protocols[target.protocol]
  if (!protocol) throw new Error(`No protocol is known for ${target.protocol}//.`)
  const links = new Set<Link>()
  const traps: { match: Match; fate: Fate; when: 'before' | 'after'; left: number; hit(message: Message): void }[] = []
  let counts = { roundTrips: 0, sent: 0, received: 0, connections: 0 }
  let labels: string[] = []
  let connections = 0

  const watcher: Watcher = {
    fate(message, when) {
      if (record && when === 'before') labels.push(message.label)
      const trap = traps.find((each) => each.left > 0 && each.when === when && matches(each.match, message))
      if (!trap) return undefined
      trap.left--
      trap.hit(message)
      return trap.fate
    },
    passed(direction, bytes, answers) {
      counts[direction] += bytes
      if (answers) counts.roundTrips++
    },
  }
  const server: Server = createServer({ noDelay: true, allowHalfOpen: true }, (client) => {
    counts.connections++
    const upstream = connect({
      port: Number(target.port || protocol.port),
      host: target.hostname,
      noDelay: true,
      allowHalfOpen: true,
    })
    const link = new Link(client, upstream, ++connections, protocol.reader(), watcher)
    links.add(link)
    client.once('close', () => links.delete(link))
  })
  await new Promise<void>((resolve, reject) => server.once('error', reject).listen(0, '127.0.0.1', resolve))
  const address = server.address()
  if (address === null || typeof address === 'string') throw new Error('The system gave no port.')
  const proxied = new URL(url)
  proxied.hostname = '127.0.0.1'
  proxied.port = String(address.port)

  return {
    url: proxied.href,
    get traffic() {
      return { ...counts, labels: [...labels] }
    },
    get open() {
      return links.size
    },
    reset() {
      counts = { roundTrips: 0, sent: 0, received: 0, connections: 0 }
      labels = []
    },
    at(match, fate, { when = 'before', times = 1 } = {}) {
      let count = 0
      let resolve: (message: Message) => void = () => {}
      const caught = new Promise<Message>((settle) => {
        resolve = settle
      })
      const trap = {
        match,
        fate,
        when,
        left: times,
        hit(message: Message) {
          count++
          resolve(message)
        },
      }
      traps.push(trap)
      return {
        get count() {
          return count
        },
        caught,
        remove: () => void traps.splice(traps.indexOf(trap), 1),
      }
    },
    cut(how) {
      for (const link of links) link.cut(how)
    },
    async close() {
      for (const link of links) link.cut('reset')
      await new Promise((resolve) => server.close(resolve))
    },
  }
}

function matches(match: Match, message: Message): boolean {
  if (typeof match === 'function') return match(message)
  return typeof match === 'string' ? message.label.startsWith(match) : match.test(message.label)
}

interface Watcher {
  fate(message: Message, when: 'before' | 'after'): Fate | undefined
  passed(direction: Direction, bytes: number, answers: boolean): void
}

/** One client's connection and its continuation to the server. */
class Link {
  readonly #client: Socket
  readonly #upstream: Socket
  readonly #number: number
  readonly #reader: WireReader
  readonly #watcher: Watcher
  /** The client has sent something that was not answered yet. */
  #asked = false
  #stalled = false
  /** Stalled for a while. */
  #paused = false
  /** What goes on after a pause: one for each direction, and the ends that came meanwhile. */
  readonly #pumps: (() => void)[] = []
  readonly #resumed: (() => void)[] = []

  constructor(client: Socket, upstream: Socket, number: number, reader: WireReader, watcher: Watcher) {
    this.#client = client
    this.#upstream = upstream
    this.#number = number
    this.#reader = reader
    this.#watcher = watcher
    this.#forward('sent', client, upstream)
    this.#forward('received', upstream, client)
  }

  cut(how: 'reset' | 'end'): void {
    this.#stalled = true
    for (const socket of [this.#client, this.#upstream]) {
      if (how === 'end') socket.destroySoon()
      else if (socket.writableEnded)
        socket.destroy() // a reset fails while it ends, and leaves it open for ever
      else socket.resetAndDestroy()
    }
  }

  #pause(ms: number): void {
    this.#paused = true
    setTimeout(() => {
      this.#paused = false
      for (const pump of this.#pumps) pump()
      for (const act of this.#resumed.splice(0)) act()
    }, ms)
  }

  /** During a pause nothing is known of what happened at the other side. */
  #unlessPaused(act: () => void): void {
    if (this.#paused) this.#resumed.push(act)
    else act()
  }

  #forward(direction: Direction, from: Socket, to: Socket): void {
    let unread = Buffer.alloc(0)
    /** What the message at the front needs, and what has come of it since: joined once, because it may be long. */
    let needed = 0
    let arrived: Buffer[] = []
    let held = false
    let ended = false
    const passing: Buffer[] = []
    const pump = () => {
      const flush = () => {
        if (passing.length > 0) to.write(Buffer.concat(passing.splice(0)))
      }
      while (!held && !this.#stalled && !this.#paused) {
        const length = this.#reader.lengthOf(direction, unread)
        const whole = length !== undefined && unread.length >= length
        needed = whole ? 0 : (length ?? 0)
        if (!whole) break
        const bytes = unread.subarray(0, length)
        unread = unread.subarray(length)
        const message = { label: this.#reader.read(direction, bytes), connection: this.#number, bytes }
        const passOn = (what: Buffer) => {
          this.#watcher.passed(direction, what.length, direction === 'received' && this.#asked)
          this.#asked = direction === 'sent'
          passing.push(what)
        }
        const before = this.#watcher.fate(message, 'before')
        if (typeof before === 'function') {
          passOn(before(message))
        } else if (before) {
          flush()
          return meet(before, () => passOn(bytes))
        } else {
          passOn(bytes)
        }
        const after = this.#watcher.fate(message, 'after')
        if (after && typeof after !== 'function') {
          flush()
          return meet(after, () => {})
        }
      }
      flush()
      if (ended && !held && !this.#stalled && !this.#paused) to.end()
    }
    const meet = (fate: Exclude<Fate, (message: Message) => Buffer>, release: () => void) => {
      if (fate === 'stall') {
        this.#stalled = true
      } else if (typeof fate === 'string') {
        this.cut(fate)
      } else if ('stall' in fate) {
        held = true // the message itself is not read again
        this.#resumed.push(() => {
          held = false
          release()
          pump()
        })
        this.#pause(fate.stall)
      } else {
        held = true
        void fate.passed.then(() => {
          held = false
          release()
          pump()
        })
      }
    }
    this.#pumps.push(pump)
    from.on('data', (chunk) => {
      arrived.push(chunk)
      if (arrived.reduce((sum, { length }) => sum + length, unread.length) < needed) return
      unread = Buffer.concat([unread, ...arrived])
      arrived = []
      pump()
    })
    from.once('end', () => {
      ended = true
      if (this.#stalled && direction === 'sent')
        this.cut('reset') // a stalled connection ends with its client
      else pump()
    })
    from.on('error', () => this.#unlessPaused(() => to.destroy()))
    from.once('close', () => {
      if (!ended || this.#stalled) this.#unlessPaused(() => to.destroy())
    })
  }
}
