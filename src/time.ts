/** What a timer of Node can wait for, in ms; one that is set to more fires at once. */
export const longestTimeout: number = 2 ** 31 - 1

/** Resolves once every microtask that is due has run: what was just settled has had its say. */
export function drained(): Promise<void> {
  return new Promise((resolve) => process.nextTick(resolve))
}

/** Resolves in the next turn of the event loop. */
export function nextTurn(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve))
}

/** Resolves after `ms` milliseconds. */
export function sleep(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms))
}
