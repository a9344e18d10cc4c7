import { newContext } from 'ambient-db'
import { kyselyHandle } from 'ambient-db/kysely'
import fc from 'fast-check'
import { type Kysely, PostgresDialect } from 'kysely'
import { afterAll, beforeAll, expect, it } from 'vitest'
import { createSubject, type Subject } from '../support/subject.ts'

// Random programs of nested and parallel blocks, run in one context, against what they must leave behind.

type Step =
  | { readonly kind: 'note' }
  /** Gives other branches their turn. */
  | { readonly kind: 'pause'; readonly turns: number }
  | {
      readonly kind: 'block'
      readonly by: 'atomic' | 'native' | 'savepoint'
      readonly body: Step[]
      readonly throws: boolean
    }
  | { readonly kind: 'join'; readonly body: Step[] }
  /** Started and not awaited: the block that surrounds it joins it. */
  | { readonly kind: 'unawaited'; readonly body: Step[] }
  | { readonly kind: 'parallel'; readonly bodies: Step[][] }
  /** A block of which one branch throws after some turns, while the others go on. */
  | { readonly kind: 'abandoned'; readonly native: boolean; readonly turns: number; readonly bodies: Step[][] }
  /** The error of a statement or of a joining block that is swallowed in a block of its own. */
  | { readonly kind: 'failed'; readonly joined: boolean; readonly body: Step[] }

const { step } = fc.letrec<{ step: Step; body: Step[]; bodies: Step[][] }>((tie) => ({
  step: fc.oneof(
    { depthSize: 'small', withCrossShrink: true },
    fc.record({ kind: fc.constant('note' as const) }),
    fc.record({ kind: fc.constant('pause' as const), turns: fc.nat(3) }),
    fc.record({
      kind: fc.constant('block' as const),
      by: fc.constantFrom('atomic' as const, 'native' as const, 'savepoint' as const),
      body: tie('body'),
      throws: fc.boolean(),
    }),
    fc.record({ kind: fc.constant('join' as const), body: tie('body') }),
    fc.record({ kind: fc.constant('unawaited' as const), body: tie('body') }),
    fc.record({ kind: fc.constant('parallel' as const), bodies: tie('bodies') }),
    fc.record({
      kind: fc.constant('abandoned' as const),
      native: fc.boolean(),
      turns: fc.nat(30),
      bodies: tie('bodies'),
    }),
    fc.record({ kind: fc.constant('failed' as const), joined: fc.boolean(), body: tie('body') }),
  ),
  body: fc.array(tie('step'), { maxLength: 4 }),
  bodies: fc.array(tie('body'), { minLength: 1, maxLength: 3 }),
}))

let subject: Subject
let kysely: Kysely<unknown>

beforeAll(async () => {
  subject = await createSubject({ pool: { max: 1 }, acquireTimeout: 5000 })
  kysely = kyselyHandle(subject.main, (pool) => new PostgresDialect({ pool }))
})
afterAll(() => subject.close())

const boom = new Error('boom')
/** The notes whose `afterCommit` hook ran. */
const committed: string[] = []

async function pause(turns: number): Promise<void> {
  for (let count = 0; count < turns; count++) await new Promise((resolve) => setImmediate(resolve))
}

/** What the program must leave behind; names of notes are paths, so that both sides agree on them. */
function expected(body: Step[], path: string): string[] {
  return body.flatMap((each, index) => {
    const here = `${path}.${index}`
    switch (each.kind) {
      case 'note':
        return [here]
      case 'block':
        return each.throws ? [] : expected(each.body, here)
      case 'join':
      case 'unawaited':
        return expected(each.body, here)
      case 'parallel':
        return each.bodies.flatMap((branch, number) => expected(branch, `${here}.${number}`))
      default:
        return []
    }
  })
}

async function run(body: Step[], path: string): Promise<void> {
  const { main, note, fail } = subject
  for (const [index, each] of body.entries()) {
    const here = `${path}.${index}`
    switch (each.kind) {
      case 'note':
        await note(here)
        main.afterCommit(() => committed.push(here))
        break
      case 'pause':
        await pause(each.turns)
        break
      case 'block': {
        const work = async () => {
          await run(each.body, here)
          if (each.throws) throw boom
        }
        const block = {
          atomic: () => main.atomic(work),
          savepoint: () => main.session().savepoint(work),
          native: () => kysely.transaction().execute(work),
        }[each.by]()
        if (each.throws) await expect(block).rejects.toBe(boom)
        else await block
        break
      }
      case 'join':
        await main.atomic(() => run(each.body, here), { current: 'join' })
        break
      case 'unawaited':
        main.atomic(() => run(each.body, here)).catch(() => {}) // where something around it throws, it is refused
        break
      case 'parallel':
        await Promise.all(each.bodies.map((branch, number) => run(branch, `${here}.${number}`)))
        break
      case 'abandoned': {
        const thrower = async () => {
          await pause(each.turns)
          throw boom
        }
        const work = () =>
          Promise.all([thrower(), ...each.bodies.map((branch, number) => run(branch, `${here}.${number}`))])
        await expect(each.native ? kysely.transaction().execute(work) : main.atomic(work)).rejects.toBe(boom)
        break
      }
      case 'failed': {
        const block = main.atomic(async () => {
          await run(each.body, here)
          if (each.joined) await main.atomic(() => Promise.reject(boom), { current: 'join' }).catch(() => {})
          else await fail().catch(() => {})
        })
        await expect(block).rejects.toMatchObject({ code: 'AMBIENT_TRANSACTION_ABORTED' })
        break
      }
    }
  }
}

it('A1 A3 A6 K2 leaves behind what nested, parallel, unawaited and abandoned blocks must, and no trace of the rest', async () => {
  const property = fc.asyncProperty(fc.array(step, { maxLength: 6 }), fc.boolean(), async (body, outer) => {
    await subject.clear()
    committed.length = 0
    const program = () => run(body, 'n')
    await newContext(() => (outer ? subject.main.atomic(program) : program()))
    expect(await subject.notes()).toEqual(expected(body, 'n').sort())
    expect(committed.sort()).toEqual(expected(body, 'n').sort())
    expect(await subject.openTransactions()).toBe(0)
    expect(subject.overlapping).toEqual([])
  })
  const opening: Step = { kind: 'abandoned', native: false, turns: 0, bodies: [[{ kind: 'note' }], []] }
  const examples: [Step[], boolean][] = [
    [[opening], true],
    [[{ kind: 'failed', joined: false, body: [opening] }], true],
    [[{ kind: 'block', by: 'atomic', body: [opening, { kind: 'note' }], throws: false }], false],
  ]
  await fc.assert(property, { numRuns: Number(process.env.FUZZ ?? 100), examples })
}, 600_000)
