import { databaseContext } from 'ambient-db/fastify'
import fastify, { type FastifyInstance } from 'fastify'
import { inventory, order, stock } from './shop.ts'

export function createApp(): FastifyInstance {
  const app: FastifyInstance = fastify()
  app.register(databaseContext, {
    transaction: ({ method }) => (method === 'GET' ? { isolationLevel: 'repeatable read', readOnly: true } : undefined),
  })

  app.get('/', () => inventory())

  app.put<{ Params: { product: string }; Body: { pieces: number } }>('/products/:product', async (request, reply) => {
    await stock(request.params.product, request.body.pieces)
    return reply.code(201).send({ stocked: request.body.pieces })
  })

  app.post<{ Body: { product: string; customer: string } }>('/orders', async (request, reply) => {
    const placed = await order(request.body.product, request.body.customer)
    if (!placed) return reply.code(409).send({ error: 'Sold out.' })
    if (request.body.customer === 'nobody') throw new Error('Orders need a customer.') // all of it is undone
    return reply.code(201).send({ order: placed.id }) // COMMIT comes first
  })
  return app
}
