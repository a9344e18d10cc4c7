import { once } from 'node:events'
import { createServer, type Server } from 'node:http'
import type { AddressInfo } from 'node:net'
import { type CurrentTransaction, isAmbientError, newContext } from 'ambient-db'
import type { NextFunction, Request, Response } from 'express'
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { gate } from '../../../test/support/gate.ts'

/** An engine to run the scenarios on, with a second connection to it. */
export interface Subject {
  /** What DATABASE_URL is to be. */
  readonly url: string
  /** The texts that are committed, in the order of their rows. */
  journal(): Promise<string[]>
  clear(): Promise<void>
  /** Whether the journal can be read while the service has a transaction open. */
  readonly looksInside: boolean
  /** After the last scenario, before the service shuts down. */
  leave?(): Promise<void>
  /** How many connections of the service have a transaction open. */
  openTransactions(): Promise<number>
  close(): Promise<void>
}

/** A running service over a subject. */
export interface Scenarios {
  post(path: string): Promise<{ status: number; body: string }>
  /** The errors that the last request was answered with. */
  readonly errors: unknown[]
  /** What a handler calls between its queries. Default is nothing. */
  slowWork: () => Promise<void>
  readonly subject: Subject
}

type Row = readonly [current: CurrentTransaction, kept: string[], keptIfTheRequestFails: string[]]

