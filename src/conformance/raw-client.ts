import { connect, type Socket } from 'node:net'

/** An answer as it came over the wire. */
export interface RawAnswer {
  readonly status: number
  /** By lower-case name. */
  readonly headers: Readonly<Record<string, readonly string[]>>
  readonly body: string
  /** The statuses of the interim answers (1xx) before it. */
  readonly interim: readonly number[]
  /** By lower-case name. */
  readonly trailers: Readonly<Record<string, readonly string[]>>
}

/** A request as text; `content-length` is added where there is a body. */
export interface RawRequest {
  readonly method?: string
  readonly path: string
  readonly headers?: Readonly<Record<string, string>>
  readonly body?: string
}

/** One HTTP/1.1 connection on a raw socket: it sees bytes when they arrive, and can go away at any moment. */
export class RawClient {
  readonly socket: Socket
  /** Resolves when the socket is closed, for whatever reason. */
  readonly closed: Promise<void>
  #received = Buffer.alloc(0)
  #taken = 0
  #waiting: (() => void)[] = []
  #isClosed = false

  private constructor(socket: Socket) {
    this.socket = socket
    this.closed = new Promise((resolve) => {
      socket.on('close', () => {
        this.#isClosed = true
        this.#wake()
        resolve()
      })
    })
    socket.on('error', () => {}) // 'close' follows
    socket.on('data', (chunk) => {
      this.#received = Buffer.concat([this.#received.subarray(this.#taken), chunk])
      this.#taken = 0
      this.#wake()
    })
  }

  static async open(port: number): Promise<RawClient> {
    const socket = connect({ port, host: '127.0.0.1', noDelay: true })
    await new Promise<void>((resolve, reject) => socket.once('connect', resolve).once('error', reject))
    return new RawClient(socket)
  }

  /** What arrived and was not taken by {@link answer}. */
  get pending(): string {
    return this.#received.toString('latin1', this.#taken)
  }

  /** Sends requests, all in one piece. */
  send(...requests: RawRequest[]): void {
    this.socket.write(requests.map(written).join(''))
  }

  /** Resolves when more has arrived than was taken; rejects if the connection ended first. */
  async firstByte(): Promise<void> {
    while (this.pending === '') await this.#more()
  }

  /** Resolves when what is pending holds `text`. */
  async arrival(text: string): Promise<void> {
    while (!this.pending.includes(text)) await this.#more()
  }

  /** Takes the next answer. `HEAD` tells that it has no body. */
  async answer(method = 'GET'): Promise<RawAnswer> {
    const interim: number[] = []
    for (;;) {
      const [line = '', ...fields] = (await this.#until('\r\n\r\n')).split('\r\n')
      const status = Number(line.split(' ')[1])
      const headers = parseFields(fields)
      if (status >= 100 && status < 200) {
        interim.push(status)
        continue
      }
      const empty = method === 'HEAD' || status === 204 || status === 304
      const { body, trailers } = empty ? { body: '', trailers: {} } : await this.#body(headers)
      return { status, headers, body, interim, trailers }
    }
  }

  /** Goes away at once. */
  destroy(): void {
    this.socket.destroy()
  }

  async #body(headers: RawAnswer['headers']): Promise<Pick<RawAnswer, 'body' | 'trailers'>> {
    const length = headers['content-length']?.[0]
    if (length !== undefined) return { body: await this.#take(Number(length)), trailers: {} }
    if (headers['transfer-encoding']?.[0] !== 'chunked') {
      while (!this.#isClosed) await this.#more().catch(() => {})
      return { body: await this.#take(this.#received.length - this.#taken), trailers: {} }
    }
    const chunks: string[] = []
    for (;;) {
      const size = Number.parseInt(await this.#until('\r\n'), 16)
      if (size === 0) break
      chunks.push(await this.#take(size))
      await this.#until('\r\n')
    }
    const fields: string[] = []
    for (let field = await this.#until('\r\n'); field !== ''; field = await this.#until('\r\n')) fields.push(field)
    return { body: chunks.join(''), trailers: parseFields(fields) }
  }

  async #until(mark: string): Promise<string> {
    for (;;) {
      const end = this.#received.indexOf(mark, this.#taken, 'latin1')
      if (end !== -1) {
        const text = await this.#take(end - this.#taken)
        this.#taken += mark.length
        return text
      }
      await this.#more()
    }
  }

  async #take(length: number): Promise<string> {
    while (this.#received.length - this.#taken < length) await this.#more()
    const text = this.#received.toString('latin1', this.#taken, this.#taken + length)
    this.#taken += length
    return text
  }

  async #more(): Promise<void> {
    if (this.#isClosed) throw new Error(`The connection ended after: ${JSON.stringify(this.pending.slice(0, 200))}`)
    await new Promise<void>((resolve) => this.#waiting.push(resolve))
  }

  #wake(): void {
    for (const resume of this.#waiting.splice(0)) resume()
  }
}

function written({ method = 'GET', path, headers = {}, body = '' }: RawRequest): string {
  const all: Record<string, string | number> = { host: '127.0.0.1', ...headers }
  if (body !== '') all['content-length'] ??= Buffer.byteLength(body)
  const lines = Object.entries(all).map(([name, value]) => `${name}: ${value}\r\n`)
  return `${method} ${path} HTTP/1.1\r\n${lines.join('')}\r\n${body}`
}

function parseFields(lines: string[]): Record<string, string[]> {
  const fields: Record<string, string[]> = {}
  for (const line of lines) {
    const colon = line.indexOf(':')
    const name = line.slice(0, colon).toLowerCase()
    fields[name] = [...(fields[name] ?? []), line.slice(colon + 1).trim()]
  }
  return fields
}
