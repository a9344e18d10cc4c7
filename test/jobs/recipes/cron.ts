import { isAmbientError, newContext } from 'ambient-db'

export async function nightly(): Promise<void> {
  try {
    await newContext(() => main.db.deleteFrom('users').where('name', '=', '').execute(), { timeout: 600_000 })
  } catch (error) {
    if (isAmbientError(error, 'AMBIENT_COMMIT_UNKNOWN')) return // nothing lost: it runs again tomorrow
    throw error
  }
}
