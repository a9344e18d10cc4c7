import fc from 'fast-check'

/** What ends a unit of work before its time. */
export type Limit = 'signal' | 'timeout' | undefined

export type Mode = 'commit' | 'rollback' | 'append' | 'raise' | 'savepoint' | 'join'

/** What one step of a program does, in the session that it finds. */
export type Act =
  /** So many rows, one after the other. */
  | { readonly do: 'write'; readonly times: number }
  /** A statement that the database refuses. */
  | { readonly do: 'fail' }
  /** A row because of which COMMIT is refused. */
  | { readonly do: 'orphan' }
  | { readonly do: 'begin' | 'commit' | 'rollback' | 'throw' }
  | { readonly do: 'close'; readonly outcome: 'commit' | 'rollback' | undefined }
  | { readonly do: 'atomic'; readonly mode: Mode | undefined; readonly limit: Limit; readonly body: readonly Step[] }
  | { readonly do: 'savepoint' | 'native'; readonly body: readonly Step[] }
  | ({ readonly do: 'context'; readonly limit: Limit; readonly body: readonly Step[] } & ContextWays)
  /** With `hold` it keeps its connection until its end. */
  | { readonly do: 'session'; readonly limit: Limit; readonly hold: boolean; readonly body: readonly Step[] }
  /** Awaited until all have ended or one has thrown, until all have ended, or not at all. */
  | {
      readonly do: 'branches'
      readonly how: 'all' | 'settled' | 'unawaited'
      readonly bodies: readonly (readonly Step[])[]
    }
  | {
      readonly do: 'hook'
      readonly when: 'beforeCommit' | 'afterCommit' | 'afterRollback'
      readonly body: readonly Step[]
    }
  /** Fires the limit of the unit around it, or of one farther out. */
  | { readonly do: 'expire'; readonly outward: number }

/** How a context is made, and takes what nobody awaits. */
export interface ContextWays {
  /** `openContext` is settled by hand. */
  readonly by: 'newContext' | 'openContext'
  readonly unawaited: 'error' | undefined
}

export interface Step {
  readonly act: Act
  /** Its error is caught, and the next step follows. */
  readonly swallow: boolean
}

/** What runs in a new context, and in which order its branches get their turns. */
export interface Program extends ContextWays {
  readonly body: readonly Step[]
  readonly limit: Limit
  /** Which of those that are at a gate go next, one or several at once: the first of them when the turns have run out. */
  readonly turns: readonly (readonly number[])[]
}

const limit = fc.oneof(
  { weight: 4, arbitrary: fc.constant(undefined) },
  { weight: 2, arbitrary: fc.constantFrom('signal' as const, 'timeout' as const) },
)

const contextWays = {
  by: fc.constantFrom('newContext' as const, 'newContext' as const, 'openContext' as const),
  unawaited: fc.constantFrom(undefined, undefined, 'error' as const),
}

const depthIdentifier = fc.createDepthIdentifier()

