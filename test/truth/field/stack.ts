/** A way to use a database that is put beside others: an adapter of ours, another library, code by hand. One file each. */
export interface Stack {
  readonly name: string
  /** The packages that it is made of; the first one is judged. */
  readonly packages: readonly string[]
  /** The page that shows the way in which the stack is used here. */
  readonly documentation: string
  open(options: { readonly url: string; readonly poolSize: number }): Promise<OpenStack>
}

export interface OpenStack {
  /** Runs `work` in a transaction of its own, in the way that the documentation recommends. */
  unit(work: (work: Work) => Promise<unknown>): Promise<unknown>
  /** Whether an error says, in a documented way, that nobody knows whether the transaction was committed. Absent: there is no such way. */
  saysUnknown?(error: unknown): boolean
  /** The HTTP handler of the documentation: a POST to `/marks/<label>` writes a row in a transaction and is answered. Absent: none is shown. */
  serve?(): Promise<HttpServer>
  close(): Promise<unknown>
}

export interface HttpServer {
  readonly url: string
  close(): Promise<unknown>
}

/** What the code of a unit has in its hands. It may keep it for longer than it should. */
export interface Work {
  /** Adds a row to the table `marks` in the transaction of the unit. Its column `label` is unique. */
  write(label: string): Promise<unknown>
  /** Runs `work` in a transaction nested in this one. Absent: the stack has none with a callback. */
  nested?(work: (work: Work) => Promise<unknown>): Promise<unknown>
}
