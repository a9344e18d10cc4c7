import type { Comparison } from './harness.ts'

/** A number that is counted or read off, rather than compared. */
export interface Count {
  readonly kind: 'count'
  readonly name: string
  readonly unit: string
  readonly goal: number
  /** `'planted'` does what the measure must find to be too much. */
  measure(variant: 'real' | 'planted'): Promise<number>
}

export type Measure = Comparison | Count

/** What the measures need of the run. */
export interface Bench {
  /** The connection string of the server. */
  readonly url: string
  readonly quick: boolean
  /** Runs at the end of the measures, the latest first. */
  atEnd(close: () => unknown): void
}
