import type { PoolConfig } from 'pg'
import type { CurrentTransaction } from '../../../src/atomic.ts'
import { openContext } from '../../../src/index.ts'
import type { Server } from './server.ts'
import type { Stage } from './stage.ts'

/** A piece of work as users write it. What it says by `report`, `committed` and `rolledBack` is judged against the rows. */
export interface Unit {
  readonly name: string
  /** What it asks of its pools; only those of `pg` have it. */
  readonly pool?: PoolConfig & { pipeline?: boolean }
  readonly streams?: true
  /** The server must be able to refuse a COMMIT. */
  readonly spoils?: true
  run(stage: Stage): Promise<unknown>
}

/** An atomic block that does away with what is open first; whoever is let in knows that this has happened. */
function blockAfter(stage: Stage, before: string, label: string): Promise<unknown> {
  let entered = false
  const block = stage.main.atomic(async () => {
    entered = true
    stage.committed('the block began', [before])
    await stage.write(label)
  })
  return stage.report('atomic', () => (entered ? [label] : [before]), block)
}

function block(stage: Stage, current: CurrentTransaction, label: string): Promise<unknown> {
  return stage.main.atomic(() => stage.write(label), { current })
}

/** Those that a server can play. */
export function unitsFor({ name, spoilCommit }: Server): readonly Unit[] {
  return units.filter(({ pool, spoils }) => (!pool || name === 'PostgreSQL') && (!spoils || spoilCommit !== undefined))
}