/** The scenarios that are the same on every engine. */
export function testScenarios(prepare: () => Promise<Subject>): Scenarios {
  let server: Server
  let shutdown: () => Promise<void>
  const scenarios = { errors: [] as unknown[], post, slowWork: async () => {} } as Scenarios & { subject: Subject }

  beforeAll(async () => {
    const subject = await prepare()
    process.env.DATABASE_URL = subject.url
    // These read DATABASE_URL when they are loaded.
    const { main } = await import('../database.ts')
    const { createTables } = await import('../schema.ts')
    const { createScenarios } = await import('../scenarios.ts')
    await newContext(createTables)
    const app = createScenarios(() => scenarios.slowWork())
    app.use((error: unknown, _request: Request, response: Response, _next: NextFunction) => {
      scenarios.errors.push(error)
      response.sendStatus(500)
    })
    server = createServer(app).listen(0, '127.0.0.1')
    await once(server, 'listening')
    shutdown = main.shutdown
    scenarios.subject = subject
  })

  afterAll(async () => {
    server.close()
    await once(server, 'close')
    await scenarios.subject.leave?.()
    await shutdown()
    await scenarios.subject.close()
  })

  beforeEach(async () => {
    await scenarios.subject.clear()
    scenarios.errors.length = 0
    scenarios.slowWork = async () => {}
  })

  async function post(path: string) {
    const { port } = server.address() as AddressInfo
    const response = await fetch(`http://127.0.0.1:${port}${path}`, { method: 'POST' })
    return { status: response.status, body: await response.text() }
  }

  async function failingSlowWork(): Promise<void> {
    throw new Error('The work after it failed.')
  }

  const journal = () => scenarios.subject.journal()

  it('commits before it answers', async () => {
    expect(await post('/basic')).toMatchObject({ status: 201 })
    expect(await journal()).toEqual(['basic'])
    expect(await scenarios.subject.openTransactions()).toBe(0)
  })

  describe('an atomic block', () => {
    it('is durable when it returns, and what follows is another transaction', async (test) => {
      if (!scenarios.subject.looksInside) test.skip('a sandbox has one connection, which the request holds')
      const seen: string[][] = []
      scenarios.slowWork = async () => void seen.push(await journal())
      expect(await post('/atomic')).toMatchObject({ status: 201 })
      expect(seen).toEqual([['inside']])
      expect(await journal()).toEqual(['inside', 'after'])
    })

    it('outlives a failure of the rest of its request', async () => {
      scenarios.slowWork = failingSlowWork
      expect(await post('/atomic')).toMatchObject({ status: 500 })
      expect(await journal()).toEqual(['inside'])
    })

    const rows: Row[] = [
      ['commit', ['before', 'inside'], ['before', 'inside']],
      ['rollback', ['inside'], ['inside']],
      ['append', ['before', 'inside'], ['before', 'inside']],
      ['savepoint', ['before', 'inside'], []],
      ['join', ['before', 'inside'], []],
    ]
    it.each(rows)("with current '%s' over an open transaction leaves %j", async (current, kept) => {
      expect(await post(`/atomic/over/${current}`)).toMatchObject({ status: 201 })
      expect(await journal()).toEqual(kept)
    })

    it.each(rows)(
      "with current '%s' leaves something else if its request fails afterwards",
      async (current, _, kept) => {
        scenarios.slowWork = failingSlowWork
        expect(await post(`/atomic/over/${current}`)).toMatchObject({ status: 500 })
        expect(await journal()).toEqual(kept)
      },
    )

    it("with current 'raise' refuses an open transaction, which its request then loses", async () => {
      expect(await post('/atomic/over/raise')).toMatchObject({ status: 500 })
      expect(scenarios.errors).toEqual([expect.toSatisfy((error) => isAmbientError(error, 'AMBIENT_TRANSACTION_OPEN'))])
      expect(await journal()).toEqual([])
    })

    it.each<[CurrentTransaction, string[]]>([
      ['commit', ['before']],
      ['rollback', []],
      ['append', []],
      ['savepoint', ['before']],
    ])("that fails with current '%s' leaves %j to a handler that goes on", async (current, kept) => {
      expect(await post(`/atomic/failing/${current}`)).toMatchObject({ status: 201 })
      expect(await journal()).toEqual(kept)
    })

    it("that fails with current 'join' takes the request with it, though the handler goes on", async () => {
      expect(await post('/atomic/failing/join')).toMatchObject({ status: 500 })
      expect(scenarios.errors).toEqual([
        expect.objectContaining({ code: 'AMBIENT_TRANSACTION_ABORTED', cause: new Error('The block failed.') }),
      ])
      expect(await journal()).toEqual([])
    })
  })

  it('commits and closes by hand, and goes on in a new session', async () => {
    const { status, body } = await post('/manual')
    expect([status, JSON.parse(body)]).toEqual([201, { firstIsClosed: true, secondIsAnother: true }])
    expect(await journal()).toEqual(['first', 'second', 'third'])
  })

  it('holds no connection after an early release, so that others get through', async () => {
    const working = gate()
    const done = gate()
    scenarios.slowWork = () => {
      working.open()
      return done.passed
    }
    const slow = post('/early-release')
    await working.passed
    expect(await journal()).toEqual(['before'])
    expect(await scenarios.subject.openTransactions()).toBe(0)
    expect(await post('/basic')).toMatchObject({ status: 201 })
    done.open()
    expect(await slow).toMatchObject({ status: 201 })
    expect(await journal()).toEqual(['before', 'basic', 'after'])
  })

  it('runs several sessions in turn once the request has let go of its own transaction', async () => {
    expect(await post('/several-in-turn')).toMatchObject({ status: 201 })
    expect((await journal()).sort()).toEqual(['of a context', 'of a session', 'of another', 'of the request'])
  })

  describe('a rollback', () => {
    it('follows an exception', async () => {
      expect(await post('/rollback/exception')).toMatchObject({ status: 500 })
      expect(scenarios.errors).toEqual([new Error('The handler failed.')])
      expect(await journal()).toEqual([])
    })

    it('follows an error status', async () => {
      expect(await post('/rollback/status')).toMatchObject({ status: 422 })
      expect(await journal()).toEqual([])
    })

    it('by hand undoes what was written, and not what is written next', async () => {
      expect(await post('/rollback/by-hand')).toMatchObject({ status: 201 })
      expect(await journal()).toEqual(['kept'])
    })
  })

  return scenarios
}
