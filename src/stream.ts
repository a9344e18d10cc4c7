import type { OpenStream } from './adapter.ts'
import type { AmbientError } from './errors.ts'
import type { Lane, Occupant } from './lane.ts'
import type { Level } from './level.ts'
import type { Session } from './session.ts'
import { drained } from './time.ts'

/** A stream while it has its turn, or waits for it. */
interface StreamTurn extends Occupant {
  /** What it is to end with. */
  end?: AmbientError
  /** Ends it, once it is in its owner's hands. */
  destroy?: (error: Error) => void
}

/** The streams of a session: each takes a turn like a statement, and keeps it until it is closed or its surroundings end. */
export class Streams<Connection> {
  readonly #session: Session<Connection>

  constructor(session: Session<Connection>) {
    this.#session = session
  }

  /** Resolves when its turn in `lane` has come; only then `levelNow` is asked where it belongs. */
  open(lane: Lane, levelNow: () => Level, destroy: (error: Error) => void): Promise<OpenStream<Connection>> {
    const session = this.#session
    const occupant: StreamTurn = { label: 'a stream', place: session.place(), exclusive: 'stream' }
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
        occupant.destroy = (error) => {
          try {
            destroy(error)
          } catch (failure) {
            close(failure) // nobody else would
          }
        }
        resolve({ connection, lost, closing, close })
        if (occupant.end) await drained().then(() => occupant.end && occupant.destroy?.(occupant.end)) // it is in its owner's hands now
        const startedAt = performance.now()
        const failure = await ended
        session.publish('statement', { duration: performance.now() - startedAt, error: failure })
        await settle(failure)
      }
      lane.run(occupant, turn).catch(reject)
    })
  }

  /** Ends the stream that is open or waits in `lane`, because of `what`; throws instead if it is to refuse. */
  endIn(lane: Lane, what: string, way: 'destroy' | 'refuse' = 'destroy'): void {
    const stream = lane.stream as StreamTurn | undefined // made by `open`
    if (!stream) return
    const error = this.#session.refuseBehind(stream, { label: what })
    if (way === 'refuse') throw error
    stream.end = error // for one that has not had its turn yet
    stream.destroy?.(error)
  }
}
