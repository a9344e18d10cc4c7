import type { Direction, WireReader } from './proxy.ts'

const commands: Record<number, string> = {
  1: 'Quit',
  2: 'InitDb',
  14: 'Ping',
  17: 'ChangeUser',
  3: 'Query',
  22: 'Prepare',
  23: 'Execute',
  25: 'Close',
  31: 'Reset',
}

const flags = { compress: 0x20, ssl: 0x800 }
const moreResults = 8
/** A packet of this size goes on in the next one. */
const fullPacket = 0xffffff

/** What the next packet of the server is, so that it can be told from others that begin with the same byte. */
type Expected =
  | 'greeting'
  | 'login'
  | 'answer'
  | 'prepared'
  | 'rows'
  /** So many definitions of columns or parameters, and the EOF behind them; then `next`. */
  | { readonly name: 'Column' | 'Param'; left: number; readonly next: Expected }
  | 'nothing'

/**
 * Reads the packets of MySQL and MariaDB: `> login`, `> Query COMMIT`, `> Prepare insert into t …`, `> Execute insert into t …`,
 * `> Close`, `> Quit` from the client; from the server `< greeting`, `< OK login`, `< OK COMMIT`, `< ERR 1213`, `< Prepared`,
 * `< Param`, and for rows `< Header`, `< Column`, `< EOF columns`, `< Row`, `< EOF rows`. An answer bears the first word of its
 * question, because it says nothing of it by itself.
 */
export class MysqlReader implements WireReader {
  #expected: Expected = 'greeting'
  #opaque = false
  /** The texts of prepared statements, by their number. */
  readonly #prepared = new Map<number, string>()
  #question = ''
  readonly #unfinished = { sent: false, received: false }

  /** Nothing is to come from the server before it is asked again. */
  get idle(): boolean {
    return this.#expected === 'nothing'
  }

  lengthOf(_direction: Direction, unread: Buffer): number | undefined {
    if (unread.length === 0) return undefined
    if (this.#opaque) return unread.length
    return unread.length < 4 ? undefined : unread.readUIntLE(0, 3) + 4
  }

  read(direction: Direction, bytes: Buffer): string {
    const arrow = direction === 'sent' ? '>' : '<'
    if (this.#opaque) return `${arrow} opaque`
    const unfinished = this.#unfinished[direction]
    this.#unfinished[direction] = bytes.readUIntLE(0, 3) === fullPacket
    if (unfinished) return `${arrow} more`
    const body = bytes.subarray(4)
    return `${arrow} ${direction === 'sent' ? this.#fromClient(bytes[3] as number, body) : this.#fromServer(body)}`
  }

  #fromClient(sequence: number, body: Buffer): string {
    if (this.#expected === 'login') {
      if (sequence > 1) return 'auth'
      const asked = body.readUInt32LE(0)
      this.#opaque = (asked & flags.ssl) !== 0 && body.length === 32
      return this.#opaque ? 'ssl' : 'login'
    }
    if (sequence > 0) return 'data' // of LOAD DATA LOCAL
    const code = body[0] as number
    const name = commands[code] ?? `Command ${code}`
    const id = () => body.readUInt32LE(1)
    const text = /Query|Prepare/.test(name)
      ? queryText(body)
      : name === 'Execute'
        ? this.#prepared.get(id())
        : undefined
    this.#question = text ?? name
    if (name === 'Close') this.#prepared.delete(id())
    else if (name === 'ChangeUser') this.#expected = 'login'
    else if (name === 'Prepare') this.#expected = 'prepared'
    else if (name !== 'Quit') this.#expected = 'answer'
    return text === undefined ? name : `${name} ${text}`
  }

  #fromServer(body: Buffer): string {
    const first = body[0] as number
    const expected = this.#expected
    if (expected === 'greeting') {
      this.#expected = 'login'
      return first === 0xff ? error(body) : 'greeting'
    }
    if (typeof expected === 'object') {
      if (expected.left-- > 0) return expected.name
      this.#expected = expected.next
      return `EOF ${expected.name.toLowerCase()}s`
    }
    if (first === 0xff) {
      this.#expected = 'nothing'
      return error(body)
    }
    if (expected === 'login') {
      if (first !== 0) return 'auth'
      this.#expected = 'nothing'
      return 'OK login'
    }
    if (expected === 'prepared') return this.#readPrepared(body)
    if (expected === 'rows') {
      if (first !== 0xfe || body.length >= 9) return 'Row'
      this.#expected = body.readUInt16LE(3) & moreResults ? 'answer' : 'nothing'
      return 'EOF rows'
    }
    return this.#readAnswer(body)
  }

  #readAnswer(body: Buffer): string {
    const [count, afterCount] = lengthCoded(body, 0)
    if (body[0] === 0xfb) return 'LocalInfile'
    if (count > 0) {
      this.#expected = { name: 'Column', left: count, next: 'rows' }
      return 'Header'
    }
    const [, afterRows] = lengthCoded(body, afterCount)
    const [, afterId] = lengthCoded(body, afterRows)
    this.#expected = body.readUInt16LE(afterId) & moreResults ? 'answer' : 'nothing'
    return `OK ${firstWord(this.#question)}`
  }

  #readPrepared(body: Buffer): string {
    this.#prepared.set(body.readUInt32LE(1), this.#question)
    const [columns, parameters] = [body.readUInt16LE(5), body.readUInt16LE(7)]
    const rest: Expected = columns > 0 ? { name: 'Column', left: columns, next: 'nothing' } : 'nothing'
    this.#expected = parameters > 0 ? { name: 'Param', left: parameters, next: rest } : rest
    return 'Prepared'
  }
}

/** The SQL of a query, without the empty list of attributes that newer clients and servers put before it. */
function queryText(body: Buffer): string {
  return body.toString('utf8', body[1] === 0 && body[2] === 1 ? 3 : 1)
}

function firstWord(text: string): string {
  return (/^[\s(]*(\w+)/.exec(text)?.[1] ?? '').toUpperCase()
}

function error(body: Buffer): string {
  return `ERR ${body.readUInt16LE(1)}`
}

/** A number and where it ends. */
function lengthCoded(body: Buffer, at: number): [value: number, end: number] {
  const first = body[at] as number
  if (first < 0xfb) return [first, at + 1]
  const size = first === 0xfc ? 2 : first === 0xfd ? 3 : 8
  if (size === 8) return [Number(body.readBigUInt64LE(at + 1)), at + 9]
  return [body.readUIntLE(at + 1, size), at + 1 + size]
}
