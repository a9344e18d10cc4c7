import type { Truth } from './truth.ts'
import { firstByte } from './truths/http.ts'
import { lateInStranger, lateWrite } from './truths/late.ts'
import { cutAtBegin, lostAnswer, refusedBegin } from './truths/lost.ts'
import { nestedBlocks, siblingOfBlock } from './truths/nesting.ts'
import { forgottenStatement, swallowedError } from './truths/swallowed.ts'

/** Every stack is asked all of them. */
export const truths: readonly Truth[] = [
  swallowedError,
  lateWrite,
  lostAnswer,
  cutAtBegin,
  lateInStranger,
  nestedBlocks,
  refusedBegin,
  firstByte,
  forgottenStatement,
  siblingOfBlock,
]
