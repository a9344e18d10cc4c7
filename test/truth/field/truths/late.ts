import { gate } from '../../../support/gate.ts'
import type { OpenStack } from '../stack.ts'
import { describe, type Told, tell } from '../told.ts'
import { broken, type Finding, holds, partly, type Truth } from '../truth.ts'

export const lateWrite: Truth = {
  id: 'T2',
  title: 'A branch writes after the rollback',
  scene:
    'One branch of a `Promise.all` throws, so the unit is rolled back and rejects. Then the other branch writes. The row must not be there, and the branch must be told.',
  async judge(stage) {
    const stack = await stage.open(2)
    const over = gate()
    let late: Promise<Told> | undefined
    const unit = stack.unit(({ write }) =>
      Promise.all([
        write('first').then(() => {
          throw new Error('planned')
        }),
        over.passed.then(() => {
          late = tell(write('late'))
        }),
      ]),
    )
    const told = await tell(unit)
    over.open()
    await over.passed
    const branch = await late
    if (told.said !== 'error') return broken(`the unit was to reject, and said ${told.said}`)
    if (await stage.has('first')) return broken('the work of the unit itself is there')
    return judgeLate(branch, (await stage.has('late')) && 'late row persisted')
  },
}

export const lateInStranger: Truth = {
  id: 'T5',
  title: "A late write while a stranger's transaction is open",
  scene:
    'A unit has returned and is committed. Another one, on the same pool of one connection, is in the middle of its transaction when a forgotten branch of the first one writes. The row must be in no transaction but that of its unit.',
  async judge(stage) {
    const stack = await stage.open(1)
    const committed = await judgeRound(stack, 'commits')
    const undone = await judgeRound(stack, 'rolls back')
    const marks = await stage.marks()
    const transactionOf = (label: string) => marks.find((mark) => mark.label === label)?.transaction
    if (transactionOf('late: commits') && transactionOf('late: commits') === transactionOf('stranger: commits')) {
      return broken("lands in the stranger's transaction")
    }
    if (undone?.said === 'ok' && !transactionOf('late: rolls back')) return broken('says OK, undone with the stranger')
    return judgeLate(committed, transactionOf('late: commits') !== undefined && 'is committed by itself')
  },
}

/** What the branch was told of its late write. */
async function judgeRound(stack: OpenStack, ending: 'commits' | 'rolls back'): Promise<Told | undefined> {
  const over = gate()
  let late: Promise<Told> | undefined
  await tell(
    stack.unit(async ({ write }) => {
      await write(`first: ${ending}`)
      void over.passed.then(() => {
        late = tell(write(`late: ${ending}`))
      })
    }),
  )
  await tell(
    stack.unit(async ({ write }) => {
      await write(`stranger: ${ending}`)
      over.open()
      await new Promise((resolve) => setImmediate(resolve)) // the late write has come to its driver, or to the queue of the pool
      await write(`stranger again: ${ending}`) // on the same connection it would be behind the late write
      if (ending === 'rolls back') throw new Error('planned')
    }),
  )
  return late
}

function judgeLate(told: Told | undefined, there: string | false): Finding {
  if (there) return broken(there)
  if (told?.said === 'error') return holds(`refused: ${describe(told.error)}`)
  return told?.said === 'ok' ? broken('says OK, the row is not there') : partly('no row, but the write never settles')
}
