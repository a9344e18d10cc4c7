import { spawnSync } from 'node:child_process'
import { existsSync, readdirSync } from 'node:fs'
import { mkdir, mkdtemp, readdir, rename, rm } from 'node:fs/promises'
import { join, resolve } from 'node:path'

/** Where a package was unpacked, and how its programs are run. */
export interface UnpackedPackage {
  /** The folder that stands for `/`. */
  readonly root: string
  /** The command that runs one of its programs, as in `program('usr/bin/redis-server')`. */
  program(path: string): string[]
}

/**
 * Unpacks a package of Debian or Ubuntu with all it needs that this system lacks, into `.tools`, which later runs use without
 * the network. Nothing is installed, and no rights are needed: apt works on lists and a cache of its own.
 */
export async function unpackDebian(name: string): Promise<UnpackedPackage> {
  const root = resolve('.tools', `debian-${name}`)
  if (!existsSync(root)) await fetchInto(root, name)
  const libraries = ['lib', 'usr/lib']
    .map((folder) => join(root, folder))
    .filter((folder) => existsSync(folder))
    .flatMap((folder) => readdirSync(folder).map((triplet) => join(folder, triplet)))
  return { root, program: (path) => ['env', `LD_LIBRARY_PATH=${libraries.join(':')}`, join(root, path)] }
}

async function fetchInto(root: string, name: string): Promise<void> {
  await mkdir(resolve('.tools'), { recursive: true })
  // Moved into place when complete, so that neither an interruption nor a second run leaves half of it.
  const temporary = await mkdtemp(resolve('.tools', 'unpacking-'))
  try {
    const lists = join(temporary, 'lists')
    const cache = join(temporary, 'cache')
    const unpacked = join(temporary, 'root')
    for (const folder of [join(lists, 'partial'), join(cache, 'archives', 'partial'), unpacked]) {
      await mkdir(folder, { recursive: true })
    }
    const own = [`Dir::State::Lists=${lists}`, `Dir::Cache=${cache}`, 'Debug::NoLocking=1', 'APT::Sandbox::User=']
    const apt = (...args: string[]) =>
      run('apt-get', [...own.flatMap((option) => ['-o', option]), '-qq', '-y', ...args])
    const updated = apt('update') // a source that is out of reach need not be the one that has the package
    const download = apt('install', '--reinstall', '--download-only', '--no-install-recommends', name)
    const archives = (await readdir(join(cache, 'archives'))).filter((file) => file.endsWith('.deb'))
    if (!download.ok || archives.length === 0) {
      throw new Error(`The Debian package ${name} could not be had.\n${updated.output}${download.output}`)
    }
    for (const archive of archives) {
      const { ok, output } = run('dpkg-deb', ['-x', join(cache, 'archives', archive), unpacked])
      if (!ok) throw new Error(`${archive} could not be unpacked.\n${output}`)
    }
    await rename(unpacked, root).catch((error) => {
      if (!existsSync(root)) throw error
    })
  } finally {
    await rm(temporary, { recursive: true, force: true })
  }
}

function run(command: string, args: string[]): { ok: boolean; output: string } {
  const { status, error, stdout, stderr } = spawnSync(command, args, { encoding: 'utf8' })
  return { ok: status === 0, output: error ? `${command}: ${error.message}\n` : `${stderr}${stdout}` }
}
