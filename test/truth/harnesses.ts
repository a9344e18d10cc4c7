import { audit } from './audit/audit.ts'
import { cuts } from './cuts/cuts.ts'
import type { Harness } from './harness.ts'

export const harnesses: readonly Harness[] = [cuts, audit]
