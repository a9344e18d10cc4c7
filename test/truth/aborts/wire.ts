import type { EventEmitter } from 'node:events'
import { Socket } from 'node:net'
import { Client, type ClientConfig } from 'pg'
import type { Piece } from './piece.ts'

/** A transaction as the client's end of the wire knows it. */
interface Transaction {
  readonly piece: Piece | undefined
  /** The server has said that there is none any more. */
  over: boolean
}

type Kind = 'begin' | 'commit' | 'other'

/** The connection of a client of `pg`, which its types do not know of. */
interface Connection extends EventEmitter {
  query(text: string): void
  parse(query: { text: string }): void
  sync(): void
}

interface Listener {
  /** Hears what is sent and answered, as labels. */
  readonly passed: (label: string) => void
  /** Hears that COMMIT is written. */
  readonly written: () => void
  /** Hears of what is sent before the last answer has come, though nobody said that it may be. */
  readonly outOfStep: (sql: string) => void
  /** What the running code belongs to. */
  readonly piece: () => Piece | undefined
}

/** What passes between the pools of one run and the server. */
export class Wire {
  readonly #listener: Listener
  readonly #transactions = new Set<Transaction>()
  readonly #sockets = new Set<Socket>()
  #over = false
  /** While it is not settled, nothing of what the server says is heard. */
  #deaf: Promise<void> | undefined

  constructor(listener: Listener) {
    this.#listener = listener
  }

  /** Options of a pool that let its clients be watched. */
  get poolOptions(): { Client: new (config?: ClientConfig) => Client } {
    const watch = (client: Client) => this.#watch(client)
    class WatchedClient extends Client {
      constructor(config?: ClientConfig) {
        super(config)
        watch(this)
      }
    }
    return { Client: WatchedClient }
  }

  /** The transactions of a context or session of which the server has not said that they are over. */
  open(whole: Piece): number {
    return [...this.#transactions].filter(({ piece, over }) => piece?.whole === whole && !over).length
  }

  get sockets(): number {
    return this.#sockets.size
  }

  /** Closes what the code under test has left open, and what it opens from now on. */
  destroy(): void {
    this.#over = true
    for (const socket of this.#sockets) socket.destroy()
  }

  /** Keeps back what the server says until `passed`. */
  hold(passed: Promise<void>): void {
    this.#deaf = passed.finally(() => {
      this.#deaf = undefined
    })
  }

  /** Makes a socket that can be kept from hearing. */
  socket = (): Socket => {
    const socket = new Socket()
    const emit = socket.emit as (...args: unknown[]) => boolean // any of its overloads
    let kept: Promise<void> | undefined
    socket.emit = (...args: unknown[]) => {
      const wait = kept ?? (args[0] === 'data' ? this.#deaf : undefined)
      if (!wait) return emit.apply(socket, args)
      const next = wait.then(() => {
        if (kept === next) kept = undefined // nothing has come behind it
        emit.apply(socket, args)
      })
      kept = next
      return true
    }
    this.#sockets.add(socket)
    if (this.#over) socket.once('connect', () => socket.destroy())
    socket.once('close', () => this.#sockets.delete(socket))
    return socket
  }

  #watch(client: Client): void {
    const { connection } = client as unknown as { connection: Connection }
    const arrow = client.database?.endsWith('_other') ? 'other ' : ''
    const questions: Kind[] = []
    let transaction: Transaction | undefined
    let greeted = false
    const asked = (text: string) => {
      const kind = kindOf(text)
      if (questions.length > 0 && !client.pipeline) this.#listener.outOfStep(text)
      questions.push(kind)
      if (kind === 'commit') this.#listener.written()
      if (kind === 'begin') {
        transaction = { piece: this.#listener.piece(), over: false }
        this.#transactions.add(transaction)
      }
      this.#listener.passed(`${arrow}> ${labelOf(text)}`)
    }
    const { query, parse, sync } = connection
    connection.query = (text) => {
      asked(text)
      query.call(connection, text)
    }
    connection.parse = (statement) => {
      parse.call(connection, statement)
      this.#listener.passed(`${arrow}> ${labelOf(statement.text)}`)
    }
    connection.sync = () => {
      questions.push('other')
      sync.call(connection)
    }
    connection.on('message', ({ name, status, code }: { name: string; status?: string; code?: string }) => {
      if (name === 'error') this.#listener.passed(`${arrow}< error ${code}`)
      if (name !== 'readyForQuery') return
      if (greeted) questions.shift()
      greeted = true
      if (status === 'I' && transaction && !questions.includes('begin')) transaction.over = true
      this.#listener.passed(`${arrow}< ${status}`)
    })
  }
}

function labelOf(sql: string): string {
  return sql.slice(0, 40).replace(/\d+/g, '#')
}

function kindOf(text: string): Kind {
  if (/^(?:begin|start transaction)/i.test(text)) return 'begin'
  return /^commit/i.test(text) ? 'commit' : 'other'
}
