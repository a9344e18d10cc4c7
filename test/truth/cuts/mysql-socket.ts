import { Socket } from 'node:net'
import { MysqlReader } from '../../support/mysql-wire.ts'
import type { Direction } from '../../support/proxy.ts'
import type { Tap } from './wire-log.ts'

/** Not an answer to what was asked: the server takes its leave. */
const farewell = /^< ERR (?:1053|1927|3169|4031)$/

/** The socket of one client, which lets a {@link Tap} hear what is asked through it and what is answered. */
export class MysqlSocket extends Socket {
  readonly #tap: Tap
  readonly #reader: MysqlReader = new MysqlReader()
  readonly #unread: Record<Direction, Buffer> = { sent: Buffer.alloc(0), received: Buffer.alloc(0) }
  /** Hears of the answer to what was asked; the driver asks one thing at a time. */
  #answered: (() => void) | undefined

  constructor(tap: Tap) {
    super()
    this.setNoDelay(true)
    this.#tap = tap
    this.prependListener('data', (chunk) => this.#read('received', chunk))
    this.once('connect', () => {
      // Not a method of the class: `connect` puts the one of `Socket` in its place.
      this.write = (chunk: Buffer, ...rest: never[]): boolean => {
        if (!this.destroyed && this.writable) this.#read('sent', chunk)
        return super.write(chunk, ...rest)
      }
    })
  }

  #read(direction: Direction, chunk: Buffer): void {
    let unread = Buffer.concat([this.#unread[direction], chunk])
    for (;;) {
      const length = this.#reader.lengthOf(direction, unread)
      if (length === undefined || unread.length < length) break
      const label = this.#reader.read(direction, unread.subarray(0, length))
      unread = unread.subarray(length)
      const question = /^> (?:Query|Execute) (.*)$/s.exec(label)?.[1]
      if (question !== undefined) this.#answered = this.#tap(question)
      if (direction === 'received' && this.#reader.idle && !farewell.test(label)) this.#answered?.()
    }
    this.#unread[direction] = unread
  }
}
