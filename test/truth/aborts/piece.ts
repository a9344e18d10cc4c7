import type { ContextEvent } from '../../../src/index.ts'

/** A part of the unit of work that can be aborted by itself. */
export class Piece {
  readonly kind: 'context' | 'session' | 'block'
  readonly parent: Piece | undefined
  aborted = false
  /** A block's callback was called: what is committed from here on is its own. */
  entered = false
  /** A COMMIT was called for before the abort. */
  committing = false
  /** Its context was published. */
  opened = false
  /** How the library published its end. */
  readonly end: Promise<ContextEvent>
  ended: (event: ContextEvent) => void = () => {}

  constructor(kind: Piece['kind'], parent: Piece | undefined) {
    this.kind = kind
    this.parent = parent
    this.end = new Promise((resolve) => {
      this.ended = resolve
    })
  }

  /** The context or session that it is part of. */
  get whole(): Piece {
    return this.kind === 'block' && this.parent ? this.parent.whole : this
  }

  /** Neither it nor what it is part of was aborted. */
  get mayCommit(): boolean {
    if (this.aborted && (this.kind !== 'block' || this.entered)) return false
    return this.kind !== 'block' || (this.parent?.mayCommit ?? true)
  }
}
