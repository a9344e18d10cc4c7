import { isDeepStrictEqual } from 'node:util'
import { engine } from './database.ts'
import { answered, check, closing, holds, opening, sent, step, tell } from './narrator.ts'
import type { NewOrder } from './orders.ts'
import type { LabelPrinter } from './printer.ts'
import type { Holdings, Witness } from './witness.ts'

export interface Sights {
  /** Where the service listens. */
  readonly url: string
  readonly printer: LabelPrinter
  readonly witness: Witness
  /** What the service has logged since the last call. */
  readonly takeLog: () => unknown[]
}

interface Answer {
  /** 0 if there was none. */
  readonly status: number
  readonly body: unknown
}

/** Sends requests to the service and shows what becomes of them; true if all of it is as it should be. */
export async function runTour({ url, printer, witness, takeLog }: Sights): Promise<boolean> {
  let now = await witness.look()

  async function send(path: string, order: NewOrder, signal?: AbortSignal): Promise<Answer> {
    const timeout = AbortSignal.timeout(5000)
    try {
      const response = await fetch(`${url}${path}`, {
        method: 'POST',
        headers: { 'content-type': 'application/json' },
        body: JSON.stringify(order),
        signal: signal ? AbortSignal.any([signal, timeout]) : timeout,
      })
      return { status: response.status, body: await response.json() }
    } catch (error) {
      return { status: 0, body: String(error) }
    }
  }

  /** Sends a request, and shows it and its answer. */
  async function post(path: string, order: NewOrder): Promise<Answer> {
    sent('POST', path, order)
    const answer = await send(path, order)
    answered(answer.status, answer.body)
    return answer
  }

  /** Shows what the database holds now. */
  async function look(): Promise<{ before: Holdings; now: Holdings }> {
    const before = now
    now = await witness.look()
    holds(now, before)
    return { before, now }
  }

  /** Checks that a request was answered with an error and changed nothing. */
  async function checkRefused(answer: Answer, status: number, reason?: RegExp): Promise<void> {
    const log = takeLog().map(String)
    for (const line of log) tell('log', line)
    const { before, now } = await look()
    check(`the answer is ${status}`, answer.status === status)
    if (reason) check('the service logged the reason, once', log.length === 1 && reason.test(log.join()))
    check('the database holds what it held before', isDeepStrictEqual(now, before))
  }

  opening(
    `An order service: Express, Kysely and ${engine === 'sqlite' ? 'SQLite' : 'PostgreSQL'}`,
    'It listens on a port and is sent real requests. What stands beside "database" was read through a second connection,\n' +
      'which sees nothing but what is committed.',
  )

  await step(
    'An order is placed',
    'The handler writes an order and its lines, and takes from the stock. All is committed, and then 201 leaves.',
    async () => {
      const order = { customer: 'Ada', lines: [line('cup', 2), line('teapot', 1)] }
      const { status } = await post('/orders', order)
      const { before, now } = await look()
      check('the answer is 201', status === 201)
      check('the order is there, with both lines', linesOf(now, 'Ada') === 2)
      check(
        'two cups and a teapot have left the stock',
        took(before, now, 'cup') === 2 && took(before, now, 'teapot') === 1,
      )
    },
  )

  await step(
    'Something is out of stock',
    'The order is written and the teapot is taken already when it turns out that there is one vase, not two.\n' +
      'The answer is an error, so all of it is rolled back.',
    async () => {
      const answer = await post('/orders', { customer: 'Ben', lines: [line('teapot', 1), line('vase', 2)] })
      await checkRefused(answer, 409)
    },
  )

  await step(
    'A handler throws',
    'It has a bug: it reads the card of a gift, which may be missing, after it has written the order.',
    async () => {
      const answer = await post('/orders/gift', { customer: 'Cleo', lines: [line('cup', 1)] })
      await checkRefused(answer, 500, /TypeError/)
    },
  )

  await step(
    'The database refuses at COMMIT',
    'The shop knows no unicorn, but this foreign key is checked at COMMIT: both writes succeed, and the handler says 201.\n' +
      'COMMIT is answered before anything leaves. It fails, and the client is told so.',
    async () => {
      const answer = await post('/orders/import', { customer: 'Dan', lines: [line('unicorn', 1)] })
      await checkRefused(answer, 500, /foreign key/i)
    },
  )

  await step(
    'Five customers want the last lamp, all at once',
    'A lamp is taken only where one is left, and each order waits at that until the one before it is committed\n' +
      `(${engine === 'sqlite' ? 'on SQLite transactions take turns' : 'on PostgreSQL the row is locked'}). So exactly one 201 leaves.`,
    async () => {
      const customers = ['Eva', 'Finn', 'Gus', 'Hal', 'Ida']
      const orders = customers.map((customer) => ({ customer, lines: [line('lamp', 1)] }))
      for (const order of orders) sent('POST', '/orders', order)
      const answers = await Promise.all(orders.map((order) => send('/orders', order)))
      for (const [index, { status, body }] of answers.entries()) answered(status, body, `${customers[index]}: `)
      const { before, now } = await look()
      const statuses = answers.map(({ status }) => status).sort()
      check('one answer is 201, four are 409', isDeepStrictEqual(statuses, [201, 409, 409, 409, 409]))
      check('there is one more order', now.orders.length === before.orders.length + 1)
      check('no lamp is left', took(before, now, 'lamp') === 1)
    },
  )

  await step(
    'A client hangs up',
    'This handler commits nothing before the label is printed. The client leaves meanwhile, so the order is rolled back\n' +
      'at once, and the last vase is there for the next customer.',
    async () => {
      const printing = printer.nextJob()
      const client = new AbortController()
      const order = { customer: 'Jan', lines: [line('vase', 1)] }
      sent('POST', '/orders/pickup', order)
      const answer = send('/orders/pickup', order, client.signal)
      const label = await printing
      tell('printer', "prints Jan's label; the vase is taken, nothing is committed")
      client.abort()
      check('the client left without an answer', (await answer).status === 0)
      const next = await post('/orders', { ...order, customer: 'Kim' })
      label.finish()
      const { before, now } = await look()
      check('the answer to the next customer is 201', next.status === 201)
      check('the order of the first is nowhere', linesOf(now, 'Jan') === 0)
      check('the vase is with the second', linesOf(now, 'Kim') === 1 && took(before, now, 'vase') === 1)
      check('the service logged no error', takeLog().length === 0)
    },
  )

  await step(
    'Slow work after an early commit',
    'This handler calls `main.commit()` before the label is printed. The order counts, and the request holds no connection\n' +
      'and no lock: another order of the same item gets through while the label is printed.',
    async () => {
      const printing = printer.nextJob()
      const order = { customer: 'Leo', lines: [line('cup', 1)] }
      let done = false
      sent('POST', '/orders/delivery', order)
      const answer = send('/orders/delivery', order).finally(() => {
        done = true
      })
      const label = await printing
      tell('printer', "prints Leo's label")
      const meanwhile = await look()
      check('the order is there, though its client has no answer yet', linesOf(meanwhile.now, 'Leo') === 1 && !done)
      const other = await post('/orders', { ...order, customer: 'Mia' })
      check('another order got through meanwhile', other.status === 201 && !done)
      label.finish()
      tell('printer', "has printed Leo's label")
      const { status, body } = await answer
      answered(status, body)
      const after = await look()
      check('the answer is 201', status === 201)
      check('both orders are there', linesOf(after.now, 'Leo') === 1 && linesOf(after.now, 'Mia') === 1)
    },
  )

  return closing()
}

function line(item: string, pieces: number) {
  return { item, pieces }
}

/** How many lines the orders of `customer` have. */
function linesOf({ orders }: Holdings, customer: string): number {
  return orders.filter((order) => order.customer === customer).flatMap(({ lines }) => lines).length
}

/** How many pieces of `item` have left the stock. */
function took(before: Holdings, now: Holdings, item: string): number {
  const pieces = ({ stock }: Holdings) => stock.find((each) => each.item === item)?.pieces ?? 0
  return pieces(before) - pieces(now)
}
