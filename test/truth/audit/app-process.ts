import { type ChildProcess, fork } from 'node:child_process'
import type { Calls } from './app.ts'

/** The process that serves the app: what it does wrong must not be hidden by the one that judges it. */
export class AppProcess {
  readonly #child: ChildProcess
  readonly #exit: Promise<number | null>

  /** `flags` are of Node. */
  constructor(flags: readonly string[] = []) {
    const env = { ...process.env, NODE_ENV: 'test', NODE_OPTIONS: '' } // Express logs otherwise
    this.#child = fork(new URL('app.ts', import.meta.url), { env, execArgv: [...flags] })
    this.#exit = new Promise((resolve) => this.#child.once('exit', resolve))
  }

  /** Calls one of its functions; one call at a time. */
  async call<Name extends keyof Calls>(
    name: Name,
    ...[argument]: Parameters<Calls[Name]>
  ): Promise<Awaited<ReturnType<Calls[Name]>>> {
    const answer = new Promise<{ status: 'done' | 'failed'; value: unknown }>((resolve) =>
      this.#child.once('message', resolve as (message: unknown) => void),
    )
    const died = this.#exit.then((status) => {
      throw new Error(`The process of the app ended with ${status}.`)
    })
    this.#child.send({ name, argument })
    const { status, value } = await Promise.race([answer, died])
    if (status === 'failed') throw new Error(String(value))
    return value as Awaited<ReturnType<Calls[Name]>> // what that function resolves with
  }

  /** Lets it end by itself; resolves with whether it did, within `ms` milliseconds. */
  async end(ms: number): Promise<boolean> {
    this.#child.disconnect()
    let timer: NodeJS.Timeout | undefined
    const late = new Promise<false>((resolve) => {
      timer = setTimeout(resolve, ms, false)
    })
    const ended = await Promise.race([this.#exit.then(() => true), late])
    clearTimeout(timer)
    if (!ended) this.#child.kill('SIGKILL')
    return ended
  }
}
