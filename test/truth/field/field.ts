import { fork } from 'node:child_process'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Answer, Message } from './child.ts'
import { truths } from './truths.ts'

const child = new URL('child.ts', import.meta.url)
/** For a process that is blocked: all waiting inside is bounded. */
const bound = 240_000
const atOnce = 3

/** What a stack came to, by the id of the truth. */
export type Answers = Readonly<Record<string, Answer>>

/**
 * Asks each stack (the URL of its module) all truths. Each stack has processes of its own: `'each truth'` has one, so that
 * nothing that goes wrong in one can show in another, or all truths of a stack have `'one'`, which takes less time.
 */
export async function askAll(
  stacks: readonly URL[],
  serverUrl: string,
  processes: 'each truth' | 'one' = 'each truth',
): Promise<Answers[]> {
  const ids = truths.map(({ id }) => id)
  const runs = stacks.flatMap((stack) =>
    processes === 'one' ? [{ stack, ids }] : ids.map((id) => ({ stack, ids: [id] })),
  )
  const answers = new Map(stacks.map((stack) => [stack, {}]))
  const waiting = [...runs]
  const worker = async () => {
    for (let run = waiting.shift(); run; run = waiting.shift()) {
      Object.assign(answers.get(run.stack) ?? {}, await ask(run.stack, run.ids, serverUrl))
    }
  }
  await Promise.all(Array.from({ length: atOnce }, worker))
  return stacks.map((stack) => answers.get(stack) ?? {})
}

async function ask(stack: URL, ids: readonly string[], serverUrl: string): Promise<Answers> {
  const { NODE_OPTIONS: _, ...inherited } = process.env
  const run = fork(child, [stack.href, serverUrl, ...ids], {
    stdio: ['ignore', 'pipe', 'pipe', 'ipc'],
    execArgv: [],
    env: { ...inherited, NODE_COMPILE_CACHE: join(tmpdir(), 'ambient-db-field-compiled') },
  })
  let output = ''
  for (const stream of [run.stdout, run.stderr]) {
    stream?.setEncoding('utf8').on('data', (text) => {
      output += text
    })
  }
  const answers: Record<string, Answer> = {}
  run.on('message', (message: Message) => {
    if ('fault' in message) output = message.fault
    else answers[message.id] = message.answer
  })
  const timer = setTimeout(() => run.kill('SIGKILL'), bound)
  await new Promise((resolve) => run.once('close', resolve))
  clearTimeout(timer)
  const missing = ids.filter((id) => !(id in answers))
  if (missing.length > 0) throw new Error(`${missing[0]} could not be asked of ${stack.href}:\n${output}`)
  return answers
}
