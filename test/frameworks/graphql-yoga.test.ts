import { hasContext } from 'ambient-db'
import { databaseContext } from 'ambient-db/graphql-yoga'
import { createGraphQLError, createSchema, createYoga } from 'graphql-yoga'
import { describe, expect, it } from 'vitest'
import { Context } from '../../src/context.ts'
import { useNotebook } from './notebook.ts'
import { serve } from './support.ts'

const notebook = useNotebook()
const { note, doom, notes, contexts, open, closing } = notebook

const schema = createSchema({
  typeDefs: /* GraphQL */ `
    type Query {
      inside: Boolean
      readOnly: String
    }
    type Mutation {
      make(id: String!): String
      fail(status: Int): String
      doom: String
    }
  `,
  resolvers: {
    Query: {
      inside: () => hasContext(),
      readOnly: async () =>
        (await notebook.databases.main.query('show transaction_read_only'))[0]?.transaction_read_only,
    },
    Mutation: {
      make: async (_parent, { id }) => {
        await note(id)
        return id
      },
      fail(_parent, { status }) {
        throw createGraphQLError('no', { extensions: { http: { status } } })
      },
      doom: async () => {
        await doom()
        return 'first'
      },
    },
  },
})

type Options = Parameters<typeof databaseContext>[0]

function create(options?: Options, times = 1) {
  const logged: unknown[] = []
  const yoga = createYoga({
    schema,
    batching: true,
    plugins: Array.from({ length: times }, () => databaseContext(options)),
    logging: { debug() {}, info() {}, warn() {}, error: (error) => void logged.push(error) },
  })
  const ask = async (query: string | string[], init: RequestInit = {}) => {
    const body = Array.isArray(query) ? query.map((each) => ({ query: each })) : { query }
    const headers = { 'content-type': 'application/json' }
    const response = await yoga.fetch('http://localhost/graphql', {
      ...init,
      method: 'POST',
      headers,
      body: JSON.stringify(body),
    })
    return { status: response.status, body: await response.json() }
  }
  return { yoga, ask, logged }
}

describe('H8 an operation', () => {
  it('is committed before its answer leaves', async () => {
    const server = await serve(create().yoga as Parameters<typeof serve>[0])
    closing(() => server.close())
    const client = await open(server.port)
    const body = JSON.stringify({ query: 'mutation { make(id: "a") }' })
    const headers = { 'content-type': 'application/json' }
    client.send({ method: 'POST', path: '/graphql', headers, body })
    await client.firstByte()
    expect(await notes()).toEqual(['a'])
    expect((await client.answer()).body).toBe('{"data":{"make":"a"}}')
  })

  it('with an error is rolled back as a whole', async () => {
    const { body } = await create().ask('mutation { make(id: "a") fail }')
    expect(body).toMatchObject({ data: { make: 'a', fail: null }, errors: [{ message: 'no' }] })
    expect(await notes()).toEqual([])
  })

  it('whose commit fails has no data, and an error that Yoga masks and logs', async () => {
    const { ask, logged } = create()
    const { body } = await ask('mutation { doom }')
    expect(body).toMatchObject({ errors: [{ message: 'Unexpected error.' }] })
    expect(body.data ?? null).toBeNull()
    expect(JSON.stringify(logged.map(String))).toMatch(/foreign key/)
  })

  it('of a batch is settled by its own result', async () => {
    const { body } = await create().ask([
      'mutation { make(id: "a") }',
      'mutation { make(id: "b") fail }',
      'mutation { doom }',
      'mutation { make(id: "c") }',
    ])
    expect(body).toMatchObject([{ data: { make: 'a' } }, { errors: [{}] }, { errors: [{}] }, { data: { make: 'c' } }])
    expect(await notes()).toEqual(['a', 'c'])
  })

  it('whose client has gone is rolled back', async () => {
    const client = new AbortController()
    const { ask } = create({
      outcome(status) {
        client.abort()
        return status < 400 ? 'commit' : 'rollback'
      },
    })
    await ask('mutation { make(id: "a") }', { signal: client.signal }).catch(() => {})
    expect(await contexts()).toBe(1)
    expect(await notes()).toEqual([])
  })

  it('has one context, however often the plugin stands there', async () => {
    const { body } = await create({}, 2).ask('mutation { make(id: "a") doom }')
    expect(body).toMatchObject({ errors: [{ message: 'Unexpected error.' }] })
    expect([await contexts(), await notes()]).toEqual([1, []])
  })

  it('takes its options by the operation', async () => {
    const { ask } = create({
      transaction: ({ type }) => ({ readOnly: type === 'query' }),
      skip: ({ operationName }) => operationName === 'Skipped',
      outcome: (status) => (status === 404 || status === 200 ? 'commit' : 'rollback'),
    })
    expect((await ask('{ readOnly inside }')).body).toEqual({ data: { readOnly: 'on', inside: true } })
    await ask('mutation { make(id: "a") fail(status: 404) }')
    await ask('mutation { make(id: "b") fail(status: 409) }')
    expect(await notes()).toEqual(['a'])
  })
})

it('C3 an operation yields to a context of the testing tools', async () => {
  const test = new Context({ adoptable: true })
  await test.run(async () => {
    await create().ask('mutation { make(id: "a") }')
    expect(await notes()).toEqual([])
  })
  await test.settle('rollback')
})
