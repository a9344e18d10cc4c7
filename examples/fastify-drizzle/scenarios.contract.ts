import { beforeEach, expect, it } from 'vitest'

/** Asks the shop, in whatever way. */
export type Ask = (
  method: 'GET' | 'POST' | 'PUT',
  path: string,
  body?: object,
) => Promise<{ status: number; body: unknown }>

/** What holds for the shop, in a sandbox and with real commits. */
export function testShop(ask: Ask, mails: () => string[]): void {
  const order = async (customer: string) => (await ask('POST', '/orders', { product: 'lamp', customer })).status
  const shop = async () => (await ask('GET', '/')).body

  beforeEach(async () => {
    mails().length = 0
    expect((await ask('PUT', '/products/lamp', { pieces: 1 })).status).toBe(201)
  })

  it('sells what is there, and says so once it is sold', async () => {
    expect(await order('ann')).toBe(201)
    expect(await order('bob')).toBe(409)
    expect(await shop()).toEqual({
      products: [{ id: 'lamp', stock: 0 }],
      orders: [{ product: 'lamp', customer: 'ann' }],
    })
    expect(mails()).toEqual(['ann: your lamp is on its way.'])
  })

  it('undoes an order whose handler fails, and tells nobody', async () => {
    expect(await order('nobody')).toBe(500)
    expect(await shop()).toEqual({ products: [{ id: 'lamp', stock: 1 }], orders: [] })
    expect(mails()).toEqual([])
  })

  it('sells the last piece once, to whomever', async () => {
    const answers = await Promise.all(['ann', 'bob', 'cleo', 'dan'].map(order))
    expect(answers.sort()).toEqual([201, 409, 409, 409])
    expect(mails()).toHaveLength(1)
  })
}