const units: readonly Unit[] = [
  { name: 'one write', run: (stage) => stage.unit(['a'], () => stage.write('a')) },
  {
    name: 'several writes',
    run: (stage) =>
      stage.unit(['a', 'b', 'c', 'd'], async () => {
        await stage.write('a')
        await Promise.all([stage.write('b'), stage.read(), stage.write('c')])
        await stage.write('d')
      }),
  },
  {
    name: 'read only',
    run: (stage) =>
      stage.unit(
        [],
        async () => {
          await stage.read()
          await stage.read()
        },
        { transaction: { readOnly: true, isolationLevel: 'repeatable read' } },
      ),
  },
  {
    name: 'nested savepoints',
    run: (stage) => {
      stage.rolledBack('the savepoint threw', ['d'])
      return stage.unit(['a', 'b', 'c', 'e'], async () => {
        await stage.write('a')
        await stage.main.session().savepoint(async () => {
          await stage.write('b')
          await stage.main.session().savepoint(() => stage.write('c'))
        })
        const failing = stage.main.session().savepoint(async () => {
          await stage.write('d')
          await stage.fail()
        })
        await failing.catch(() => {})
        await stage.write('e')
      })
    },
  },
  {
    name: 'failure swallowed',
    run: (stage) =>
      stage.unit(['a'], async () => {
        await stage.write('a')
        await stage.fail().catch(() => {})
      }),
  },
  {
    name: 'failure thrown',
    run: (stage) =>
      stage.unit(['a'], async () => {
        await stage.write('a')
        await stage.fail()
      }),
  },
  {
    name: 'commit refused',
    spoils: true,
    run: (stage) =>
      stage.unit(['a'], async () => {
        await stage.write('a')
        await stage.execute(stage.sql.spoilCommit ?? '')
      }),
  },
  {
    name: 'nothing awaited',
    run: (stage) =>
      stage.unit(['a', 'b'], async () => {
        stage.write('a').catch(() => {})
        stage.write('b').catch(() => {})
      }),
  },
  {
    name: 'manual commit',
    run: (stage) =>
      stage.unit(['b', 'c'], async () => {
        await stage.write('a')
        await stage.report('commit()', ['a'], stage.main.commit())
        await stage.write('b')
        await stage.write('c')
      }),
  },
  {
    name: 'manual commit, its failure swallowed',
    run: (stage) =>
      stage.unit(['b'], async () => {
        await stage.write('a')
        await stage.report('commit()', ['a'], stage.main.commit()).catch(() => stage.main.rollback())
        await stage.write('b')
      }),
  },
  {
    name: 'manual rollback',
    run: (stage) => {
      stage.rolledBack('rollback()', ['a'])
      return stage.unit(['b'], async () => {
        await stage.write('a')
        await stage.main.rollback()
        await stage.write('b')
      })
    },
  },
  {
    name: 'session closed',
    run: (stage) =>
      stage.unit(['b'], async () => {
        await stage.write('a')
        await stage.report('closeSession()', ['a'], stage.main.closeSession('commit'))
        await stage.write('b')
      }),
  },
  {
    name: 'atomic commit',
    run: (stage) =>
      stage.unit(['c'], async () => {
        await stage.write('a')
        await blockAfter(stage, 'a', 'b')
        await stage.write('c')
      }),
  },
  {
    name: 'atomic rollback',
    run: (stage) => {
      stage.rolledBack('atomic after a rollback', ['a'])
      return stage.unit(['c'], async () => {
        await stage.write('a')
        await stage.report('atomic', ['b'], block(stage, 'rollback', 'b'))
        await stage.write('c')
      })
    },
  },
  {
    name: 'atomic append',
    run: (stage) =>
      stage.unit(['c'], async () => {
        await stage.write('a')
        await stage.report('atomic', ['a', 'b'], block(stage, 'append', 'b'))
        await stage.write('c')
      }),
  },
  {
    name: 'atomic savepoint',
    run: (stage) =>
      stage.unit(['a', 'b', 'c'], async () => {
        await stage.write('a')
        await block(stage, 'savepoint', 'b')
        await stage.write('c')
      }),
  },
  {
    name: 'atomic join',
    run: (stage) =>
      stage.unit(['a', 'b', 'c'], async () => {
        await stage.write('a')
        await block(stage, 'join', 'b')
        await stage.write('c')
      }),
  },
  {
    name: 'atomic in atomic',
    run: (stage) => {
      stage.rolledBack('the inner block threw', ['c'])
      return stage.unit(['d'], async () => {
        const outer = stage.main.atomic(async () => {
          await stage.write('a')
          await stage.main.atomic(() => stage.write('b'))
          const failing = stage.main.atomic(async () => {
            await stage.write('c')
            throw new Error('of the block')
          })
          await failing.catch(() => {})
        })
        await stage.report('atomic', ['a', 'b'], outer)
        await stage.write('d')
      })
    },
  },
  {
    name: 'atomic side by side',
    run: (stage) =>
      stage.unit(['c'], async () => {
        const one = stage.report('atomic', ['a'], block(stage, 'commit', 'a'))
        const two = stage.report('atomic', ['b'], block(stage, 'commit', 'b'))
        const ends = await Promise.allSettled([one, two])
        const failed = ends.find(({ status }) => status === 'rejected')
        if (failed) throw (failed as PromiseRejectedResult).reason
        await stage.write('c')
      }),
  },
  {
    name: 'atomic with retry',
    run: (stage) => {
      let attempt = 0
      stage.rolledBack('an attempt that failed', ['a1'])
      return stage.unit(['b'], async () => {
        const retried = stage.main.atomic(
          async () => {
            await stage.write(`a${++attempt}`)
            if (attempt === 1) await stage.execute(stage.sql.conflict)
          },
          { retry: { attempts: 2 } },
        )
        await stage.report('atomic', ['a2'], retried)
        await stage.write('b')
      })
    },
  },
  {
    name: 'native transaction',
    run: (stage) =>
      stage.unit(['a', 'b', 'c', 'd'], async () => {
        await stage.write('a')
        await stage.transaction(['b', 'c'])
        await stage.write('d')
      }),
  },
  {
    name: 'two databases',
    run: (stage) =>
      stage.unit({ main: ['a'], other: ['b'] }, async () => {
        await stage.write('a')
        await stage.write('b', 'other')
      }),
  },
  {
    name: 'two databases, failure swallowed',
    run: (stage) =>
      stage.unit({ main: ['a'], other: ['b'] }, async () => {
        await stage.write('b', 'other')
        await stage.write('a')
        await stage.fail().catch(() => {})
      }),
  },
  {
    name: 'new session',
    run: (stage) =>
      stage.unit(['a', 'c'], async () => {
        await stage.write('a')
        const beside = stage.main.newSession((session) => stage.writeIn(session, 'b'))
        await stage.report('newSession', ['b'], beside)
        await stage.write('c')
      }),
  },
  {
    name: 'new session that holds its connection',
    run: (stage) => {
      const held = stage.main.newSession(
        async (session) => {
          await stage.writeIn(session, 'a')
          await stage.report('commit()', ['a'], session.commit())
          await stage.writeIn(session, 'b')
        },
        { hold: true },
      )
      return stage.report('newSession', ['b'], held)
    },
  },
  {
    name: 'two contexts at once',
    run: (stage) =>
      Promise.allSettled([
        stage.unit(['a'], () => stage.write('a')),
        stage.unit(['b'], async () => {
          await stage.write('b')
          await stage.fail()
        }),
      ]),
  },
  {
    name: 'context in the hand',
    async run(stage) {
      const context = openContext()
      try {
        await context.run(() => stage.write('a'))
      } catch (error) {
        stage.rolledBack('settle(rollback)', ['a'])
        await context.settle('rollback', error)
        return
      }
      await stage.report('settle(commit)', ['a'], context.settle('commit'))
    },
  },
  {
    name: 'hooks',
    run: (stage) =>
      stage.unit(['a', 'b'], async () => {
        stage.main.beforeCommit(() => stage.write('b'))
        stage.main.afterCommit(async () => {
          stage.committed('afterCommit', ['a', 'b'])
          await stage.unit(['c'], () => stage.write('c'))
        })
        stage.main.afterRollback(() => stage.rolledBack('afterRollback', ['a', 'b']))
        await stage.write('a')
      }),
  },
  {
    name: 'stream',
    streams: true,
    run: (stage) =>
      stage.unit(['a', 'b'], async () => {
        await stage.write('a')
        for await (const _ of stage.stream());
        await stage.write('b')
      }),
  },
  {
    name: 'stream left early',
    streams: true,
    run: (stage) =>
      stage.unit(['a', 'b'], async () => {
        await stage.write('a')
        for await (const _ of stage.stream()) break
        await stage.write('b')
      }),
  },
  {
    name: 'stream with a time limit',
    run: (stage) =>
      stage.unit(
        ['a', 'b'],
        async () => {
          await stage.write('a')
          for await (const _ of stage.stream());
          await stage.write('b')
        },
        { timeout: 1500 },
      ),
  },
  {
    name: 'aborted by its signal',
    run: (stage) => {
      const controller = new AbortController()
      stage.rolledBack('the signal', ['a'])
      const aborted = stage.unit(
        ['a'],
        async () => {
          await stage.write('a')
          setTimeout(() => controller.abort(), 30)
          await stage.execute(stage.sql.sleep)
          await new Promise(() => {}) // the signal is the only end
        },
        { signal: controller.signal },
      )
      return aborted
    },
  },
  {
    name: 'autocommit',
    run: (stage) =>
      stage.unit(
        [],
        async () => {
          await stage.statement('a', stage.write('a'))
          await stage.report(
            'atomic',
            ['b', 'c'],
            stage.main.atomic(() => Promise.all([stage.write('b'), stage.write('c')])),
          )
          await stage.statement('d', stage.write('d'))
        },
        { transaction: 'autocommit' },
      ),
  },
  {
    name: 'pipelined pool',
    pool: { pipeline: true },
    run: (stage) =>
      stage.unit(['d', 'e', 'f'], async () => {
        await stage.write('a')
        await Promise.all([stage.write('b'), stage.write('c')])
        await stage.report('commit()', ['a', 'b', 'c'], stage.main.commit())
        await stage.write('d')
        await stage.main.atomic(() => stage.write('e'), { current: 'savepoint' })
        await stage.write('f')
      }),
  },
  {
    name: 'pipelined pool, failure swallowed',
    pool: { pipeline: true },
    run: (stage) =>
      stage.unit(['a'], async () => {
        await stage.write('a')
        await stage.fail().catch(() => {})
      }),
  },
]
