import { connect, type Socket } from 'node:net'
import postgres, { type Sql } from 'postgres'
import type { MakeEngine, PostgresProbe } from './support.ts'

/** A socket, and what the server has said on it last. */
class Line {
  /** `'I'` is no transaction; anything else is one, or an answer that is awaited. */
  status = ''

  constructor(socket: Socket) {
    let unread = Buffer.alloc(0)
    socket.on('data', (chunk) => {
      unread = Buffer.concat([unread, chunk])
      while (unread.length >= 5 && unread.length > unread.readUInt32BE(1)) {
        if (unread[0] === 0x5a) this.status = String.fromCharCode(unread[5] as number)
        unread = unread.subarray(unread.readUInt32BE(1) + 1)
      }
    })
  }
}

/** An engine of postgres.js, by the bytes on its sockets. */
class SqlProbe implements PostgresProbe {
  readonly host: string | undefined
  readonly lines = new Map<Socket, Line>()
  closed = false

  constructor(host: string | undefined) {
    this.host = host
  }

  get open(): number {
    return this.#used.length
  }

  get busy(): number {
    return this.#used.filter(([, { status }]) => status === 'T' || status === 'E').length
  }

  /** Those that the client has not ended itself. */
  get #used(): [Socket, Line][] {
    return [...this.lines].filter(([socket]) => !socket.writableEnded && !socket.destroyed)
  }

  get living(): number {
    return this.lines.size
  }

  add(socket: Socket): Socket {
    this.lines.set(socket, new Line(socket))
    socket.once('close', () => this.lines.delete(socket))
    return socket
  }
}

/** Makes engines of postgres.js for a harness. */
export function sqlEngines(options: object = {}): MakeEngine<Sql> {
  return (url, max, host) => {
    const probe = new SqlProbe(host)
    const { hostname, port } = new URL(url)
    const socket = () => probe.add(connect(Number(port), hostname))
    const engine = postgres(url, { max, onnotice: () => {}, socket, ...options } as object)
    const { end } = engine
    engine.end = async (how) => {
      await end(how)
      probe.closed = true
    }
    return { engine, probe }
  }
}
