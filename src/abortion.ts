import { AmbientError } from './errors.ts'
import { longestTimeout } from './time.ts'

/** When work is to be aborted. */
export interface AbortOptions {
  /** Aborts the work when it fires. */
  readonly signal?: AbortSignal | undefined
  /** Milliseconds after which the work is aborted. Default is no limit. */
  readonly timeout?: number | undefined
}

/** Throws `AMBIENT_INVALID_ARGUMENT` for what no timer can wait for. */
export function assertTimeout(timeout: number | undefined, name = 'timeout'): void {
  if (timeout === undefined || (typeof timeout === 'number' && timeout <= longestTimeout)) return
  const what = `\`${name}\` must be a number of milliseconds, at most ${longestTimeout}.`
  throw new AmbientError('AMBIENT_INVALID_ARGUMENT', what)
}

/** Not a closure: the promise keeps it, and it would keep the signal. */
function ignore(): void {}

/** Watches a signal and a deadline; `promise` rejects with the coded error when the first of them fires. */
export class Abortion {
  readonly promise: Promise<never>
  #error: AmbientError | undefined
  #reject: (error: AmbientError) => void = () => {}
  #stop: () => void

  constructor({ signal, timeout }: AbortOptions, onAbort: (error: AmbientError) => void = () => {}) {
    assertTimeout(timeout)
    this.promise = new Promise((_, reject) => {
      this.#reject = reject
    })
    this.promise.catch(ignore) // whoever races with it reports it
    const abort = (error: AmbientError) => {
      if (this.abort(error)) onAbort(error)
    }
    const onSignal = () =>
      abort(new AmbientError('AMBIENT_ABORTED', 'The work was aborted.', { cause: signal?.reason }))
    const onTimeout = () => abort(new AmbientError('AMBIENT_TIMEOUT', `The work did not end within ${timeout} ms.`))
    const timer = timeout === undefined ? undefined : setTimeout(onTimeout, timeout)
    signal?.addEventListener('abort', onSignal, { once: true })
    this.#stop = () => {
      clearTimeout(timer)
      signal?.removeEventListener('abort', onSignal)
    }
    if (signal?.aborted) onSignal()
  }

  get error(): AmbientError | undefined {
    return this.#error
  }

  /** Fires by hand; false if it had fired already. */
  abort(error: AmbientError): boolean {
    if (this.#error) return false
    this.#error = error
    this.#reject(error)
    return true
  }

  /** Stops watching, and forgets the signal. */
  stop(): void {
    // The error is kept for late code, and until a stack is read it keeps the objects of its calls alive: sessions, blocks.
    for (const each of [this.#error, this.#error?.cause]) if (each instanceof Error) void each.stack
    this.#stop()
    this.#stop = () => {}
  }
}
