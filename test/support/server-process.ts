import { spawn } from 'node:child_process'
import { open, rm, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'

export interface User {
  readonly uid: number
  readonly gid: number
}

interface ServerProcess {
  /** The name of the server, for messages. */
  readonly name: string
  readonly command: readonly string[]
  /** Whom it runs as, if not as this process. */
  readonly user?: User | undefined
  /** Its working directory, which is removed when it has ended. */
  readonly directory: string
  readonly logFile: string
  /** Whether it takes connections. Asked again and again. */
  isReady(): Promise<boolean>
  /** The signal that makes it end well, and soon. */
  readonly stopBy: 'INT' | 'TERM'
}

/**
 * Runs a server until its standard input ends, then shuts it down and removes its files. The pipe ends with the
 * process that holds it, however that process ends: a crash leaves neither a server nor a directory behind.
 * A server that ends while there is a file `restart` in its directory is started again.
 */
const supervisor = `
signal=$1; directory=$2; shift 2
command -v setpriv >/dev/null && set -- setpriv --pdeathsig "$signal" "$@"
exec 3<&0
while
  "$@" </dev/null 3<&- & server=$!
  { cat; kill -"$signal" $server; } <&3 >/dev/null 2>&1 & stopper=$!
  wait $server; status=$?
  [ -e "$directory/restart" ]
do
  rm -f "$directory/restart"
  kill $stopper
done
rm -rf "$directory"
exit $status
`

/** Starts a server, and resolves when it is ready with what stops it. It ends with this process at the latest. */
export async function launch(server: ServerProcess): Promise<() => Promise<void>> {
  const { name, command, user, directory, logFile, isReady, stopBy } = server
  const log = await open(logFile, 'w+')
  try {
    const child = spawn('/bin/sh', ['-c', supervisor, `${name}-supervisor`, stopBy, directory, ...command], {
      ...user,
      cwd: directory,
      detached: true, // Ctrl-C is for the tests alone: they still need the server to end well
      stdio: ['pipe', log.fd, log.fd],
    })
    let ending: string | undefined
    const ended = new Promise<void>((resolve) => {
      child.once('error', (error) => {
        ending = error.message
        resolve()
      })
      child.once('exit', (code, signal) => {
        ending = `it ended with ${signal ?? `code ${code}`}`
        resolve()
      })
    })
    const { stdin } = child
    stdin?.on('error', () => undefined) // the server was gone before us: nothing is left to tell it
    child.unref()

    async function stop(): Promise<void> {
      child.ref()
      stdin?.end()
      const killer = setTimeout(() => child.pid && process.kill(-child.pid, 'SIGKILL'), 10_000)
      await ended
      clearTimeout(killer)
      await rm(directory, { recursive: true, force: true })
    }

    for (const deadline = Date.now() + 30_000; !(await isReady()); await sleep(20)) {
      if (ending === undefined && Date.now() < deadline) continue
      const { size } = await log.stat()
      const { buffer } = await log.read(Buffer.alloc(size), 0, size, 0)
      const reason = ending ?? 'it was not ready within 30 seconds'
      await stop()
      throw new Error(`${name} did not start: ${reason}. It said:\n${buffer}`)
    }
    return stop
  } finally {
    await log.close()
  }
}

/** Has the server of this directory started again when it ends. */
export async function requestRestart(directory: string): Promise<void> {
  await writeFile(join(directory, 'restart'), '')
}

/** A port that nothing listens on, for the moment. */
export async function freePort(): Promise<number> {
  const server = createServer()
  await new Promise<void>((resolve, reject) => server.once('error', reject).listen(0, '127.0.0.1', resolve))
  const address = server.address()
  await new Promise((resolve) => server.close(resolve))
  if (address === null || typeof address === 'string') throw new Error('The system gave no port.')
  return address.port
}

/** Starts again where, between the choice of a free port and its use, another process took it. */
export async function onFreePort<Server>(start: () => Promise<Server>): Promise<Server> {
  for (let attempt = 1; ; attempt++) {
    try {
      return await start()
    } catch (error) {
      if (attempt === 5 || !/could not bind|Address already in use/i.test(String(error))) throw error
    }
  }
}
