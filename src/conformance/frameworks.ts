import assert from 'node:assert/strict'
import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { once } from 'node:events'
import type { IncomingMessage, ServerResponse } from 'node:http'
import { Readable } from 'node:stream'
import { setImmediate as nextTurn } from 'node:timers/promises'
import { bounded } from '../clock.ts'
import { Context, contextSignal, hasContext, newContext } from '../context.ts'
import type { AmbientDatabase } from '../database.ts'
import { isAmbientError } from '../errors.ts'
import type { ContextEvent } from '../events.ts'
import type { DatabaseContextOptions } from '../request.ts'
import { type RawAnswer, RawClient, type RawRequest } from './raw-client.ts'

type Row = Record<string, unknown>

/** A PostgreSQL database, from both sides. */
export interface SuiteDatabase {
  /** The database under test. */
  readonly ambient: AmbientDatabase<unknown, unknown>
  /** Runs SQL through its ambient handle. */
  query(sql: string, parameters?: unknown[]): Promise<Row[]>
  /** Streams the rows of a query through its ambient handle, with a cursor. */
  stream(sql: string): Promise<Readable>
  /** Runs SQL on a connection of its own that the library does not know of: always the same one, because it takes locks. */
  witness(sql: string, parameters?: unknown[]): Promise<Row[]>
}

/** A request as the suite's handlers see it. */
export interface SuiteRequest {
  /** The JSON body, read by the framework's own means. */
  json(): Promise<unknown>
  /** Node's own objects, where the framework has them. */
  readonly node?: { readonly request: IncomingMessage; readonly response: ServerResponse } | undefined
}

/** What a suite's handler answers; the harness sends it in the framework's own way. */
export interface SuiteAnswer {
  /** Default is 200. */
  readonly status?: number
  readonly headers?: Readonly<Record<string, string | string[]>>
  /** Text, bytes that come by and by, or an object that is sent as JSON. Default is no body. */
  readonly body?: string | Readable | object
}

/** Answers by its result; by `undefined` it says that it used Node's own response. */
export type SuiteHandler = (request: SuiteRequest) => Promise<SuiteAnswer | undefined> | SuiteAnswer

/** What a harness serves. */
export interface SuiteApp {
  /** By path; every method. */
  readonly routes: Readonly<Record<string, SuiteHandler>>
  /** Options of the middleware. */
  readonly options?: DatabaseContextOptions<{ readonly url?: string | undefined }>
  /** The middleware stands there this many times. Default is 1. */
  readonly mounted?: number
  /** Code in front of the middleware, which lets the request proceed. Default is none. */
  readonly around?: (proceed: () => unknown) => unknown
}

/** A server that a harness started. */
export interface SuiteServer {
  readonly port: number
  /** What the framework's own error handling was given. It answers the error's `statusCode`, or 500, with its message. */
  readonly errors: readonly unknown[]
  close(): Promise<void>
}

/** What the suite needs of a framework and of the place it runs in. */
export interface FrameworkHarness {
  readonly main: SuiteDatabase
  /** Another database, defined after `main`. */
  readonly other: SuiteDatabase
  /** Whether {@link SuiteRequest.node} is there. */
  readonly node: boolean
  /** Serves on a free port of 127.0.0.1, in the async context of the call. */
  start(app: SuiteApp): Promise<SuiteServer>
  /** Milliseconds to wait for what must come. Default is 5000. */
  readonly patience?: number
}

/** One behaviour that every framework must show. */
export interface FrameworkCase {
  /** Starts with the rule. */
  readonly name: string
  /** It needs {@link FrameworkHarness.node}. */
  readonly needsNode: boolean
  /** Rejects if the framework does not behave so. */
  run(harness: FrameworkHarness): Promise<void>
}

/**
 * What every middleware must pass, on real sockets and a real PostgreSQL, with any test runner.
 *
 * @example
 * ```ts
 * import { frameworkSuite, type FrameworkHarness } from 'ambient-db/conformance'
 * import { test } from 'node:test'
 *
 * declare const harness: FrameworkHarness
 * for (const { name, needsNode, run } of frameworkSuite) {
 *   test(name, { skip: needsNode && !harness.node }, () => run(harness))
 * }
 * ```
 */
