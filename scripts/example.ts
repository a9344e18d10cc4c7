// npm run example -- <name>: starts an example, on the package as it was built.
import { readdirSync } from 'node:fs'

const names = readdirSync(new URL('../examples', import.meta.url)).filter((name) => name !== 'express-kysely')
const name = process.argv[2]
if (!name || !names.includes(name)) {
  console.error(`npm run example -- ${names.join(' | ')}`)
  process.exit(1)
}
await import(new URL(`../examples/${name}/start.ts`, import.meta.url).href)
