import { execFileSync } from 'node:child_process'
import { mkdtempSync, readdirSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestProject } from 'vitest/node'

declare module 'vitest' {
  interface ProvidedContext {
    /** The path of the tarball that `npm publish` would upload. */
    tarball: string
  }
}

/** Builds and packs the package, as publishing does. */
export default function setup(project: TestProject): () => void {
  const directory = mkdtempSync(join(tmpdir(), 'ambient-db-pack-'))
  execFileSync('npm', ['pack', '--pack-destination', directory, '--loglevel=error'], {
    cwd: project.config.root,
    stdio: ['ignore', 'ignore', 'inherit'],
  })
  const [name] = readdirSync(directory)
  if (name === undefined) throw new Error('npm pack made no tarball.')
  project.provide('tarball', join(directory, name))
  return () => rmSync(directory, { recursive: true, force: true })
}
