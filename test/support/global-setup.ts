import type { TestProject } from 'vitest/node'
import { acquirePostgres } from './postgres-server.ts'

declare module 'vitest' {
  interface ProvidedContext {
    postgresUrl: string
  }
}

/** One PostgreSQL server for all test files. */
export default async function setup(project: TestProject): Promise<() => Promise<void>> {
  const server = await acquirePostgres()
  project.provide('postgresUrl', server.url)
  return server.stop
}
