import assert from 'node:assert/strict'
import { setImmediate as nextTurn } from 'node:timers/promises'
import type { Capabilities } from '../adapter.ts'
import { detach, newContext, openContext } from '../context.ts'
import type { AmbientDatabase, DatabaseOptions } from '../database.ts'
import { type AmbientError, type AmbientErrorCode, type CommitOutcome, isAmbientError } from '../errors.ts'

/** Options of a database under test. */
export interface HarnessOptions<Handle = unknown>
  extends Partial<Omit<DatabaseOptions<Handle, unknown, unknown>, 'adapter' | 'beforeSession'>> {
  readonly beforeSession?: (() => unknown) | undefined
  /** The size of the pool. Default is at least 5. */
  readonly connections?: number | undefined
}

/** An engine that the adapter made, as the harness sees it from outside. */
export interface EngineProbe {
  /** What its factory was given. */
  readonly host: string | undefined
  /** Physical connections; 1 for an open engine that has no others. */
  readonly open: number
  /** Those of them that somebody holds or has a transaction open on. */
  readonly busy: number
  readonly closed: boolean
}

/** A native transaction that is begun and ended by separate calls. */
export interface NativeTransactionProbe {
  insert(id: number): Promise<unknown>
  commit(): Promise<unknown>
  rollback(): Promise<unknown>
}

/** A statement that the database lets wait. */
export interface GateProbe<Handle> {
  /** Runs a statement that is not answered before the gate opens. */
  pass(handle: Handle): Promise<unknown>
  /** Resolves when a statement waits at the gate, in the database. */
  reached(): Promise<void>
  /** Resolves when no statement waits there any more, whatever became of it. */
  left(): Promise<void>
  open(): Promise<void>
}

/**
 * What {@link adapterSuite} needs to know of an adapter. All engines reach one database with one table of rows, `id` its primary
 * key; the optional operations are left out where the engine or the library does not have them, which skips their cases.
 */
export interface AdapterHarness<Handle = unknown> {
  /** The same as the adapter declares: the suite cannot see that, and chooses its cases by this. */
  readonly capabilities: Capabilities
  /**
   * Defines a database over a new adapter. The suite shuts it down. The factory of the engine may take the host as a parameter
   * only if `options.host` is there: otherwise a factory that takes one is refused.
   */
  define(options?: HarnessOptions<Handle>): AmbientDatabase<Handle, unknown>
  /** Empties the table and forgets the engines that were made before. */
  reset(): Promise<void>
  /** The engines that were made since the last reset, in the order in which their factories were called. */
  engines(): readonly EngineProbe[]
  /** Inserts a row through a handle. */
  insert(handle: Handle, id: number): Promise<unknown>
  /** The ids that a handle sees, in ascending order. */
  ids(handle: Handle): Promise<number[]>
  /** Runs a statement through a handle that the engine answers with an error. */
  fail(handle: Handle): Promise<unknown>
  /** What the library has wrapped in the error of a statement: the session speaks of that. Default is the error itself. */
  driverError?(error: unknown): unknown
  /** The ids that are committed, in ascending order, by a connection that the library does not know of. */
  witness(): Promise<number[]>
  /** Streams the ids that a handle sees, in ascending order. */
  stream?(handle: Handle): AsyncIterable<number>
  /** Runs `work` in a native transaction with a callback. */
  transaction?<Result>(
    handle: Handle,
    work: (transaction: { insert(id: number): Promise<unknown> }) => Promise<Result>,
  ): Promise<Result>
  /** Begins a native transaction without a callback. */
  beginTransaction?(handle: Handle): Promise<NativeTransactionProbe>
  /** Does something that COMMIT is going to fail for, such as breaking a deferred constraint. */
  spoilCommit?(handle: Handle): Promise<unknown>
  /** Ends the transaction by SQL that the adapter does not recognise: behind a comment, or in several statements at once. */
  endBehindTheBack?(handle: Handle): Promise<unknown>
  /** Makes a gate. */
  gate?(): Promise<GateProbe<Handle>>
  /** Makes a gate that a transaction waits at while it commits, if it has passed a statement: that one does not wait. */
  gateAtCommit?(): Promise<GateProbe<Handle>>
  /** Changes a row through a handle: a conflict, if `changeElsewhere` changed it after the transaction's first read. */
  change?(handle: Handle, id: number): Promise<unknown>
  /**
   * Changes a row by a connection that the library does not know of, and commits. Left out, with `change`, where an open
   * transaction locks others out: the case would meet that lock and not the conflict.
   */
  changeElsewhere?(id: number): Promise<unknown>
  /** Kills every connection of the engines, from the side of the server; resolves when the clients know. */
  kill?(): Promise<unknown>
  /** Has the answer to the next COMMIT lost on its way, and the connection with it. */
  loseCommit?(): unknown
  /** Has the connection cut at the next COMMIT, before it reaches the database, or when it was passed on. */
  cutAtCommit?(when: 'before' | 'after'): unknown
  /** Has the connection cut at the next BEGIN, so many times. */
  cutAtBegin?(times: number): unknown
}

/** One case of {@link adapterSuite}. */
export interface AdapterCase {
  /** A sentence that begins with the rule's number. */
  readonly name: string
  /** Rejects if the adapter fails it; says why if it was skipped. Cases run one at a time. */
  run(harness: AdapterHarness): Promise<{ readonly skipped: string } | undefined>
}

/** A case while it runs. */
class Trial {
  readonly harness: AdapterHarness
  readonly #defined: AmbientDatabase<unknown, unknown>[] = []
  #main: AmbientDatabase<unknown, unknown> | undefined

  constructor(harness: AdapterHarness) {
    this.harness = harness
  }

  get main(): AmbientDatabase<unknown, unknown> {
    this.#main ??= this.define()
    return this.#main
  }

  define(options?: HarnessOptions): AmbientDatabase<unknown, unknown> {
    const database = this.harness.define(options)
    this.#defined.push(database)
    return database
  }

  /** Defines the database that the operations below work on. */
  use(options: HarnessOptions): AmbientDatabase<unknown, unknown> {
    this.#main = this.define(options)
    return this.#main
  }

  /** Inserts a row through the ambient handle; a refusal that is thrown rejects as well. */
  async insert(id: number, handle: unknown = this.main.db): Promise<void> {
    try {
      await this.harness.insert(handle, id)
    } catch (error) {
      throw this.driverError(error)
    }
  }

  async fail(handle: unknown = this.main.db): Promise<unknown> {
    return this.driverError(await rejection(this.harness.fail(handle)))
  }

  driverError(error: unknown): unknown {
    return this.harness.driverError ? this.harness.driverError(error) : error
  }

  async ids(handle: unknown = this.main.db): Promise<number[]> {
    return this.harness.ids(handle)
  }

  async committed(...ids: number[]): Promise<void> {
    assert.deepEqual(await this.harness.witness(), ids, 'the committed rows')
  }

  get busy(): number {
    return this.harness.engines().reduce((sum, { busy }) => sum + busy, 0)
  }

  get open(): number {
    return this.harness.engines().reduce((sum, { open }) => sum + open, 0)
  }

