import { type Gate, gate } from '../../../support/gate.ts'
import type { Work } from '../stack.ts'
import type { Mark, Stage } from '../stage.ts'
import { describe, type Told, tell } from '../told.ts'
import { broken, type Finding, holds, notApplicable, partly, type Truth } from '../truth.ts'

const rounds = 10

export const nestedBlocks: Truth = {
  id: 'T6',
  title: 'Parallel nested blocks, one of them undone',
  scene: `A unit runs two nested transactions by \`Promise.all\`: one returns, the other throws, which the unit catches. The work of the one must be there if it and the unit say OK, the work of the other must be gone. ${rounds} rounds, in which now one and now the other begins, writes more and ends first.`,
  judge: (stage) =>
    judgeRounds(stage, ({ nested }, label, round) => {
      const keep = () =>
        nested(async ({ write }) => {
          for (let row = 1; row <= 3; row++) await write(`${label} kept ${row}`)
        })
      const undo = () =>
        nested(async ({ write }) => {
          for (let row = 1; row <= 1 + round / 2; row++) await write(`${label} undone ${row}`)
          throw new Error('planned')
        })
      if (round % 2 === 0) return { kept: keep(), undone: undo() }
      const undone = undo()
      return { undone, kept: keep() }
    }),
}

export const siblingOfBlock: Truth = {
  id: 'T10',
  title: 'A statement beside a nested block that is undone',
  scene: `A unit runs by \`Promise.all\` a nested transaction that throws, which the unit catches, and plain statements of its own, while the block is open. The statements must be there if they and the unit say OK, the work of the block must be gone. ${rounds} rounds.`,
  judge: (stage) =>
    judgeRounds(stage, ({ nested, write }, label) => {
      const open: Gate = gate()
      const undone = nested(async (inner) => {
        await inner.write(`${label} undone 1`)
        open.open()
        await new Promise((resolve) => setImmediate(resolve)) // the statements have come to the driver, or to a queue
        await inner.write(`${label} undone 2`)
        throw new Error('planned')
      })
      void undone.catch(() => {}).then(open.open) // it may fail before
      const writeBoth = () => Promise.all([1, 2].map((row) => write(`${label} kept ${row}`)))
      return { undone, kept: open.passed.then(writeBoth) }
    }),
}

type Beside = (
  work: Required<Work>,
  label: string,
  round: number,
) => { readonly kept: Promise<unknown>; readonly undone: Promise<unknown> }

/** Runs what must be kept beside a block that is undone, and compares what each of them was told with what is there. */
async function judgeRounds(stage: Stage, beside: Beside): Promise<Finding> {
  const stack = await stage.open(2)
  const lies: string[] = []
  const refusals: string[] = []
  for (let round = 0; round < rounds; round++) {
    const label = `round ${round}`
    let applicable = true
    let told: { kept: Told; undone: Told } | undefined
    const unit = await tell(
      stack.unit(async ({ write, nested }) => {
        applicable = nested !== undefined
        if (!nested) return
        await write(`${label} outer`)
        const both = beside({ write, nested }, label, round)
        const [kept, undone] = await Promise.all([tell(both.kept), tell(both.undone)])
        told = { kept, undone }
      }),
    )
    if (!applicable) return notApplicable('no nested transactions with a callback')
    const marks = (await stage.marks()).filter((mark) => mark.label.startsWith(label))
    const { lie, refusal } = judgeRound(unit, told, (what) =>
      marks.find((mark) => mark.label.startsWith(`${label} ${what}`)),
    )
    if (lie) lies.push(lie)
    if (refusal) refusals.push(refusal)
  }
  if (lies.length > 0) return broken(`${[...new Set(lies)].join('; ')}; in ${lies.length} of ${rounds} rounds`)
  if (refusals.length > 0) {
    return partly(`no lie, but in ${refusals.length} of ${rounds} rounds ${[...new Set(refusals)].join('; or ')}`)
  }
  return holds('one is kept, the other undone')
}

function judgeRound(
  unit: Told,
  told: { kept: Told; undone: Told } | undefined,
  mark: (what: string) => Mark | undefined,
): { lie?: string | false; refusal?: string } {
  const [outer, kept, undone] = [mark('outer'), mark('kept'), mark('undone')]
  if (unit.said === 'nothing') return { lie: 'never settles' }
  if (unit.said === 'error') {
    const lie = (outer || kept || undone) && 'the unit rejects, and work of it is there'
    const refusal =
      told === undefined
        ? 'the unit cannot begin on the connection that it gets'
        : `the unit rejects, ${describe(unit.error)}`
    return { lie: lie ?? false, refusal }
  }
  if (told === undefined || told.kept.said === 'nothing' || told.undone.said === 'nothing') {
    return { lie: 'never settles' }
  }
  const lie =
    (!outer && 'the unit says OK, and its work is gone') ||
    (undone && 'work is there that was undone') ||
    (told.kept.said === 'ok' && !kept && 'work is lost that was said to be kept') ||
    (told.kept.said === 'error' && kept && 'work is there that was said to have failed') ||
    (kept && kept.transaction !== outer?.transaction && 'is not nested, but commits a transaction of its own')
  if (told.kept.said !== 'error') return { lie: lie || false }
  return { lie: lie || false, refusal: `what was to be kept fails, ${describe(told.kept.error)}` }
}
