import { AsyncLocalStorage } from 'node:async_hooks'
import { AmbientError } from '../../../src/errors.ts'
import { isAmbientError } from '../../../src/index.ts'
import type { Hands, Sabotage } from './stage.ts'

/** A fault that the harness must see. */
export interface Mutant {
  readonly name: string
  /** Makes the fault; what it remembers is of one run. */
  readonly sabotage: Sabotage
  /** The engines where it is a fault. Default is all. */
  readonly only?: (engine: string) => boolean
}

const onPostgres = (engine: string) => engine !== 'kysely-sqlite'
const onSqlite = (engine: string) => !onPostgres(engine)

/** Faults below the rules are planted in the adapter; faults in the rules stand between program and library. */
export const mutants: readonly Mutant[] = [
  {
    name: 'says committed where it rolled back',
    sabotage: {
      mutate: (adapter) => ({
        ...adapter,
        commit: async (connection) => {
          await adapter.rollback(connection)
          return 'committed'
        },
      }),
    },
  },
  {
    name: 'commits what is to be rolled back',
    sabotage: { mutate: (adapter) => ({ ...adapter, rollback: (connection) => adapter.commit(connection) }) },
  },
  {
    name: 'says committed where COMMIT was refused',
    sabotage: {
      mutate: (adapter) => ({
        ...adapter,
        commit: (connection) => adapter.commit(connection).catch(() => 'committed' as const),
      }),
    },
  },
  {
    name: 'ignores the command tag of COMMIT, and what failed before',
    only: onPostgres,
    sabotage: {
      mutate: ({ transactionStatus: _, ...adapter }) => ({
        ...adapter,
        capabilities: (engine) => ({ ...adapter.capabilities(engine), failedStatementAborts: false }),
        commit: async (connection) => {
          await adapter.commit(connection)
          return 'committed'
        },
      }),
    },
  },
  {
    name: 'keeps the rows of a block that was rolled back',
    sabotage: { mutate: (adapter) => ({ ...adapter, rollbackTo: async () => {} }) },
  },
  {
    name: 'rolls back the savepoint of a block that returned',
    sabotage: {
      mutate: (adapter) => ({
        ...adapter,
        releaseSavepoint: async (connection, name) => {
          await adapter.rollbackTo(connection, name)
          await adapter.releaseSavepoint(connection, name)
        },
      }),
    },
  },
  {
    name: 'takes an only connection for a pool',
    only: onSqlite,
    sabotage: {
      mutate: (adapter) => ({
        ...adapter,
        capabilities: (engine) => ({ ...adapter.capabilities(engine), singleConnection: false }),
      }),
    },
  },
  {
    name: 'forgets the throw of a joined block',
    sabotage: {
      hands: (hands) => ({
        ...hands,
        atomic: (work, options) => (options.current === 'join' ? work() : hands.atomic(work, options)),
      }),
    },
  },
  {
    name: 'nests where it must commit what is open',
    sabotage: {
      hands: (hands) => ({
        ...hands,
        atomic: (work, options) =>
          hands.atomic(work, options.current === 'commit' ? { ...options, current: 'savepoint' } : options),
      }),
    },
  },
  { name: 'lets statements of other branches into a block', sabotage: { hands: letIntoBlocks } },
  { name: 'runs the hooks of a block that was rolled back', sabotage: { hands: registerOutsideOfBlocks } },
  {
    name: 'lets late statements through, in a transaction of their own',
    sabotage: {
      hands: (hands) => ({
        ...hands,
        statement: (db, sql) =>
          hands.statement(db, sql).catch(async (error: unknown) => {
            if (!isAmbientError(error, 'AMBIENT_CONTEXT_ENDED') && !isAmbientError(error, 'AMBIENT_BLOCK_ENDED'))
              throw error
            await hands.newContext(async () => void (await hands.statement(db, sql)), {})
          }),
      }),
    },
  },
  {
    name: 'rejects the promise of what was aborted, and lets the work go on',
    sabotage: {
      hands: (hands) => ({
        ...hands,
        newContext: (work, { signal, timeout }) => {
          const running = hands.newContext(work, { timeout })
          if (!signal) return running
          const aborted = new Promise<never>((_, reject) => {
            const abort = () => reject(new AmbientError('AMBIENT_ABORTED', 'The work was aborted.'))
            signal.addEventListener('abort', abort)
            running.then(abort, abort)
          })
          return Promise.race([running, aborted])
        },
      }),
    },
  },
  {
    name: 'says that a block went well before it has',
    sabotage: {
      hands: (hands) => ({
        ...hands,
        atomic: (work, options) =>
          new Promise((resolve, reject) => {
            const told = async () => {
              await work()
              resolve()
            }
            hands.atomic(told, options).catch(reject)
          }),
      }),
    },
  },
]

/** Every statement joins the block that began last, whoever issues it. */
function letIntoBlocks(hands: Hands): Hands {
  const open: (typeof AsyncLocalStorage.snapshot extends () => infer Inside ? Inside : never)[] = []
  return {
    ...hands,
    atomic: (work, options) =>
      hands.atomic(async () => {
        const inside = AsyncLocalStorage.snapshot()
        open.push(inside)
        try {
          await work()
        } finally {
          open.splice(open.indexOf(inside), 1)
        }
      }, options),
    statement: (db, sql) => {
      const inside = open.at(-1)
      return inside ? inside(() => hands.statement(db, sql)) : hands.statement(db, sql)
    },
  }
}

/** Every hook belongs to the transaction, whichever block it was registered in. */
function registerOutsideOfBlocks(hands: Hands): Hands {
  const outside = new AsyncLocalStorage<(work: () => void) => void>()
  return {
    ...hands,
    newContext: (work, options) => hands.newContext(() => outside.run(AsyncLocalStorage.snapshot(), work), options),
    hook: (subject, when, hook) => {
      const register = () => hands.hook(subject, when, hook)
      const around = outside.getStore()
      if (around) around(register)
      else register()
    },
  }
}
