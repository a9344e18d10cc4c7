import { once } from 'node:events'
import { type ClientHttp2Stream, connect } from 'node:http2'
import { text } from 'node:stream/consumers'
import { RawClient } from '../../../src/conformance/raw-client.ts'

export interface Ask {
  readonly path: string
  readonly body: string
}

/** A request that was sent. */
export interface Exchange {
  /** Resolves with the first byte of the answer; with the status, if that much has come. Rejects if the connection ended first. */
  firstByte(): Promise<number | undefined>
  /** Reads the answer to its end. Rejects if the connection ends first. */
  answer(): Promise<{ readonly status: number; readonly body: string }>
}

/** A connection that is kept alive. */
export interface Connection {
  /** Sends requests at once; their answers are to be read one by one, in this order. */
  ask(...asks: Ask[]): Exchange[]
  /** Goes away at once. */
  destroy(): void
}

/** On a raw socket: the first byte is seen when it arrives. */
async function openHttp1(port: number): Promise<Connection> {
  const client = await RawClient.open(port)
  const exchange: Exchange = {
    async firstByte() {
      await client.firstByte()
      const [, status] = /^HTTP\/1\.1 (\d{3}) /.exec(client.pending) ?? []
      return status === undefined ? undefined : Number(status)
    },
    answer: () => client.answer('POST'),
  }
  return {
    ask(...asks) {
      const headers = { 'content-type': 'application/json' }
      client.send(...asks.map((ask) => ({ method: 'POST', headers, ...ask })))
      return asks.map(() => exchange)
    },
    destroy: () => client.destroy(),
  }
}

/** The first that can be seen of an answer is its head. */
async function openHttp2(port: number): Promise<Connection> {
  const session = connect(`http://127.0.0.1:${port}`)
  session.on('error', () => {}) // its streams say so
  await once(session, 'connect')
  const exchangeOn = (stream: ClientHttp2Stream): Exchange => {
    const head = new Promise<number>((resolve, reject) => {
      stream.once('response', ({ ':status': status }) => resolve(Number(status)))
      stream.once('close', () => reject(new Error('The stream was closed before it was answered.')))
    })
    const body = text(stream) // at once: a stream that nobody reads is emptied when it is closed
    for (const promise of [head, body]) promise.catch(() => {})
    return {
      firstByte: () => head,
      async answer() {
        const answer = { status: await head, body: await body }
        if (stream.rstCode) throw new Error('The stream was reset.')
        return answer
      },
    }
  }
  return {
    ask: (...asks) =>
      asks.map(({ path, body }) => {
        const stream = session.request({ ':method': 'POST', ':path': path, 'content-type': 'application/json' })
        stream.end(body)
        return exchangeOn(stream)
      }),
    destroy: () => session.destroy(),
  }
}

export const openConnection = { http1: openHttp1, http2: openHttp2 }
