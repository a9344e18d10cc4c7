import { readFileSync } from 'node:fs'
import { describe, expect, it } from 'vitest'
import { type Results, withResults } from '../truth/field/results.ts'
import { truths } from '../truth/field/truths.ts'

const results: Results = JSON.parse(readFileSync('bench/field/results.json', 'utf8'))

describe('the results of npm run field', () => {
  it('are those that docs/field.md shows', () => {
    const page = readFileSync('docs/field.md', 'utf8')
    expect(page).toBe(withResults(page, results))
  })

  it('are of the truths as they are asked now', () => {
    expect(results.truths).toEqual(truths.map(({ id, title, scene }) => ({ id, title, scene })))
  })

  it('are of the releases that are pinned now', () => {
    const { dependencies } = JSON.parse(readFileSync('bench/field/package.json', 'utf8'))
    const others = results.stacks.filter(
      ({ name, packages }) => !name.startsWith('by hand') && !('ambient-db' in packages),
    )
    expect(others.map(({ name }) => name)).toHaveLength(9)
    for (const { name, packages } of others) expect(dependencies, name).toMatchObject(packages)
  })
})
