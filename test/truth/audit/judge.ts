import type { Account, Said, SentCommit } from './app.ts'
import { keyOf, type Plan } from './plan.ts'
import { type Part, styleOf } from './styles.ts'

export type Kind =
  | 'not visible'
  | 'success without rows'
  | 'failure with rows'
  | 'half of the rows'
  | 'stray rows'
  | 'hook'
  | 'leaked context'
  | 'unjustified unknown'
  | 'missed unknown'
  | 'no answer'
  | 'hang'
  | 'uncaught'
  | 'lost slot'
  | 'open transaction'
  | 'left open'

export interface Violation {
  readonly kind: Kind
  /** The request that it is about, if it is about one. */
  readonly request?: number
  readonly text: string
}

/** Rows of the parts of requests, by key. */
export type Counts = ReadonlyMap<string, number>

/** What an answer says in its body, if it is of a failure. */
export interface Explanation {
  readonly code?: string
  readonly message?: string
  readonly outcome?: 'rolled-back' | 'unknown' | 'partial'
  readonly database?: string
  readonly databases?: Readonly<Record<'committed' | 'rolledBack' | 'unknown', readonly string[]>>
  /** A request without a context found one. */
  readonly leaked?: string
}

/** What a client saw of its request. */
export interface Sight {
  readonly plan: Plan
  /** How it ended for the client: with the whole answer, with a part of it, without one, or not at all. */
  readonly end: 'answered' | 'cut off' | 'closed' | 'hung' | 'left'
  /** The status of the answer, if that much of it was read. */
  readonly status?: number | undefined
  readonly explanation?: Explanation | undefined
  /** The rows that another connection saw on the first byte of the answer. */
  readonly visible?: Counts | undefined
}

/** An outcome that nobody can know, and what became of it. */
export interface Unknown {
  readonly request: number
  readonly part: string
  readonly there: boolean
}

export interface Verdict {
  readonly violations: readonly Violation[]
  readonly unknowns: readonly Unknown[]
  /** Parts of requests that were acknowledged, and of requests that nobody waited for. */
  readonly acknowledged: number
  readonly unheard: number
  readonly unheardThere: number
}

type Claim = Said['verdict'] | 'unheard'

/** Compares what was said, by answers and by promises, with the rows that are there. */
export function judge(sights: readonly Sight[], { said, commits }: Account, rows: Counts): Verdict {
  const violations: Violation[] = []
  const unknowns: Unknown[] = []
  const counted = { acknowledged: 0, unheard: 0, unheardThere: 0 }
  const saidOf = new Map(said.map((each) => [each.key, each]))
  const commitsOf = new Map<string, SentCommit[]>()
  for (const commit of commits) {
    for (const key of commit.keys) commitsOf.set(key, [...(commitsOf.get(key) ?? []), commit])
  }
  const spokenOf = new Set<string>()

  for (const sight of sights) {
    const { plan, status, explanation } = sight
    const { request } = plan
    const violate = (kind: Kind, text: string) => violations.push({ kind, request, text })
    const { parts } = styleOf(plan.style)
    const answer =
      status === undefined ? `no answer (${sight.end})` : `${status} ${explanation?.code ?? explanation?.message ?? ''}`
    if (sight.end === 'hung') violate('hang', 'the request was not answered in time')
    if (plan.style !== 'stream that fails') {
      // whose handler gives its answer up
      if (sight.end === 'closed') violate('no answer', 'the connection was closed before the answer')
      if (sight.end === 'cut off') violate('no answer', 'the answer was cut off')
    }
    if (explanation?.leaked) violate('leaked context', `outside of any context there was one: ${explanation.leaked}`)
    const success = status !== undefined && status < 400

    for (const part of parts) {
      const key = keyOf(part, request)
      spokenOf.add(key)
      const count = rows.get(key) ?? 0
      const there = count > 0
      const own = saidOf.get(key)
      const claim = claimOf(part, sight, own)
      const who = `${part.name}: ${part.told === 'by the answer' ? answer : (own?.by ?? 'nobody')}`
      if (there && count !== plan.rows) violate('half of the rows', `${who}: ${count} of ${plan.rows} rows are there`)
      if (claim === 'there' && !there) violate('success without rows', `${who}: no rows`)
      if (claim === 'gone' && there) violate('failure with rows', `${who}: ${count} rows are there`)
      if (claim === 'there') counted.acknowledged++
      if (claim === 'unheard') counted.unheard++
      if (claim === 'unheard' && there) counted.unheardThere++
      const open = (commitsOf.get(key) ?? []).some(({ answered }) => !answered)
      if (claim === 'unknown') {
        unknowns.push({ request, part: part.name, there })
        if (!open) violate('unjustified unknown', `${who}: no COMMIT was sent, or it was answered`)
      } else if (open && claim !== 'unheard' && part.told !== 'never') {
        violate('missed unknown', `${who}: a COMMIT was sent and not answered`)
      }
      const promised = claim === 'there' && part.told !== 'later'
      if (promised && sight.visible && sight.visible.get(key) !== plan.rows) {
        violate('not visible', `${who}: ${sight.visible.get(key) ?? 0} of ${plan.rows} rows on the first byte`)
      }
      if (part.told !== 'by a hook') continue
      const committed = parts.every((each) => each === part || rows.has(keyOf(each, request)))
      if (success && !own) violate('hook', 'the hook behind the commit did not run before the first byte')
      if (own && (!committed || explanation?.outcome)) violate('hook', 'the hook behind the commit ran without one')
    }
    for (const each of halves(plan, parts, rows)) violate('half of the rows', each)
  }

  for (const [key, count] of rows) {
    if (!spokenOf.has(key)) violations.push({ kind: 'stray rows', text: `${count} rows of ${key}, which nobody wrote` })
  }
  return { violations, unknowns, ...counted }
}

/** What was said about a part; a client that left has heard nothing. */
function claimOf({ told, database }: Part, { status, explanation }: Sight, own: Said | undefined): Claim {
  if (told === 'never') return 'gone'
  if (told !== 'by the answer') return own?.verdict ?? 'gone'
  if (status !== undefined && status < 400) return 'there'
  if (!explanation) return 'unheard'
  const { databases, outcome } = explanation
  if (databases?.committed.includes(database)) return 'there'
  if (databases?.unknown.includes(database)) return 'unknown'
  return outcome === 'unknown' && explanation.database === database ? 'unknown' : 'gone'
}

/** Parts of one transaction that are not there together. */
function halves({ request }: Plan, parts: readonly Part[], rows: Counts): string[] {
  const own = parts.filter(({ told, database }) => told === 'by the answer' && database === 'main')
  const there = own.filter((part) => rows.has(keyOf(part, request)))
  return there.length === 0 || there.length === own.length
    ? []
    : [`only ${there.map(({ name }) => name)} of ${own.length} parts are there`]
}
