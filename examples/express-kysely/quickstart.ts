// npm run quickstart [-- --serve]
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { parseArgs } from 'node:util'

const stopped = new Promise<void>((stop) => {
  // Not `once`: npm hands on what the terminal has sent to all already.
  for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => stop())
})
const folder = await mkdtemp(join(tmpdir(), 'order-service-'))
try {
  process.env.DATABASE_URL ||= pathToFileURL(join(folder, 'orders.db')).href
  process.exitCode = (await quickstart()) ? 0 : 1
} catch (error) {
  console.error(`\n✗ ${error instanceof Error ? error.message : error}`)
  process.exitCode = 1
} finally {
  await rm(folder, { recursive: true, force: true })
}

/** Starts the service and shows it; true if all that it showed is as it should be. */
async function quickstart(): Promise<boolean> {
  const { serve } = parseArgs({ options: { serve: { type: 'boolean' } } }).values
  // These read DATABASE_URL when they are loaded.
  const { startService } = await import('./service.ts')
  const { openWitness } = await import('./witness.ts')
  const { createPrinter } = await import('./printer.ts')
  const { runTour } = await import('./tour.ts')

  let log: unknown[] | undefined = []
  const printer = createPrinter()
  const service = await startService({
    printer,
    log: (error) => (log ? log.push(error) : console.error(String(error))),
  })
  const witness = openWitness()
  try {
    const { url } = service
    const tour = runTour({ url, printer, witness, takeLog: () => log?.splice(0) ?? [] })
    const ok = await Promise.race([tour, stopped.then(() => false)])
    if (!ok) return false
    if (!serve) {
      console.log('The code: examples/express-kysely/app.ts. To try it yourself: npm run quickstart -- --serve\n')
      return true
    }
    log = undefined
    invite(url)
    await stopped
    console.log('\nStopping.')
    return true
  } finally {
    await witness.close()
    await service.stop()
  }
}

function invite(url: string): void {
  const order = (item: string, pieces = 1) =>
    `-H 'content-type: application/json' -d '{"customer":"You","lines":[{"item":"${item}","pieces":${pieces}}]}'`
  console.log(`The service keeps running at ${url} until you press Ctrl-C. In another terminal:

# what there is
curl ${url}/stock
curl ${url}/orders
# 201, and out of stock
curl -i ${url}/orders ${order('cup')}
curl -i ${url}/orders ${order('cup', 99)}
# refused at COMMIT
curl -i ${url}/orders/import ${order('unicorn')}
# hangs up while the label is printed: look at the stock afterwards
curl -m 1 ${url}/orders/pickup ${order('teapot')}
# the order is there before its label is
curl -i ${url}/orders/delivery ${order('teapot')}
`)
}
