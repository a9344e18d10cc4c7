import { expect, it } from 'vitest'

/** Asks the bank, in whatever way. */
export type Ask = (method: string, path: string, body?: unknown) => Promise<{ status: number; body: unknown }>

/** What holds for the bank, in a sandbox and with real commits. */
export function testBank(ask: Ask): void {
  const post = async (path: string, body: unknown) => (await ask('POST', path, body)).status
  const balances = async () => (await ask('GET', '/accounts')).body
  const openAccounts = async () => {
    expect(await post('/accounts', { id: 'ann', balance: 10 })).toBe(201)
    expect(await post('/accounts', { id: 'bob', balance: 0 })).toBe(201)
  }

  it('transfers all or nothing', async () => {
    await openAccounts()
    expect(await post('/transfers', { source: 'ann', target: 'bob', amount: 7 })).toBe(201)
    expect(await balances()).toEqual({ ann: 3, bob: 7 })
    expect(await post('/transfers', { source: 'ann', target: 'bob', amount: 7 })).toBe(409)
    expect(await balances()).toEqual({ ann: 3, bob: 7 })
  })

  it('answers no success for what is refused at COMMIT', async () => {
    await openAccounts()
    expect(await post('/transfers', { source: 'ann', target: 'eve', amount: 1 })).toBe(422)
    expect(await balances()).toEqual({ ann: 10, bob: 0 })
  })

  it('transfers side by side without losing any', async () => {
    await openAccounts()
    const transfers = Array.from({ length: 12 }, () => post('/transfers', { source: 'ann', target: 'bob', amount: 1 }))
    expect((await Promise.all(transfers)).sort()).toEqual([...Array<number>(10).fill(201), 409, 409])
    expect(await balances()).toEqual({ ann: 0, bob: 10 })
  })
}
