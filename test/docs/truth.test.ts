import { readFileSync } from 'node:fs'
import { describe, expect, it } from 'vitest'
import { type Figures, withFigures } from '../truth/figures.ts'
import { holds } from '../truth/harness.ts'
import { harnesses } from '../truth/harnesses.ts'

const figures: Figures = JSON.parse(readFileSync('test/truth/figures.json', 'utf8'))

describe('the figures of npm run truth', () => {
  it('are those that docs/truth.md shows', () => {
    const page = readFileSync('docs/truth.md', 'utf8')
    expect(page).toBe(withFigures(page, figures))
  })

  it.each(harnesses.map(({ name }) => name))('come from a run of %s in which all held', (name) => {
    expect(figures).toHaveProperty(name)
    expect(figures[name] && holds(figures[name])).toBe(true)
  })
})
