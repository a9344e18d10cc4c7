import { styleText } from 'node:util'
import type { Holdings } from './witness.ts'

// `styleText` colours only what goes to a terminal, and honours NO_COLOR.
const dim = (text: string) => styleText('dim', text)
const bold = (text: string) => styleText('bold', text)
const green = (text: string) => styleText('green', text)
const red = (text: string) => styleText('red', text)

let steps = 0
let checks = 0
const failures: string[] = []

/** The opening words. */
export function opening(title: string, text: string): void {
  console.log(`\n${bold(title)}\n${text}`)
}

/** One step of the tour: a heading and what it is about. */
export async function step(title: string, text: string, show: () => Promise<void>): Promise<void> {
  steps++
  console.log(`\n${bold(styleText('cyan', `${steps}. ${title}`))}\n${indent(text)}\n`)
  try {
    await show()
  } catch (error) {
    check(`step ${steps} runs to its end, without: ${error}`, false)
  }
}

/** One line of what happens, with who or what it is about in front. */
export function tell(who: string, text: string): void {
  console.log(indent(`${dim(who.padEnd(9))} ${text}`))
}

export function sent(method: string, path: string, body: unknown): void {
  tell('sent', `${bold(`${method} ${path}`)} ${JSON.stringify(body)}`)
}

export function answered(status: number, body: unknown, to = ''): void {
  tell('answer', `${to}${styleText(status < 400 ? 'green' : 'yellow', String(status))} ${JSON.stringify(body)}`)
}

/** What the database holds, beside what it held before. */
export function holds(now: Holdings, before: Holdings): void {
  const stock = now.stock.map(({ item, pieces }) => {
    const had = before.stock.find((line) => line.item === item)?.pieces
    return had === pieces ? `${pieces} ${item}` : green(`${pieces} ${item} (was ${had})`)
  })
  const orders = now.orders.map(({ id, customer, lines }) => {
    const text = `#${id} ${customer}: ${lines.map(({ item, pieces }) => `${pieces} ${item}`).join(' + ')}`
    return before.orders.some((order) => order.id === id) ? text : green(`${text} (new)`)
  })
  tell('database', `stock   ${stock.join(', ')}`)
  tell('', `orders  ${orders.join(', ') || 'none'}`)
}

/** Says whether the tour shows what it should. */
export function check(claim: string, held: boolean): void {
  checks++
  if (!held) failures.push(`step ${steps}: ${claim}`)
  console.log(indent(held ? `${green('✓')} ${claim}` : red(`✗ NOT SO: ${claim}`)))
}

/** The closing words; true if every check held. */
export function closing(): boolean {
  const failed = failures.length
  if (failed === 0)
    console.log(`\n${green('✓')} ${bold(`All ${steps} steps showed what they should (${checks} checks).`)}\n`)
  else console.log(`\n${red('✗')} ${bold(`${failed} of ${checks} checks failed:`)}\n${indent(failures.join('\n'))}\n`)
  return failed === 0
}

function indent(text: string): string {
  return text.replaceAll(/^/gm, '   ')
}
