import type { PoolConfig } from 'pg'
import { openContext } from '../../../src/index.ts'
import { postgres } from '../cuts/postgres.ts'
import type { StageDatabase } from '../cuts/stage.ts'
import { unitsFor } from '../cuts/units.ts'
import type { Piece } from './piece.ts'
import type { AbortStage } from './stage.ts'

/** A piece of work as users write it, and what of it can be aborted. */
export interface AbortUnit {
  readonly name: string
  readonly aborts: readonly Piece['kind'][]
  /** It has no request of its own. */
  readonly noRequest?: true
  readonly pool?: PoolConfig & { pipeline?: boolean }
  readonly database?: StageDatabase
  /** A statement of its runs for long, or waits. */
  readonly long?: true
  run(stage: AbortStage): Promise<unknown>
}

const long = 'select pg_sleep(0.4)'

/** What only some of it can be aborted of; of the others, their context. */
const scriptedAborts: Record<string, readonly Piece['kind'][]> = {
  'atomic rollback': ['context', 'block'],
  'atomic append': ['context', 'block'],
  'atomic savepoint': ['context', 'block'],
  'atomic join': ['context', 'block'],
  'atomic in atomic': ['context', 'block'],
  'atomic side by side': ['context', 'block'],
  'atomic with retry': ['context', 'block'],
  autocommit: ['context', 'block'],
  'new session': ['context', 'session'],
  'new session that holds its connection': ['session'],
}

/** They say by themselves when they end, or of a block that it has committed what was open, though it may have been too late. */
const notScripted = ['aborted by its signal', 'stream with a time limit', 'context in the hand', 'atomic commit']

const fromScripts = unitsFor(postgres)
  .filter(({ name }) => !notScripted.includes(name))
  .map((unit): AbortUnit => ({ ...unit, aborts: scriptedAborts[unit.name] ?? ['context'] }))

