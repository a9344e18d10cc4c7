import type { TestProject } from 'vitest/node'
import { generatePrismaClient } from '../../scripts/prisma-client.mjs'
import { acquireMariadb } from './mariadb-server.ts'
import { acquirePostgres } from './postgres-server.ts'

declare module 'vitest' {
  interface ProvidedContext {
    postgresUrl: string
    /** What keeps the tests that need it from running, where there is no server. */
    mysqlServer: { readonly url: string } | { readonly problem: string }
  }
}

/** One server of each kind for all test files. */
export default async function setup(project: TestProject): Promise<() => Promise<void>> {
  generatePrismaClient() // also where Vitest was started without the bootstrap
  const [postgres, mariadb] = await Promise.all([acquirePostgres(), acquireMariadb().catch(problemOf)])
  project.provide('postgresUrl', postgres.url)
  project.provide('mysqlServer', 'problem' in mariadb ? mariadb : { url: mariadb.url })
  return async () => {
    await postgres.stop()
    if (!('problem' in mariadb)) await mariadb.stop()
  }
}

/** Without MariaDB the other tests still run. */
function problemOf(error: Error): { problem: string } {
  return { problem: error.message }
}
