import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { mkdir, mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type UnpackedPackage, unpackDebian } from './debian-packages.ts'
import { freePort, launch, onFreePort } from './server-process.ts'

/** A MariaDB server of our own, or the MySQL or MariaDB that `MYSQL_URL` names. */
export interface MariadbServer {
  /** The connection string of a user who may create databases and kill connections. */
  readonly url: string
  /** Stops the server and removes its files. Does nothing the second time, and to a server that `MYSQL_URL` names. */
  stop(): Promise<void>
}

/** Stands in every connection string, so that a test can look for it where no password may be. */
const mariadbPassword = 'not-to-be-shown'

const settings: Record<string, string> = {
  'bind-address': '127.0.0.1',
  'max-connections': '300',
  'max-allowed-packet': '64M',
  'character-set-server': 'utf8mb4',
  'innodb-flush-log-at-trx-commit': '0',
  'innodb-buffer-pool-size': '64M',
  'innodb-log-file-size': '16M',
  'aria-log-file-size': '8M',
}

const help = 'Set MYSQL_URL to a server whose user may create databases and kill connections, and it is used instead.'

/** The server that `MYSQL_URL` names if it is set, otherwise one of our own. */
export async function acquireMariadb(): Promise<MariadbServer> {
  const url = process.env.MYSQL_URL
  return url ? { url, stop: () => Promise.resolve() } : startMariadb()
}

/**
 * Starts a MariaDB server on a free port in a temporary directory, and resolves when it takes connections.
 *
 * It needs no installation and no rights: the programs come from Debian's package, once. It ends with
 * {@link MariadbServer.stop}, and with this process at the latest.
 */
async function startMariadb(): Promise<MariadbServer> {
  const programs = await unpackDebian('mariadb-server-core').catch((cause) => {
    throw new Error(`The tests' MariaDB server comes from Debian's packages, which failed. ${help}\n${cause.message}`)
  })
  return onFreePort(() => startOnce(programs))
}

async function startOnce({ root, program }: UnpackedPackage): Promise<MariadbServer> {
  const directory = await mkdtemp(join(tmpdir(), 'ambient-db-mariadb-'))
  try {
    const share = ['mariadb', 'mysql'].map((name) => join(root, 'usr/share', name)).find((path) => existsSync(path))
    const tables = join(share ?? '', 'mysql_system_tables.sql')
    const data = join(share ?? '', 'mysql_system_tables_data.sql')
    const [dataDirectory, temporary] = [join(directory, 'data'), join(directory, 'tmp')]
    await Promise.all([mkdir(dataDirectory), mkdir(temporary)])
    const options = Object.entries({
      basedir: join(root, 'usr'),
      'lc-messages-dir': share ?? '',
      datadir: dataDirectory,
      tmpdir: temporary,
      ...settings,
    }).map(([name, value]) => `--${name}=${value}`)
    const asRoot = process.getuid?.() === 0 ? ['--user=root'] : [] // it refuses root unless it is told
    const [command = '', ...args] = [...program('usr/sbin/mariadbd'), '--no-defaults', ...asRoot, ...options]

    const bootstrap = spawnSync(command, [...args, '--bootstrap'], {
      encoding: 'utf8',
      input: [
        'create database mysql;',
        'use mysql;',
        await readFile(tables, 'utf8'),
        await readFile(data, 'utf8'),
        'flush privileges;',
        `create user 'tests'@'%' identified by '${mariadbPassword}';`,
        "grant all on *.* to 'tests'@'%' with grant option;",
        '',
      ].join('\n'),
    })
    if (bootstrap.status !== 0) {
      throw new Error(`MariaDB could not make its data directory: ${bootstrap.error?.message ?? bootstrap.stderr}`)
    }

    const port = await freePort()
    const logFile = join(directory, 'mariadb.log')
    const stop = await launch({
      name: 'MariaDB',
      command: [command, ...args, `--port=${port}`, '--socket=mariadb.sock'],
      directory,
      logFile,
      isReady: async () => (await readFile(logFile, 'utf8')).includes('ready for connections'),
      stopBy: 'TERM',
    })
    return { url: `mysql://tests:${mariadbPassword}@127.0.0.1:${port}/mysql`, stop }
  } catch (error) {
    await rm(directory, { recursive: true, force: true })
    throw error
  }
}
