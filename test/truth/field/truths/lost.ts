import { gate } from '../../../support/gate.ts'
import type { Fate, Message } from '../../../support/proxy.ts'
import { sleep } from '../../waiting.ts'
import type { OpenStack } from '../stack.ts'
import type { Stage } from '../stage.ts'
import { describe, tell, traits } from '../told.ts'
import { broken, type Finding, holds, partly, type Truth } from '../truth.ts'

export const lostAnswer: Truth = {
  id: 'T3',
  title: 'The answer to COMMIT is lost',
  scene:
    'The server commits, and the connection is cut before the answer arrives: the row is there. Before that, the same unit loses its connection at its BEGIN and at its INSERT, when it is certain that nothing is committed. The caller must be able to tell the two apart.',
  async judge(stage) {
    const stack = await stage.open(2)
    const one = () => tell(stack.unit(({ write }) => write('first')))
    const certain: unknown[] = []
    for (const match of [beginOnItsWay, /^> [QP] insert/i, '< C INSERT']) {
      stage.proxy.at(match, 'reset')
      const told = await one()
      if (told.said !== 'error') throw new Error(`A connection was lost before COMMIT, and the unit said ${told.said}.`)
      certain.push(told.error)
      await stage.quiet()
    }
    stage.uncaught.length = 0 // of these

    const trap = stage.proxy.at('< C COMMIT', 'reset')
    const lost = await one()
    if (trap.count === 0) throw new Error('COMMIT was never answered.')
    if (!(await stage.has('first'))) throw new Error('The row is not there, though the server has committed.')
    if (lost.said === 'ok') return broken('says OK without an answer')
    if (lost.said === 'nothing') return broken('never settles')
    const text = describe(lost.error)
    if (stack.saysUnknown?.(lost.error)) {
      return certain.some(stack.saysUnknown) ? broken(`${text}; but says so where it is certain, too`) : holds(text)
    }
    const differences = certain.map((error) => {
      const known = traits(error)
      return traits(lost.error).filter((trait) => !known.includes(trait))
    })
    const same = differences.findIndex((each) => each.length === 0)
    if (same !== -1) return broken(`${text}; the same as of a lost ${same === 0 ? 'BEGIN' : 'INSERT'}`)
    const difference = differences[0]?.find((trait) => differences.every((each) => each.includes(trait)))
    return partly(
      `${text}; no documented way to tell, only a detail differs: \`${difference ?? differences.flat()[0]}\``,
    )
  },
}

export const cutAtBegin: Truth = {
  id: 'T4',
  title: 'The connection is cut at BEGIN, four times',
  scene:
    'A pool of two. Each unit must reject, no exception be left uncaught, and both connections be usable afterwards.',
  judge: (stage) => judgeBegin(stage, 'reset'),
}

export const refusedBegin: Truth = {
  id: 'T7',
  title: 'The server refuses BEGIN, four times',
  scene:
    'As T4, but the server answers BEGIN with an error and the connection stays. Nothing may be written without its transaction.',
  judge: (stage) => judgeBegin(stage, misspell),
}

const poolSize = 2

const beginOnItsWay = /^> [QP] (begin|start transaction)/i

/** The same message with SQL that the server can't read. */
function misspell({ bytes }: Message): Buffer {
  const spoilt = Buffer.from(bytes)
  spoilt.write('X', spoilt.toString('latin1').search(/begin|start transaction/i))
  return spoilt
}

async function judgeBegin(stage: Stage, fate: Fate): Promise<Finding> {
  const stack = await stage.open(poolSize)
  const begins = () => stage.proxy.traffic.labels.filter((label) => beginOnItsWay.test(label)).length
  const trap = stage.proxy.at(beginOnItsWay, fate, { times: 4 })
  for (let attempt = 1; trap.count < 4 && attempt <= 8; attempt++) {
    const label = `attempt ${attempt}`
    const spared = () => begins() - trap.count
    const before = spared()
    const told = await tell(stack.unit(({ write }) => write(label)))
    const there = await stage.has(label)
    if (told.said === 'nothing') return broken(`unit ${attempt} never settles`)
    if (told.said === 'ok' && !there) return broken('says OK, the row is gone')
    if (told.said === 'error' && there) return broken('rejects, but the row is there')
    if (told.said === 'ok' && spared() === before) return broken('says OK, the row was written without a transaction')
    await stage.quiet()
  }
  if (trap.count < 4) throw new Error(`Only ${trap.count} BEGINs were seen.`)
  const usable = await usableConnections(stack)
  return usable === poolSize ? holds('usable') : broken(`${poolSize - usable} of ${poolSize} connections are lost`)
}

/** How many units can be in the middle of their transactions at the same time. */
async function usableConnections(stack: OpenStack): Promise<number> {
  let arrived = 0
  const all = gate()
  const meeting = Promise.race([all.passed, sleep(3000)])
  const units = Array.from({ length: poolSize }, (_, index) =>
    tell(
      stack.unit(async ({ write }) => {
        await write(`usable ${index}`)
        if (++arrived === poolSize) all.open()
        await meeting
      }),
    ),
  )
  await meeting
  const usable = arrived
  await Promise.all(units)
  return usable
}
