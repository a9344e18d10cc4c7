import { type DatabaseName, type Part, type StyleName, styleOf, styles } from './styles.ts'

/**
 * What spoils a transaction from inside: COMMIT fails (a deferred constraint), it fails by chance (serializable reads and writes
 * of what others write), or it takes its time.
 */
export type Spoil = 'doomed' | 'contended' | 'slow'

/** What happens on the wire to the transaction of one part, once. */
export interface WireFault {
  readonly part: string
  readonly at: 'statement' | 'commit' | 'answer'
  readonly when: 'before' | 'after'
  /** RST, FIN, nothing for a while, or the server ends the backend. */
  readonly way: 'reset' | 'end' | 'stall' | 'kill'
}

/** When a client goes away. */
export type Leave = 'once sent' | 'at commit' | 'at the first byte' | 'in the body' | 'behind the answer'

/** One request, and all that shall happen to it. It follows from the seed and its number alone. */
export interface Plan {
  readonly request: number
  readonly style: StyleName
  /** Rows of each part. */
  readonly rows: number
  readonly spoils: Readonly<Record<string, readonly Spoil[]>>
  readonly wire: WireFault | undefined
  readonly leaves: Leave | undefined
  /** Its socket is a new one. */
  readonly opens: boolean
  /** It is sent together with the one before it. */
  readonly pipelined: boolean
}

export function planOf(seed: number, request: number): Plan {
  const random = randomOf(seed, request)
  const chance = (share: number) => random() < share
  const pick = <Item>(items: readonly Item[]): Item => items[Math.floor(random() * items.length)] as Item
  const style = pick(Object.keys(styles) as StyleName[])
  const { parts, streams } = styleOf(style)
  const spoils = (): Spoil[] => [
    ...(chance(0.07) ? (['doomed'] as const) : []),
    ...(chance(0.15) ? (['contended'] as const) : []),
    ...(chance(0.2) ? (['slow'] as const) : []),
  ]
  return {
    request,
    style,
    rows: 2 + Math.floor(random() * 3),
    spoils: Object.fromEntries(parts.map(({ name }) => [name, spoils()])),
    wire: chance(0.25)
      ? {
          part: pick(parts).name,
          at: pick(['statement', 'commit', 'commit', 'answer']),
          when: pick(['before', 'after']),
          way: pick(['reset', 'end', 'stall', 'kill']),
        }
      : undefined,
    leaves: chance(0.12)
      ? pick<Leave>([
          'once sent',
          'at commit',
          'at the first byte',
          'behind the answer',
          ...(streams ? (['in the body', 'in the body'] as const) : []),
        ])
      : undefined,
    opens: chance(0.12),
    pipelined: chance(0.2),
  }
}

/** By which rows, and the statements that write them, are known to belong to a part of a request. */
export function unitOf(request: number, part: string): string {
  return `audit:${request}/${part}`
}

/** The units that are named in the parameters of a statement. */
export function unitIn(parameters: string): string | undefined {
  return /audit:\d+\/[a-z]+/.exec(parameters)?.[0]
}

export function requestOf(unit: string): number {
  return Number(unit.slice('audit:'.length).split('/')[0])
}

/** Where the rows of a unit are. */
export function keyOf({ name, database }: Part, request: number): string {
  return `${database} ${unitOf(request, name)}`
}

export const databaseNames: readonly DatabaseName[] = ['main', 'other']

/** Numbers from 0 to 1, the same for the same seeds. */
export function randomOf(...seeds: readonly number[]): () => number {
  let state = seeds.reduce((mixed, seed) => Math.imul(mixed ^ seed, 0x9e3779b1) ^ (mixed >>> 15), 0x85ebca6b)
  return () => {
    state = (state + 0x6d2b79f5) | 0
    let mixed = Math.imul(state ^ (state >>> 15), state | 1)
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32
  }
}
