import { broken, holds, notApplicable, type Truth } from '../truth.ts'

export const firstByte: Truth = {
  id: 'T8',
  title: 'A success leaves before COMMIT is answered',
  scene:
    'The HTTP handler of the documentation writes a row in a transaction, and the server refuses COMMIT (a deferred constraint). The client must not see a success. A row that is not refused must be there when the status arrives.',
  async judge(stage) {
    const stack = await stage.open(2)
    if (!stack.serve) return notApplicable('shows no HTTP handler with a transaction')
    const server = await stack.serve()
    try {
      const fine = await fetch(`${server.url}/marks/fine`, { method: 'POST' })
      const there = await stage.has('fine')
      const refused = await fetch(`${server.url}/marks/refused`, { method: 'POST' })
      await Promise.all([fine.text(), refused.text()])
      if (!fine.ok) throw new Error(`A request without any fault is answered ${fine.status}.`)
      if (await stage.has('refused')) throw new Error('COMMIT was not refused.')
      if (refused.ok) return broken(`answers ${refused.status}, the row is gone`)
      return there ? holds(`answers ${refused.status}`) : broken(`answers ${fine.status} before the row is there`)
    } finally {
      await server.close()
    }
  },
}
