import { sandbox } from 'ambient-db/testing'
import { afterAll, afterEach, beforeAll, beforeEach, describe } from 'vitest'
import { createApp } from '../app.ts'
import { createTables, main } from '../database.ts'
import { testShop } from '../scenarios.contract.ts'
import { mails } from '../shop.ts'

const box = sandbox(main)
const app = createApp()
beforeAll(createTables, 60_000)
beforeEach(box.begin)
afterEach(box.rollback)
afterAll(async () => {
  await app.close()
  await main.shutdown()
})

describe('the shop, embedded and in a sandbox', () => {
  testShop(
    async (method, url, body) => {
      const response = await app.inject({ method, url, ...(body && { body }) })
      return { status: response.statusCode, body: response.json() }
    },
    () => mails,
  )
})
