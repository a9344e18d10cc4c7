import { databaseContext } from 'ambient-db/node-http'
import { afterAll, beforeAll, describe, it } from 'vitest'
import { frameworkSuite } from '../../src/conformance/frameworks.ts'
import { createDatabases, type Databases, nodeHttpHarness } from './support.ts'

let databases: Databases
beforeAll(async () => {
  databases = await createDatabases()
})
afterAll(() => databases.close())

describe('node:http', () => {
  for (const { name, run } of frameworkSuite) it(name, () => run(nodeHttpHarness(databases, databaseContext)))
})
