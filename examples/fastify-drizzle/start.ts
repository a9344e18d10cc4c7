import { createApp } from './app.ts'
import { createTables, main } from './database.ts'

await createTables()
const app = createApp()
const address = await app.listen({ host: '127.0.0.1', port: Number(process.env.PORT ?? 3000) })
console.log(`A shop listens on ${address}.`)
for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  process.once(signal, () => void app.close().then(main.shutdown))
}
