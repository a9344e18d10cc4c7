import type { Program } from './program.ts'
import { Model, type Nature } from './rules.ts'
import { type Scene, Stage } from './stage.ts'

/** What came of one program. */
export interface Outcome {
  /** What was not as the model says, and after which turns; absent if everything was. */
  readonly divergence?: string
  /** By the rules the program waits for itself (a hook for the only connection, say), so nothing can be said of it. */
  readonly stuck?: true
  readonly turns: number
}

/** More ways than this are not followed: it takes five races in one turn. */
const mostWays = 32

/** Runs `program` by the rules and for real, turn by turn. */
export async function tryOut(program: Program, scene: Scene): Promise<Outcome> {
  const { nature } = scene.engine
  if (waitsForItself(program, nature)) return { stuck: true, turns: 0 }
  const stage = new Stage(scene)
  const gates: string[] = []
  const diverged = async (what: string): Promise<Outcome> => {
    await stage.giveUp()
    return { divergence: `${what}\nafter the turns ${gates.join(', ') || '(none)'}`, turns: gates.length }
  }
  let ways = [new Model(nature, [])]
  for (const way of ways) way.start(program)
  stage.start(program)
  for (;;) {
    const found = await stage.compare(ways)
    if (typeof found === 'string') return diverged(found)
    const gate = nextGate(found, program, gates.length)
    if (gate !== undefined) {
      const { choices } = found
      gates.push(gate)
      found.open(gate)
      stage.open(gate)
      ways = found.asked > choices.length ? waysOf(program, nature, gates, choices) : [found]
      continue
    }
    if (!found.ended) {
      await stage.giveUp()
      return { stuck: true, turns: gates.length }
    }
    const wrong = (await stage.compareRows(found)) ?? (await scene.ground.leftOpen())
    return wrong ? diverged(wrong) : { turns: gates.length }
  }
}

/** What may have become of `program` after `gates`: one way for each decision of what is anybody's, beyond `decided`. */
function waysOf(program: Program, nature: Nature, gates: readonly string[], decided: readonly boolean[]): Model[] {
  const ways: Model[] = []
  const untried = [decided]
  for (let choices = untried.pop(); choices && ways.length < mostWays; choices = untried.pop()) {
    const model = new Model(nature, choices)
    model.start(program)
    for (const gate of gates) model.open(gate)
    ways.push(model)
    for (let index = choices.length; index < model.asked; index++) {
      untried.push([...model.choices.slice(0, index), true])
    }
  }
  return ways
}

function nextGate(model: Model, { schedule }: Program, turn: number): string | undefined {
  const { gates } = model
  return gates[(schedule[turn] ?? 0) % gates.length]
}

function waitsForItself(program: Program, nature: Nature): boolean {
  const model = new Model(nature, [])
  model.start(program)
  for (let turn = 0; ; turn++) {
    const gate = nextGate(model, program, turn)
    if (gate === undefined) return !model.ended
    model.open(gate)
  }
}
