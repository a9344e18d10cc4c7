import { sandbox } from 'ambient-db/testing'
import { afterAll, afterEach, beforeAll, beforeEach, describe } from 'vitest'
import { app } from '../app.ts'
import { createTables, main } from '../database.ts'
import { testBank } from '../scenarios.contract.ts'

const box = sandbox(main)
beforeAll(createTables, 60_000)
beforeEach(box.begin)
afterEach(box.rollback)
afterAll(main.shutdown)

describe('the bank, embedded and in a sandbox', () => {
  testBank(async (method, path, body) => {
    const response = await app.request(path, { method, ...(body !== undefined && { body: JSON.stringify(body) }) })
    return { status: response.status, body: await response.json() }
  })
})
