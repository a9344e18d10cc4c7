import { Socket } from 'node:net'

/** Hears what the driver asks on one connection, and when it is answered. */
export interface Tap {
  /**
   * Something that the server answers with one `ReadyForQuery` was written to the socket.
   *
   * @returns what is called with the answer: an error of the server, or at the latest its `ReadyForQuery`.
   */
  asked(sql: string): () => void
  /** Parameters were written to the socket, as they are on the wire. */
  bound?(parameters: string): void
}

/**
 * A socket for the option `stream` of a pool of `pg`, which lets a {@link Tap} hear: a client that has not noticed the end of its
 * connection yet has sent what no proxy ever saw.
 */
export class TappedSocket extends Socket {
  readonly #tap: Tap
  /** What is called with the next answers, in order. The first is that to the start-up. */
  readonly #open: ((() => void) | undefined)[] = [undefined]
  #prepared = ''
  #unread = Buffer.alloc(0)

  constructor(tap: Tap) {
    super()
    this.#tap = tap
    this.prependListener('data', (chunk) => this.#received(chunk))
    this.once('connect', () => {
      // Not a method of the class: `connect` puts the one of `Socket` in its place.
      this.write = (chunk: Buffer, ...rest: never[]): boolean => {
        if (!this.destroyed && this.writable) this.#sent(chunk)
        return super.write(chunk, ...rest)
      }
    })
  }

  /** The driver writes one message, or several that belong together, at a time. */
  #sent(chunk: Buffer): void {
    for (let at = 0; at + 5 <= chunk.length; ) {
      const type = String.fromCharCode(chunk[at] as number)
      if (type === '\0') return // the start-up has no type
      const length = chunk.readInt32BE(at + 1) + 1
      const text = chunk.toString('latin1', at + 5, at + length)
      if (type === 'Q') this.#open.push(this.#tap.asked(text))
      if (type === 'P') this.#prepared = text.slice(text.indexOf('\0') + 1)
      if (type === 'B') this.#tap.bound?.(text)
      if (type === 'S') this.#open.push(this.#tap.asked(this.#prepared))
      at += length
    }
  }

  #received(chunk: Buffer): void {
    this.#unread = Buffer.concat([this.#unread, chunk])
    while (this.#unread.length >= 5) {
      const length = this.#unread.readInt32BE(1) + 1
      if (this.#unread.length < length) return
      const message = this.#unread.subarray(0, length)
      this.#unread = this.#unread.subarray(length)
      const type = String.fromCharCode(message[0] as number)
      const refusal = type === 'E' && !message.includes('C57P')
      if (refusal || type === 'Z') this.#open[0]?.()
      if (type === 'Z') this.#open.shift()
    }
  }
}
