import { once } from 'node:events'
import type { AddressInfo } from 'node:net'
import { createAdaptorServer } from '@hono/node-server'
import { afterAll, beforeAll, beforeEach, describe } from 'vitest'
import { createDatabase, type TestDatabase } from '../../../test/support/postgres.ts'
import { testBank } from '../scenarios.contract.ts'

let database: TestDatabase
let port: number
let close: () => Promise<void>

beforeAll(async () => {
  database = await createDatabase()
  process.env.DATABASE_URL = database.url
  // These read it when they are loaded.
  const { app } = await import('../app.ts')
  const { createTables, main } = await import('../database.ts')
  await createTables()
  const server = createAdaptorServer({ fetch: app.fetch }).listen(0, '127.0.0.1')
  await once(server, 'listening')
  port = (server.address() as AddressInfo).port
  close = async () => {
    server.close()
    await main.shutdown()
    await database.drop()
  }
})
beforeEach(() => database.witness.rows('truncate transfers, accounts'))
afterAll(() => close())

describe('the bank, on PostgreSQL and over a socket', () => {
  testBank(async (method, path, body) => {
    const init = { method, headers: { connection: 'close' }, ...(body !== undefined && { body: JSON.stringify(body) }) }
    const response = await fetch(`http://127.0.0.1:${port}${path}`, init)
    return { status: response.status, body: await response.json() }
  })
})
