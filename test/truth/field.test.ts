import { readdirSync } from 'node:fs'
import { beforeAll, describe, expect, inject, it } from 'vitest'
import { type Answers, askAll } from './field/field.ts'
import { truths } from './field/truths.ts'

/** The rules that a truth is about. */
const rules: Record<string, string> = {
  T1: 'S4',
  T2: 'C4',
  T3: 'S5',
  T4: 'S7',
  T5: 'C4',
  T6: 'A3',
  T7: 'S2',
  T8: 'H1',
  T9: 'C5',
  T10: 'A3',
}

const folder = new URL('field/stacks/', import.meta.url)
const stacks = ['ambient-db-pg', 'ambient-db-kysely', 'ambient-db-kysely-bare', 'careful', 'careless']

/** `npm run field` asks other libraries, too. */
describe('the truths of the field', () => {
  let answers: Record<string, Answers>
  beforeAll(async () => {
    const urls = stacks.map((name) => new URL(`${name}.ts`, folder))
    const found = await askAll(urls, inject('postgresUrl'), 'one')
    answers = Object.fromEntries(stacks.map((name, index) => [name, found[index] ?? {}]))
  }, 300_000)

  it.each(truths.map((truth) => ({ ...truth, rule: rules[truth.id] })))('$rule $title: ambient-db holds', ({ id }) => {
    for (const name of ['ambient-db-pg', 'ambient-db-kysely']) {
      expect(answers[name]?.[id], name).toMatchObject({ verdict: 'holds', uncaught: [] })
    }
  })

  it('S5 S7 hold over a bare dialect but for the exceptions that its documentation declares', () => {
    const found = Object.entries(answers['ambient-db-kysely-bare'] ?? {})
    const broken = found.filter(([, { verdict }]) => verdict !== 'holds')
    expect(broken.map(([id, { text }]) => [id, text])).toEqual([
      ['T3', expect.stringMatching(/^AmbientError AMBIENT_COMMIT_UNKNOWN.*; \d uncaught exceptions?$/)],
      ['T4', expect.stringMatching(/^usable; \d uncaught exceptions$/)],
    ])
    for (const [, { uncaught }] of broken) {
      for (const error of uncaught) expect(error).toMatch(/ECONNRESET|Connection terminated unexpectedly/)
    }
    expect(found).toHaveLength(truths.length)
  })

  it.each(truths)('$id can be passed, and failed: by hand, with care and without', ({ id }) => {
    expect(answers.careful?.[id]).toMatchObject({ verdict: 'holds', uncaught: [] })
    expect(answers.careless?.[id]).toMatchObject({ verdict: 'broken' })
  })

  it('is asked of every stack that is here', () => {
    const files = readdirSync(folder).filter((file) => file !== 'marks.ts')
    expect(files.sort()).toEqual(stacks.map((name) => `${name}.ts`).sort())
  })
})
