import { aborts } from './aborts/aborts.ts'
import { audit } from './audit/audit.ts'
import { contamination } from './contamination/contamination.ts'
import { cuts } from './cuts/cuts.ts'
import type { Harness } from './harness.ts'
import { memory } from './memory/memory.ts'
import { model } from './model/model.ts'
import { pools } from './pools/pools.ts'

export const harnesses: readonly Harness[] = [cuts, aborts, model, contamination, audit, pools, memory]
