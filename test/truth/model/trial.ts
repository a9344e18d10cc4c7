import { actAt, type Program } from './program.ts'
import { Model, type Nature } from './rules.ts'
import { type Scene, Stage } from './stage.ts'

/** What came of one program. */
export interface Outcome {
  /** What was not as the model says, and after which turns; absent if everything was. */
  readonly divergence?: string
  /** Why nothing can be said of it. */
  readonly left?: 'waits for itself' | 'too many ways'
  readonly turns: number
}

/** A program that may have come to where it is in more ways than can be looked through in this many attempts is left. */
const mostAttempts = 2000

/** Runs `program` by the rules and for real, turn by turn. */
export async function tryOut(program: Program, scene: Scene): Promise<Outcome> {
  const { nature } = scene.engine
  if (waitsForItself(program, nature)) return { left: 'waits for itself', turns: 0 }
  const course: Course = { program, nature, turns: [], seen: [] }
  const stage = new Stage(scene)
  stage.start(program)
  let model = modelOf(course, [])
  let attempts = 0
  const others = () => {
    attempts = 0
    return waysThrough(course, () => ++attempts <= mostAttempts)
  }
  const ended = async (what: Pick<Outcome, 'divergence' | 'left'>): Promise<Outcome> => {
    await stage.giveUp()
    return { ...what, turns: course.turns.length }
  }
  const diverged = (what: string) => {
    if (attempts > mostAttempts) return ended({ left: 'too many ways' })
    const taken = course.turns.map((gates) => gates.join(' + ')).join(', ')
    return ended({ divergence: `${what}\nafter the turns ${taken || '(none)'}` })
  }
  for (;;) {
    const found = await stage.compare(model, model.asked > 0, others)
    if (typeof found === 'string') return diverged(found)
    model = found
    const gates = nextGates(model.gates, program, course.turns.length)
    if (gates.length > 0) {
      course.seen.push(signatureOf(model))
      course.turns.push(gates)
      model.open(gates)
      for (const gate of gates) stage.open(gate)
      continue
    }
    if (!model.ended) return ended({ left: 'waits for itself' })
    const wrong = (await stage.compareRows(model)) ?? (await scene.ground.leftOpen())
    return wrong ? diverged(wrong) : { turns: course.turns.length }
  }
}

/** What a program went through. */
interface Course {
  readonly program: Program
  readonly nature: Nature
  /** The gates that were opened in each turn. */
  readonly turns: (readonly string[])[]
  /** What was there before each of them. */
  readonly seen: string[]
}

/**
 * Every way in which `course` may have come to where it is, as long as `goOn` says so: what is anybody's is decided so that all was
 * there that was seen. What was decided last is decided otherwise first.
 */
function* waysThrough(course: Course, goOn: () => boolean): Generator<Model, void, void> {
  const untried: (readonly boolean[])[] = [[]]
  for (let choices = untried.pop(); choices && goOn(); choices = untried.pop()) {
    const model = new Model(course.nature, choices)
    model.start(course.program)
    const right = course.turns.every((gates, turn) => {
      if (signatureOf(model) !== course.seen[turn]) return false
      model.open(gates)
      return true
    })
    for (let index = choices.length; index < model.asked; index++) {
      untried.push([...model.choices.slice(0, index), true])
    }
    if (right) yield model
  }
}

/** What can be seen of a model. */
function signatureOf({ log, gates, rows, hooks, reported }: Model): string {
  const groups = hooks.filter(({ length }) => length > 0).map((group) => group.join())
  return JSON.stringify([[...log].sort(), [...gates].sort(), [...rows].sort(), groups.sort(), [...reported].sort()])
}

function modelOf({ program, nature, turns }: Course, choices: readonly boolean[]): Model {
  const model = new Model(nature, choices)
  model.start(program)
  for (const gates of turns) model.open(gates)
  return model
}

/** What aborts goes alone: the answer of a statement that it meets at the database is anybody's. */
function nextGates(gates: readonly string[], program: Program, turn: number): string[] {
  if (gates.length === 0) return []
  const wanted = (program.turns[turn] ?? [0]).map((number) => gates[number % gates.length] as string)
  const chosen = [...new Set(wanted)]
  const alone = chosen.some((gate) => actAt(program, gate)?.do === 'expire')
  return alone ? chosen.slice(0, 1) : chosen
}

function waitsForItself(program: Program, nature: Nature): boolean {
  const model = modelOf({ program, nature, turns: [], seen: [] }, [])
  for (let turn = 0; ; turn++) {
    const gates = nextGates(model.gates, program, turn)
    if (gates.length === 0) return !model.ended
    model.open(gates)
  }
}
