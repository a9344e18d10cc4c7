import { fork } from 'node:child_process'
import { once } from 'node:events'
import { Agent, request } from 'node:http'
import type { Comparison, Side } from './harness.ts'
import type { Bench, Measure } from './measure.ts'

/** What the middleware costs the server, which runs in a process of its own so that its CPU time is told from the client's. */
export async function http(bench: Bench): Promise<Measure[]> {
  const child = fork(new URL('./http-server.ts', import.meta.url), [bench.url])
  bench.atEnd(() => child.disconnect())
  const [ports] = (await once(child, 'message')) as [Record<string, number>]
  const agent = new Agent({ keepAlive: true })
  bench.atEnd(() => agent.destroy())

  async function cpu(): Promise<number> {
    child.send('cpu')
    const [used] = await once(child, 'message')
    return used
  }

  function get(server: string, path: string): Promise<void> {
    return new Promise((resolve, reject) => {
      const sent = request({ agent, port: ports[server], host: '127.0.0.1', path }, (response) => {
        if (response.statusCode !== 200) reject(new Error(`${server}${path} answered ${response.statusCode}`))
        response.resume().once('end', resolve)
      })
      sent.once('error', reject).end()
    })
  }

  const side = (server: string, path: string): Side => ({ operation: () => get(server, path) })
  const compared = (what: string, server: string, path: string): Comparison => ({
    kind: 'comparison',
    name: `http: ${what}`,
    shows: 'cpu',
    concurrency: 8,
    baseline: side(`${server} by hand`, path),
    subject: side(server, path),
    planted: (delay) => side(`${server} by hand`, `${path}?spin=${delay}`),
    cpu,
  })
  return ['node:http', 'Express'].flatMap((server) => [
    compared(`${server}, no database`, server, '/plain'),
    compared(`${server}, held commit over newContext`, server, '/insert'),
  ])
}
