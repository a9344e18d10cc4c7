export const ending = new AbortController()

process.once('SIGTERM', () => {
  ending.abort() // its signal goes to the contexts that shall not be waited for
  void main.shutdown() // lets the others finish, for `settleTimeout` at most
})