  async end(): Promise<void> {
    await Promise.all(this.#defined.map((database) => database.shutdown()))
  }
}

/** Why a case does not apply to a harness. */
type Need = (harness: AdapterHarness) => string | undefined

const operation =
  (name: keyof AdapterHarness): Need =>
  (harness) =>
    harness[name] === undefined ? `the harness has no \`${name}\`` : undefined
const capability =
  (name: keyof Capabilities, value = true): Need =>
  ({ capabilities }) =>
    capabilities[name] === value ? undefined : `the engine declares \`${name}: ${!value}\``
const severalConnections = capability('singleConnection', false)
const savepoints = capability('savepoints')

function rule(name: string, body: (trial: Trial) => Promise<void>, ...needs: Need[]): AdapterCase {
  return {
    name,
    async run(harness) {
      for (const need of needs) {
        const skipped = need(harness)
        if (skipped) return { skipped }
      }
      await harness.reset()
      const trial = new Trial(harness)
      const warnings: Error[] = []
      const onWarning = (warning: Error) => warnings.push(warning)
      process.on('warning', onWarning)
      try {
        await body(trial)
        await nextTurn()
        assert.equal(trial.busy, 0, 'connections that are still held at the end')
        assert.deepEqual(warnings, [])
      } finally {
        process.off('warning', onWarning)
        await trial.end()
      }
      return undefined
    },
  }
}

/** What `promise` rejects with. */
async function rejection(promise: Promise<unknown>): Promise<unknown> {
  return promise.then(
    (value) => assert.fail(`resolved with ${String(value)} instead of rejecting`),
    (error: unknown) => error,
  )
}

/** What `promise` is refused with by the library. */
async function refusal(code: AmbientErrorCode, promise: Promise<unknown>): Promise<AmbientError> {
  const error = await rejection(promise)
  if (isAmbientError(error, code)) return error
  throw new assert.AssertionError({
    message: `rejected with something else than ${code}`,
    actual: error,
    expected: code,
  })
}

/** Settles nothing, so that it may reject before anybody awaits it. */
function noted<Result>(promise: Promise<Result>): Promise<Result> {
  promise.catch(ignore)
  return promise
}

function ignore(): void {}

interface Latch {
  readonly passed: Promise<void>
  open(): void
}

function latch(): Latch {
  let open = () => {}
  const passed = new Promise<void>((resolve) => {
    open = resolve
  })
  return { passed, open }
}

const planned = new Error('planned')

async function fails(work: Promise<unknown>): Promise<void> {
  assert.equal(await rejection(work), planned, 'the error that is thrown is the error that was thrown')
}

const contexts: AdapterCase[] = [
  rule('C1 gives one context one session, in every child call', async ({ main }) => {
    await newContext(async () => {
      const session = main.session()
      const child = async () => {
        await nextTurn()
        return main.session()
      }
      assert.equal(await child(), session)
      assert.notEqual(await newContext(async () => main.session()), session)
    })
  }),
  rule('C2 refuses statements outside any context', async (t) => {
    const error = await refusal(
      'AMBIENT_NO_CONTEXT',
      detach(() => t.insert(1)),
    )
    assert.match(error.message, new RegExp(`'${t.main.name}'`))
    assert.equal(t.harness.engines().length, 0)
  }),
  rule('C4 joins what nobody awaited, and commits it', async (t) => {
    await newContext(async () => {
      void t.insert(1).then(() => t.insert(2))
    })
    await t.committed(1, 2)
  }),
  rule('C4 refuses late statements unsent, and they are in no later transaction', async (t) => {
    const ended = latch()
    let late = Promise.resolve()
    await newContext(async () => {
      await t.insert(1)
      late = noted(ended.passed.then(() => t.insert(2)))
    })
    await newContext(async () => {
      await t.insert(3)
      ended.open()
      await refusal('AMBIENT_CONTEXT_ENDED', late)
    })
    await t.committed(1, 3)
  }),
  rule('C4 T2 refuses a sibling that writes after the rollback', async (t) => {
    const rolledBack = latch()
    let sibling = Promise.resolve()
    await fails(
      newContext(async () => {
        await t.insert(1)
        sibling = noted(rolledBack.passed.then(() => t.insert(2)))
        throw planned
      }),
    )
    rolledBack.open()
    await refusal('AMBIENT_CONTEXT_ENDED', sibling)
    await t.committed()
  }),
  rule('C5 makes a failure that nobody awaited the failure of the context', async (t) => {
    let failure: unknown
    const error = await rejection(
      newContext(async () => {
        await t.insert(1)
        t.harness.fail(t.main.db).catch((thrown: unknown) => {
          failure = t.driverError(thrown)
        })
      }),
    )
    assert.equal(error, failure)
    await t.committed()
  }),
  rule("C5 refuses work that nobody awaited with `unawaited: 'error'`", async (t) => {
    const work = async () => {
      t.insert(1).catch(ignore)
    }
    await refusal('AMBIENT_UNAWAITED_WORK', newContext(work, { unawaited: 'error' }))
    await t.committed()
  }),
  rule(
    'C6 commits the databases of a context in the order of their definition, all or none',
    async (t) => {
      const order: string[] = []
      const [first, second] = ['first', 'second'].map((name) =>
        t.define({ name, hooks: { afterCommit: () => order.push(name) } }),
      ) as [Trial['main'], Trial['main']]
      await newContext(async () => {
        await t.insert(2, second.db)
        await t.insert(1, first.db)
      })
      assert.deepEqual(order, ['first', 'second'])
      await t.committed(1, 2)
      await fails(
        newContext(async () => {
          await t.insert(3, first.db)
          await t.insert(4, second.db)
          throw planned
        }),
      )
      await t.committed(1, 2)
    },
    severalConnections,
  ),
  rule(
    'C6 says which databases committed when one of them failed',
    async (t) => {
      const [first, second] = [t.define({ name: 'first' }), t.define({ name: 'second' })]
      const error = await refusal(
        'AMBIENT_PARTIAL_COMMIT',
        newContext(async () => {
          await t.insert(1, first.db)
          await t.insert(2, second.db)
          await t.harness.spoilCommit?.(second.db)
        }),
      )
      assert.deepEqual(error.databases, { committed: ['first'], rolledBack: ['second'], unknown: [] })
      assert.equal(error.outcome, 'partial')
      await t.committed(1)
    },
    severalConnections,
    operation('spoilCommit'),
  ),
  rule('C8 rolls back when its signal fires between statements', async (t) => {
    const controller = new AbortController()
    let after = Promise.resolve()
    const error = await refusal(
      'AMBIENT_ABORTED',
      newContext(
        async () => {
          await t.insert(1)
          controller.abort(planned)
          after = noted(t.insert(2))
          await after
        },
        { signal: controller.signal },
      ),
    )
    assert.equal(error.cause, planned)
    await refusal('AMBIENT_CONTEXT_ENDED', after)
    await t.committed()
  }),
  rule(
    'C8 ends a statement that runs when the context is aborted',
    async (t) => {
      const gate = await t.harness.gate?.()
      assert(gate)
      const controller = new AbortController()
      let statement: Promise<unknown> = Promise.resolve()
      const context = newContext(
        async () => {
          await t.insert(1)
          statement = noted(gate.pass(t.main.db))
          await statement
        },
        { signal: controller.signal },
      )
      context.catch(ignore)
      await gate.reached()
      controller.abort()
      await refusal('AMBIENT_ABORTED', context)
      await rejection(statement)
      if (t.harness.capabilities.cancelling) await gate.left()
      await t.committed()
      await gate.open()
      await newContext(() => t.insert(2))
      await t.committed(2)
    },
    operation('gate'),
  ),
  rule(
    'C8 ends a block at its timeout, and the rest of the context goes on',
    async (t) => {
      const gate = await t.harness.gate?.()
      assert(gate)
      await newContext(async () => {
        const block = async () => {
          await t.insert(1)
          await gate.pass(t.main.db)
        }
        await refusal('AMBIENT_TIMEOUT', t.main.atomic(block, { timeout: 50 }))
        await t.insert(2)
      })
      await t.committed(2)
      await gate.open()
    },
    operation('gate'),
  ),
]

const sessions: AdapterCase[] = [
  rule('S1 opens nothing for a context without a statement', async (t) => {
    await newContext(async () => {
      assert.ok(t.main.session().db)
      assert.equal(t.main.session().inTransaction, false)
    })
    assert.deepEqual(t.harness.engines(), [])
  }),
  rule('S1 has handles that can be awaited', async ({ main }) => {
    assert.equal((main.db as { then?: unknown }).then, undefined)
    await newContext(async () => {
      const { db } = main.session()
      assert.equal((db as { then?: unknown }).then, undefined)
      assert.equal(await Promise.resolve(db), db)
    })
  }),
  rule('S2 commits when the work returns', async (t) => {
    const result = await newContext(async () => {
      await t.insert(1)
      assert.equal(t.main.session().inTransaction, true)
      assert.deepEqual(await t.ids(), [1])
      if (!t.harness.capabilities.singleConnection) await t.committed()
      return 'result'
    })
    assert.equal(result, 'result')
    await t.committed(1)
  }),
  rule('S2 rolls back when the work throws', async (t) => {
    await fails(
      newContext(async () => {
        await t.insert(1)
        throw planned
      }),
    )
    await t.committed()
  }),
  rule('S2 shares one BEGIN between concurrent first statements', async (t) => {
    let begun = 0
    t.use({ hooks: { afterBegin: () => begun++ } })
    await fails(
      newContext(async () => {
        await Promise.all([1, 2, 3].map((id) => t.insert(id)))
        throw planned
      }),
    )
    assert.equal(begun, 1)
    await t.committed()
  }),
  rule('S2 stays idle after a failed opening, and the next statement tries again', async (t) => {
    let calls = 0
    t.use({
      beforeSession: () => {
        if (++calls === 1) throw planned
      },
    })
    await newContext(async () => {
      await fails(t.insert(1))
      assert.equal(t.main.session().inTransaction, false)
      await t.insert(2)
    })
    assert.equal(calls, 2)
    await t.committed(2)
  }),
  rule('S3 holds a connection exactly while a transaction is open', async (t) => {
    await newContext(async () => {
      t.main.session()
      assert.equal(t.busy, 0)
      await t.insert(1)
      assert.equal(t.busy, 1)
      await t.main.commit()
      assert.equal(t.busy, 0)
      await t.committed(1)
      await t.insert(2)
      await t.main.rollback()
      assert.equal(t.busy, 0)
      await t.insert(3)
      assert.equal(t.busy, 1)
    })
    await t.committed(1, 3)
  }),
  rule('S3 keeps one connection for a session with `hold`, and destroys it', async (t) => {
    await t.main.newSession(
      async (session) => {
        await t.insert(1, session.db)
        await session.commit()
        await t.committed(1)
        await t.insert(2, session.db)
        assert.equal(t.open, 1)
      },
      { hold: true },
    )
    await t.committed(1, 2)
    if (!t.harness.capabilities.singleConnection) assert.equal(t.open, 0)
  }),
  rule(
    'S4 T1 rejects when the database aborted the transaction for an error that was swallowed',
    async (t) => {
      let first: unknown
      const error = await refusal(
        'AMBIENT_TRANSACTION_ABORTED',
        newContext(async () => {
          await t.insert(1)
          first = await t.fail()
        }),
      )
      assert.equal(error.cause, first)
      assert.equal(error.outcome, 'rolled-back')
      await t.committed()
    },
    capability('failedStatementAborts'),
  ),
  rule(
    'S4 T1 commits the rest where a failed statement does not abort the transaction',
    async (t) => {
      await newContext(async () => {
        await t.insert(1)
        await t.fail()
        await t.insert(2)
      })
      await t.committed(1, 2)
    },
    capability('failedStatementAborts', false),
  ),
  rule(
    'S4 refuses statements of an aborted transaction until it is rolled back',
    async (t) => {
      await newContext(async () => {
        await t.insert(1)
        const first = await t.fail()
        assert.equal((await refusal('AMBIENT_TRANSACTION_ABORTED', t.insert(2))).cause, first)
        assert.equal((await refusal('AMBIENT_TRANSACTION_ABORTED', t.main.commit())).cause, first)
        assert.equal(t.main.session().inTransaction, true)
        await t.main.rollback()
        await t.insert(3)
      })
      await t.committed(3)
    },
    capability('failedStatementAborts'),
  ),
  rule(
    'S4 lets an error that was swallowed in a savepoint doom only that',
    async (t) => {
      await newContext(async () => {
        await t.insert(1)
        let first: unknown
        const inner = t.main.session().savepoint(async () => {
          await t.insert(2)
          first = await t.fail()
        })
        assert.equal((await refusal('AMBIENT_TRANSACTION_ABORTED', inner)).cause, first)
        await t.insert(3)
      })
      await t.committed(1, 3)
    },
    savepoints,
    capability('failedStatementAborts'),
  ),
  rule(
    "S4 throws the engine's own error when COMMIT fails, and nothing is there",
    async (t) => {
      const ran: string[] = []
      const error = await rejection(
        newContext(async () => {
          t.main.afterCommit(() => ran.push('afterCommit'))
          t.main.afterRollback(() => ran.push('afterRollback'))
          await t.insert(1)
          await t.harness.spoilCommit?.(t.main.db)
        }),
      )
      assert.ok(!isAmbientError(error), `the engine's own error, not ${String(error)}`)
      assert.deepEqual(ran, ['afterRollback'])
      await t.committed()
      await newContext(() => t.insert(2))
      await t.committed(2)
    },
    operation('spoilCommit'),
  ),
  rule(
    'S5 T3 tells a COMMIT without an answer from every failure that is known to have rolled back',
    async (t) => {
      const ran: string[] = []
      const error = await refusal(
        'AMBIENT_COMMIT_UNKNOWN',
        newContext(async () => {
          t.main.afterCommit(() => ran.push('afterCommit'))
          t.main.afterRollback(() => ran.push('afterRollback'))
          await t.insert(1)
          t.harness.loseCommit?.()
        }),
      )
      assert.equal(error.outcome, 'unknown')
      assert.ok(error.cause instanceof Error)
      assert.deepEqual(ran, [])
      await t.committed(1)
      await newContext(() => t.insert(2))
      await t.committed(1, 2)
    },
    operation('loseCommit'),
  ),
  ...lookups(),
  rule('S6 refuses a session that was closed, and the next one is new', async (t) => {
    await newContext(async () => {
      const session = t.main.session()
      const { db } = session
      await t.insert(1)
      await refusal('AMBIENT_TRANSACTION_OPEN', session.close())
      assert.equal(session.closed, false)
      await session.close('commit')
      assert.equal(session.closed, true)
      await t.committed(1)
      await refusal('AMBIENT_SESSION_CLOSED', t.insert(2, db))
      assert.notEqual(t.main.session(), session)
      await t.insert(3)
      await t.main.closeSession('rollback')
      await t.insert(4)
    })
    await t.committed(1, 4)
  }),
  rule('S6 rolls back what is open when a session is disposed of', async (t) => {
    await newContext(async () => {
      {
        await using session = t.main.session()
        await t.insert(1, session.db)
      }
      await t.insert(2)
    })
    await t.committed(2)
  }),
  rule(
    'S7 destroys a connection that was lost in a transaction, which can never commit',
    async (t) => {
      const error = await refusal(
        'AMBIENT_TRANSACTION_ABORTED',
        newContext(async () => {
          await t.insert(1)
          await t.harness.kill?.()
        }),
      )
      assert.ok(error.cause instanceof Error)
      await t.committed()
      await newContext(() => t.insert(2))
      await t.committed(2)
    },
    operation('kill'),
    capability('lossDetection'),
  ),
  rule(
    'S7 rejects the statement whose connection dies under it, and the commit after it',
    async (t) => {
      const gate = await t.harness.gate?.()
      assert(gate)
      let first: unknown
      const context = newContext(async () => {
        await t.insert(1)
        first = t.driverError(await rejection(gate.pass(t.main.db)))
      })
      context.catch(ignore)
      await gate.reached()
      await t.harness.kill?.()
      const error = await refusal('AMBIENT_TRANSACTION_ABORTED', context)
      assert.equal(error.cause, first)
      await gate.open()
      await t.committed()
      await newContext(() => t.insert(2))
      await t.committed(2)
    },
    operation('kill'),
    operation('gate'),
  ),
  rule(
    'S7 T4 stays usable when connections are cut at BEGIN',
    async (t) => {
      t.use({ connections: 2 })
      t.harness.cutAtBegin?.(4)
      for (let attempt = 0; attempt < 4; attempt++) {
        const error = await rejection(newContext(() => t.insert(1)))
        assert.ok(!isAmbientError(error, 'AMBIENT_COMMIT_UNKNOWN'), 'no COMMIT was sent')
      }
      await Promise.all([2, 3].map((id) => newContext(() => t.insert(id))))
      await t.committed(2, 3)
    },
    operation('cutAtBegin'),
  ),
  rule('S8 runs the statements of one session one at a time, in the order of issue', async (t) => {
    const answered: number[] = []
    const ids = Array.from({ length: 20 }, (_, index) => index + 1)
    await newContext(async () => {
      await Promise.all(ids.map((id) => t.insert(id).then(() => answered.push(id))))
    })
    assert.deepEqual(answered, ids)
    await t.committed(...ids)
  }),
  rule('S8 counts a statement that was started before commit() as issued before it', async (t) => {
    await fails(
      newContext(async () => {
        const issued = t.insert(1)
        const commit = t.main.commit()
        const later = t.insert(2)
        await Promise.all([issued, commit, later])
        throw planned
      }),
    )
    await t.committed(1)
  }),
  rule(
    'S10 detects that the transaction was ended behind its back',
    async (t) => {
      const error = await refusal(
        'AMBIENT_TRANSACTION_ABORTED',
        newContext(async () => {
          await t.insert(1)
          await t.harness.endBehindTheBack?.(t.main.db)
          const refused = await refusal('AMBIENT_TRANSACTION_ABORTED', t.insert(2))
          assert.match(refused.message, /may be committed/)
        }),
      )
      assert.notEqual(error.outcome, 'rolled-back')
      assert.ok(!(await t.harness.witness()).includes(2))
    },
    operation('endBehindTheBack'),
    capability('transactionStatus'),
  ),
  rule(
    'S11 bounds the wait for a connection, and says how many the waiting context holds',
    async (t) => {
      t.use({ connections: 1, acquireTimeout: 500 }) // the first connection is made within it
      await newContext(async () => {
        await t.insert(1)
        const error = await refusal(
          'AMBIENT_ACQUIRE_TIMEOUT',
          newContext(() => t.insert(2)),
        )
        assert.equal(error.statusCode, 503)
        assert.match(error.message, /hold 1 of them/)
      })
      await newContext(() => t.insert(3))
      await t.committed(1, 3)
    },
    severalConnections,
  ),
  rule(
    'S11 refuses at once to wait for the only connection in the unit that holds it',
    async (t) => {
      await newContext(async () => {
        await t.insert(1)
        await refusal(
          'AMBIENT_SELF_DEADLOCK',
          newContext(() => t.insert(2)),
        )
        await refusal(
          'AMBIENT_SELF_DEADLOCK',
          t.main.newSession((session) => t.insert(2, session.db)),
        )
        await t.main.commit()
        await newContext(() => t.insert(3))
      })
      await t.committed(1, 3)
    },
    capability('singleConnection'),
  ),
  rule(
    'S13 lets sessions of an engine with one connection wait for each other',
    async (t) => {
      t.use({ acquireTimeout: 5000 })
      const inside = latch()
      const done: number[] = []
      const holding = newContext(async () => {
        await t.insert(1)
        await inside.passed
        done.push(1)
      })
      const waiting = [2, 3, 4].map((id) => newContext(() => t.insert(id)).then(() => done.push(id)))
      await nextTurn()
      inside.open()
      await Promise.all([holding, ...waiting])
      assert.deepEqual(done, [1, 2, 3, 4])
      await t.committed(1, 2, 3, 4)
    },
    capability('singleConnection'),
  ),
  rule(
    'S13 bounds the wait for the only connection',
    async (t) => {
      t.use({ acquireTimeout: 50 })
      const inside = latch()
      const holding = newContext(async () => {
        await t.insert(1)
        await inside.passed
      })
      await nextTurn()
      await refusal(
        'AMBIENT_ACQUIRE_TIMEOUT',
        newContext(() => t.insert(2)),
      )
      inside.open()
      await holding
      await newContext(() => t.insert(3))
      await t.committed(1, 3)
    },
    capability('singleConnection'),
  ),
  rule(
    'S11 gives parallel contexts connections and outcomes of their own',
    async (t) => {
      const together = latch()
      const one = newContext(async () => {
        await t.insert(1)
        await together.passed
      })
      const other = newContext(async () => {
        await t.insert(2)
        assert.deepEqual(await t.ids(), [2])
        assert.equal(t.busy, 2)
        together.open()
        throw planned
      })
      await Promise.all([one, fails(other)])
      await t.committed(1)
    },
    severalConnections,
  ),
  rule('runs each statement of a context without transactions on its own', async (t) => {
    await fails(
      newContext(
        async () => {
          await t.insert(1)
          assert.equal(t.busy, 0)
          assert.equal(t.main.session().inTransaction, false)
          await t.committed(1)
          await t.fail()
          await t.insert(2)
          await fails(
            t.main.atomic(async () => {
              await t.insert(3)
              assert.equal(t.main.session().inTransaction, true)
              throw planned
            }),
          )
          await t.main.atomic(() => t.insert(4))
          await t.insert(5)
          throw planned
        },
        { transaction: 'autocommit' },
      ),
    )
    await t.committed(1, 2, 4, 5)
  }),
  rule(
    'gives newSession a session beside the context',
    async (t) => {
      await fails(
        newContext(async () => {
          await t.insert(1)
          await t.main.newSession(async (session) => {
            assert.notEqual(session, t.main.session())
            await t.insert(2, session.db)
            assert.deepEqual(await t.ids(session.db), [2])
            assert.deepEqual(await t.ids(), [1])
            assert.equal(t.busy, 2)
          })
          await t.committed(2)
          throw planned
        }),
      )
      await t.committed(2)
    },
    severalConnections,
  ),
  rule('needs no context for newSession, with manual control inside', async (t) => {
    let kept: unknown
    await t.main.newSession(async (session) => {
      kept = session.db
      await t.insert(1, session.db)
      await session.commit()
      await t.insert(2, session.db)
      await session.rollback()
      await t.insert(3, session.db)
    })
    await refusal('AMBIENT_SESSION_CLOSED', t.insert(4, kept))
    await fails(
      t.main.newSession(async (session) => {
        await t.insert(5, session.db)
        throw planned
      }),
    )
    await t.committed(1, 3)
  }),
]

const streams: AdapterCase[] = [
  rule('S9 streams rows inside the transaction', async (t) => {
    await newContext(async () => {
      await t.insert(1)
      await t.insert(2)
      const ids: number[] = []
      for await (const id of stream(t)) ids.push(id)
      assert.deepEqual(ids, [1, 2])
      await t.insert(3)
    })
    await t.committed(1, 2, 3)
  }),
  rule('S9 refuses whatever else the session is asked for while a stream is open', async (t) => {
    await newContext(async () => {
      for (const id of [1, 2, 3]) await t.insert(id)
      const ids = stream(t)[Symbol.asyncIterator]()
      await ids.next()
      await refusal('AMBIENT_STREAM_OPEN', t.insert(4))
      await refusal('AMBIENT_STREAM_OPEN', t.main.commit())
      await refusal(
        'AMBIENT_STREAM_OPEN',
        t.main.atomic(() => {}),
      )
      await ids.return?.()
      await t.insert(5)
    })
    await t.committed(1, 2, 3, 5)
  }),
  rule('S9 frees the session when a loop over a stream is left early', async (t) => {
    await newContext(async () => {
      for (const id of [1, 2, 3]) await t.insert(id)
      for await (const id of stream(t)) {
        assert.equal(id, 1)
        break
      }
      await t.insert(4)
    })
    await t.committed(1, 2, 3, 4)
  }),
  rule('S9 destroys a stream that is still open when its context ends', async (t) => {
    await newContext(() => Promise.all([1, 2, 3].map((id) => t.insert(id))))
    let ids: AsyncIterator<number> | undefined
    await newContext(async () => {
      await t.insert(4)
      ids = stream(t)[Symbol.asyncIterator]()
      await ids.next()
    })
    await t.committed(1, 2, 3, 4)
    await refusal('AMBIENT_STREAM_OPEN', ids?.next() ?? Promise.resolve())
  }),
  rule('S9 destroys a stream when its context throws', async (t) => {
    await newContext(() => Promise.all([1, 2, 3].map((id) => t.insert(id))))
    await fails(
      newContext(async () => {
        await t.insert(4)
        await stream(t)[Symbol.asyncIterator]().next()
        throw planned
      }),
    )
    await t.committed(1, 2, 3)
  }),
  rule('S9 H5 refuses to settle a context in the hand while a stream is open', async (t) => {
    await newContext(() => Promise.all([1, 2, 3].map((id) => t.insert(id))))
    const context = openContext()
    await context.run(async () => {
      await t.insert(4)
      await stream(t)[Symbol.asyncIterator]().next()
    })
    await refusal('AMBIENT_STREAM_OPEN', context.settle('commit'))
    await t.committed(1, 2, 3)
  }),
  rule('S9 streams without a transaction, on a connection of its own', async (t) => {
    await newContext(() => Promise.all([1, 2, 3].map((id) => t.insert(id))))
    await newContext(
      async () => {
        const ids: number[] = []
        for await (const id of stream(t)) {
          ids.push(id)
          if (ids.length === 2) break
        }
        assert.deepEqual(ids, [1, 2])
        assert.equal(t.main.session().inTransaction, false)
        await t.insert(4)
      },
      { transaction: 'autocommit' },
    )
    await t.committed(1, 2, 3, 4)
  }),
].map((each) => restricted(each, capability('streaming'), operation('stream')))

/** What `resolve()` finds out about a COMMIT without an answer. */
function lookups(): AdapterCase[] {
  const unknown = async (t: Trial, id: number, lose: (harness: AdapterHarness) => unknown) => {
    const work = newContext(async () => {
      await t.insert(id)
      lose(t.harness)
    })
    return refusal('AMBIENT_COMMIT_UNKNOWN', work)
  }
  const loseAnswer = (harness: AdapterHarness) => harness.loseCommit?.()
  const looksUp = [capability('commitLookup'), operation('loseCommit')]
  return [
    rule(
      'S5 resolve() finds that work is there of which only the answer was lost',
      async (t) => {
        t.use({ resolvable: true })
        const error = await unknown(t, 1, loseAnswer)
        assert.equal(await error.resolve?.(), 'committed')
        await t.committed(1)
      },
      ...looksUp,
    ),
    rule(
      'S5 resolve() finds that work is gone whose COMMIT never arrived',
      async (t) => {
        t.use({ resolvable: true })
        const error = await unknown(t, 1, (harness) => harness.cutAtCommit?.('before'))
        assert.equal(await error.resolve?.(), 'rolled-back')
        await t.committed()
      },
      capability('commitLookup'),
      operation('cutAtCommit'),
    ),
    rule(
      'S5 resolve() waits for a COMMIT that is still under way, and says nothing before',
      async (t) => {
        t.use({ resolvable: true })
        const gate = await t.harness.gateAtCommit?.()
        assert(gate)
        const work = newContext(async () => {
          await t.insert(1)
          await gate.pass(t.main.db)
          t.harness.cutAtCommit?.('after')
        })
        let resolved: Promise<CommitOutcome> | undefined
        try {
          const error = await refusal('AMBIENT_COMMIT_UNKNOWN', work)
          await gate.reached()
          assert.equal(await error.resolve?.({ timeout: 200 }), 'unknown')
          resolved = error.resolve?.()
        } finally {
          await gate.open()
        }
        assert.equal(await resolved, 'committed')
        await t.committed(1)
      },
      capability('commitLookup'),
      operation('cutAtCommit'),
      operation('gateAtCommit'),
    ),
    rule(
      'S5 D4 resolve() needs no free connection, and no engine that is open',
      async (t) => {
        t.use({ resolvable: true, connections: 1 })
        const [one, two] = [await unknown(t, 1, loseAnswer), await unknown(t, 2, loseAnswer)]
        const [inside, finish] = [latch(), latch()]
        const holder = newContext(async () => {
          await t.insert(3)
          inside.open()
          await finish.passed
        })
        await inside.passed
        const outcome = await one.resolve?.({ timeout: 5000 })
        const { open } = t
        finish.open()
        await holder
        assert.deepEqual([outcome, open], ['committed', 1])
        await t.main.shutdown()
        assert.equal(await two.resolve?.(), 'committed')
        await t.committed(1, 2, 3)
      },
      ...looksUp,
    ),
    rule(
      'S5 resolve() does not say that a transaction committed which has written nothing',
      async (t) => {
        t.use({ resolvable: true })
        const work = newContext(async () => {
          await t.ids()
          loseAnswer(t.harness)
        })
        const error = await refusal('AMBIENT_COMMIT_UNKNOWN', work)
        assert.equal(await error.resolve?.(), 'unknown')
      },
      ...looksUp,
    ),
    rule(
      'S5 resolve() says unknown where nothing can be looked up, or nobody asked for it',
      async (t) => {
        if (!t.harness.capabilities.commitLookup) t.use({ resolvable: true })
        const error = await unknown(t, 1, loseAnswer)
        assert.equal(await error.resolve?.(), 'unknown')
        await t.committed(1)
      },
      operation('loseCommit'),
    ),
  ]
}

function stream({ harness, main }: Trial): AsyncIterable<number> {
  assert(harness.stream)
  return harness.stream(main.db)
}

function restricted({ name, run }: AdapterCase, ...needs: Need[]): AdapterCase {
  return {
    name,
    async run(harness) {
      for (const need of needs) {
        const skipped = need(harness)
        if (skipped) return { skipped }
      }
      return run(harness)
    },
  }
}

const blocks: AdapterCase[] = [
  rule('A1 atomic is durable when it returns', async (t) => {
    await fails(
      newContext(async () => {
        await t.main.atomic(() => t.insert(1))
        await t.committed(1)
        assert.equal(t.busy, 0)
        await t.insert(2)
        throw planned
      }),
    )
    await t.committed(1)
  }),
  rule('A1 commits what is open before the block, by default', async (t) => {
    await newContext(async () => {
      await t.insert(1)
      await fails(
        t.main.atomic(async () => {
          await t.committed(1)
          await t.insert(2)
          throw planned
        }),
      )
    })
    await t.committed(1)
  }),
  rule("A1 `current: 'rollback'` rolls back what is open and starts anew", async (t) => {
    await newContext(async () => {
      await t.insert(1)
      await t.main.atomic(() => t.insert(2), { current: 'rollback' })
    })
    await t.committed(2)
  }),
  rule("A1 `current: 'append'` goes on in what is open and commits it", async (t) => {
    await fails(
      newContext(async () => {
        await t.insert(1)
        await t.main.atomic(() => t.insert(2), { current: 'append' })
        await t.committed(1, 2)
        throw planned
      }),
    )
    await newContext(async () => {
      await t.insert(3)
      const block = async () => {
        await t.insert(4)
        throw planned
      }
      await fails(t.main.atomic(block, { current: 'append' }))
      await t.insert(5)
    })
    await t.committed(1, 2, 5)
  }),
  rule("A1 `current: 'raise'` refuses what is open, and leaves it alone", async (t) => {
    await newContext(async () => {
      await t.insert(1)
      await refusal(
        'AMBIENT_TRANSACTION_OPEN',
        t.main.atomic(() => t.insert(2), { current: 'raise' }),
      )
      await t.insert(3)
    })
    await newContext(() => t.main.atomic(() => t.insert(4), { current: 'raise' }))
    await t.committed(1, 3, 4)
  }),
  rule(
    "A1 `current: 'savepoint'` nests in what is open",
    async (t) => {
      await newContext(async () => {
        await t.insert(1)
        const block = async () => {
          await t.insert(2)
          throw planned
        }
        await fails(t.main.atomic(block, { current: 'savepoint' }))
        assert.deepEqual(await t.ids(), [1])
        await t.main.atomic(() => t.insert(3), { current: 'savepoint' })
        if (!t.harness.capabilities.singleConnection) await t.committed()
      })
      await t.committed(1, 3)
    },
    savepoints,
  ),
  rule("A1 `current: 'join'` takes part, and a throw inside dooms the transaction", async (t) => {
    await newContext(async () => {
      await t.insert(1)
      await t.main.atomic(() => t.insert(2), { current: 'join' })
      assert.equal(t.main.session().inTransaction, true)
    })
    await t.committed(1, 2)
    const error = await refusal(
      'AMBIENT_TRANSACTION_ABORTED',
      newContext(async () => {
        await t.insert(3)
        const block = async () => {
          throw planned
        }
        await fails(t.main.atomic(block, { current: 'join' }))
      }),
    )
    assert.equal(error.cause, planned)
    await t.committed(1, 2)
  }),
  rule(
    'A2 nests atomic blocks as savepoints',
    async (t) => {
      await newContext(() =>
        t.main.atomic(async () => {
          await t.insert(1)
          await t.main.atomic(async () => {
            await t.insert(2)
            await fails(
              t.main.atomic(async () => {
                await t.insert(3)
                throw planned
              }),
            )
            await t.insert(4)
          })
        }),
      )
      await t.committed(1, 2, 4)
    },
    savepoints,
  ),
  rule('A2 refuses what would break the promise of the outer block', async (t) => {
    await newContext(() =>
      t.main.atomic(async () => {
        await t.insert(1)
        const { main } = t
        for (const current of ['commit', 'rollback', 'append'] as const) {
          await refusal(
            'AMBIENT_ATOMIC_NESTING',
            main.atomic(() => t.insert(2), { current }),
          )
        }
        await refusal(
          'AMBIENT_TRANSACTION_OPEN',
          main.atomic(() => t.insert(2), { current: 'raise' }),
        )
        await refusal('AMBIENT_ATOMIC_NESTING', main.commit())
        await refusal('AMBIENT_ATOMIC_NESTING', main.rollback())
        await refusal('AMBIENT_ATOMIC_NESTING', main.closeSession('rollback'))
        await t.insert(3)
      }),
    )
    await t.committed(1, 3)
  }),
  rule('A3 keeps parallel blocks of one context apart', async (t) => {
    const block = (id: number) => async () => {
      await t.insert(id)
      await nextTurn()
      await t.insert(id + 1)
      if (id === 20) throw planned
    }
    await newContext(async () => {
      const results = await Promise.allSettled([10, 20, 30].map((id) => t.main.atomic(block(id))))
      assert.deepEqual(
        results.map(({ status }) => status),
        ['fulfilled', 'rejected', 'fulfilled'],
      )
    })
    await t.committed(10, 11, 30, 31)
  }),
  rule('A3 lets statements beside an open block wait for its end', async (t) => {
    const [started, finish] = [latch(), latch()]
    await newContext(async () => {
      const block = t.main.atomic(async () => {
        await t.insert(1)
        started.open()
        await finish.passed
        throw planned
      })
      block.catch(ignore)
      await started.passed
      const beside = t.insert(2)
      await nextTurn()
      finish.open()
      await fails(block)
      await beside
    })
    await t.committed(2)
  }),
  rule(
    'A3 keeps parallel inner blocks apart',
    async (t) => {
      const block = (id: number) => async () => {
        await t.insert(id)
        await nextTurn()
        await t.insert(id + 1)
        if (id === 20) throw planned
      }
      await newContext(() =>
        t.main.atomic(async () => {
          await t.insert(1)
          await Promise.allSettled([10, 20, 30].map((id) => t.main.atomic(block(id))))
        }),
      )
      await t.committed(1, 10, 11, 30, 31)
    },
    savepoints,
  ),
  rule('A3 refuses whoever waits for a block that waits for nothing at the database', async (t) => {
    t.use({ blockTimeout: 50 })
    const started = latch()
    await newContext(async () => {
      const beside = started.passed.then(() => t.insert(2))
      beside.catch(ignore)
      await t.main.atomic(async () => {
        await t.insert(1)
        started.open()
        await refusal('AMBIENT_SESSION_BUSY', beside)
      })
    })
    await t.committed(1)
  }),
  rule(
    'A5 runs a block again after a real conflict',
    async (t) => {
      await newContext(() => t.insert(1))
      let attempts = 0
      const hooks: number[] = []
      await newContext(() =>
        t.main.atomic(
          async () => {
            const attempt = ++attempts
            t.main.afterCommit(() => hooks.push(attempt))
            await t.ids()
            if (attempt === 1) await t.harness.changeElsewhere?.(1)
            await t.harness.change?.(t.main.db, 1)
            await t.insert(10 + attempt)
          },
          { isolationLevel: 'repeatable read', retry: { attempts: 3 } },
        ),
      )
      assert.equal(attempts, 2)
      assert.deepEqual(hooks, [2])
      await t.committed(1, 12)
    },
    operation('change'),
    operation('changeElsewhere'),
  ),
  rule('A6 joins what a block started, and refuses what it starts after its end', async (t) => {
    const ended = latch()
    let late = Promise.resolve()
    await newContext(async () => {
      await t.main.atomic(async () => {
        void t.insert(1).then(() => t.insert(2))
        late = noted(ended.passed.then(() => t.insert(3)))
      })
      await t.committed(1, 2)
      await t.insert(4)
      ended.open()
      await refusal('AMBIENT_BLOCK_ENDED', late)
    })
    await t.committed(1, 2, 4)
  }),
  rule('A6 refuses what a block that had joined starts after its end', async (t) => {
    const ended = latch()
    let late = Promise.resolve()
    await newContext(async () => {
      await t.insert(1)
      const block = async () => {
        late = noted(ended.passed.then(() => t.insert(2)))
      }
      await t.main.atomic(block, { current: 'join' })
      ended.open()
      await refusal('AMBIENT_BLOCK_ENDED', late)
    })
    await t.committed(1)
  }),
  rule('A6 refuses a sibling in a block that was rolled back', async (t) => {
    const sibling = latch()
    let late: Promise<unknown> = Promise.resolve()
    await newContext(async () => {
      const slow = async () => {
        await sibling.passed
        await t.insert(1)
      }
      const block = t.main.atomic(async () => {
        late = noted(slow())
        await Promise.all([late, t.insert(2).then(() => Promise.reject(planned))])
      })
      await fails(block)
      sibling.open()
      await refusal('AMBIENT_BLOCK_ENDED', late)
    })
    await t.committed()
  }),
  rule('A7 begins and commits for `savepoint` and `append`, and leaves `join` open, with nothing open', async (t) => {
    await fails(
      newContext(async () => {
        await t.main.atomic(() => t.insert(1), { current: 'savepoint' })
        await t.main.atomic(() => t.insert(2), { current: 'append' })
        await t.committed(1, 2)
        await t.main.atomic(() => t.insert(3), { current: 'join' })
        assert.equal(t.main.session().inTransaction, true)
        throw planned
      }),
    )
    await t.committed(1, 2)
  }),
  rule('A7 refuses options that differ from those of the open transaction', async (t) => {
    const inner = (options: object) => t.main.atomic(() => {}, { current: 'join', ...options })
    await newContext(() =>
      t.main.atomic(
        async () => {
          await t.ids()
          await refusal('AMBIENT_TRANSACTION_OPTIONS', inner({ readOnly: false }))
          await inner({ readOnly: true })
        },
        { readOnly: true },
      ),
    )
  }),
]

const natives: AdapterCase[] = [
  rule(
    'A4 makes a native transaction a savepoint, whose rollback keeps the outer work',
    async (t) => {
      await newContext(async () => {
        await t.insert(1)
        await fails(
          native(t, async (transaction) => {
            await transaction.insert(2)
            await t.insert(3) // a helper that finds the session by itself joins
            throw planned
          }),
        )
        assert.equal(await native(t, (transaction) => transaction.insert(4).then(() => 'result')), 'result')
        if (!t.harness.capabilities.singleConnection) await t.committed()
        await t.insert(5)
      })
      await t.committed(1, 4, 5)
    },
    operation('transaction'),
    savepoints,
  ),
  rule(
    'A4 nests native transactions and atomic blocks in each other',
    async (t) => {
      await newContext(() =>
        native(t, async (transaction) => {
          await transaction.insert(1)
          await fails(
            t.main.atomic(async () => {
              await t.insert(2)
              await native(t, (inner) => inner.insert(3))
              throw planned
            }),
          )
          await native(t, (inner) => inner.insert(4))
          await refusal('AMBIENT_ATOMIC_NESTING', t.main.commit())
        }),
      )
      await t.committed(1, 4)
    },
    operation('transaction'),
    savepoints,
  ),
  rule(
    'A4 keeps parallel native transactions, and statements beside them, apart',
    async (t) => {
      const started = latch()
      await newContext(async () => {
        const one = native(t, async (transaction) => {
          await transaction.insert(1)
          started.open()
          await nextTurn()
          await transaction.insert(2)
          throw planned
        })
        one.catch(ignore)
        await started.passed
        const other = native(t, async (transaction) => {
          await transaction.insert(3)
          await nextTurn()
          await t.insert(4)
        })
        const beside = t.insert(5)
        await fails(one)
        await Promise.all([other, beside])
      })
      await t.committed(3, 4, 5)
    },
    operation('transaction'),
    savepoints,
  ),
  rule(
    'A4 rolls a native transaction back for an error that was swallowed in it',
    async (t) => {
      await newContext(async () => {
        await t.insert(1)
        const inner = native(t, async (transaction) => {
          await transaction.insert(2)
          await t.fail()
        })
        await refusal('AMBIENT_TRANSACTION_ABORTED', inner)
        await t.insert(3)
      })
      await t.committed(1, 3)
    },
    operation('transaction'),
    savepoints,
    capability('failedStatementAborts'),
  ),
  rule(
    'A4 A6 joins what a native transaction started',
    async (t) => {
      await newContext(async () => {
        await native(t, async () => {
          void t.insert(1).then(() => t.insert(2))
        })
        await t.insert(3)
      })
      await t.committed(1, 2, 3)
    },
    operation('transaction'),
    savepoints,
  ),
  rule(
    'A4 A6 refuses what a native transaction starts after its end',
    async (t) => {
      const ended = latch()
      let late = Promise.resolve()
      await newContext(async () => {
        await native(t, async (transaction) => {
          await transaction.insert(1)
          late = noted(ended.passed.then(() => t.insert(2)))
        })
        ended.open()
        await refusal('AMBIENT_BLOCK_ENDED', late)
      })
      await t.committed(1)
    },
    operation('transaction'),
    savepoints,
  ),
  rule(
    'A4 commits a native transaction of a context without transactions',
    async (t) => {
      await newContext(
        async () => {
          await native(t, async (transaction) => {
            await transaction.insert(1)
            await t.insert(2)
          })
          await t.committed(1, 2)
          await fails(
            native(t, async (transaction) => {
              await transaction.insert(3)
              throw planned
            }),
          )
          await t.insert(4)
        },
        { transaction: 'autocommit' },
      )
      await t.committed(1, 2, 4)
    },
    operation('transaction'),
  ),
  rule(
    'A4 refuses others while a native transaction without a callback is open',
    async (t) => {
      await newContext(async () => {
        await t.insert(1)
        const first = await begin(t)
        await first.insert(2)
        await refusal('AMBIENT_SESSION_BUSY', t.insert(3))
        await refusal(
          'AMBIENT_SESSION_BUSY',
          t.main.atomic(() => t.insert(3)),
        )
        await refusal('AMBIENT_SESSION_BUSY', t.main.commit())
        await first.rollback()
        const second = await begin(t)
        await second.insert(4)
        await second.commit()
        await t.insert(5)
      })
      await t.committed(1, 4, 5)
    },
    operation('beginTransaction'),
    savepoints,
  ),
  rule(
    'A4 never commits a native transaction that was left open when its context throws',
    async (t) => {
      await fails(
        newContext(async () => {
          await t.insert(1)
          const left = await begin(t)
          await left.insert(2)
          throw planned
        }),
      )
      await t.committed()
    },
    operation('beginTransaction'),
    savepoints,
  ),
  rule(
    'A4 does not commit, and does not hang, when a native transaction was left open',
    async (t) => {
      t.use({ settleTimeout: 100 })
      await refusal(
        'AMBIENT_SETTLE_TIMEOUT',
        newContext(async () => {
          await t.insert(1)
          const left = await begin(t)
          await left.insert(2)
        }),
      )
      await t.committed()
    },
    operation('beginTransaction'),
    savepoints,
  ),
]

function native<Result>(
  { harness, main }: Trial,
  work: Parameters<NonNullable<AdapterHarness['transaction']>>[1],
): Promise<Result> {
  assert(harness.transaction)
  return harness.transaction(main.db, work) as Promise<Result> // what `work` resolves with
}

function begin({ harness, main }: Trial): Promise<NativeTransactionProbe> {
  assert(harness.beginTransaction)
  return harness.beginTransaction(main.db)
}

const hooks: AdapterCase[] = [
  rule('K1 runs hooks inside the transaction before every COMMIT', async (t) => {
    const seen: (readonly number[])[] = []
    t.use({ hooks: { beforeCommit: async ({ db }) => seen.push(await t.ids(db)) } })
    await newContext(async () => {
      t.main.beforeCommit(() => t.insert(2))
      await t.insert(1)
      await t.main.commit()
      await t.committed(1, 2)
      await t.main.atomic(async () => {
        t.main.beforeCommit(() => t.insert(4))
        await t.insert(3)
      })
      await t.committed(1, 2, 3, 4)
      await t.insert(5)
      t.main.beforeCommit(() => t.insert(6))
    })
    assert.deepEqual(seen, [[1], [1, 2, 3], [1, 2, 3, 4, 5]])
    await t.committed(1, 2, 3, 4, 5, 6)
  }),
  rule('K1 lets a hook veto the commit', async (t) => {
    await fails(
      newContext(async () => {
        await t.insert(1)
        t.main.beforeCommit(() => Promise.reject(planned))
      }),
    )
    await newContext(async () => {
      await t.insert(2)
      t.main.beforeCommit(() => Promise.reject(planned))
      await fails(t.main.commit())
      await t.insert(3)
    })
    await t.committed(3)
  }),
  rule('K1 runs afterBegin inside every transaction', async (t) => {
    t.use({
      hooks: {
        afterBegin: async ({ db }) => {
          const ids = await t.ids(db)
          await t.insert(100 + ids.length, db)
        },
      },
    })
    await newContext(async () => {
      await t.insert(1)
      await t.main.commit()
      await t.insert(2)
    })
    await t.committed(1, 2, 100, 102)
  }),
  rule('K2 runs the hooks of the outcome, in contexts of their own', async (t) => {
    const ran: string[] = []
    const register = (name: string) => {
      t.main.afterCommit(async () => {
        ran.push(`${name} committed`)
        assert.equal(t.busy, 0)
        await t.insert(name.length)
      })
      t.main.afterRollback(() => ran.push(`${name} rolled back`))
    }
    await newContext(async () => {
      await t.insert(10)
      register('1')
    })
    await fails(
      newContext(async () => {
        await t.insert(20)
        register('22')
        throw planned
      }),
    )
    await newContext(() =>
      t.main.atomic(async () => {
        await t.insert(30)
        register('333')
      }),
    )
    assert.deepEqual(ran, ['1 committed', '22 rolled back', '333 committed'])
    await t.committed(1, 3, 10, 30)
  }),
  rule(
    'K2 drops the hooks of a savepoint that was rolled back',
    async (t) => {
      const ran: string[] = []
      await newContext(async () => {
        await t.insert(1)
        await fails(
          t.main.session().savepoint(async () => {
            await t.insert(2)
            t.main.beforeCommit(() => ran.push('before'))
            t.main.afterCommit(() => ran.push('dropped'))
            throw planned
          }),
        )
        await t.main.session().savepoint(async () => {
          await t.insert(3)
          t.main.afterCommit(() => ran.push('kept'))
        })
      })
      assert.deepEqual(ran, ['kept'])
      await t.committed(1, 3)
    },
    savepoints,
  ),
  rule('K2 reports a failing hook, and changes nothing', async (t) => {
    const reported: unknown[] = []
    t.use({ onHookError: (error) => reported.push(error) })
    await newContext(async () => {
      await t.insert(1)
      t.main.afterCommit(() => Promise.reject(planned))
      t.main.afterCommit(() => t.insert(2))
    })
    assert.deepEqual(reported, [planned])
    await t.committed(1, 2)
  }),
]

const engines: AdapterCase[] = [
  rule('D1 makes the engine once, at first use, also when many begin at once', async (t) => {
    await Promise.all([1, 2, 3, 4].map((id) => newContext(() => t.insert(id))))
    assert.equal(t.harness.engines().length, 1)
    assert.equal(await t.main.connect(), await t.main.connect())
    assert.equal(t.harness.engines().length, 1)
    await t.committed(1, 2, 3, 4)
  }),
  rule('D2 runs beforeSession before the first connection, once for sessions that begin together', async (t) => {
    let calls = 0
    t.use({
      beforeSession: async () => {
        calls++
        assert.equal(t.open, 0)
        await nextTurn()
      },
    })
    await Promise.all([1, 2].map((id) => newContext(() => t.insert(id))))
    assert.equal(calls, 1)
    await t.committed(1, 2)
  }),
  rule('D2 refuses the database inside its own beforeSession', async (t) => {
    t.use({ beforeSession: () => newContext(() => t.insert(1)) })
    await refusal(
      'AMBIENT_BEFORE_SESSION',
      newContext(() => t.insert(2)),
    )
    await t.committed()
  }),
  rule('D3 sends new transactions to the new host while those under way finish on the old one', async (t) => {
    t.use({ host: 'one' })
    const hosts = () => t.harness.engines().map(({ host, closed }) => `${host}${closed ? ' closed' : ''}`)
    await newContext(async () => {
      await t.insert(1)
      await t.main.changeHost('one')
      assert.deepEqual(hosts(), ['one'])
      await t.main.changeHost('two')
      assert.equal(t.main.host, 'two')
      await t.insert(2)
      if (!t.harness.capabilities.singleConnection) await newContext(() => t.insert(3))
      assert.deepEqual(hosts(), ['one', 'two'])
      await t.main.commit()
      await t.insert(4)
    })
    while (hosts()[0] !== 'one closed') await nextTurn()
    assert.deepEqual(hosts(), ['one closed', 'two'])
    await t.committed(...(t.harness.capabilities.singleConnection ? [1, 2, 4] : [1, 2, 3, 4]))
  }),
  rule('D4 refuses new work after shutdown, and waits for what is under way', async (t) => {
    const [inside, finish] = [latch(), latch()]
    const under = newContext(async () => {
      await t.insert(1)
      inside.open()
      await finish.passed
      await t.insert(2)
    })
    await inside.passed
    const down = t.main.shutdown()
    const error = await refusal(
      'AMBIENT_SHUT_DOWN',
      newContext(() => t.insert(3)),
    )
    assert.equal(error.statusCode, 503)
    await refusal('AMBIENT_SHUT_DOWN', t.main.changeHost('two'))
    finish.open()
    await Promise.all([under, down, t.main.shutdown()])
    assert.ok(t.harness.engines().every(({ closed }) => closed))
    await t.committed(1, 2)
  }),
  rule('D4 ends what is still under way after the wait', async (t) => {
    t.use({ settleTimeout: 50 })
    const [inside, finish] = [latch(), latch()]
    const under = newContext(async () => {
      await t.insert(1)
      inside.open()
      await finish.passed
    })
    under.catch(ignore)
    await inside.passed
    await t.main.shutdown()
    await t.committed()
    finish.open()
    await refusal('AMBIENT_SHUT_DOWN', under)
    await t.committed()
  }),
]

/**
 * What every adapter has to hold, on a real engine. Needs no test runner: a case resolves, says why it was skipped, or rejects.
 *
 * @example
 * ```ts
 * import { it } from 'node:test'
 * import { type AdapterHarness, adapterSuite } from 'ambient-db/conformance'
 *
 * declare const harness: AdapterHarness // of your adapter
 * for (const { name, run } of adapterSuite) {
 *   it(name, async (test) => {
 *     const result = await run(harness)
 *     if (result) test.skip(result.skipped)
 *   })
 * }
 * ```
 */
export const adapterSuite: readonly AdapterCase[] = [
  ...contexts,
  ...sessions,
  ...streams,
  ...blocks,
  ...natives,
  ...hooks,
  ...engines,
]
