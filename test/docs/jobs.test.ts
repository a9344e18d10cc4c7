import { readdirSync, readFileSync } from 'node:fs'
import { expect, it } from 'vitest'
import { markdownBlocks } from './blocks.ts'

const folder = 'test/jobs/recipes'

it('the recipes that docs/jobs.md prints are those that are tested', () => {
  const printed = markdownBlocks('docs/jobs.md', readFileSync('docs/jobs.md', 'utf8'))
  const tested = readdirSync(folder).map((file) => readFileSync(`${folder}/${file}`, 'utf8'))
  expect(printed.map(({ code }) => `${code.join('\n')}\n`).sort()).toEqual(tested.sort())
})
