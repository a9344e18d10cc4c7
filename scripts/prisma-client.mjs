// Generates the Prisma client that tests and documentation are compiled with, into .tools, when it is not that of the schema and
// of the installed Prisma. It takes about a second, and nothing is downloaded.
import { spawnSync } from 'node:child_process'
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = fileURLToPath(new URL('..', import.meta.url))
const schema = join(root, 'test', 'support', 'prisma', 'schema.prisma')
const cli = join(root, 'node_modules', 'prisma')
const stamp = join(root, '.tools', 'prisma-client', 'generated-from.txt')

/** @param {string} node the Node to run Prisma with */
export function generatePrismaClient(node = process.execPath) {
  const { version } = JSON.parse(readFileSync(join(cli, 'package.json'), 'utf8'))
  const source = `Prisma ${version}\n${readFileSync(schema, 'utf8')}`
  if (read(stamp) === source) return
  const env = {
    ...process.env,
    // Any file that exists: nothing is asked of the schema engine, which Prisma would download without this.
    PRISMA_SCHEMA_ENGINE_BINARY: node,
    PRISMA_HIDE_UPDATE_MESSAGE: '1',
    CHECKPOINT_DISABLE: '1',
  }
  const args = [join(cli, 'build', 'index.js'), 'generate', '--schema', schema]
  const { status, error, stdout, stderr } = spawnSync(node, args, { cwd: root, env, encoding: 'utf8' })
  if (status !== 0) throw new Error(`\`prisma generate\` failed.\n${error?.message ?? `${stderr}${stdout}`}`)
  mkdirSync(dirname(stamp), { recursive: true })
  writeFileSync(stamp, source)
}

function read(path) {
  try {
    return readFileSync(path, 'utf8')
  } catch {
    return undefined
  }
}
