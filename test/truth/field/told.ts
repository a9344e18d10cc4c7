/** What a caller was told: that it is done, an error, or nothing in time. */
export type Told =
  | { readonly said: 'ok' }
  | { readonly said: 'nothing' }
  | { readonly said: 'error'; readonly error: unknown }

/** In which everything must have settled that is not held up on purpose. Generous: others may want the machine. */
const bound = 5000

export async function tell(promise: Promise<unknown>): Promise<Told> {
  const settled = promise.then(
    (): Told => ({ said: 'ok' }),
    (error: unknown): Told => ({ said: 'error', error }),
  )
  return (await within(settled, bound)) ?? { said: 'nothing' }
}

/** What `promise` resolves with, `undefined` if it does not in time or rejects. */
export async function within<Result>(promise: Promise<Result>, ms: number): Promise<Result | undefined> {
  let timer: NodeJS.Timeout | undefined
  const late = new Promise<undefined>((resolve) => {
    timer = setTimeout(resolve, ms, undefined)
  })
  try {
    return await Promise.race([promise.catch(() => undefined), late])
  } finally {
    clearTimeout(timer)
  }
}

/** Of a transaction: another one in every run. */
const identifier = /\([0-9a-f-]{36}\)/

/** The code or class of an error, the first sentence of its message, and the code or class of its cause. */
export function describe(error: unknown): string {
  if (!(error instanceof Error)) return String(error)
  const [sentence = ''] = error.message.replace(identifier, '(…)').split(/\n|\.(?:\s|$)/)
  const text = sentence.length > 80 ? `${sentence.slice(0, 79).trimEnd()}…` : sentence
  const cause = error.cause instanceof Error ? `, caused by ${kindOf(error.cause)}` : ''
  return `${kindOf(error)}: ${text.replace(`${kindOf(error)} `, '')}${cause}`
}

function kindOf(error: Error): string {
  const { code } = error as { code?: unknown }
  const { name } = error.constructor
  if (typeof code !== 'string') return name
  return name === 'Error' ? code : `${name} ${code}`
}

const inner = ['cause', 'parent', 'original', 'driverError']

/** Everything about an error that code could look at, as `path = value`. */
export function traits(error: unknown, path = ''): string[] {
  if (!(error instanceof Error)) return [`${path} = ${String(error)}`]
  const of = (key: string, value: unknown) => `${path}${key} = ${String(value)}`
  const own = Object.entries(error).filter(([key, value]) => !inner.includes(key) && Object(value) !== value)
  const causes = inner.flatMap((key) => {
    const value = (error as unknown as Record<string, unknown>)[key]
    return value instanceof Error && path.split('.').length < 3 ? traits(value, `${path}${key}.`) : []
  })
  return [
    of('constructor.name', error.constructor.name),
    of('message', error.message),
    ...own.map(([key, value]) => of(key, value)),
    ...causes,
  ]
}
