import { Client } from 'pg'

/** A point that code waits at until the test lets it pass. */
export interface Gate {
  /** Resolves when the gate is open. */
  readonly passed: Promise<void>
  open(): void
}

export function gate(): Gate {
  let open = () => {}
  const passed = new Promise<void>((resolve) => {
    open = resolve
  })
  return { passed, open }
}

/** Resolves when `condition` holds; asks again and again, so that no test need guess how long something takes. */
export async function until(condition: () => boolean | Promise<boolean>, what = 'the condition'): Promise<void> {
  const deadline = performance.now() + 10_000
  while (!(await condition())) {
    if (performance.now() > deadline) throw new Error(`Waited in vain for ${what}.`)
    await new Promise((resolve) => setImmediate(resolve))
  }
}

/** A gate at the database: `select pg_advisory_xact_lock_shared(key)` waits there until it opens. */
export interface DatabaseGate {
  readonly sql: string
  open(): Promise<void>
}

let keys = 0

export async function databaseGate(url: string): Promise<DatabaseGate> {
  const key = ++keys
  const client = new Client({ connectionString: url, application_name: 'gate' })
  await client.connect()
  await client.query('select pg_advisory_lock($1)', [key])
  let ended: Promise<void> | undefined
  return {
    sql: `select pg_advisory_xact_lock_shared(${key})`,
    open: () => {
      ended ??= client.end()
      return ended
    },
  }
}
