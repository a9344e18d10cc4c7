// npm run mutation -- [--file=<name>[:<line>[-<line>]]]… [--sample=<n>] [--seed=<n>] [--minutes=<n>] [--tests=<filter>]…
//   [--controls=<one for so many mutants>] [--concurrency=<n>] [--json=<file>]
import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { existsSync, globSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { availableParallelism, tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { acquirePostgres } from '../support/postgres-server.ts'
import { type Report, read, tableOf } from './report.ts'
import type { Order } from './sampler.ts'

const { values: options } = parseArgs({
  options: {
    file: { type: 'string', multiple: true },
    sample: { type: 'string' },
    seed: { type: 'string', default: String(Date.now() % 1_000_000) },
    minutes: { type: 'string', default: '60' },
    tests: { type: 'string', multiple: true },
    controls: { type: 'string', default: '40' },
    concurrency: { type: 'string', default: String(availableParallelism() + 1) },
    json: { type: 'string', default: new URL('results.json', import.meta.url).pathname },
  },
})

/** What only web frameworks, or authors of adapters, use. */
const notCore = ['conformance.ts', 'request.ts', 'response.ts', 'response-guard.ts']

const folder = new URL('.', import.meta.url).pathname
const stryker = join(folder, 'node_modules/@stryker-mutator/core')
if (!isInstalled()) {
  console.log('installing Stryker (once)')
  const { status } = spawnSync('npm', ['ci', '--no-audit', '--no-fund'], { cwd: folder, stdio: 'inherit' })
  if (status !== 0) process.exit(1)
}

const core = readdirSync('src').filter((name) => name.endsWith('.ts') && !notCore.includes(name))
const sources = new Map(core.map((name) => [name, readFileSync(join('src', name), 'utf8')])) // they may change meanwhile
const scratch = mkdtempSync(join(tmpdir(), 'ambient-db-mutation-'))
const temporary = `.stryker-tmp-${process.pid}` // beside node_modules, as Stryker wants it
const server = await acquirePostgres()
try {
  const results = join(scratch, 'results')
  await mutate(results)
  const report = read(results, sources)
  writeFileSync(
    options.json,
    `${JSON.stringify({ command: process.argv.slice(2), seed: options.seed, ...report }, null, 2)}\n`,
  )
  print(report)
} finally {
  for (const path of [scratch, temporary]) rmSync(path, { recursive: true, force: true })
  await server.stop()
}

function isInstalled(): boolean {
  const read = (path: string) => JSON.parse(readFileSync(join(path, 'package.json'), 'utf8'))
  return existsSync(stryker) && read(stryker).version === read(folder).dependencies['@stryker-mutator/core']
}

/** Runs Stryker until it is done or the time is up. */
async function mutate(results: string): Promise<void> {
  const config = join(scratch, 'stryker.json')
  const settings = {
    mutate: (options.file ?? core).map((name) => `src/${name}`),
    testRunner: 'vitest',
    // `related` would look at imports; which tests reach a mutant is measured.
    vitest: { configFile: 'test/mutation/vitest.config.ts', related: false, pool: 'forks' },
    ...(options.tests && { testFiles: options.tests.flatMap((filter) => globSync(`test/**/*${filter}*.test.ts`)) }),
    plugins: ['@stryker-mutator/vitest-runner', join(folder, 'sampler.ts')],
    reporters: ['sampler'],
    concurrency: Number(options.concurrency),
    ignorePatterns: ['.tools', 'dist', 'coverage', 'examples', 'bench', 'biome.json'],
    disableTypeChecks: false,
    tsconfigFile: 'none', // TypeScript 7 has no API for Stryker to read it with
    dryRunTimeoutMinutes: 20,
    // Of a whole run, which ends far sooner. A busy machine must not make a timeout of a mutant that survives.
    timeoutFactor: 5,
    timeoutMS: 120_000,
    tempDirName: temporary,
    cleanTempDir: 'always',
    logLevel: 'warn',
  }
  writeFileSync(config, JSON.stringify(settings))
  const order: Order = {
    results,
    seed: Number(options.seed),
    controls: Number(options.controls),
    ...(options.sample !== undefined && { sample: Number(options.sample) }),
  }
  const env = { ...process.env, DATABASE_URL: server.url, MUTATION_ORDER: JSON.stringify(order) }
  const child = spawn(process.execPath, [join(stryker, 'bin/stryker.js'), 'run', config], {
    env,
    stdio: 'inherit',
    detached: true,
  })
  const timer = setTimeout(() => stop(child), Number(options.minutes) * 60_000)
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.once(signal, () => stop(child))
  await new Promise((ended, failed) => child.once('error', failed).once('exit', ended))
  clearTimeout(timer)
}

/** It cleans up, and its processes end with it. */
function stop({ pid }: ChildProcess): void {
  if (pid !== undefined) process.kill(pid, 'SIGTERM')
}

function print(report: Report): void {
  const { population, planned, tested, controls, mutants } = report
  for (const { fate, file, line, column, mutator, original, replacement } of mutants) {
    if (fate === 'killed' || fate === 'timeout') continue
    console.log(`\n${fate}: src/${file}:${line}:${column} ${mutator}`)
    console.log(`${original.replaceAll(/^/gm, '  - ')}\n${replacement.replaceAll(/^/gm, '  + ')}`)
  }
  for (const failure of controls.failed) console.log(`\nfailed without a mutant: ${failure}`)
  console.log(`\n${tableOf(report)}`)
  const part = tested === population ? 'all' : `a random sample, seed ${options.seed}`
  const left = tested < planned ? `, ${planned - tested} of it left when the time was up` : ''
  console.log(
    `\n${tested} of ${population} mutants (${part}${left}); of ${controls.run} runs without a mutant ${controls.failed.length} failed`,
  )
}
