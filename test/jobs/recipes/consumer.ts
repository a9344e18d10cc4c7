import { newContext } from 'ambient-db'

interface Delivery {
  readonly topic: string
  readonly partition: number
  readonly message: { readonly offset: string; readonly value: Buffer | null }
}

/** Hand it to `consumer.run({ eachMessage })`: the offset moves when it resolves, so after the commit. */
export async function eachMessage({ topic, partition, message }: Delivery): Promise<void> {
  await newContext(async () => {
    const done = main.db.insertInto('doneJobs').values({ id: `${topic}/${partition}/${message.offset}` })
    const { numInsertedOrUpdatedRows: first } = await done
      .onConflict((key) => key.doNothing())
      .executeTakeFirstOrThrow()
    if (!first) return // it came before, and was committed
    await main.db
      .insertInto('users')
      .values({ name: String(message.value) })
      .execute()
  })
}
