import type { Direction, WireReader } from './proxy.ts'

/**
 * Reads the messages of PostgreSQL: `> Q BEGIN`, `> P insert into t …`, `> B`, `> E`, `> S` from the client,
 * `< C COMMIT`, `< E 23505`, `< Z I` from the server; `> startup`, `> ssl`, `> cancel` for the packets without a type.
 */
export class PostgresReader implements WireReader {
  /** Packets have no type until the start-up is done; after an accepted SSLRequest nothing can be read. */
  #phase: 'startup' | 'ssl answer' | 'messages' | 'opaque' = 'startup'

  lengthOf(direction: Direction, unread: Buffer): number | undefined {
    if (unread.length === 0) return undefined
    const fromClient = direction === 'sent'
    if (this.#phase === 'startup' && fromClient && unread[0] === 0x16) this.#phase = 'opaque' // a TLS handshake
    if (this.#phase === 'opaque') return unread.length
    if (this.#phase === 'ssl answer' && !fromClient) return 1
    if (this.#phase === 'startup' && fromClient) return unread.length < 8 ? undefined : unread.readInt32BE(0)
    return unread.length < 5 ? undefined : unread.readInt32BE(1) + 1
  }

  read(direction: Direction, bytes: Buffer): string {
    if (direction === 'sent') {
      if (this.#phase === 'opaque') return '> opaque'
      if (this.#phase === 'startup') return `> ${this.#readStartup(bytes.readInt32BE(4))}`
      return label('>', bytes, clientText)
    }
    if (this.#phase === 'opaque') return '< opaque'
    if (this.#phase === 'ssl answer') {
      this.#phase = bytes.toString('latin1') === 'S' ? 'opaque' : 'startup'
      return `< ssl ${bytes.toString('latin1')}`
    }
    return label('<', bytes, serverText)
  }

  #readStartup(code: number): string {
    if (code === 80877102) return 'cancel'
    this.#phase = code === 80877103 || code === 80877104 ? 'ssl answer' : 'messages'
    return this.#phase === 'messages' ? 'startup' : 'ssl'
  }
}

function label(arrow: string, bytes: Buffer, textOf: (type: string, body: Buffer) => string): string {
  const type = String.fromCharCode(bytes[0] ?? 0)
  const text = textOf(type, bytes.subarray(5))
  return text === '' ? `${arrow} ${type}` : `${arrow} ${type} ${text}`
}

/** The SQL of a query or of a statement to prepare. */
function clientText(type: string, body: Buffer): string {
  if (type === 'Q') return text(body)
  if (type === 'P') return text(body.subarray(body.indexOf(0) + 1))
  return ''
}

/** The tag of a completed command, the SQLSTATE of an error or notice, the status that a `ReadyForQuery` tells. */
function serverText(type: string, body: Buffer): string {
  if (type === 'C') return text(body)
  if (type === 'Z') return body.toString('latin1')
  if (type !== 'E' && type !== 'N') return ''
  for (let at = 0; body[at]; at = body.indexOf(0, at) + 1) {
    if (String.fromCharCode(body[at] ?? 0) === 'C') return text(body.subarray(at + 1))
  }
  return ''
}

function text(body: Buffer): string {
  return body.toString('utf8', 0, body.indexOf(0))
}
