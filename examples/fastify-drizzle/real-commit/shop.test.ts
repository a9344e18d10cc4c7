import { afterAll, beforeAll, beforeEach, describe } from 'vitest'
import { createDatabase, type TestDatabase } from '../../../test/support/postgres.ts'
import { testShop } from '../scenarios.contract.ts'

let database: TestDatabase
let address: string
let mails: string[]
let close: () => Promise<void>

beforeAll(async () => {
  database = await createDatabase()
  process.env.DATABASE_URL = database.url
  // These read it when they are loaded.
  const { createApp } = await import('../app.ts')
  const { createTables, main } = await import('../database.ts')
  ;({ mails } = await import('../shop.ts'))
  await createTables()
  const app = createApp()
  address = await app.listen({ host: '127.0.0.1', port: 0 })
  close = async () => {
    await app.close()
    await main.shutdown()
    await database.drop()
  }
})
beforeEach(() => database.witness.rows('truncate orders, products'))
afterAll(() => close())

describe('the shop, on PostgreSQL and over a socket', () => {
  testShop(
    async (method, path, body) => {
      const headers = { connection: 'close', ...(body && { 'content-type': 'application/json' }) }
      const response = await fetch(address + path, { method, headers, ...(body && { body: JSON.stringify(body) }) })
      return { status: response.status, body: await response.json() }
    },
    () => mails,
  )
})
