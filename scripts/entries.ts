import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'

/** One public module of the package. */
export interface Entry {
  /** The key in `exports`, as in `./pg`. */
  readonly subpath: string
  /** What a user imports, as in `ambient-db/pg`. */
  readonly specifier: string
  /** Its place under `src` and `dist`, without the extension, as in `adapters/pg`. */
  readonly module: string
  /** The absolute path of its source. */
  readonly source: string
}

const root = new URL('../', import.meta.url)

/**
 * The public modules. The `exports` of package.json is the one list of them: the build, the tests' aliases and the
 * checks of the package are all derived from it. `./dist/adapters/pg.js` is built from `src/adapters/pg.ts`.
 */
export function publicEntries(): Entry[] {
  const manifest: { name: string; exports: Record<string, string | { default: string }> } = JSON.parse(
    readFileSync(new URL('package.json', root), 'utf8'),
  )
  return Object.entries(manifest.exports).flatMap(([subpath, target]) => {
    if (typeof target === 'string') return []
    const module = target.default.replace(/^\.\/dist\/(.+)\.js$/, '$1')
    const source = fileURLToPath(new URL(`src/${module}.ts`, root))
    return [{ subpath, specifier: manifest.name + subpath.slice(1), module, source }]
  })
}
