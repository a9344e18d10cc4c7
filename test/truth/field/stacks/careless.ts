import { Pool, type PoolClient } from 'pg'
import { listen } from '../listen.ts'
import type { Stack, Work } from '../stack.ts'
import { insert, labelOf } from './marks.ts'

/** Transactions by hand as they are often written. Planted: the harness must find every truth broken here. */
export const stack: Stack = {
  name: 'by hand, careless',
  packages: ['pg'],
  documentation: 'https://node-postgres.com/features/transactions',
  async open({ url, poolSize }) {
    const pool = new Pool({ connectionString: url, max: poolSize })

    async function unit(work: (work: Work) => Promise<unknown>): Promise<unknown> {
      const client = await pool.connect()
      await client.query('BEGIN') // if that fails the connection is lost
      try {
        const result = await work(workOf(client))
        await client.query('COMMIT') // may be answered ROLLBACK
        return result
      } catch (error) {
        await client.query('ROLLBACK')
        throw error
      } finally {
        client.release()
      }
    }

    let savepoints = 0
    const workOf = (client: PoolClient): Work => ({
      write: (label) => client.query(insert, [label]),
      async nested(inner) {
        const savepoint = `s${++savepoints}`
        await client.query(`SAVEPOINT ${savepoint}`)
        try {
          await inner(workOf(client))
          await client.query(`RELEASE ${savepoint}`)
        } catch (error) {
          await client.query(`ROLLBACK TO ${savepoint}`)
          throw error
        }
      },
    })

    return {
      unit,
      serve: () =>
        listen(async (request, response) => {
          const client = await pool.connect()
          client.on('error', () => {})
          response.on('finish', () => {
            client.query(response.statusCode < 400 ? 'COMMIT' : 'ROLLBACK').then(
              () => client.release(),
              (error) => client.release(error),
            )
          })
          try {
            await client.query('BEGIN')
            await workOf(client).write(labelOf(request.url))
            response.writeHead(201).end()
          } catch {
            response.writeHead(500).end()
          }
        }),
      close: () => pool.end(),
    }
  },
}
