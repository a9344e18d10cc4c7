// All checks of the repository, or with arguments the tests that they select: `npm test -- pg`.
import { check, stage, summarize, vitest } from './stages.ts'

const selection = process.argv.slice(2)

if (selection.length > 0) {
  await stage(`tests ${selection.join(' ')}`, () => vitest(selection))
} else {
  await stage('types', () => check(['tsc', '--project', 'tsconfig.json'], ['tsc', '--project', 'tsconfig.build.json']))
  const colors = process.stdout.isTTY ? [] : ['--colors=off'] // it does not know NO_COLOR
  await stage('format and lint', () => check(['biome', 'ci', '--error-on-warnings', ...colors]))
  await stage('unused code', () => check(['knip']))
  await stage('build', () => check(['tsdown']))
  await stage('behaviour', () => vitest(['--project=behaviour', '--project=drizzle-next']))
  // One after the other: each brings a load of its own.
  await stage('truth', () => vitest(['--project=truth', '--no-file-parallelism']))
  await stage('package', () => vitest(['--project=package']))
  await stage('documentation', () => vitest(['--project=documentation']))
}
summarize()
