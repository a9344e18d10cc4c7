import { isAmbientError } from 'ambient-db'
import { databaseContext } from 'ambient-db/hono'
import { Hono } from 'hono'
import { balances, open, Refused, transfer } from './bank.ts'

export const app = new Hono()

app.onError((error, context) => {
  if (error instanceof Refused) return context.json({ error: error.message }, 409)
  // The target of a transfer is checked at COMMIT: the handler had already answered 201.
  if ((error as { code?: unknown }).code === '23503') return context.json({ error: 'There is no such account.' }, 422)
  if (isAmbientError(error) && error.statusCode === 503) return context.json({ error: 'Try again.' }, 503)
  return context.json({ error: 'Something went wrong.' }, 500)
})

app.use(databaseContext({ transaction: ({ method }) => (method === 'GET' ? { readOnly: true } : undefined) }))

app.get('/accounts', async (context) => context.json(await balances()))

app.post('/accounts', async (context) => {
  const { id, balance } = await context.req.json<{ id: string; balance: number }>()
  await open(id, balance)
  return context.json({ id, balance }, 201) // COMMIT comes first
})

app.post('/transfers', async (context) => {
  const { source, target, amount } = await context.req.json<{ source: string; target: string; amount: number }>()
  await transfer(source, target, amount)
  return context.json({ source, target, amount }, 201)
})
