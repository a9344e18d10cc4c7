import { db } from './database.ts'

/** The account is empty, or there is none. */
export class Refused extends Error {}

export async function open(id: string, balance: number): Promise<void> {
  await db.query('insert into accounts values ($1, $2)', [id, balance])
}

export async function balances(): Promise<Record<string, number>> {
  const { rows } = await db.query('select id, balance from accounts order by id')
  return Object.fromEntries((rows as { id: string; balance: number }[]).map(({ id, balance }) => [id, balance]))
}

/** Three statements, and no transaction in sight: it is that of the request. */
export async function transfer(source: string, target: string, amount: number): Promise<void> {
  const taken = await db.query(
    'update accounts set balance = balance - $2 where id = $1 and balance >= $2 returning balance',
    [source, amount],
  )
  if (taken.rows.length === 0) throw new Refused(`${source} cannot pay ${amount}.`)
  await db.query('update accounts set balance = balance + $2 where id = $1', [target, amount])
  await db.query('insert into transfers (source, target, amount) values ($1, $2, $3)', [source, target, amount])
}
