// npm run field [-- <name of a stack's file>… | --render]
//
// All stacks: writes results.json and the results in docs/field.md. Some: shows what they come to, and writes nothing.
// --render: writes docs/field.md again from results.json.
import { spawnSync } from 'node:child_process'
import { readFile, writeFile } from 'node:fs/promises'
import { createRequire } from 'node:module'
import { basename } from 'node:path'
import { parseArgs } from 'node:util'
import { serverVersion } from '../../test/support/database.ts'
import { acquirePostgres } from '../../test/support/postgres-server.ts'
import { type Answers, askAll } from '../../test/truth/field/field.ts'
import { type Results, type StackResults, withResults } from '../../test/truth/field/results.ts'
import type { Stack } from '../../test/truth/field/stack.ts'
import { truths } from '../../test/truth/field/truths.ts'

const peers = [
  'kysely',
  'drizzle',
  'knex',
  'postgres-js',
  'typeorm',
  'sequelize',
  'typeorm-transactional',
  'nestjs-cls-typeorm',
  'nestjs-cls-drizzle',
].map((name) => new URL(`stacks/${name}.ts`, import.meta.url))
const ours = ['ambient-db-pg', 'ambient-db-kysely', 'ambient-db-kysely-bare', 'careful', 'careless'].map(
  (name) => new URL(`../../test/truth/field/stacks/${name}.ts`, import.meta.url),
)
const resultsFile = new URL('results.json', import.meta.url)
const page = new URL('../../docs/field.md', import.meta.url)

const { values: options, positionals: chosen } = parseArgs({
  allowPositionals: true,
  options: { render: { type: 'boolean', default: false } },
})

if (options.render) await render()
else await run()

async function render(): Promise<void> {
  const results: Results = JSON.parse(await readFile(resultsFile, 'utf8'))
  await writeFile(page, withResults(await readFile(page, 'utf8'), results))
}

async function run(): Promise<void> {
  const types = spawnSync('tsc', ['--project', 'bench/field'], { stdio: 'inherit' })
  if (types.status !== 0) throw new Error('The types are not right.')
  const stacks = [...peers, ...ours].filter(
    (url) => chosen.length === 0 || chosen.includes(basename(url.pathname, '.ts')),
  )
  if (stacks.length === 0) throw new Error(`There is no stack ${chosen.join(', ')}.`)
  const server = await acquirePostgres()
  try {
    const answers = await askAll(stacks, server.url)
    const judged = await Promise.all(stacks.map((url, index) => describe(url, answers[index] ?? {})))
    print(judged)
    if (chosen.length > 0) return
    const results: Results = {
      date: new Date().toISOString().slice(0, 10),
      node: process.versions.node,
      postgres: await serverVersion(server.url),
      truths: truths.map(({ id, title, scene }) => ({ id, title, scene })),
      stacks: judged,
    }
    await writeFile(resultsFile, `${JSON.stringify(results, null, 2)}\n`)
    await render()
  } finally {
    await server.stop()
  }
}

async function describe(url: URL, answers: Answers): Promise<StackResults> {
  const { stack }: { stack: Stack } = await import(url.href)
  const { name, packages, documentation } = stack
  const versions = Object.fromEntries(packages.map((each) => [each, installed(each, url)]))
  return { name, packages: versions, documentation, answers }
}

/** The version of a package as the stack finds it. */
function installed(name: string, from: URL): string {
  const require = createRequire(from)
  for (const folder of require.resolve.paths(name) ?? []) {
    try {
      return require(`${folder}/${name}/package.json`).version
    } catch {
      // not in this one
    }
  }
  const own = createRequire(import.meta.url)('../../package.json')
  if (own.name === name) return own.version
  throw new Error(`There is no ${name}.`)
}

function print(stacks: readonly StackResults[]): void {
  for (const { name, answers } of stacks) {
    console.log(`\n${name}`)
    for (const { id } of truths) {
      const { verdict, text, uncaught } = answers[id] ?? { verdict: '', text: '', uncaught: [] }
      console.log(`  ${id.padEnd(3)} ${verdict.padEnd(14)} ${text}`)
      for (const error of uncaught) console.log(`      uncaught: ${error}`)
    }
  }
}
