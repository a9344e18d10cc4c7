import type { Stage } from './stage.ts'
import { describe, type Told } from './told.ts'

/** How a stack came out of one truth. */
export interface Finding {
  /** `partly`: nobody is lied to, but something is lost or left to guessing. */
  readonly verdict: 'holds' | 'partly' | 'broken' | 'not applicable'
  /** What was said and what was there. */
  readonly text: string
}

/** One thing that a stack may say or do wrong, and how it is found out. */
export interface Truth {
  readonly id: string
  readonly title: string
  /** What happens, and what a stack that tells the truth does. */
  readonly scene: string
  /** A throw is a fault of the harness, never a finding. */
  judge(stage: Stage): Promise<Finding>
}

export const holds = (text: string): Finding => ({ verdict: 'holds', text })
export const partly = (text: string): Finding => ({ verdict: 'partly', text })
export const broken = (text: string): Finding => ({ verdict: 'broken', text })
export const notApplicable = (text: string): Finding => ({ verdict: 'not applicable', text })

/** Compares what was said of a row with whether it is there. */
export function compare(told: Told, there: boolean): Finding {
  if (told.said === 'nothing') return broken(`never settles, and the row is ${there ? 'there' : 'gone'}`)
  if (told.said === 'ok') return there ? holds('says OK, the row is there') : broken('says OK, the row is gone')
  const rejects = `rejects: ${describe(told.error)}`
  return there ? broken(`${rejects}; but the row is there`) : holds(rejects)
}