const { body } = fc.letrec<{ body: Step[]; inner: Step[]; step: Step; act: Act; nest: Act; simple: Act }>((tie) => ({
  simple: fc.oneof(
    { weight: 10, arbitrary: fc.record({ do: fc.constant('write' as const), times: fc.integer({ min: 1, max: 3 }) }) },
    { weight: 2, arbitrary: fc.constant<Act>({ do: 'fail' }) },
    { weight: 1, arbitrary: fc.constant<Act>({ do: 'orphan' }) },
    { weight: 1, arbitrary: fc.constant<Act>({ do: 'begin' }) },
    { weight: 2, arbitrary: fc.constant<Act>({ do: 'commit' }) },
    { weight: 2, arbitrary: fc.constant<Act>({ do: 'rollback' }) },
    { weight: 1, arbitrary: fc.constant<Act>({ do: 'throw' }) },
    {
      weight: 2,
      arbitrary: fc.record({
        do: fc.constant('close' as const),
        outcome: fc.constantFrom(undefined, 'commit' as const, 'rollback' as const),
      }),
    },
    { weight: 2, arbitrary: fc.record({ do: fc.constant('expire' as const), outward: fc.nat(2) }) },
  ),
  nest: fc.oneof(
    {
      weight: 5,
      arbitrary: fc.record({
        do: fc.constant('atomic' as const),
        mode: fc.constantFrom<(Mode | undefined)[]>(
          undefined,
          'commit',
          'rollback',
          'append',
          'raise',
          'savepoint',
          'join',
          'join',
        ),
        limit,
        body: tie('inner'),
      }),
    },
    {
      weight: 1,
      arbitrary: fc.record({ do: fc.constantFrom('savepoint' as const, 'native' as const), body: tie('inner') }),
    },
    {
      weight: 1,
      arbitrary: fc.record({ do: fc.constant('context' as const), limit, body: tie('inner'), ...contextWays }),
    },
    {
      weight: 1,
      arbitrary: fc.record({ do: fc.constant('session' as const), limit, hold: fc.boolean(), body: tie('inner') }),
    },
    {
      weight: 4,
      arbitrary: fc.record({
        do: fc.constant('branches' as const),
        how: fc.constantFrom('all' as const, 'settled' as const, 'unawaited' as const),
        bodies: fc.array(tie('inner'), { minLength: 1, maxLength: 3 }),
      }),
    },
    {
      weight: 4,
      arbitrary: fc.record({
        do: fc.constant('hook' as const),
        when: fc.constantFrom('beforeCommit' as const, 'afterCommit' as const, 'afterRollback' as const),
        body: tie('inner'),
      }),
    },
  ),
  act: fc.oneof(
    { depthIdentifier, maxDepth: 8, depthSize: 'medium', withCrossShrink: true },
    { weight: 5, arbitrary: tie('simple') },
    { weight: 4, arbitrary: tie('nest') },
  ),
  step: fc.record({ act: tie('act'), swallow: fc.constantFrom(true, true, true, false) }),
  inner: fc.array(tie('step'), { minLength: 1, maxLength: 4, size: 'max', depthIdentifier }),
  body: fc.array(tie('step'), { minLength: 3, maxLength: 8, size: 'max', depthIdentifier }),
}))

export const programs: fc.Arbitrary<Program> = fc.record({
  body,
  limit,
  ...contextWays,
  turns: fc.array(
    fc.oneof(
      { weight: 3, arbitrary: fc.tuple(fc.nat(5)) },
      { weight: 1, arbitrary: fc.array(fc.nat(5), { minLength: 2, maxLength: 3, size: 'max' }) },
    ),
    { maxLength: 40, size: 'max' },
  ),
})

/** The program as somebody would write it, a step a line, each with the path that it is called by. */
export function printed(program: Program): string {
  const lines = [`n ${headOf({ do: 'context', ...program })}`, ...linesOf(program.body, 'n', '  ')]
  return lines.join('\n')
}

function linesOf(body: readonly Step[], path: string, indent: string): string[] {
  return body.flatMap(({ act, swallow }, index) => {
    const here = `${path}.${index}`
    const line = `${indent}${here} ${headOf(act)}${swallow ? ', caught' : ''}`
    if (act.do === 'branches') {
      const inner = act.bodies.flatMap((branch, number) => [
        `${indent}  branch ${number}`,
        ...linesOf(branch, `${here}.${number}`, `${indent}    `),
      ])
      return [line, ...inner]
    }
    return [line, ...('body' in act ? linesOf(act.body, here, `${indent}  `) : [])]
  })
}

function headOf(act: Act): string {
  switch (act.do) {
    case 'write':
      return act.times === 1 ? 'write' : `write ${act.times} times`
    case 'close':
      return `close(${act.outcome ?? ''})`
    case 'atomic':
      return `atomic(${act.mode ?? ''})${limited(act.limit)}`
    case 'context':
      return `${act.by}${limited(act.limit)}${act.unawaited ? ', unawaited work is an error' : ''}`
    case 'session':
      return `newSession${limited(act.limit)}${act.hold ? ', held' : ''}`
    case 'branches':
      return act.how === 'unawaited' ? 'branches that nobody awaits' : `branches, ${act.how}`
    case 'hook':
      return act.when
    case 'expire':
      return `expire ${act.outward}`
    default:
      return act.do
  }
}

function limited(limit: Limit): string {
  return limit ? ` with a ${limit}` : ''
}

/** The step with this path. */
export function actAt({ body }: Program, path: string): Act | undefined {
  let steps: readonly Step[] | readonly (readonly Step[])[] = body
  let act: Act | undefined
  for (const number of path.replaceAll('!', '').split('.').slice(1)) {
    const found: Step | readonly Step[] | undefined = steps[Number(number)]
    if (found === undefined) return undefined
    if (Array.isArray(found)) {
      steps = found
      continue
    }
    act = (found as Step).act
    steps = act.do === 'branches' ? act.bodies : 'body' in act ? act.body : []
  }
  return act
}
