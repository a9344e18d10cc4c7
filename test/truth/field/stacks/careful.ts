import { Pool, type PoolClient } from 'pg'
import { listen } from '../listen.ts'
import type { Stack, Work } from '../stack.ts'
import { insert, labelOf } from './marks.ts'

/** Transactions by hand with every trap in mind. The harness must find that every truth holds: none asks for ambient-db. */
export const stack: Stack = {
  name: 'by hand, careful',
  packages: ['pg'],
  documentation: 'https://node-postgres.com/features/transactions',
  async open({ url, poolSize }) {
    const pool = new Pool({ connectionString: url, max: poolSize })
    pool.on('error', () => {})

    async function unit(work: (work: Work) => Promise<unknown>): Promise<unknown> {
      const client = await pool.connect()
      let broken: Error | undefined
      const onError = (error: Error) => {
        broken = error
      }
      client.on('error', onError)
      try {
        await client.query('BEGIN').catch((error) => {
          broken = error
          throw error
        })
        const level = new Level(client)
        try {
          const result = await work(level.work)
          await level.end()
          await commit(client)
          return result
        } catch (error) {
          await level.end()
          if (error instanceof CommitUnknown) broken = error
          else await client.query('ROLLBACK').catch(onError)
          throw error
        }
      } finally {
        client.off('error', onError)
        client.release(broken)
      }
    }

    return {
      unit,
      saysUnknown: (error) => error instanceof CommitUnknown,
      serve: () =>
        listen(async (request, response) => {
          const told = unit(({ write }) => write(labelOf(request.url)))
          const status = await told.then(
            () => 201,
            () => 500,
          )
          response.writeHead(status).end()
        }),
      close: () => pool.end(),
    }
  },
}

class CommitUnknown extends Error {}

async function commit(client: PoolClient): Promise<void> {
  const { command } = await client.query('COMMIT').catch((error) => {
    const answered = 'severity' in error
    throw answered ? error : new CommitUnknown('COMMIT was not answered.', { cause: error })
  })
  if (command !== 'COMMIT') throw new Error('The server rolled the transaction back.')
}

/** The transaction or a savepoint in it: does one thing at a time, in order, until it has ended. */
class Level {
  readonly #client: PoolClient
  #tail: Promise<unknown> = Promise.resolve()
  #ended = false

  constructor(client: PoolClient) {
    this.#client = client
  }

  get work(): Work {
    return {
      write: (label) => this.#inTurn(() => this.#client.query(insert, [label])),
      nested: (inner) => this.#inTurn(() => this.#nested(inner)),
    }
  }

  /** Waits for what has been started, and lets nothing more in. */
  async end(): Promise<void> {
    this.#ended = true
    await this.#tail
  }

  async #inTurn(act: () => Promise<unknown>): Promise<unknown> {
    if (this.#ended) throw new Error('The transaction has ended.')
    const turn = this.#tail.then(act)
    this.#tail = turn.catch(() => {})
    return turn
  }

  async #nested(inner: (work: Work) => Promise<unknown>): Promise<void> {
    await this.#client.query('SAVEPOINT nested')
    const level = new Level(this.#client)
    try {
      await inner(level.work)
      await level.end()
      await this.#client.query('RELEASE nested')
    } catch (error) {
      await level.end()
      await this.#client.query('ROLLBACK TO nested')
      throw error
    }
  }
}
