import type { OpenStream } from './adapter.ts'
import type { AmbientError } from './errors.ts'
import type { Lane, Occupant } from './lane.ts'
import type { Level } from './level.ts'
import type { Session } from './session.ts'
import { drained } from './time.ts'

/** The streams of a session: each takes a turn like a statement, and keeps it until it is closed or its surroundings end. */
export class Streams<Connection> {
  readonly #session: Session<Connection>
  #destroy: ((error: Error) => void) | undefined
  /** What the stream is to end with. */
  #end: AmbientError | undefined

  constructor(session: Session<Connection>) {
    this.#session = session
  }

  /** Resolves when its turn in `lane` has come; only then `levelNow` is asked where it belongs. */
  open(lane: Lane, levelNow: () => Level, destroy: (error: Error) => void): Promise<OpenStream<Connection>> {
    const session = this.#session
    const occupant: Occupant = { label: 'a stream', place: session.place(), exclusive: 'stream' }
    return new Promise<OpenStream<Connection>>((resolve, reject) => {
      const turn = async () => {
        let end: (failure: unknown) => void = () => {}
        const ended = new Promise<unknown>((resolveEnd) => {
          end = resolveEnd
        })
        const closing = () => {
          occupant.exclusive = undefined
        }
        const close = (failure?: unknown) => {
          closing()
          end(failure)
        }
        const { connection, lost, settle } = await session.transaction.openStream(levelNow(), ended, lane)
        this.#destroy = (error) => {
          try {
            destroy(error)
          } catch (failure) {
            close(failure) // nobody else would
          }
        }
        resolve({ connection, lost, closing, close })
        if (this.#end) await drained().then(() => this.#end && this.#destroy?.(this.#end)) // it is in its owner's hands now
        const startedAt = performance.now()
        const failure = await ended
        session.publish('statement', { duration: performance.now() - startedAt, error: failure })
        await settle(failure)
        this.#destroy = undefined
        this.#end = undefined
      }
      lane.run(occupant, turn).catch((error) => {
        this.#end = undefined // not meant for the next one
        reject(error)
      })
    })
  }

  /** Ends the stream that is open or waits in `lane`, because of `what`; throws instead if it is to refuse. */
  endIn(lane: Lane, what: string, way: 'destroy' | 'refuse' = 'destroy'): void {
    if (!lane.stream) return
    const error = this.#session.refuseBehind(lane.stream, { label: what })
    if (way === 'refuse') throw error
    this.#end = error // for one that has not had its turn yet
    this.#destroy?.(error)
  }
}
