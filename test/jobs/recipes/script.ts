import { newContext } from 'ambient-db'

try {
  await newContext(async () => {
    for (const name of ['ann', 'bob']) await main.db.insertInto('users').values({ name }).execute()
  })
} finally {
  await main.shutdown() // otherwise the pool keeps the process alive
}
