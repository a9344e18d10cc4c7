import { type CurrentTransaction, newContext } from 'ambient-db'
import { databaseContext } from 'ambient-db/express'
import express, { type Express } from 'express'
import { db, main } from './database.ts'

/** Writes one line of the journal: like any function of a service, it takes part in whatever surrounds it. */
async function write(text: string): Promise<void> {
  await db.insertInto('journal').values({ text }).execute()
}

/** One route for each way of using a session. `slowWork` stands for what has nothing to do with the database. */
export function createScenarios(slowWork: () => Promise<void>): Express {
  const app = express()
  app.use(databaseContext())

  // The usual one: a connection and BEGIN with the first query, COMMIT before the answer leaves.
  app.post('/basic', async (_request, response) => {
    await write('basic')
    response.sendStatus(201)
  })

  // A function that would be committed with the request is committed now; what follows is a new transaction.
  app.post('/atomic', async (_request, response) => {
    await main.atomic(() => write('inside'))
    await write('after')
    await slowWork()
    response.sendStatus(201)
  })

  // What an atomic block does about a transaction that is open already.
  app.post('/atomic/over/:current', async (request, response) => {
    await write('before')
    await main.atomic(() => write('inside'), { current: request.params.current as CurrentTransaction })
    await slowWork()
    response.sendStatus(201)
  })

  // The same with a block that fails, and a handler that goes on.
  app.post('/atomic/failing/:current', async (request, response) => {
    await write('before')
    const failing = async () => {
      await write('inside')
      throw new Error('The block failed.')
    }
    await main.atomic(failing, { current: request.params.current as CurrentTransaction }).catch(() => undefined)
    response.sendStatus(201)
  })

  // By hand: commit, close, and go on with a new session.
  app.post('/manual', async (_request, response) => {
    const first = main.session()
    await write('first')
    await first.commit() // or main.commit()
    await write('second') // the same session, a new transaction
    await main.commit()
    await main.closeSession()
    await write('third') // a new session
    const second = main.session()
    response.status(201).json({ firstIsClosed: first.closed, secondIsAnother: second !== first })
  })

  // Before long work: nothing is held while it lasts.
  app.post('/early-release', async (_request, response) => {
    await write('before')
    await main.closeSession('commit')
    await slowWork()
    await write('after')
    response.sendStatus(201)
  })

  // At the same time, each on a connection of its own. An engine with one connection refuses it.
  app.post('/several-at-once', async (_request, response) => {
    await Promise.all([
      write('of the request'),
      newContext(() => write('of a context')),
      newContext(async () => {
        await write('of a context, by hand')
        await main.commit()
        await main.closeSession()
      }),
      main.newSession(({ db }) => db.insertInto('journal').values({ text: 'of a session' }).execute()),
      main.newSession(async (session) => {
        await session.db.insertInto('journal').values({ text: 'of a session, by hand' }).execute()
        await session.commit()
      }),
    ])
    await slowWork()
    response.sendStatus(201)
  })

  // With one connection too: the request lets go of its own transaction first, and the others take turns.
  app.post('/several-in-turn', async (_request, response) => {
    await write('of the request')
    await main.commit()
    await Promise.all([
      newContext(() => write('of a context')),
      newContext(() => write('of another')),
      main.newSession(({ db }) => db.insertInto('journal').values({ text: 'of a session' }).execute()),
    ])
    response.sendStatus(201)
  })

  // Rolled back by an exception …
  app.post('/rollback/exception', async () => {
    await write('lost')
    throw new Error('The handler failed.')
  })

  // … by the status of the answer …
  app.post('/rollback/status', async (_request, response) => {
    await write('lost')
    response.sendStatus(422)
  })

  // … or by hand, and the request goes on.
  app.post('/rollback/by-hand', async (_request, response) => {
    await write('lost')
    await main.rollback()
    await write('lost, too')
    await main.session().rollback()
    await write('kept')
    response.sendStatus(201)
  })

  return app
}
