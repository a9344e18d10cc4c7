import { describe, expect, it } from 'vitest'
import { createDatabase } from '../../../test/support/postgres.ts'
import { testScenarios } from './scenarios.contract.ts'

describe('the scenarios on PostgreSQL', () => {
  const scenarios = testScenarios(async () => {
    const database = await createDatabase()
    const { rows } = database.witness
    return {
      url: database.url,
      looksInside: true,
      journal: async () => {
        const journal = await rows<{ text: string }>('select text from ambient_db_quickstart.journal order by id')
        return journal.map(({ text }) => text)
      },
      clear: async () => void (await rows('delete from ambient_db_quickstart.journal')),
      openTransactions: async () => {
        const backends = await database.backends()
        return backends.filter(({ transactionStart }) => transactionStart !== null).length
      },
      close: database.drop,
    }
  })

  it('run several sessions at once, each on its own connection', async () => {
    const open: number[] = []
    scenarios.slowWork = async () => void open.push(await scenarios.subject.openTransactions())
    expect(await scenarios.post('/several-at-once')).toMatchObject({ status: 201 })
    expect(open).toEqual([1]) // the others have ended
    expect((await scenarios.subject.journal()).sort()).toEqual([
      'of a context',
      'of a context, by hand',
      'of a session',
      'of a session, by hand',
      'of the request',
    ])
  })

  it('keep what the other sessions committed if the request fails', async () => {
    scenarios.slowWork = () => Promise.reject(new Error('The work after it failed.'))
    expect(await scenarios.post('/several-at-once')).toMatchObject({ status: 500 })
    expect((await scenarios.subject.journal()).sort()).toEqual([
      'of a context',
      'of a context, by hand',
      'of a session',
      'of a session, by hand',
    ])
  })
})
