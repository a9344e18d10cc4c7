import { once } from 'node:events'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { newContext } from 'ambient-db'
import { createApp, type Services } from './app.ts'
import { location, main } from './database.ts'
import { createTables, dropTables } from './schema.ts'

export interface Service {
  readonly url: string
  stop(): Promise<void>
}

/** Creates the tables and listens on `port`; by default on any that is free. */
export async function startService(services: Services, port = 0): Promise<Service> {
  await newContext(createTables).catch(async (error) => {
    await main.shutdown()
    const what = `The database at ${location()} cannot be used: ${error.message || error.code}.`
    throw new Error(`${what} Make it ready, or correct DATABASE_URL, or leave it out to use SQLite.`, { cause: error })
  })
  const server = createServer(createApp(services)).listen(port, '127.0.0.1')
  await once(server, 'listening')
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    async stop() {
      server.close()
      const impatience = setTimeout(() => server.closeAllConnections(), 3000)
      await once(server, 'close')
      clearTimeout(impatience)
      try {
        await newContext(dropTables)
      } finally {
        await main.shutdown()
      }
    },
  }
}