export const frameworkSuite: readonly FrameworkCase[] = [
  define('H1 commits before the status line leaves', async (suite) => {
    const lock = await suite.lock()
    const port = await suite.start({
      routes: {
        '/': async () => {
          await suite.insertHeld(lock, 'a')
          return { status: 201, headers: { 'set-cookie': 'a=b' }, body: { id: 'a' } }
        },
      },
    })
    const client = await suite.open(port)
    client.send({ method: 'POST', path: '/' })
    await suite.waitsInCommit()
    assert.equal(client.pending, '', 'bytes left before COMMIT was answered')
    await lock.release()
    await client.firstByte()
    assert.ok(await suite.committed('a'), 'the status line came before the row')
    const { status, body } = await client.answer()
    assert.deepEqual([status, body], [201, '{"id":"a"}'])
  }),

  define('H1 answers a failed COMMIT by its error handling, and nothing of the first answer leaks', async (suite) => {
    const port = await suite.start({
      routes: {
        '/': async () => {
          await suite.insertDoomed()
          const headers = {
            'set-cookie': ['session=secret', 'theme=dark'],
            etag: '"first"',
            'content-encoding': 'identity',
            'cache-control': 'max-age=60',
            location: '/rows/1',
            'x-first': 'yes',
          }
          return { status: 201, headers, body: { first: 'x'.repeat(2_000) } }
        },
      },
    })
    const answer = await suite.ask(port, { method: 'POST', path: '/' })
    assert.equal(answer.status, 500)
    for (const name of ['set-cookie', 'content-encoding', 'cache-control', 'location', 'x-first']) {
      assert.equal(answer.headers[name], undefined, `${name} leaked`)
    }
    assert.notEqual(answer.headers.etag?.[0], '"first"')
    assert.match(answer.body, /foreign key/)
    assert.doesNotMatch(answer.body, /xxx/)
    assert.equal(suite.errors.length, 1)
    assert.equal((suite.errors[0] as { code?: string }).code, '23503')
  }),

  define('H1 answers an error when the answer to COMMIT is lost', async (suite) => {
    const lock = await suite.lock()
    const port = await suite.start({
      routes: {
        '/': async () => {
          await suite.insertHeld(lock, 'a')
          return { body: 'done' }
        },
      },
    })
    const asked = suite.ask(port, { path: '/' })
    const backend = await suite.waitsInCommit()
    await suite.witness('select pg_terminate_backend($1)', [backend])
    const { status } = await asked
    assert.equal(status, 500)
    assert.equal(suite.errors.length, 1)
    await lock.release()
  }),

  define('H1 answers a failed stream as a whole, before its first byte', async (suite) => {
    const source = Readable.from(['never'])
    const port = await suite.start({
      routes: {
        '/': async () => {
          await suite.insertDoomed()
          return { headers: { 'x-first': 'yes' }, body: source }
        },
      },
    })
    const { status, headers, body } = await suite.ask(port, { path: '/' })
    assert.deepEqual([status, headers['x-first']], [500, undefined])
    assert.doesNotMatch(body, /never/)
    await suite.until('the source to be destroyed', () => source.destroyed)
  }),

  define('H2 rolls back for a status of 400 or more, commits below', async (suite) => {
    const answerWith = (status: number) => async () => {
      await suite.insert(String(status))
      return { status, body: 'text' }
    }
    const statuses = [200, 302, 400, 404, 503]
    const port = await suite.start({
      routes: Object.fromEntries(statuses.map((status) => [`/${status}`, answerWith(status)])),
    })
    for (const status of statuses) {
      assert.equal((await suite.ask(port, { path: `/${status}` })).status, status)
      assert.equal(await suite.committed(String(status)), status < 400, `after ${status}`)
    }
    assert.deepEqual(suite.errors, [])
  }),

  define('H2 asks `outcome`', async (suite) => {
    const port = await suite.start({
      options: { outcome: (status, { url }) => (status === 404 || url === '/keep' ? 'commit' : 'rollback') },
      routes: {
        '/found': async () => ({ status: 200, body: await suite.insert('200') }),
        '/missing': async () => ({ status: 404, body: await suite.insert('404') }),
        '/keep': async () => ({ status: 500, body: await suite.insert('500') }),
      },
    })
    for (const path of ['/found', '/missing', '/keep']) await suite.ask(port, { path })
    assert.deepEqual(await suite.rows(), ['404', '500'])
  }),

  define('H3 rolls back when the handler throws; its error handling answers', async (suite) => {
    const port = await suite.start({
      routes: {
        '/': async () => {
          await suite.insert('a')
          throw new Error('no')
        },
        '/teapot': async () => {
          await suite.insert('b')
          throw Object.assign(new Error('no'), { statusCode: 418 })
        },
      },
    })
    assert.equal((await suite.ask(port, { path: '/' })).status, 500)
    assert.equal((await suite.ask(port, { path: '/teapot' })).status, 418)
    assert.deepEqual(await suite.rows(), [])
    assert.equal(suite.errors.length, 2)
  }),

  define('H4 rolls back at once when the client goes before the answer', async (suite) => {
    const entered = gate()
    const left = gate()
    const late = gate<unknown>()
    const port = await suite.start({
      routes: {
        '/': async () => {
          await suite.insert('a')
          entered.open()
          await left.opened
          await suite.insert('b').catch(late.open)
          return { body: 'nobody reads it' }
        },
      },
    })
    const client = await suite.open(port)
    client.send({ path: '/' })
    await entered.opened
    assert.equal(await suite.openTransactions(), 1)
    client.destroy()
    await suite.until('the rollback', async () => (await suite.openTransactions()) === 0)
    left.open()
    assert.ok(isAmbientError(await late.opened, 'AMBIENT_CONTEXT_ENDED'))
    assert.deepEqual(await suite.rows(), [])
  }),

  define('H4 fires the signal of the context when the client goes, and not when it is answered', async (suite) => {
    const entered = gate()
    const fired = gate<unknown>()
    const signals: AbortSignal[] = []
    const port = await suite.start({
      routes: {
        '/answered': async () => {
          signals.push(contextSignal())
          return { body: await suite.insert('a') }
        },
        '/left': async () => {
          const signal = contextSignal()
          signal.addEventListener('abort', () => fired.open(signal.reason))
          entered.open()
          await fired.opened
          return { body: 'nobody reads it' }
        },
      },
    })
    const client = await suite.open(port)
    client.send({ path: '/answered' })
    await client.answer()
    client.send({ path: '/left' })
    await entered.opened
    client.destroy()
    assert.ok(isAmbientError(await fired.opened, 'AMBIENT_ABORTED'))
    assert.equal(signals[0]?.aborted, false)
  }),

  define('H4 cancels the statement that runs when the client goes', async (suite) => {
    const lock = await suite.lock()
    const port = await suite.start({
      routes: { '/': async () => ({ body: await suite.query('select pg_advisory_xact_lock($1)', [lock.key]) }) },
    })
    const client = await suite.open(port)
    client.send({ path: '/' })
    await suite.until('the statement', async () => (await suite.waitingBackends()).length === 1)
    client.destroy()
    await suite.until('its end', async () => (await suite.openTransactions()) === 0)
    await lock.release()
  }),

  define('H4 cancels what its answer waits for when the client goes', async (suite) => {
    const lock = await suite.lock()
    const port = await suite.start({
      routes: {
        '/': async () => {
          await suite.insert('a')
          void suite.query('select pg_advisory_xact_lock($1)', [lock.key]).catch(() => {})
          return { body: 'joins the statement' }
        },
      },
    })
    const client = await suite.open(port)
    client.send({ path: '/' })
    await suite.until('the statement', async () => (await suite.waitingBackends()).length === 1)
    client.destroy()
    await suite.until('its end', async () => (await suite.openTransactions()) === 0)
    await lock.release()
    assert.deepEqual(await suite.rows(), [])
    for (const error of suite.errors) assert.ok(isAmbientError(error, 'AMBIENT_ABORTED'), String(error))
  }),

  define('H4 rolls back when a handler never answers and the client goes', async (suite) => {
    const entered = gate()
    const port = await suite.start({
      routes: {
        '/': async () => {
          await suite.insert('a')
          entered.open()
          return new Promise(() => {})
        },
      },
    })
    const client = await suite.open(port)
    client.send({ path: '/' })
    await entered.opened
    client.destroy()
    await suite.until('the rollback', async () => (await suite.openTransactions()) === 0)
    assert.deepEqual(await suite.rows(), [])
  }),

  define('H4 keeps what was committed when the client goes amid the body, and ends its source', async (suite) => {
    const source = Readable.from(endless())
    const port = await suite.start({
      routes: {
        '/': async () => {
          await suite.insert('a')
          return { body: source }
        },
      },
    })
    const client = await suite.open(port)
    client.send({ path: '/' })
    await client.firstByte()
    assert.ok(await suite.committed('a'))
    client.destroy()
    await suite.until('the end of the source', () => source.destroyed)
    assert.ok(await suite.committed('a'))
    assert.deepEqual(suite.errors, [])
  }),

  define('H5 streams 5 MB behind the commit, and reads no further while it lasts', async (suite) => {
    const lock = await suite.lock()
    const chunk = 'x'.repeat(50_000)
    let produced = 0
    const chunks = function* () {
      for (; produced < 100; produced++) yield chunk
    }
    const port = await suite.start({
      routes: {
        '/': async () => {
          await suite.insertHeld(lock, 'a')
          return { body: Readable.from(chunks()) }
        },
      },
    })
    const client = await suite.open(port)
    client.send({ path: '/' })
    await suite.waitsInCommit()
    assert.equal(client.pending, '')
    assert.ok(produced < 50, `${produced} of 100 chunks were read while nothing could leave`)
    await lock.release()
    await client.firstByte()
    assert.ok(await suite.committed('a'))
    const { status, body } = await client.answer()
    assert.deepEqual([status, body.length], [200, 5_000_000])
  }),

  define('H5 sends events one by one after the commit, and has ended the context by then', async (suite) => {
    const [first, second] = [gate(), gate()]
    const seen: unknown[] = []
    const events = async function* () {
      yield 'data: 1\n\n'
      await first.opened
      seen.push(await suite.insert('late').catch((error) => error.code))
      await newContext(() => suite.insert('b'))
      yield 'data: 2\n\n'
      await second.opened
    }
    const port = await suite.start({
      routes: {
        '/': async () => {
          await suite.insert('a')
          return { headers: { 'content-type': 'text/event-stream' }, body: Readable.from(events()) }
        },
      },
    })
    const client = await suite.open(port)
    client.send({ path: '/' })
    await client.arrival('data: 1')
    assert.deepEqual(await suite.rows(), ['a'])
    first.open()
    await client.arrival('data: 2')
    // A framework may read the source from outside of the context.
    assert.match(String(seen), /^(AMBIENT_CONTEXT_ENDED|AMBIENT_NO_CONTEXT)$/)
    assert.deepEqual(await suite.rows(), ['a', 'b'])
    second.open()
    assert.equal((await client.answer()).body, 'data: 1\n\ndata: 2\n\n')
  }),

  define('H5 refuses a cursor that is open at the head, at once', async (suite) => {
    const port = await suite.start({
      routes: {
        '/': async () => {
          await suite.insert('a')
          const rows = await suite.stream('select generate_series(1, 100000) as n')
          return { body: rows.map((row) => `${JSON.stringify(row)}\n`) }
        },
      },
    })
    const { status } = await suite.ask(port, { path: '/' })
    assert.equal(status, 500)
    assert.ok(isAmbientError(suite.errors[0], 'AMBIENT_STREAM_OPEN'), String(suite.errors[0]))
    assert.deepEqual(await suite.rows(), [])
  }),

  define('H6 keeps the context through the body parser', async (suite) => {
    const port = await suite.start({
      routes: {
        '/': async (request) => {
          const { id } = (await request.json()) as { id: string }
          await suite.insert(id)
          return { body: { id } }
        },
      },
    })
    const client = await suite.open(port)
    // The body arrives on its own, later than the head.
    const body = '{"id":"from the body"}'
    client.socket.write(
      `POST / HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: ${body.length}\r\nexpect: 100-continue\r\n\r\n`,
    )
    await client.arrival('100 Continue')
    client.socket.write(body)
    assert.equal((await client.answer()).status, 200)
    assert.ok(await suite.committed('from the body'))
  }),

  define('H6 never leaks the context to the next request of the socket', async (suite) => {
    const seen: boolean[] = []
    const look = () => void seen.push(hasContext())
    const port = await suite.start({
      around: (proceed) => {
        look()
        const result = proceed()
        look()
        return result
      },
      options: { skip: ({ url }) => url === '/skipped' },
      routes: {
        '/': async () => ({ body: await suite.insert(crypto.randomUUID()) }),
        '/skipped': async () => {
          look()
          await nextTurn()
          look()
          return { body: await suite.insert('b').catch((error) => error.code) }
        },
      },
    })
    const client = await suite.open(port)
    client.send({ path: '/' }, { path: '/skipped' }, { path: '/' })
    const bodies = [await client.answer(), await client.answer(), await client.answer()].map(({ body }) => body)
    client.send({ path: '/skipped' })
    bodies.push((await client.answer()).body)
    assert.deepEqual([bodies[1], bodies[3]], ['AMBIENT_NO_CONTEXT', 'AMBIENT_NO_CONTEXT'])
    assert.ok(!seen.includes(true), 'code outside a request saw its context')
  }),

  define('H6 serves 200 requests on one socket, each with a transaction of its own', async (suite) => {
    const port = await suite.start({
      routes: {
        '/': async () => {
          const [row] = await suite.query('insert into suite_rows select $1 returning txid_current()::text as id', [
            crypto.randomUUID(),
          ])
          return { body: String(row?.id) }
        },
      },
    })
    const client = await suite.open(port)
    const transactions = new Set<string>()
    for (let request = 0; request < 200; request++) {
      client.send({ path: '/' })
      transactions.add((await client.answer()).body)
    }
    assert.equal(transactions.size, 200)
    assert.equal((await suite.rows()).length, 200)
  }),

  define('H6 answers pipelined requests in order, and commits the last one though the first waits', async (suite) => {
    const first = gate()
    const port = await suite.start({
      routes: {
        '/first': async () => {
          await suite.insert('first')
          await first.opened
          return { body: 'first' }
        },
        '/second': async () => ({ body: await suite.insert('second') }),
      },
    })
    const client = await suite.open(port)
    client.send({ path: '/first' }, { path: '/second' })
    await suite.until('the second commit', () => suite.committed('second'))
    assert.deepEqual([client.pending, await suite.committed('first')], ['', false])
    first.open()
    assert.equal((await client.answer()).body, 'first')
    assert.ok(await suite.committed('first'))
    assert.equal((await client.answer()).body, 'second')
  }),

  define('H7 commits before answers without a body: HEAD, 204, 304, redirects, nothing', async (suite) => {
    const answers: Record<string, SuiteAnswer> = {
      '/head': { headers: { 'content-type': 'text/plain' }, body: 'text' },
      '/204': { status: 204 },
      '/304': { status: 304, headers: { etag: '"1"' } },
      '/302': { status: 302, headers: { location: '/204' } },
      '/empty': {},
    }
    let lock = await suite.lock()
    const routes = Object.entries(answers).map(([path, answer]) => [
      path,
      async () => {
        await suite.insertHeld(lock, path)
        return answer
      },
    ])
    const port = await suite.start({ routes: Object.fromEntries(routes) })
    const client = await suite.open(port)
    for (const [path, answer] of Object.entries(answers)) {
      const method = path === '/head' ? 'HEAD' : 'GET'
      client.send({ method, path })
      await suite.waitsInCommit()
      assert.equal(client.pending, '', `${path} was answered before its commit`)
      await lock.release()
      const { status, body } = await client.answer(method)
      assert.deepEqual([status, body], [answer.status ?? 200, ''], path)
      lock = await suite.lock()
    }
    assert.deepEqual(await suite.rows(), Object.keys(answers).sort())
  }),

  define('S1 takes no connection for a request that touches no database', async (suite) => {
    const port = await suite.start({
      routes: {
        '/': () => {
          suite.main.ambient.session()
          return { body: 'nothing' }
        },
      },
    })
    const acquired: unknown[] = []
    const onEvent = (event: unknown) => acquired.push((event as { type: string }).type)
    subscribe('ambient-db:session', onEvent)
    subscribe('ambient-db:transaction', onEvent)
    const { body } = await suite.ask(port, { path: '/' })
    unsubscribe('ambient-db:session', onEvent)
    unsubscribe('ambient-db:transaction', onEvent)
    assert.equal(body, 'nothing')
    assert.deepEqual(
      acquired.filter((type) => type !== 'opened' && type !== 'closed'),
      [],
    )
  }),

  define('C3 opens a context of its own in a server that began to listen inside one', async (suite) => {
    await newContext(async () => {
      await suite.insert('outer')
      const port = await suite.start({
        options: { skip: ({ url }) => url === '/skipped' },
        routes: {
          '/': async () => ({ body: await suite.insert('inner') }),
          '/skipped': () => ({ body: String(hasContext()) }),
        },
      })
      await suite.ask(port, { path: '/' })
      assert.equal((await suite.ask(port, { path: '/skipped' })).body, 'false')
      assert.deepEqual(await suite.rows(), ['inner'])
    })
    assert.deepEqual(await suite.rows(), ['inner', 'outer'])
  }),

  define('C3 yields to a context of the testing tools', async (suite) => {
    const test = new Context({ adoptable: true })
    await test.run(async () => {
      const port = await suite.start({
        routes: {
          '/': async (request) => {
            const body = (await request.json()) as { id: string }
            return { body: await suite.insert(body.id) }
          },
        },
      })
      const headers = { 'content-type': 'application/json' }
      const { status } = await suite.ask(port, { method: 'POST', path: '/', headers, body: '{"id":"a"}' })
      assert.equal(status, 200)
      assert.equal(await suite.committed('a'), false)
      assert.deepEqual(await suite.query('select id from suite_rows'), [{ id: 'a' }])
    })
    await test.settle('rollback')
    assert.deepEqual(await suite.rows(), [])
  }),

  define('C3 does nothing the second time it is mounted', async (suite) => {
    const port = await suite.start({
      mounted: 2,
      routes: {
        '/': async () => ({ body: await suite.insert('a') }),
        '/doomed': async () => ({ body: await suite.insertDoomed() }),
      },
    })
    const opened = suite.contexts
    assert.equal((await suite.ask(port, { path: '/' })).status, 200)
    assert.ok(await suite.committed('a'))
    assert.equal(suite.contexts, opened + 1)
    assert.equal((await suite.ask(port, { path: '/doomed' })).status, 500)
    assert.equal(suite.errors.length, 1)
  }),

  define('C5 joins work that nobody awaited, and fails if it fails', async (suite) => {
    const lock = await suite.lock()
    const port = await suite.start({
      routes: {
        '/good': () => {
          void suite.insertHeld(lock, 'a')
          return { body: 'good' }
        },
        '/bad': async () => {
          await suite.insert('b')
          void suite.insert('b').catch(() => {})
          return { body: 'bad' }
        },
      },
    })
    const client = await suite.open(port)
    client.send({ path: '/good' })
    await suite.waitsInCommit()
    assert.equal(client.pending, '', 'the answer did not wait')
    await lock.release()
    assert.equal((await client.answer()).body, 'good')
    assert.equal((await suite.ask(port, { path: '/bad' })).status, 500)
    assert.deepEqual(await suite.rows(), ['a'])
  }),

  define('C5 takes work that nobody awaited for an error with `unawaited`', async (suite) => {
    const port = await suite.start({
      options: { unawaited: 'error' },
      routes: {
        '/': () => {
          void suite.insert('a').catch(() => {})
          return { body: 'good' }
        },
      },
    })
    assert.equal((await suite.ask(port, { path: '/' })).status, 500)
    assert.ok(isAmbientError(suite.errors[0], 'AMBIENT_UNAWAITED_WORK'))
    assert.deepEqual(await suite.rows(), [])
  }),

  define('C6 answers an error that says which database committed and which did not', async (suite) => {
    const port = await suite.start({
      routes: {
        '/': async () => {
          await suite.insert('a')
          await suite.other.query('insert into suite_doomed values (1)')
          return { body: 'good' }
        },
      },
    })
    assert.equal((await suite.ask(port, { path: '/' })).status, 500)
    const [error] = suite.errors
    assert.ok(isAmbientError(error, 'AMBIENT_PARTIAL_COMMIT'))
    assert.deepEqual(error.databases, {
      committed: [suite.main.ambient.name],
      rolledBack: [suite.other.ambient.name],
      unknown: [],
    })
  }),

  define('A7 begins transactions as the request asks', async (suite) => {
    const readOnly = async () => ({ body: await suite.show('transaction_read_only') })
    const port = await suite.start({
      options: { transaction: ({ url }) => (url === '/write' ? undefined : { readOnly: true }) },
      routes: { '/read': readOnly, '/write': readOnly },
    })
    assert.equal((await suite.ask(port, { path: '/read' })).body, 'on')
    assert.equal((await suite.ask(port, { path: '/write' })).body, 'off')
  }),

  defineOnNode('H5 settles at writeHead followed by write, flushHeaders or end, not before', async (suite) => {
    let lock = await suite.lock()
    const port = await suite.start({
      routes: {
        '/write': async ({ node }) => {
          node?.response.writeHead(201, { 'x-kind': 'object' })
          assert.equal(node?.response.headersSent, true)
          await suite.insertHeld(lock, 'write')
          node?.response.write('wr')
          node?.response.end('ite')
          return undefined
        },
        '/flushHeaders': async ({ node }) => {
          node?.response.writeHead(202, 'Taken', ['x-kind', 'flat', 'x-kind', 'array'])
          await suite.insertHeld(lock, 'flushHeaders')
          node?.response.flushHeaders()
          return undefined
        },
        '/end': async ({ node }) => {
          node?.response.setHeader('x-kind', 'set')
          node?.response.writeHead(203, { 'content-length': 3 })
          await suite.insertHeld(lock, 'end')
          node?.response.end('end')
          return undefined
        },
      },
    })
    const expected = { write: [201, 'object'], flushHeaders: [202, 'flat', 'array'], end: [203, 'set'] }
    for (const [name, [status, ...kinds]] of Object.entries(expected)) {
      const client = await suite.open(port)
      client.send({ path: `/${name}` })
      await suite.waitsInCommit()
      assert.equal(client.pending, '', `the head of ${name} left before its commit`)
      await lock.release()
      const answer = await client.answer('HEAD')
      assert.deepEqual([answer.status, ...(answer.headers['x-kind'] ?? [])], [status, ...kinds])
      lock = await suite.lock()
    }
    assert.deepEqual(await suite.rows(), ['end', 'flushHeaders', 'write'])
  }),

  defineOnNode('H5 says at once what is wrong with a head or a chunk', async (suite) => {
    const { codes, attempt } = attempts()
    const port = await suite.start({
      routes: {
        '/': async ({ node }) => {
          const response = node?.response ?? suite.fail()
          await suite.insert('a')
          attempt(() => response.writeHead(1000))
          attempt(() => response.writeHead(200, 'two\nlines'))
          attempt(() => response.writeHead(200, { 'a b': 'c' }))
          attempt(() => response.writeHead(200, ['odd']))
          attempt(() => response.write(42))
          attempt(() => response.end({}))
          response.writeHead(200)
          attempt(() => response.writeHead(201))
          attempt(() => response.setHeader('a', 'b'))
          response.end('good')
          attempt(() => response.setHeader('a', 'b'))
          attempt(() => response.appendHeader('a', 'b'))
          attempt(() => response.removeHeader('a'))
          return undefined
        },
      },
    })
    const { status, body } = await suite.ask(port, { path: '/' })
    assert.deepEqual([status, body], [200, 'good'])
    assert.deepEqual(codes, [
      'ERR_HTTP_INVALID_STATUS_CODE',
      'ERR_INVALID_CHAR',
      'ERR_INVALID_HTTP_TOKEN',
      'ERR_INVALID_ARG_VALUE',
      'ERR_INVALID_ARG_TYPE',
      'ERR_INVALID_ARG_TYPE',
      ...Array<string>(5).fill('ERR_HTTP_HEADERS_SENT'),
    ])
  }),

  defineOnNode('H5 holds writes while it settles: write returns false, drain follows', async (suite) => {
    const lock = await suite.lock()
    const states: unknown[] = []
    const port = await suite.start({
      routes: {
        '/': async ({ node }) => {
          const response = node?.response ?? suite.fail()
          await suite.insertHeld(lock, 'a')
          states.push(response.write('one'), response.headersSent, response.writableEnded)
          await once(response, 'drain')
          assert.ok(await suite.committed('a'))
          states.push(response.write('two'))
          response.end('three')
          states.push(response.writableEnded)
          return undefined
        },
      },
    })
    const client = await suite.open(port)
    client.send({ path: '/' })
    await suite.waitsInCommit()
    assert.equal(client.pending, '')
    await lock.release()
    assert.equal((await client.answer()).body, 'onetwothree')
    assert.deepEqual(states, [false, true, false, true, true])
  }),

  defineOnNode('H5 sends trailers after the body', async (suite) => {
    const port = await suite.start({
      routes: {
        '/': async ({ node }) => {
          const response = node?.response ?? suite.fail()
          response.writeHead(200, { trailer: 'x-sum' })
          await suite.insert('a')
          response.write('body')
          response.addTrailers({ 'x-sum': '4' })
          response.end()
          return undefined
        },
      },
    })
    const { body, trailers } = await suite.ask(port, { path: '/' })
    assert.deepEqual([body, trailers], ['body', { 'x-sum': ['4'] }])
  }),

  defineOnNode('H5 lets `end` in an open block wait for the block', async (suite) => {
    const [ended, goOn] = [gate(), gate()]
    const port = await suite.start({
      routes: {
        '/': async ({ node }) => {
          await suite.main.ambient.atomic(async () => {
            await suite.insert('a')
            node?.response.end('good')
            assert.deepEqual([node?.response.headersSent, node?.response.writableEnded], [true, true])
            ended.open()
            await goOn.opened
            await suite.insert('b')
          })
          return undefined
        },
      },
    })
    const client = await suite.open(port)
    client.send({ path: '/' })
    await ended.opened
    await suite.witness('select 1')
    assert.deepEqual([client.pending, await suite.rows()], ['', []])
    goOn.open()
    await client.firstByte()
    assert.deepEqual(await suite.rows(), ['a', 'b'])
    assert.equal((await client.answer()).body, 'good')
  }),

  defineOnNode('H5 refuses write and flushHeaders in an open block', async (suite) => {
    const { codes, attempt } = attempts()
    const port = await suite.start({
      routes: {
        '/': async ({ node }) => {
          await suite.main.ambient.atomic(async () => {
            await suite.insert('a')
            attempt(() => node?.response.write('early'))
            attempt(() => node?.response.flushHeaders())
          })
          await suite.main.ambient.newSession((session) =>
            session.savepoint(() => attempt(() => node?.response.write('good'))),
          )
          node?.response.end()
          return undefined
        },
      },
    })
    const { status, body } = await suite.ask(port, { path: '/' })
    assert.deepEqual([status, body], [200, 'good'])
    assert.deepEqual(codes, ['AMBIENT_RESPONSE_IN_BLOCK', 'AMBIENT_RESPONSE_IN_BLOCK'])
    assert.deepEqual(await suite.rows(), ['a'])
  }),

  defineOnNode('H5 never settles for 1xx', async (suite) => {
    const port = await suite.start({
      routes: {
        '/': async ({ node }) => {
          await suite.insert('a')
          node?.response.writeProcessing()
          node?.response.writeEarlyHints({ link: '</style.css>; rel=preload' })
          await suite.insert('b')
          return { status: 500, body: 'rolled back' }
        },
      },
    })
    const { status, interim } = await suite.ask(port, { path: '/' })
    assert.deepEqual([status, interim], [500, [102, 103]])
    assert.deepEqual(await suite.rows(), [])
  }),

  defineOnNode('H1 ignores what the failed handler goes on to write', async (suite) => {
    const callbacks: unknown[] = []
    const note = (error?: unknown) => callbacks.push((error as { code?: string }).code)
    const finished = gate()
    const port = await suite.start({
      routes: {
        '/': async ({ node }) => {
          const response = node?.response ?? suite.fail()
          await suite.insertDoomed()
          response.setHeader('x-first', 'yes')
          response.write('one', note)
          await suite.until('the failure', () => suite.errors.length > 0)
          response.statusMessage = 'First'
          response.setHeader('x-late', 'yes')
          response.write('two', note)
          response.addTrailers({ 'x-trailer': 'yes' })
          response.end('three', note)
          response.destroy()
          finished.open()
          return undefined
        },
        '/next': async () => ({ body: await suite.insert('next') }),
      },
    })
    const client = await suite.open(port)
    client.send({ path: '/' })
    const { status, headers, body } = await client.answer()
    assert.deepEqual([status, headers['x-first'], headers['x-late']], [500, undefined, undefined])
    assert.doesNotMatch(body, /one|two|three/)
    await finished.opened
    await suite.until('the callbacks', () => callbacks.length === 3)
    assert.deepEqual(callbacks, ['23503', '23503', '23503'])
    assert.equal(suite.errors.length, 1)
    client.send({ path: '/next' })
    assert.equal((await client.answer()).body, 'next')
  }),

  defineOnNode('H1 refuses what is sent past the response while there is something to commit', async (suite) => {
    const { codes, attempt } = attempts()
    const answer = 'HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\npast'
    const port = await suite.start({
      routes: {
        '/': async ({ node }) => {
          const { request, response } = node ?? suite.fail()
          await suite.insert('a')
          attempt(() => response.socket?.write(answer))
          attempt(() => request.socket.write(Buffer.from(answer)))
          attempt(() => response.socket?.end(answer))
          await newContext(async () => attempt(() => response.socket?.write(answer)))
          response.writeProcessing()
          return { body: 'good' }
        },
        '/untouched': async ({ node }) => {
          const { response } = node ?? suite.fail()
          response.socket?.end(answer)
          return undefined
        },
      },
    })
    const client = await suite.open(port)
    client.send({ path: '/' })
    const { body, interim } = await client.answer()
    assert.deepEqual([body, interim], ['good', [102]])
    assert.deepEqual(codes, Array<string>(4).fill('AMBIENT_RESPONSE_BYPASSED'))
    assert.deepEqual(await suite.rows(), ['a'])
    client.send({ path: '/untouched' })
    assert.equal((await client.answer()).body, 'past')
  }),

  defineOnNode('H6 keeps the context in raw events of the request', async (suite) => {
    const port = await suite.start({
      routes: {
        '/': async ({ node }) => {
          const request = node?.request ?? suite.fail()
          const id = await new Promise<string>((resolve, reject) => {
            let text = ''
            request.on('data', (chunk) => {
              text += chunk
            })
            request.on('end', () => suite.insert(text).then(resolve, reject))
          })
          return { body: id }
        },
      },
    })
    const client = await suite.open(port)
    client.socket.write('POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\nexpect: 100-continue\r\n\r\n')
    await client.arrival('100 Continue')
    client.socket.write('later')
    assert.equal((await client.answer()).status, 200)
    assert.ok(await suite.committed('later'))
  }),

  defineOnNode('H4 rolls back when the handler itself destroys the response or its socket', async (suite) => {
    const port = await suite.start({
      routes: {
        '/response': async ({ node }) => {
          await suite.insert('a')
          node?.response.destroy()
          return undefined
        },
        '/socket': async ({ node }) => {
          await suite.insert('b')
          node?.response.socket?.destroy()
          return undefined
        },
      },
    })
    for (const path of ['/response', '/socket']) {
      const client = await suite.open(port)
      client.send({ path })
      await client.closed
    }
    await suite.until('the rollbacks', async () => (await suite.openTransactions()) === 0)
    assert.deepEqual(await suite.rows(), [])
  }),
]

