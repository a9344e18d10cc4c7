import { execFileSync, spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join, resolve } from 'node:path'
import { publint } from 'publint'
import { formatMessage } from 'publint/utils'
import { afterAll, beforeAll, describe, expect, inject, it } from 'vitest'
import { publicEntries } from '../../scripts/entries.ts'

const tarball = inject('tarball')
const specifiers = publicEntries().map((entry) => entry.specifier)
const manifest = JSON.parse(readFileSync('package.json', 'utf8'))
const bin = resolve('node_modules/.bin')

describe('the packed tarball', () => {
  it('contains the build, the licence and nothing else of the repository', () => {
    const files = execFileSync('tar', ['-tzf', tarball], { encoding: 'utf8' }).trim().split('\n')
    const strangers = files.filter(
      (file) => !/^package\/(dist\/.+\.(js|d\.ts)|package\.json|README\.md|LICENSE)$/.test(file),
    )
    expect(strangers).toEqual([])
    expect(files).toContain('package/LICENSE')
    for (const { module } of publicEntries()) {
      expect(files).toContain(`package/dist/${module}.js`)
      expect(files).toContain(`package/dist/${module}.d.ts`)
    }
  })

  it('satisfies publint', async () => {
    const bytes = new Uint8Array(readFileSync(tarball))
    const { messages, pkg } = await publint({ pack: { tarball: bytes.buffer }, strict: true })
    expect(messages.map((message) => formatMessage(message, pkg, { color: false }))).toEqual([])
  })

  it('satisfies arethetypeswrong for an ESM package', () => {
    run(join(bin, 'attw'), ['--profile', 'esm-only', '--no-emoji', tarball], dirname(tarball))
  })
})

describe('an installation of the tarball', () => {
  let consumer: string

  beforeAll(() => {
    consumer = mkdtempSync(join(tmpdir(), 'ambient-db-consumer-'))
    writeFileSync(join(consumer, 'package.json'), '{ "private": true }')
    run('npm', ['install', '--offline', '--no-audit', '--no-fund', '--ignore-scripts', tarball], consumer)
  })

  afterAll(() => rmSync(consumer, { recursive: true, force: true }))

  it('brings no other package along', () => {
    const lock = JSON.parse(readFileSync(join(consumer, 'package-lock.json'), 'utf8'))
    expect(Object.keys(lock.packages)).toEqual(['', 'node_modules/ambient-db'])
  })

  it('loads without any of the libraries that it adapts', () => {
    node(`await import('ambient-db'); await import('ambient-db/node-http')`)
  })

  describe('beside the libraries that it adapts', () => {
    beforeAll(() => {
      for (const name of [
        ...Object.keys(manifest.peerDependencies),
        '@types/node',
        '@types/pg',
        '@types/express',
        '@types/emscripten',
      ]) {
        const link = join(consumer, 'node_modules', name)
        mkdirSync(dirname(link), { recursive: true })
        if (!existsSync(link)) symlinkSync(resolve('node_modules', name), link)
      }
    })

    it.each(specifiers)('%s is imported and required as one and the same module', (specifier) => {
      const names = node(`
        import { createRequire } from 'node:module'
        const imported = await import('${specifier}')
        const required = createRequire(process.cwd() + '/index.js')('${specifier}')
        for (const name of Object.keys(imported)) if (imported[name] !== required[name]) throw new Error(name)
        console.log(Object.keys(required).join())
      `)
      expect(names.trim()).not.toBe('')
    })

    it.each(['node20', 'nodenext', 'preserve'])('compiles in ESM and CommonJS under module %s', (module) => {
      // `preserve` is what bundlers use: it implies module resolution "bundler".
      const imports = specifiers.map((specifier, index) => `import * as m${index} from '${specifier}'`)
      const requires = specifiers.map((specifier, index) => `import m${index} = require('${specifier}')`)
      const use = `export const modules: object[] = [${specifiers.map((_, index) => `m${index}`)}]`
      const files = {
        'esm.mts': [...imports, use],
        'commonjs.cts': [...requires, use],
        'compiled-to-commonjs.cts': [...imports, use],
        'tsconfig.json': [
          JSON.stringify({
            compilerOptions: {
              module,
              target: 'es2022',
              strict: true,
              noEmit: true,
              types: ['node', 'emscripten'], // the declarations of PGlite need them
              skipLibCheck: false,
            },
            files: ['esm.mts', 'commonjs.cts', 'compiled-to-commonjs.cts'],
          }),
        ],
      }
      for (const [name, lines] of Object.entries(files)) writeFileSync(join(consumer, name), `${lines.join('\n')}\n`)
      run(join(bin, 'tsc'), ['--project', '.'], consumer)
    })
  })

  function node(code: string): string {
    return run(process.execPath, ['--input-type=module', '--eval', code], consumer)
  }
})

/** The output of a command that must succeed. */
function run(command: string, args: string[], cwd: string): string {
  const { status, error, stdout, stderr } = spawnSync(command, args, { cwd, encoding: 'utf8' })
  if (status !== 0) throw error ?? new Error(`${command} ${args.join(' ')}\n${stdout}${stderr}`)
  return stdout
}
