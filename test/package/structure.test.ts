import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { publicEntries } from '../../scripts/entries.ts'

/** What frameworks or adapters share, or are divided into. Every other file of theirs is public. */
const shared = ['frameworks/request', 'adapters/postgres-js-queries']

const entries = publicEntries()
const manifest = JSON.parse(readFileSync('package.json', 'utf8'))
const libraries = entries.filter(({ module }) => module.includes('/'))

describe('the public modules', () => {
  const modules = ['adapters', 'frameworks'].flatMap((folder) =>
    readdirSync(join('src', folder))
      .filter((file) => file.endsWith('.ts'))
      .map((file) => `${folder}/${file.slice(0, -'.ts'.length)}`),
  )

  it.each(modules.filter((module) => !shared.includes(module)))('src/%s.ts has a line in "exports"', (module) => {
    expect(entries.map((entry) => entry.module)).toContain(module)
  })

  it.each(entries)('$specifier has a source file', ({ source }) => {
    expect(existsSync(source), source).toBe(true)
  })

  it.each(entries)('$specifier declares its types and its code, in that order', ({ subpath, module }) => {
    const target = { types: `./dist/${module}.d.ts`, default: `./dist/${module}.js` }
    expect(JSON.stringify(manifest.exports[subpath])).toBe(JSON.stringify(target))
  })

  it.each(libraries)('$specifier is named after its file', ({ subpath, module }) => {
    expect(module.split('/')).toEqual([expect.stringMatching(/^(adapters|frameworks)$/), subpath.slice('./'.length)])
  })

  it.each(libraries)('$specifier has a test file', ({ module }) => {
    expect(existsSync(join('test', `${module}.test.ts`)), module).toBe(true)
  })

  it.each(libraries)('$specifier has a row in a table of the README', ({ specifier }) => {
    const rows = readFileSync('README.md', 'utf8')
      .split('\n')
      .filter((line) => line.startsWith('|'))
    expect(rows.filter((row) => row.includes(`\`${specifier}\``))).not.toEqual([])
  })
})

describe('what the package needs', () => {
  const sources = readdirSync('src', { recursive: true, encoding: 'utf8' })
    .filter((file) => file.endsWith('.ts'))
    .map((file) => ({ file, text: readFileSync(join('src', file), 'utf8').replaceAll(/^\s*(\/\*)?\*.*$/gm, '') }))
  const imports = sources.flatMap(({ file, text }) =>
    [...text.matchAll(/(?:from|import|import\()\s*'([^']+)'/g)].map(([, specifier = '']) => ({ file, specifier })),
  )

  it('is nothing at run time but Node', () => {
    expect(manifest.dependencies ?? {}).toEqual({})
    expect(manifest.optionalDependencies ?? {}).toEqual({})
  })

  it('includes libraries only as optional peers', () => {
    const optional = Object.keys(manifest.peerDependencies).map((name) => [name, { optional: true }])
    expect(manifest.peerDependenciesMeta).toEqual(Object.fromEntries(optional))
  })

  it('is asked of peers only where they are adapted', () => {
    const strangers = imports.filter(({ file, specifier }) => {
      if (specifier.startsWith('.') || specifier.startsWith('node:')) return false
      const [name = ''] = specifier.match(/^(@[^/]+\/)?[^/]+/) ?? []
      return !file.includes('/') || !(name in manifest.peerDependencies)
    })
    expect(strangers).toEqual([])
  })

  it('keeps async context in one place', () => {
    const users = imports.filter(({ specifier }) => specifier === 'node:async_hooks')
    expect(users.map(({ file }) => file)).toEqual(['context.ts'])
  })
})