/** What a case works with: one run of the suite against one harness. */
class Suite {
  readonly main: SuiteDatabase
  readonly other: SuiteDatabase
  readonly #harness: FrameworkHarness
  readonly #servers: SuiteServer[] = []
  readonly #clients: RawClient[] = []
  readonly #locks: number[] = []
  /** Contexts that were opened, and those of them that have not ended. */
  contexts = 0
  readonly #open = new Set<number | undefined>()

  constructor(harness: FrameworkHarness) {
    this.#harness = harness
    this.main = harness.main
    this.other = harness.other
  }

  /** Runs `body`, and looks that it left nothing behind. */
  async run(body: (suite: Suite) => Promise<void>): Promise<void> {
    const onContext = (message: unknown) => {
      const { type, contextId } = message as ContextEvent // what this channel carries
      if (type === 'opened') {
        this.contexts++
        this.#open.add(contextId)
      } else this.#open.delete(contextId)
    }
    await this.#createTables()
    subscribe('ambient-db:context', onContext)
    try {
      const limit = 2 * this.#patience
      await bounded(body(this), limit, () => new Error(`not done after ${limit} ms`))
      await this.until('the end of every context', () => this.#open.size === 0)
      await this.until('the end of every transaction', async () => (await this.openTransactions()) === 0)
    } finally {
      unsubscribe('ambient-db:context', onContext)
      for (const client of this.#clients) client.destroy()
      for (const server of this.#servers) await server.close()
      for (const key of this.#locks) await this.witness('select pg_advisory_unlock($1)', [key])
    }
  }

  get #patience(): number {
    return this.#harness.patience ?? 5_000
  }

  get errors(): readonly unknown[] {
    return this.#servers.flatMap(({ errors }) => errors)
  }

  async start(app: SuiteApp): Promise<number> {
    const server = await this.#harness.start(app)
    this.#servers.push(server)
    return server.port
  }

  async open(port: number): Promise<RawClient> {
    const client = await RawClient.open(port)
    this.#clients.push(client)
    return client
  }

  async ask(port: number, request: RawRequest): Promise<RawAnswer> {
    const client = await this.open(port)
    client.send({ ...request, headers: { connection: 'close', ...request.headers } })
    return client.answer(request.method)
  }

  query(sql: string, parameters?: unknown[]): Promise<Row[]> {
    return this.main.query(sql, parameters)
  }

  stream(sql: string): Promise<Readable> {
    return this.main.stream(sql)
  }

  witness(sql: string, parameters?: unknown[]): Promise<Row[]> {
    return this.main.witness(sql, parameters)
  }

  async insert(id: string): Promise<string> {
    await this.query('insert into suite_rows values ($1)', [id])
    return id
  }

  /** Inserts a row whose COMMIT waits for the lock. */
  async insertHeld({ key }: Lock, id: string): Promise<void> {
    await this.insert(id)
    await this.query('insert into suite_held values ($1)', [key])
  }

  /** Inserts a row whose COMMIT fails. */
  async insertDoomed(): Promise<string> {
    await this.query('insert into suite_doomed values (1)')
    return 'doomed'
  }

  async show(setting: string): Promise<string> {
    const [row] = await this.query('select current_setting($1) as value', [setting])
    return String(row?.value)
  }

  async rows(): Promise<unknown[]> {
    return (await this.witness('select id from suite_rows order by id')).map(({ id }) => id)
  }

  async committed(id: string): Promise<boolean> {
    return (await this.rows()).includes(id)
  }

  async lock(): Promise<Lock> {
    const key = Math.floor(Math.random() * 2 ** 40)
    await this.witness('select pg_advisory_lock($1)', [key])
    this.#locks.push(key)
    return {
      key,
      release: async () => {
        await this.witness('select pg_advisory_unlock($1)', [this.#locks.splice(this.#locks.indexOf(key), 1)[0]])
      },
    }
  }

  async openTransactions(): Promise<number> {
    const sql =
      'select 1 from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid() and xact_start is not null'
    return (await Promise.all([this.main, this.other].map(({ witness }) => witness(sql)))).flat().length
  }

  /** Connections that wait for an advisory lock. */
  async waitingBackends(): Promise<Row[]> {
    return this.witness(
      `select pid, query from pg_stat_activity where datname = current_database() and wait_event = 'advisory'`,
    )
  }

  /** Resolves with the connection that waits in COMMIT. */
  async waitsInCommit(): Promise<unknown> {
    let pid: unknown
    await this.until('COMMIT to wait for the lock', async () => {
      const [waiting] = await this.waitingBackends()
      pid = waiting?.pid
      return /^commit/i.test(String(waiting?.query))
    })
    await nextTurn() // what left before has been read by the client: it may have been ready in the same turn as the witness
    return pid
  }

  async until(what: string, holds: () => boolean | Promise<boolean>): Promise<void> {
    for (const deadline = Date.now() + this.#patience; !(await holds()); await nextTurn()) {
      if (Date.now() > deadline) assert.fail(`waited in vain for ${what}`)
    }
  }

  fail(): never {
    assert.fail('the harness gives no node objects')
  }

  async #createTables(): Promise<void> {
    for (const { witness } of [this.main, this.other]) {
      await witness('create table if not exists suite_rows (id text primary key)')
      await witness('create table if not exists suite_parents (id int primary key)')
      await witness(
        'create table if not exists suite_doomed (parent int references suite_parents deferrable initially deferred)',
      )
      await witness('create table if not exists suite_held (key bigint)')
      await witness(
        `create or replace function suite_wait() returns trigger language plpgsql
           as $$ begin perform pg_advisory_xact_lock(new.key); return null; end $$`,
      )
      await witness('drop trigger if exists suite_wait on suite_held')
      await witness(
        `create constraint trigger suite_wait after insert on suite_held deferrable initially deferred
           for each row execute function suite_wait()`,
      )
      await witness('truncate suite_rows, suite_held, suite_doomed, suite_parents')
    }
  }
}

interface Lock {
  readonly key: number
  release(): Promise<void>
}

function define(name: string, body: (suite: Suite) => Promise<void>, needsNode = false): FrameworkCase {
  return { name, needsNode, run: (harness) => new Suite(harness).run(body) }
}

function defineOnNode(name: string, body: (suite: Suite) => Promise<void>): FrameworkCase {
  return define(name, body, true)
}

interface Gate<Value> {
  readonly opened: Promise<Value>
  readonly open: (value: Value) => void
}

function gate<Value = void>(): Gate<Value> {
  let open: (value: Value) => void = () => {}
  const opened = new Promise<Value>((resolve) => {
    open = resolve
  })
  return { opened, open }
}

/** Notes the code of what each attempt throws. */
function attempts(): { codes: unknown[]; attempt(act: () => unknown): void } {
  const codes: unknown[] = []
  const attempt = (act: () => unknown) => {
    try {
      act()
    } catch (error) {
      codes.push((error as { code?: unknown }).code)
    }
  }
  return { codes, attempt }
}

/** Leaves the turn after each piece: a server that reads on without a pause would never hear that the client has gone. */
async function* endless(): AsyncGenerator<string> {
  for (;;) {
    yield 'x'.repeat(10_000)
    await nextTurn()
  }
}
