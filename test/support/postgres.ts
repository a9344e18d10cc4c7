import { inject } from 'vitest'
import { createDatabaseAt, type TestDatabase } from './database.ts'

export type { Backend, TestDatabase, Witness } from './database.ts'

/** Creates a database for one test file, on the server that all of them share. */
export function createDatabase(): Promise<TestDatabase> {
  return createDatabaseAt(inject('postgresUrl'))
}
