// node child.ts <URL of a stack's module> <URL of a server> <truth>…: asks one stack, in a process of its own
import type { Stack } from './stack.ts'
import { createDatabase, type Database, openStage } from './stage.ts'
import { describe } from './told.ts'
import { broken, type Finding, type Truth } from './truth.ts'
import { truths } from './truths.ts'

/** What a stack came to in one truth. */
export type Answer = Finding & {
  /** Exceptions and rejections that nobody caught. */
  readonly uncaught: readonly string[]
}

/** What the process says: an answer to each question in turn, or a fault of the harness. */
export type Message = { readonly id: string; readonly answer: Answer } | { readonly fault: string }

const [, , module = '', serverUrl = '', ...ids] = process.argv
const uncaught: string[] = []
process.on('uncaughtException', (error) => uncaught.push(describe(error)))
process.on('unhandledRejection', (error) => uncaught.push(describe(error)))

async function ask(stack: Stack, truth: Truth, database: Database): Promise<Answer> {
  const stage = await openStage(stack, database, uncaught)
  try {
    const finding = await truth.judge(stage)
    await stage.quiet()
    if (uncaught.length === 0) return { ...finding, uncaught: [] }
    const plural = uncaught.length === 1 ? 'exception' : 'exceptions'
    return { ...broken(`${finding.text}; ${uncaught.length} uncaught ${plural}`), uncaught: [...uncaught] }
  } finally {
    await stage.close()
  }
}

function say(message: Message): Promise<void> {
  return new Promise((resolve) => process.send?.(message, () => resolve()))
}

try {
  const { stack }: { stack: Stack } = await import(module)
  const database = await createDatabase(serverUrl)
  for (const truth of truths.filter(({ id }) => ids.includes(id))) {
    await say({ id: truth.id, answer: await ask(stack, truth, database) })
  }
  await database.drop()
} catch (error) {
  await say({ fault: error instanceof Error ? String(error.stack) : String(error) })
}
process.exit() // whatever a stack has left behind
