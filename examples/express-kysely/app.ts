import { databaseContext } from 'ambient-db/express'
import express, { type ErrorRequestHandler, type Express } from 'express'
import { main } from './database.ts'
import { listOrders, listStock, type NewOrder, type OrderLine, placeOrder, writeOrder } from './orders.ts'
import type { LabelPrinter } from './printer.ts'

export interface Services {
  readonly printer: LabelPrinter
  /** Takes the errors that are nobody's wish: those answered with 500 and above. */
  readonly log: (error: unknown) => void
}

/** The order service. Each request is one transaction: committed before its answer leaves, rolled back if that is an error. */
export function createApp({ printer, log }: Services): Express {
  const app = express()
  app.use(express.json())
  app.use(databaseContext({ transaction: ({ method }) => (method === 'GET' ? { readOnly: true } : undefined) }))

  app.get('/stock', async (_request, response) => {
    response.json(await listStock())
  })

  app.get('/orders', async (_request, response) => {
    response.json(await listOrders())
  })

  app.post('/orders', async (request, response) => {
    const order = await placeOrder(parseOrder(request.body))
    response.status(201).json(order) // COMMIT first, then 201
  })

  // A gift needs a card. This handler has a bug: it finds a missing one when the order is written already.
  app.post('/orders/gift', async (request, response) => {
    const order = await placeOrder(parseOrder(request.body))
    const card: string = request.body.card.trim()
    response.status(201).json({ ...order, card })
  })

  // Orders that a partner has delivered already: nothing leaves the stock.
  app.post('/orders/import', async (request, response) => {
    const order = await writeOrder(parseOrder(request.body))
    response.status(201).json(order)
  })

  // The customer waits for the label. Nothing is committed before it is printed: no customer, no order.
  app.post('/orders/pickup', async (request, response) => {
    const order = await placeOrder(parseOrder(request.body))
    const label = await printer.print(order)
    response.status(201).json({ ...order, label })
  })

  // The order counts at once. While the label is printed the request holds no connection and no lock.
  app.post('/orders/delivery', async (request, response) => {
    const order = await placeOrder(parseOrder(request.body))
    await main.commit()
    const label = await printer.print(order)
    response.status(201).json({ ...order, label })
  })

  app.use(answerErrors(log))
  return app
}

class InvalidOrder extends Error {
  readonly statusCode = 400
}

function parseOrder(body: unknown): NewOrder {
  const { customer, lines } = Object(body) as Partial<NewOrder>
  const valid = typeof customer === 'string' && Array.isArray(lines) && lines.length > 0 && lines.every(isOrderLine)
  if (!valid) throw new InvalidOrder('An order is {"customer":"…","lines":[{"item":"…","pieces":1}]}.')
  return { customer, lines }
}

function isOrderLine(line: unknown): line is OrderLine {
  const { item, pieces } = Object(line) as Partial<OrderLine>
  return typeof item === 'string' && Number.isSafeInteger(pieces) && Number(pieces) > 0
}

/** Errors say by their `statusCode` how they want to be answered; what says nothing is a 500 and none of the client's business. */
function answerErrors(log: Services['log']): ErrorRequestHandler {
  return (error, _request, response, next) => {
    const status: number = error?.statusCode ?? 500
    if (status >= 500) log(error)
    if (response.headersSent) next(error)
    else response.status(status).json({ error: status < 500 ? error.message : 'Something went wrong.' })
  }
}
