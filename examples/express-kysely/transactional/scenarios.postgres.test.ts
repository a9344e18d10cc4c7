import { describe, expect, it } from 'vitest'
import { createDatabase } from '../../../test/support/postgres.ts'
import { testScenarios } from '../real-commit/scenarios.contract.ts'
import { sandboxed } from './sandboxed.ts'

describe('the scenarios in a sandbox on PostgreSQL', () => {
  const scenarios = testScenarios(async () => {
    const database = await createDatabase()
    return sandboxed(database.url, database.drop)
  })

  it('S11 cannot show several sessions at once inside of a transaction, and say so', async () => {
    expect(await scenarios.post('/several-at-once')).toMatchObject({ status: 500 })
    expect(scenarios.errors).toMatchObject([
      { code: 'AMBIENT_SELF_DEADLOCK', message: expect.stringMatching(/real commits/) },
    ])
  })
})
