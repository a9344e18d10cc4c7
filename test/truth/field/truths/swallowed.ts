import { type Told, tell } from '../told.ts'
import { broken, compare, holds, partly, type Truth } from '../truth.ts'

export const swallowedError: Truth = {
  id: 'T1',
  title: 'A statement error is swallowed',
  scene:
    'The unit writes a row, catches the error of its next statement, and returns. PostgreSQL has aborted the transaction. Whoever says OK must have the row.',
  async judge(stage) {
    const stack = await stage.open(2)
    const unit = stack.unit(async ({ write }) => {
      await write('first')
      await write('first').catch(() => {}) // a duplicate
    })
    return compare(await tell(unit), await stage.has('first'))
  },
}

export const forgottenStatement: Truth = {
  id: 'T9',
  title: 'A statement that nobody awaits',
  scene:
    'The unit writes a row, starts a second statement, and returns without waiting for it. If the second fails, whoever says OK must have the first row. If it would not fail, its row must be there in the transaction of the unit or not at all, and it must be told which.',
  async judge(stage) {
    const stack = await stage.open(2)
    const round = async (first: string, second: string) => {
      let forgotten: Promise<Told> | undefined
      const unit = stack.unit(async ({ write }) => {
        await write(first)
        forgotten = tell(write(second))
      })
      return { unit: await tell(unit), forgotten: await forgotten }
    }

    const failing = await round('first', 'first')
    const failed = compare(failing.unit, await stage.has('first'))
    if (failed.verdict !== 'holds') return broken(`if it fails: ${failed.text}`)

    const fine = await round('second', 'forgotten')
    const marks = await stage.marks()
    const [second, forgotten] = ['second', 'forgotten'].map((label) => marks.find((mark) => mark.label === label))
    const text = `if it fails: ${failed.text}; if not: `
    const finding = compare(fine.unit, second !== undefined)
    if (finding.verdict !== 'holds') return broken(text + finding.text)
    if (forgotten && forgotten.transaction !== second?.transaction) return broken(`${text}is committed by itself`)
    const said = fine.forgotten?.said ?? 'nothing'
    if (forgotten && said === 'error') return broken(`${text}rejects, but its row is there`)
    if (!forgotten && said === 'ok') return broken(`${text}says OK, the row is gone`)
    if (said === 'nothing') return partly(`${text}never settles`)
    return holds(text + (forgotten ? 'is part of the unit' : 'is refused'))
  },
}
