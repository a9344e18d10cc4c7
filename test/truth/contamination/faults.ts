import { AsyncLocalStorage } from 'node:async_hooks'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Adapter, Statements } from '../../../src/adapter.ts'
import { isAmbientError } from '../../../src/index.ts'
import type { Kind } from './scene.ts'

type AnyAdapter = Adapter<unknown, unknown, unknown>
type Run = Statements<unknown>['run']

/** What is made worse, to see whether it is noticed. */
export interface Sabotage {
  mutate?(adapter: AnyAdapter): AnyAdapter
  /** Puts the work of a unit somewhere else. */
  within?(unit: number, run: () => Promise<void>): Promise<void>
  /** Statements of other branches run inside of the block that is open. */
  readonly joinsBlocks?: true
}

/** A fault that the harness must see. */
export interface Fault {
  readonly name: string
  readonly sabotage: () => Sabotage
  /** The adapters over MySQL destroy what is released with a transaction open, so there it is none. */
  readonly onPostgres?: true
  /** As one of these. */
  readonly shows: readonly Kind[]
}

export const faults: readonly Fault[] = [
  {
    name: 'late statements fall back to the pool',
    sabotage: () => ({
      mutate(adapter) {
        let engine: unknown
        const fallBack: (run: Run) => Run = (run) => (statement, block) =>
          run(statement, block).catch(async (error) => {
            if (!isAmbientError(error, 'AMBIENT_CONTEXT_ENDED')) throw error
            const connection = await adapter.acquire(engine, () => {})
            return statement(connection).finally(() => adapter.release(engine, connection))
          })
        const createEngine = async (host: string | undefined) => {
          engine = await adapter.createEngine(host)
          return engine
        }
        return { ...withRun(adapter, fallBack), createEngine }
      },
    }),
    shows: ['late'],
  },
  {
    name: 'connections are released without ROLLBACK',
    sabotage: () => ({ mutate: (adapter) => ({ ...adapter, rollback: async () => {} }) }),
    onPostgres: true,
    shows: ['foreign transaction'],
  },
  {
    name: 'a connection is leased to two sessions at once',
    sabotage: () => ({
      mutate(adapter) {
        let leases = 0
        let last: Promise<unknown> | undefined
        return {
          ...adapter,
          acquire(engine, onLost) {
            if (++leases % 10 === 0 && last) return last
            last = adapter.acquire(engine, onLost)
            return last
          },
        }
      },
    }),
    shows: ['foreign transaction', 'wrong rows'], // where BEGIN commits what is open, its rows stay
  },
  {
    name: 'a unit runs on in the session of another',
    sabotage: () => {
      let other: ((run: () => Promise<void>) => Promise<void>) | undefined
      return {
        within(unit, run) {
          if (unit % 5 === 0 && other) return other(run)
          other = AsyncLocalStorage.snapshot()
          return run()
        },
      }
    },
    shows: ['foreign transaction'],
  },
  {
    name: 'statements of other branches get into a block',
    sabotage: () => ({ joinsBlocks: true }),
    shows: ['foreign transaction', 'wrong rows'],
  },
  {
    name: 'a connection is released while a statement of it is still to come',
    sabotage: () => {
      let statements = 0
      const outlive: (run: Run) => Run = (run) => async (statement, block) => {
        if (++statements % 7 > 0) return run(statement, block)
        return new Promise((resolve, reject) => {
          run(async (connection) => {
            sleep(5)
              .then(() => statement(connection))
              .then(resolve, reject)
          }, block).catch(reject)
        })
      }
      return { mutate: (adapter) => withRun(adapter, outlive) }
    },
    shows: ['foreign transaction', 'wrong rows'],
  },
]

/** The same adapter, where the statements of its ambient handle go through `change`. */
function withRun(adapter: AnyAdapter, change: (run: Run) => Run): AnyAdapter {
  return {
    ...adapter,
    createHandle: (statements) =>
      adapter.createHandle({
        name: statements.name,
        host: () => statements.host(),
        run: change((statement, block) => statements.run(statement, block)),
        openStream: (destroy, block) => statements.openStream(destroy, block),
        createBlock: () => statements.createBlock(),
        afterCommit: (hook, block) => statements.afterCommit(hook, block),
        enclose: (work) => statements.enclose(work),
        unitOfWork: (make) => statements.unitOfWork(make),
      }),
  }
}
