import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type UnpackedPackage, unpackDebian } from './debian-packages.ts'
import { freePort, launch, onFreePort } from './server-process.ts'

/** A Redis server of our own, or the one that `REDIS_URL` names. */
export interface RedisServer {
  readonly url: string
  /** Stops the server and removes its files. Does nothing the second time, and to a server that `REDIS_URL` names. */
  stop(): Promise<void>
}

const help = 'Set REDIS_URL to a Redis or Valkey server, and it is used instead.'

/** The server that `REDIS_URL` names if it is set, otherwise one of our own from Debian's package, without installing anything. */
export async function acquireRedis(): Promise<RedisServer> {
  const url = process.env.REDIS_URL
  if (url) return { url, stop: () => Promise.resolve() }
  const programs = await unpackDebian('redis-server').catch((cause) => {
    throw new Error(`The tests' Redis server comes from Debian's packages, which failed. ${help}\n${cause.message}`)
  })
  return onFreePort(() => startOnce(programs))
}

async function startOnce({ program }: UnpackedPackage): Promise<RedisServer> {
  const directory = await mkdtemp(join(tmpdir(), 'ambient-db-redis-'))
  try {
    const port = await freePort()
    const settings = [
      '--port',
      String(port),
      '--bind',
      '127.0.0.1',
      '--dir',
      directory,
      '--save',
      '',
      '--appendonly',
      'no',
    ]
    const logFile = join(directory, 'redis.log')
    const stop = await launch({
      name: 'Redis',
      command: [...program('usr/bin/redis-server'), ...settings],
      directory,
      logFile,
      isReady: async () => (await readFile(logFile, 'utf8')).includes('Ready to accept connections'),
      stopBy: 'TERM',
    })
    return { url: `redis://127.0.0.1:${port}`, stop }
  } catch (error) {
    await rm(directory, { recursive: true, force: true })
    throw error
  }
}
