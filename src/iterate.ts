import type { NativeBlock, Statements } from './adapter.ts'

/** Reads what `start` gives, as a stream of the session: it ends when it was read, or left, or when the session ends it. */
export async function* iterate<Connection, Item>(
  statements: Statements<Connection>,
  start: (connection: Connection) => Promise<AsyncIterableIterator<Item>>,
  block?: NativeBlock,
): AsyncIterableIterator<Item> {
  let items: AsyncIterableIterator<Item> | undefined
  let ended: Error | undefined
  const stream = await statements.openStream((error) => {
    ended = error
    if (items) close().then(() => stream.close(), stream.close)
  }, block)
  const unlessLost = racing(stream.lost) // a library may wait for an answer that a lost connection never gives
  const close = async () => {
    if (items?.return) await unlessLost(items.return())
  }
  let failure: unknown
  try {
    const started = await start(stream.connection)
    if (ended) throw ended
    items = started
    for (let next = await unlessLost(items.next()); !next.done; next = await unlessLost(items.next())) {
      yield next.value
      if (ended) throw ended
    }
    if (ended) throw ended
  } catch (error) {
    if (error !== ended) failure = error
    throw error
  } finally {
    await close().catch((error) => {
      failure ??= error
    })
    stream.close(failure)
  }
}

/** Lets promises settle as they do, unless `lost` rejects first. Unlike `Promise.race` it leaves nothing behind on `lost`. */
function racing(lost: Promise<never>): <Value>(promise: Promise<Value>) => Promise<Value> {
  const waiting = new Set<(error: unknown) => void>()
  let error: unknown
  lost.catch((reason) => {
    error = reason
    for (const reject of waiting) reject(reason)
  })
  return (promise) =>
    new Promise((resolve, reject) => {
      if (error) reject(error)
      waiting.add(reject)
      promise.then(resolve, reject).finally(() => waiting.delete(reject))
    })
}
