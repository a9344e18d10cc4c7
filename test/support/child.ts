import { spawn } from 'node:child_process'
import { resolve } from 'node:path'
import { pathToFileURL } from 'node:url'

/** The URL of a file of the repository, to import it in a child process. */
export function sourceUrl(path: string): string {
  return pathToFileURL(resolve(path)).href
}

export interface ChildOptions {
  /** Flags of Node, as in `['--expose-gc']`. */
  readonly flags?: readonly string[]
  readonly env?: Record<string, string>
}

/** Runs `script`, an ES module, in a Node of its own. Resolves with what it wrote, and the status it ended with. */
export async function runChild(
  script: string,
  { flags = [], env = {} }: ChildOptions = {},
): Promise<{ status: number | null; stdout: string; stderr: string }> {
  const child = spawn(process.execPath, [...flags, '--input-type=module', '-'], {
    env: { ...process.env, NODE_OPTIONS: '', ...env },
    stdio: 'pipe',
  })
  let [stdout, stderr] = ['', '']
  child.stdout.setEncoding('utf8').on('data', (text) => {
    stdout += text
  })
  child.stderr.setEncoding('utf8').on('data', (text) => {
    stderr += text
  })
  child.stdin.end(script)
  const status = await new Promise<number | null>((ended, failed) => child.on('error', failed).on('close', ended))
  return { status, stdout, stderr }
}