const own: readonly AbortUnit[] = [
  {
    name: 'a long statement',
    aborts: ['context'],
    long: true,
    run: (stage) =>
      stage.unit(['a', 'b'], async () => {
        await stage.write('a')
        await stage.execute(long)
        await stage.write('b')
      }),
  },
  {
    name: 'a long first statement',
    aborts: ['context'],
    long: true,
    run: (stage) => stage.unit([], () => stage.execute(long)),
  },
  {
    name: 'a long first statement, pipelined pool',
    aborts: ['context'],
    long: true,
    pool: { pipeline: true },
    run: (stage) => stage.unit([], () => stage.execute(long)),
  },
  {
    name: 'a long statement without a transaction',
    aborts: ['context'],
    long: true,
    run: (stage) => stage.unit([], () => stage.execute(long), { transaction: 'autocommit' }),
  },
  {
    name: 'a long statement that nobody awaits',
    aborts: ['context'],
    long: true,
    run: (stage) =>
      stage.unit(['a'], async () => {
        stage.write('a').catch(() => {})
        stage.execute(long).catch(() => {})
      }),
  },
  {
    name: 'a lock',
    aborts: ['context'],
    long: true,
    run: (stage) =>
      stage.unit(['a', 'b'], async () => {
        await stage.write('a')
        await stage.wait()
        await stage.write('b')
      }),
  },
  {
    name: 'a statement behind a block',
    aborts: ['context', 'block'],
    long: true,
    run: (stage) =>
      stage.unit(['b'], async () => {
        const block = stage.main.atomic(async () => {
          await stage.write('a')
          await stage.wait()
        })
        const ends = [stage.report('atomic', ['a'], block), stage.write('b')]
        const failed = (await Promise.allSettled(ends)).find(({ status }) => status === 'rejected')
        if (failed) throw (failed as PromiseRejectedResult).reason
      }),
  },
  {
    name: 'a full pool',
    aborts: ['context'],
    run(stage) {
      const hog = (label: string) =>
        stage.report(
          'another context',
          [label],
          stage.others(async () => {
            await stage.write(label)
            await stage.execute('select pg_sleep(0.05)')
          }),
        )
      return Promise.allSettled([hog('x'), hog('y'), stage.unit(['a'], () => stage.write('a'))])
    },
  },
  {
    name: 'a long COMMIT',
    aborts: ['context'],
    run: (stage) =>
      stage.unit(['a'], async () => {
        await stage.write('a')
        await stage.execute('insert into slow_commits values (0.15)')
      }),
  },
  {
    name: 'a long COMMIT by hand',
    aborts: ['context'],
    run: (stage) =>
      stage.unit(['b'], async () => {
        await stage.write('a')
        await stage.execute('insert into slow_commits values (0.15)')
        await stage.report('commit()', ['a'], stage.main.commit())
        await stage.write('b')
      }),
  },
  {
    name: 'a long COMMIT of a block',
    aborts: ['context', 'block'],
    run: (stage) =>
      stage.unit(['b'], async () => {
        const block = stage.main.atomic(async () => {
          await stage.write('a')
          await stage.execute('insert into slow_commits values (0.15)')
        })
        await stage.report('atomic', ['a'], block)
        await stage.write('b')
      }),
  },
  {
    name: 'two databases, of which one is idle',
    aborts: ['context'],
    run: (stage) =>
      stage.unit({ other: ['b'] }, async () => {
        stage.main.session()
        await stage.write('b', 'other')
      }),
  },
  {
    name: 'two databases, the first with a long COMMIT',
    aborts: ['context'],
    run: (stage) =>
      stage.unit({ main: ['a'], other: ['b'] }, async () => {
        await stage.write('a')
        await stage.execute('insert into slow_commits values (0.15)')
        await stage.write('b', 'other')
      }),
  },
  {
    name: 'begin by hand',
    aborts: ['context'],
    run: (stage) =>
      stage.unit(['a'], async () => {
        await stage.main.begin({ isolationLevel: 'serializable' })
        await stage.write('a')
      }),
  },
  {
    name: 'a long beforeCommit hook',
    aborts: ['context'],
    long: true,
    run: (stage) =>
      stage.unit(['a', 'b'], async () => {
        stage.main.beforeCommit(async () => {
          await stage.write('b')
          await stage.execute(long)
        })
        await stage.write('a')
      }),
  },
  {
    name: 'a beforeCommit hook with nothing open',
    aborts: ['context'],
    long: true,
    run: (stage) =>
      stage.unit([], async () => {
        stage.main.beforeCommit(() => stage.execute(long))
      }),
  },
  {
    name: 'a long hook of a commit by hand',
    aborts: ['context'],
    long: true,
    run: (stage) =>
      stage.unit(['c'], async () => {
        stage.main.beforeCommit(async () => {
          await stage.write('b')
          await stage.execute(long)
        })
        await stage.write('a')
        await stage.report('commit()', ['a', 'b'], stage.main.commit())
        await stage.write('c')
      }),
  },
  {
    name: 'hooks of the database',
    aborts: ['context', 'block'],
    database: {
      beforeSession: async () => {
        for (let turn = 0; turn < 5; turn++) await turn
      },
      hooks: {
        afterBegin: async () => {
          for (let turn = 0; turn < 5; turn++) await turn
        },
        beforeCommit: async () => {
          for (let turn = 0; turn < 5; turn++) await turn
        },
      },
    },
    run: (stage) =>
      stage.unit(['b'], async () => {
        const block = stage.main.atomic(() => stage.write('a'))
        await stage.report('atomic', ['a'], block)
        await stage.write('b')
      }),
  },
  {
    name: 'context in the hand',
    aborts: ['context'],
    noRequest: true,
    run: (stage) =>
      stage.perform('context', async () => {
        const context = openContext(stage.abortBy('context'))
        try {
          await context.run(async () => {
            await stage.write('a')
            await stage.read()
          })
        } catch (error) {
          stage.rolledBack('settle(rollback)', ['a'])
          await context.settle('rollback', error)
          throw error
        }
        await stage.report('settle(commit)', ['a'], context.settle('commit'))
      }),
  },
  {
    name: 'atomic commit',
    aborts: ['context'],
    run: (stage) => {
      stage.unsaid('a commit before the block', ['a'])
      return stage.unit(['c'], async () => {
        await stage.write('a')
        const block = stage.main.atomic(async () => {
          stage.committed('the block began', ['a'])
          await stage.write('b')
        })
        await stage.report('atomic', ['b'], block)
        await stage.write('c')
      })
    },
  },
  {
    name: 'a block that commits what is open',
    aborts: ['block'],
    run: (stage) =>
      stage.unit(['a', 'c'], async () => {
        await stage.write('a')
        const block = stage.main.atomic(() => stage.write('b'))
        await stage.report('atomic', ['b'], block).catch(() => {}) // what was there before stays, in either case
        await stage.write('c')
      }),
  },
  {
    name: 'a long block in a block',
    aborts: ['block'],
    long: true,
    run: (stage) =>
      stage.unit(['d'], async () => {
        let kept: string[] = []
        const outer = stage.plain.atomic(async () => {
          await stage.write('a')
          const inner = stage.main.atomic(async () => {
            await stage.write('b')
            await stage.execute(long)
          })
          kept = await inner.then(
            () => ['b'],
            () => [],
          )
          await stage.write('c')
        })
        await stage.report('atomic', () => ['a', 'c', ...kept], outer)
        await stage.write('d')
      }),
  },
  {
    name: 'a long block, and the session goes on',
    aborts: ['block'],
    long: true,
    run: (stage) =>
      stage.unit(['b'], async () => {
        const block = stage.main.atomic(async () => {
          await stage.write('a')
          await stage.wait()
        })
        await stage.report('atomic', ['a'], block).catch(() => {})
        await stage.write('b')
      }),
  },
  {
    name: 'a long statement beside the context',
    aborts: ['session'],
    long: true,
    run: (stage) =>
      stage.unit(['a'], async () => {
        await stage.write('a')
        const beside = stage.main.newSession(async (session) => {
          await stage.writeIn(session, 'b')
          await stage.executeIn(session, long)
          await stage.report('commit()', ['b'], session.commit())
          await stage.writeIn(session, 'c')
        })
        await stage.report('newSession', ['c'], beside).catch(() => {})
      }),
  },
]

export const abortUnits: readonly AbortUnit[] = [...fromScripts, ...own]
