import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { DatabaseSync } from 'node:sqlite'
import { pathToFileURL } from 'node:url'
import { describe, expect, it } from 'vitest'
import { testScenarios } from './scenarios.contract.ts'

describe('the scenarios on SQLite', () => {
  const scenarios = testScenarios(async () => {
    const folder = await mkdtemp(join(tmpdir(), 'ambient-db-scenarios-'))
    const url = pathToFileURL(join(folder, 'test.db'))
    const witness = new DatabaseSync(url, { timeout: 0 })
    return {
      url: url.href,
      looksInside: true,
      journal: async () => {
        const journal = witness.prepare('select text from journal order by id').all()
        return journal.map(({ text }) => String(text))
      },
      clear: async () => witness.exec('delete from journal'),
      openTransactions: async () => {
        try {
          witness.exec('begin immediate; rollback') // refused while another transaction can write
          return 0
        } catch {
          return 1
        }
      },
      close: async () => {
        witness.close()
        await rm(folder, { recursive: true })
      },
    }
  })

  it('S11 refuse at once several sessions where the request holds the only connection', async () => {
    expect(await scenarios.post('/several-at-once')).toMatchObject({ status: 500 })
    expect(scenarios.errors).toMatchObject([{ code: 'AMBIENT_SELF_DEADLOCK' }])
    expect(await scenarios.subject.journal()).not.toContain('of the request')
    expect(await scenarios.subject.openTransactions()).toBe(0)
  })
})
