import { Readable } from 'node:stream'
import type { Pool } from 'pg'
import { type AmbientDatabase, hasContext, newContext } from '../../../src/index.ts'

export type DatabaseName = 'main' | 'other'

/** Rows that are written together, in a transaction of their own or of the request's. */
export interface Part {
  readonly name: string
  readonly database: DatabaseName
  /**
   * Who says what became of it: the answer of the request, a promise inside the handler, or a hook behind the commit. What is
   * written `'later'` is told of by a promise behind the head; `'never'` is undone in any case.
   */
  readonly told: 'by the answer' | 'inside' | 'by a hook' | 'later' | 'never'
}

/** What a handler answers; its framework sends it in its own way. */
export interface Answer {
  readonly status: number
  readonly location?: string
  /** An object is sent as JSON. Default is no body. */
  readonly body?: object | Readable
}

/** What the handlers work with. */
export interface Work {
  readonly request: number
  readonly main: AmbientDatabase<Pool, Pool>
  /** Writes the rows of a part, and what shall spoil its transaction. Default is in the session of the context. */
  write(part: string, db?: Pool): Promise<void>
  /** A statement that the server refuses. */
  fail(): Promise<unknown>
  /** Notes what `promise` says about a part. */
  tell<Result>(part: string, promise: Promise<Result>): Promise<Result>
}

/** A way in which handlers are written. */
export interface Style {
  readonly parts: readonly Part[]
  handle(work: Work): Promise<Answer>
  /** Has a body that takes some time. */
  readonly streams?: true
}

/** What a body fails with. */
export const bodyFailure = 'The body ends here.'

/** Something that a handler throws, and that its error handling turns into a success. */
export class Recoverable extends Error {
  readonly answer: Answer

  constructor(answer: Answer) {
    super('This can be helped.')
    this.answer = answer
  }
}

const main: Part = { name: 'main', database: 'main', told: 'by the answer' }
const inner: Part = { name: 'inner', database: 'main', told: 'inside' }
const made: Answer = { status: 201, body: { made: true } }

export const styles = {
  json: {
    parts: [main],
    async handle({ write }) {
      await write('main')
      return made
    },
  },
  callback: {
    parts: [main],
    handle: ({ write }) =>
      new Promise((resolve, reject) => {
        setImmediate(() => {
          write('main').then(() => setTimeout(() => resolve(made)), reject)
        })
      }),
  },
  redirect: {
    parts: [main],
    async handle({ write }) {
      await write('main')
      return { status: 303, location: '/made' }
    },
  },
  empty: {
    parts: [main],
    async handle({ write }) {
      await write('main')
      return { status: 204 }
    },
  },
  stream: {
    parts: [main],
    streams: true,
    async handle({ write }) {
      await write('main')
      return { status: 200, body: Readable.from(Array<string>(20).fill('x'.repeat(5_000))) }
    },
  },
  'stream that fails': {
    parts: [main],
    streams: true,
    async handle({ write }) {
      await write('main')
      const chunks = function* () {
        yield 'x'.repeat(1_000)
        throw new Error(bodyFailure)
      }
      return { status: 200, body: Readable.from(chunks()) }
    },
  },
  'stream that writes': {
    parts: [main, { name: 'later', database: 'main', told: 'later' }],
    streams: true,
    async handle({ write, tell }) {
      await write('main')
      const chunks = async function* () {
        yield 'x'.repeat(1_000)
        await tell(
          'later',
          newContext(() => write('later')),
        ).catch(() => {})
        yield 'y'
      }
      return { status: 200, body: Readable.from(chunks()) }
    },
  },
  parallel: {
    parts: [main, { name: 'beside', database: 'main', told: 'by the answer' }],
    async handle({ write }) {
      await Promise.all([write('main'), write('beside')])
      return made
    },
  },
  unawaited: {
    parts: [main, { name: 'beside', database: 'main', told: 'by the answer' }],
    async handle({ write }) {
      let failure: unknown
      void write('beside').catch((error) => {
        failure = error
      })
      await write('main')
      if (failure) throw failure // a connection that failed to open spoils no transaction, so nobody else would say it
      return made
    },
  },
  'two databases': {
    parts: [main, { name: 'other', database: 'other', told: 'by the answer' }],
    async handle({ write }) {
      await write('main')
      await write('other')
      return made
    },
  },
  'manual commit': {
    parts: [inner, main],
    async handle({ main, write, tell }) {
      await write('inner')
      await tell('inner', main.commit())
      await write('main')
      return made
    },
  },
  atomic: {
    parts: [inner, main],
    async handle({ main, write, tell }) {
      await tell(
        'inner',
        main.atomic(() => write('inner')),
      )
      await write('main')
      return made
    },
  },
  'atomic that is tried again': {
    parts: [inner, main],
    async handle({ main, write, tell }) {
      const retry = { attempts: 3 }
      await tell(
        'inner',
        main.atomic(() => write('inner'), { isolationLevel: 'serializable', retry }),
      )
      await write('main')
      return made
    },
  },
  'savepoint that fails': {
    parts: [main, { name: 'inner', database: 'main', told: 'never' }],
    async handle({ main, write, fail }) {
      await write('main')
      const block = async () => {
        await write('inner')
        await fail()
      }
      await main.atomic(block, { current: 'savepoint' }).catch(() => {})
      return made
    },
  },
  'session beside': {
    parts: [inner, main],
    async handle({ main, write, tell }) {
      await tell(
        'inner',
        main.newSession(({ db }) => write('inner', db)),
      )
      await write('main')
      return made
    },
  },
  'context beside': {
    parts: [inner, main],
    async handle({ write, tell }) {
      await tell(
        'inner',
        newContext(() => write('inner')),
      )
      await write('main')
      return made
    },
  },
  hooks: {
    parts: [main, { name: 'outbox', database: 'main', told: 'by a hook' }],
    async handle({ main, write, tell }) {
      await write('main')
      main.afterCommit(() =>
        tell(
          'outbox',
          newContext(() => write('outbox')),
        ),
      )
      return made
    },
  },
  'status of a failure': {
    parts: [main],
    async handle({ write }) {
      await write('main')
      return { status: 409, body: { conflict: true } }
    },
  },
  throw: {
    parts: [main],
    async handle({ write }) {
      await write('main')
      throw Object.assign(new Error('The handler has thrown.'), { statusCode: 422 })
    },
  },
  'throw that is recovered': {
    parts: [main],
    async handle({ write }) {
      await write('main')
      throw new Recoverable({ status: 202, body: { recovered: true } })
    },
  },
  'failure that is swallowed': {
    parts: [main],
    async handle({ write, fail }) {
      await write('main')
      await fail().catch(() => {})
      return made
    },
  },
  'without a context': {
    parts: [{ name: 'main', database: 'main', told: 'never' }],
    async handle({ write }) {
      const inherited = hasContext()
      const code = await write('main').then(
        () => 'written',
        (error) => error.code,
      )
      if (!inherited && code === 'AMBIENT_NO_CONTEXT') return { status: 404, body: {} }
      return { status: 404, body: { leaked: code } }
    },
  },
} satisfies Record<string, Style>

export type StyleName = keyof typeof styles

export function styleOf(name: StyleName): Style {
  return styles[name]
}
