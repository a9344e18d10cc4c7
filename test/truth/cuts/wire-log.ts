import type { Socket } from 'node:net'
import type { WireProxy } from '../../support/proxy.ts'
import { TappedSocket } from '../tapped-socket.ts'
import type { DatabaseName } from './stage.ts'

/** A place in the conversation of a unit of work: the n-th message with this label. */
export interface Boundary {
  readonly label: string
  readonly occurrence: number
}

/** Hears what is asked; returns what is called when the answer has come in full. */
export type Tap = (sql: string) => () => void

/** Something that the client asked, and that the server answers. */
interface Question {
  readonly kind: 'commit' | 'begin' | 'other'
  readonly database: DatabaseName
  /** When the client got the answer. */
  answeredAt?: number
}

/**
 * What passed: at the proxy the messages, for the places to cut at; at the sockets of the client the questions and answers,
 * because a client that has not noticed the cut yet has sent what the proxy never saw.
 */
export class WireLog {
  readonly labels: string[] = []
  readonly #questions: Question[] = []

  constructor(proxy: WireProxy) {
    const note = ({ label }: { label: string }) => {
      this.labels.push(sameInEveryRun(label))
      return false
    }
    proxy.at(note, 'reset', { when: 'before' })
  }

  /** Notes what is asked on `database`. */
  tap(database: DatabaseName): Tap {
    return (sql) => {
      const question: Question = { kind: kindOf(sql), database }
      this.#questions.push(question)
      return () => {
        question.answeredAt ??= performance.now()
      }
    }
  }

  /** Makes the sockets of a pool, for its option `stream`. */
  socketFor(database: DatabaseName): () => Socket {
    const asked = this.tap(database)
    return () => new TappedSocket({ asked })
  }

  /** What was asked on `database` and has no answer, or only since `lenience` ms. */
  unanswered(database: DatabaseName, lenience: number): { commits: number; begins: number } {
    const since = performance.now() - lenience
    const open = this.#questions.filter(
      (each) => each.database === database && (each.answeredAt === undefined || each.answeredAt > since),
    )
    const count = (kind: Question['kind']) => open.filter((each) => each.kind === kind).length
    return { commits: count('commit'), begins: count('begin') }
  }

  /** All boundaries, without those inside a run of equal messages (rows, parameters of the server). */
  boundaries(): Boundary[] {
    const counts = new Map<string, number>()
    const { labels } = this
    const all = labels.map((label) => {
      const occurrence = (counts.get(label) ?? 0) + 1
      counts.set(label, occurrence)
      return { label, occurrence }
    })
    return all.filter(({ label }, index) => {
      const repeats = /^< (?:S|D|Row|Column|Param)$/.test(label)
      return !(repeats && labels[index - 1] === label && labels[index + 1] === label)
    })
  }
}

/** The label without what is another in every run: its name, where parameters stand in the text, and numbers of connections. */
export function sameInEveryRun(label: string): string {
  return label.replace(/'run\d+'/, "'run'").replace(/(?<=KILL QUERY )\d+/, '…')
}

function kindOf(sql: string): Question['kind'] {
  if (/^commit\b/i.test(sql)) return 'commit'
  return /^(?:begin|start)\b/i.test(sql) ? 'begin' : 'other'
}
