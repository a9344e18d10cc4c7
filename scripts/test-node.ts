// The tests on the oldest supported line of Node and on the newest. The types do not depend on it, and the hunts in test/truth
// take minutes each.
import { stage, summarize, vitest } from './stages.ts'

for (const version of ['22.23.3', '26.10.0']) {
  const runner = [process.execPath, 'scripts/bootstrap.mjs', `--node=${version}`]
  const args = [
    '--project=behaviour',
    '--project=drizzle-next',
    '--project=package',
    '--typecheck.enabled=false',
    ...process.argv.slice(2),
  ]
  await stage(`Node ${version}`, () => vitest(args, runner))
}
summarize()
