// Runs a command with the Node and the packages that this repository needs, on a machine that may have neither:
//
//   node scripts/bootstrap.mjs [--node=<exact version>] [--with=<folder>] <command> [arguments]
//
// It runs on Node >= 18. If the running Node is too old, or is not the one asked for, it installs one into .tools from
// the npm package that carries the binary. It runs `npm ci` if node_modules is not what package-lock.json says, here and
// in the folder of another project that is asked for, and generates the Prisma client that tests are compiled with.
import { spawn, spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, mkdtempSync, readFileSync, renameSync, rmSync } from 'node:fs'
import { basename, delimiter, dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import { generatePrismaClient } from './prisma-client.mjs'

const oldest = [22, 18]
const preferred = '24.21.0'
/** Where the npm package `node-<platform>-<arch>` exists in the versions that are used here. */
const platforms = ['linux-x64', 'linux-arm64']

const root = fileURLToPath(new URL('..', import.meta.url))

class Problem extends Error {
  constructor(happened, why, remedy) {
    super(`${happened}\n  Why: ${why.trim().replaceAll('\n', '\n  ')}\n  What to do: ${remedy}`)
  }
}

function stop(problem) {
  if (!(problem instanceof Problem)) throw problem
  process.stderr.write(`bootstrap: ${problem.message}\n`)
  process.exit(1)
}

function parseArguments([first, ...rest]) {
  const [, name, value] = /^--(node|with)=(.*)$/.exec(first ?? '') ?? []
  return name ? { ...parseArguments(rest), [name]: value } : { command: first, args: rest }
}

function isRecentEnough() {
  const [major, minor] = process.versions.node.split('.').map(Number)
  return major > oldest[0] || (major === oldest[0] && minor >= oldest[1])
}

/** Runs npm, also where this process was started by another Node than the one that npm belongs to. */
function npm(args, cwd = root) {
  // What `npm pack --dry-run` and the like hand down to their scripts must not change what is installed here.
  const env = { ...process.env, NODE_ENV: 'development' }
  for (const name of ['dry_run', 'global', 'json', 'omit', 'only', 'production', 'package_lock_only', 'workspace']) {
    delete env[`npm_config_${name}`]
  }
  const cli = process.env.npm_execpath
  const viaCli = cli !== undefined && basename(cli) === 'npm-cli.js'
  const options = { cwd, env, encoding: 'utf8', shell: !viaCli && process.platform === 'win32' }
  const result = viaCli ? spawnSync(process.execPath, [cli, ...args], options) : spawnSync('npm', args, options)
  const output = result.error?.message ?? `${result.stderr}${result.stdout}`
  return { ok: result.status === 0, output }
}

const network =
  'Check that this machine reaches the npm registry (`npm ping`; behind a proxy or with a mirror, `npm config set proxy` or `registry`), and try again.'

/** The folder that holds the `node` of exactly this version, installed if need be. */
function nodeFolder(version) {
  const platform = `${process.platform}-${process.arch}`
  const own = `Install Node ${oldest.join('.')} or newer yourself (https://nodejs.org), and run the command with it.`
  if (!platforms.includes(platform)) {
    throw new Problem(
      `Node ${version} is needed, and this is Node ${process.versions.node}.`,
      `It can be installed by itself only on ${platforms.join(' and ')}; this is ${platform}.`,
      own,
    )
  }
  const target = join(root, '.tools', `node-${version}`)
  const bin = join('node_modules', `node-${platform}`, 'bin')
  if (existsSync(join(target, bin, 'node'))) return join(target, bin)

  process.stderr.write(`bootstrap: installing Node ${version} into .tools (once)\n`)
  mkdirSync(join(root, '.tools'), { recursive: true })
  // Moved into place when complete, so that neither an interruption nor a second bootstrap leaves half of it.
  const temporary = mkdtempSync(join(root, '.tools', 'installing-'))
  try {
    const quiet = ['--no-save', '--no-package-lock', '--no-audit', '--no-fund', '--ignore-scripts', '--loglevel=error']
    const { ok, output } = npm(['install', '--prefix', temporary, ...quiet, `node-${platform}@${version}`])
    if (!ok) {
      throw new Problem(`Node ${version} could not be installed.`, output, `${network} Or: ${own}`)
    }
    const check = spawnSync(join(temporary, bin, 'node'), ['--version'], { encoding: 'utf8' })
    if (check.status !== 0) {
      const why = check.error?.message ?? check.stderr
      throw new Problem(
        `Node ${version} was installed, but does not run here.`,
        `${why}\nIt needs glibc; musl has none.`,
        own,
      )
    }
    if (!existsSync(target)) renameSync(temporary, target)
  } finally {
    rmSync(temporary, { recursive: true, force: true })
  }
  return join(target, bin)
}

/** Whether node_modules holds what package-lock.json says, by the record that npm itself keeps of an installation. */
function isInstalled(folder) {
  try {
    const read = (path) => JSON.parse(readFileSync(join(folder, path), 'utf8')).packages
    const { '': _, ...wanted } = read('package-lock.json')
    const present = read('node_modules/.package-lock.json')
    const agrees = ([path, { version, optional }]) => (present[path] ? present[path].version === version : optional)
    return Object.entries(wanted).every(agrees) && Object.keys(present).every((path) => path in wanted)
  } catch {
    return false
  }
}

function installPackages(folder) {
  process.stderr.write(`bootstrap: installing the packages of ${relative(root, join(folder, 'package-lock.json'))}\n`)
  const args = ['ci', '--include=dev', '--include=optional', '--no-audit', '--no-fund', '--loglevel=error']
  const { ok, output } = npm(args, folder)
  if (!ok) throw new Problem('`npm ci` failed.', output, network)
}

function run(command, args, path) {
  const env = { ...process.env, PATH: path }
  const child = spawn(command, args, { env, stdio: 'inherit', shell: process.platform === 'win32' })
  const forward = (signal) => {
    // A terminal sends Ctrl-C to the child by itself; twice means "at once" to many programs.
    if (signal !== 'SIGINT' || !process.stdin.isTTY) child.kill(signal)
  }
  const signals = ['SIGINT', 'SIGTERM', 'SIGHUP']
  for (const signal of signals) process.on(signal, forward)
  child.on('error', ({ message }) => {
    stop(
      new Problem(
        `\`${command}\` could not be started.`,
        message,
        'Check the spelling, or run `npm ci` and try again.',
      ),
    )
  })
  child.on('exit', (code, signal) => {
    if (signal === null) process.exit(code)
    for (const each of signals) process.off(each, forward)
    process.kill(process.pid, signal)
  })
}

try {
  const { node: version, with: other, command, args } = parseArguments(process.argv.slice(2))
  if (command === undefined) {
    const usage = 'node scripts/bootstrap.mjs [--node=<exact version>] [--with=<folder>] <command> [arguments]'
    throw new Problem('There is nothing to run.', 'No command was given.', usage)
  }
  const isRight = version === undefined ? isRecentEnough() : version === process.versions.node
  const node = isRight ? dirname(process.execPath) : nodeFolder(version ?? preferred)
  for (const folder of other === undefined ? [root] : [root, join(root, other)]) {
    if (!isInstalled(folder)) installPackages(folder)
  }
  generatePrismaClient(join(node, process.platform === 'win32' ? 'node.exe' : 'node'))
  run(command, args, [join(root, 'node_modules', '.bin'), node, process.env.PATH].join(delimiter))
} catch (problem) {
  stop(problem)
}
