import { serve } from '@hono/node-server'
import { app } from './app.ts'
import { createTables, main } from './database.ts'

await createTables()
const server = serve(
  { fetch: app.fetch, port: Number(process.env.PORT ?? 3000), hostname: '127.0.0.1' },
  ({ port }) => {
    console.log(`A bank listens on http://127.0.0.1:${port}.`)
  },
)
for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  process.once(signal, () => server.close(() => void main.shutdown()))
}
