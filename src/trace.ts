/** The folder of this package's code: its own frames say nothing to a user. */
const own = import.meta.dirname

/** Tells in the text of an error where an earlier act happened; nothing unless it was traced. */
export function happened(act: string, place: string | undefined): string {
  return place ? `\n${act}\n${place}\n` : ''
}

/** The stack of the calling code outside this package, for errors that speak of it later (O2). */
export function callerStack(): string {
  const limit = Error.stackTraceLimit
  Error.stackTraceLimit = 50
  const frames = new Error('here').stack?.split('\n').slice(1) ?? []
  Error.stackTraceLimit = limit
  const outside = frames.filter((frame) => !own || !frame.includes(own))
  return outside.slice(0, 10).join('\n')
}
