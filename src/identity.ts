import type { Lease } from './engine.ts'

/** What a transaction can be looked up by if the answer to its COMMIT is lost: the server is asked for it before COMMIT is sent. */
export class Identity<Connection> {
  /** Known once the transaction has written; then it never changes. */
  id: string | undefined
  /** Nothing was sent since it was asked for. */
  #asked = false

  get due(): boolean {
    return this.id === undefined && !this.#asked
  }

  /** Something was sent that may be the first to write. */
  sent(): void {
    this.#asked = false
  }

  /** `statement` has just been sent. Where statements can be pipelined, the question travels with it: settles when both are answered. */
  follow<Result>(statement: Promise<Result>, lease: Lease<Connection>): Promise<Result> {
    this.sent()
    if (this.id !== undefined || !lease.adapter.mayPipelineBegin?.(lease.connection)) return statement
    return this.#askBehind(statement, lease)
  }

  async #askBehind<Result>(statement: Promise<Result>, lease: Lease<Connection>): Promise<Result> {
    const asked = this.#ask(lease).catch(() => {}) // behind a statement that failed; it is asked again before COMMIT
    const result = await statement
    await asked
    return result
  }

  async ask(lease: Lease<Connection>): Promise<void> {
    await this.#ask(lease)
    this.#asked = true
  }

  async #ask({ adapter, connection }: Lease<Connection>): Promise<void> {
    this.id = await adapter.identifyTransaction?.(connection)
  }
}
