import { newContext } from 'ambient-db'
import { type Job, Worker, type WorkerOptions } from 'bullmq'

/** It names three parameters: BullMQ looks at their number, and gives a signal only to those that do. */
export function createUser(job: Job<{ name: string }>, _token?: string, signal?: AbortSignal): Promise<void> {
  return newContext(
    async () => {
      const done = main.db.insertInto('doneJobs').values({ id: String(job.id) })
      const { numInsertedOrUpdatedRows: first } = await done
        .onConflict((key) => key.doNothing())
        .executeTakeFirstOrThrow()
      if (!first) return // a delivery before this one was committed
      await main.db.insertInto('users').values({ name: job.data.name }).execute()
    },
    { signal, timeout: 30_000 },
  )
}

export function startWorker(options: WorkerOptions): Worker<{ name: string }, void> {
  const worker = new Worker<{ name: string }, void>('users', createUser, options)
  worker.on('error', (error) => console.error(error))
  // Another worker may have the job by now.
  worker.on('lockRenewalFailed', (ids) => {
    for (const id of ids) worker.cancelJob(id)
  })
  return worker
}
