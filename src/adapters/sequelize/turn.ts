import type { NativeBlock, Statements } from '../../adapter.ts'
import { isAmbientError } from '../../errors.ts'
import { controlRefused, parseTransactionControl } from '../../sql.ts'
import { unsupported } from './inside.ts'

type Act = (connection: Sender) => Promise<unknown>
type Sender = Record<'query' | 'execute', (...args: unknown[]) => unknown>

/** What Sequelize takes for a connection: the turn of one query in the session. */
export class Turn {
  readonly uuid: string | undefined
  readonly #statements: Statements<object>
  readonly #block: NativeBlock | undefined
  #reserved: Promise<unknown> | undefined
  /** What is sent in the turn that was taken, if anything. */
  #arrive: (act?: Act) => void = () => {}

  constructor(statements: Statements<object>, block: NativeBlock | undefined, uuid?: string) {
    this.#statements = statements
    this.#block = block
    this.uuid = uuid
  }

  /** Takes the turn now, for what Sequelize sends a moment later: what was started before `commit()` is part of it. */
  reserve(): void {
    const arrived = new Promise<Act | undefined>((resolve) => {
      this.#arrive = resolve
    })
    this.#reserved = this.#run(async (connection) => (await arrived)?.(connection))
    this.#reserved.catch(() => {}) // whoever sends gets it
  }

  /** Gives the turn back if nothing was sent in it. */
  leave(): void {
    this.#reserved = undefined
    this.#arrive()
  }

  query(...args: unknown[]): unknown {
    return this.#send('query', args)
  }

  execute(...args: unknown[]): unknown {
    return this.#send('execute', args)
  }

  #send(method: keyof Sender, args: unknown[]): unknown {
    const callback = args.pop() as (error: unknown, answer?: unknown) => void // Sequelize gives one
    if (typeof callback !== 'function')
      throw unsupported('What Sequelize has for a connection is for its own queries: use `query`.')
    const text = String((args[0] as { sql?: unknown }).sql ?? args[0])
    let unsent: { error: unknown } | undefined
    const act: Act = async (connection) => {
      let settle: (error: unknown, answer?: unknown) => void = () => {}
      const answer = new Promise<unknown>((resolve, reject) => {
        settle = (error, result) => (error ? reject(error) : resolve(result))
      })
      try {
        connection[method](...args, settle)
      } catch (error) {
        unsent = { error } // bad arguments, of which the server heard nothing
        return undefined
      }
      return answer
    }
    const refuse = (error: unknown) =>
      callback(isAmbientError(error) ? new Refusal(undefined, { cause: error }) : error)
    const answer = parseTransactionControl(text)
      ? Promise.reject(controlRefused(this.#statements.name))
      : this.#act(act)
    answer.then((result) => (unsent ? callback(unsent.error) : callback(null, result)), refuse)
    return { setMaxListeners() {} } // of the command of mysql2
  }

  #act(act: Act): Promise<unknown> {
    const reserved = this.#reserved
    this.#reserved = undefined
    this.#arrive(act)
    return reserved ?? this.#run(act)
  }

  #run(act: Act): Promise<unknown> {
    return this.#statements.run((connection) => act(connection as Sender), this.#block)
  }
}

/** A refusal of the session while it is in the hands of Sequelize, which notes the query and its values on errors and wraps them. */
class Refusal extends Error {}

/** What Sequelize has wrapped. */
export function parentOf(error: unknown): unknown {
  return (error as { parent?: unknown } | null | undefined)?.parent
}

/** Throws what Sequelize has failed with, or what the session has refused. */
export function reveal(error: unknown): never {
  const parent = parentOf(error)
  throw parent instanceof Refusal ? parent.cause : error
}
