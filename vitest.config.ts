import { defineConfig } from 'vitest/config'
import { publicEntries } from './scripts/entries.ts'

export default defineConfig({
  resolve: {
    // The package by its name is its source: nothing need be built before a test runs.
    alias: publicEntries().map(({ specifier, source }) => ({
      find: new RegExp(`^${specifier}$`),
      replacement: source,
    })),
  },
  test: {
    pool: 'forks',
    maxWorkers: '100%', // the servers of the databases work while a test waits, and the other way round
    testTimeout: 15_000,
    hookTimeout: 30_000,
    coverage: { include: ['src/**/*.ts'] },
    projects: [
      {
        extends: true,
        test: {
          name: 'behaviour',
          include: ['test/**/*.test.ts', 'examples/**/*.test.ts'],
          exclude: ['**/node_modules/**', 'test/package/**', 'test/docs/**', 'test/truth/**'],
          globalSetup: ['test/support/global-setup.ts'],
          typecheck: { enabled: true, include: ['test/**/*.test-d.ts'], tsconfig: 'tsconfig.json' },
        },
      },
      {
        // The release candidate of Drizzle, in place of Drizzle: the same tests.
        extends: true,
        resolve: { alias: [{ find: /^drizzle-orm(?=\/|$)/, replacement: 'drizzle-orm-next' }] },
        test: {
          name: 'drizzle-next',
          include: ['test/adapters/drizzle*.test.ts'],
          exclude: ['test/adapters/drizzle-versions.test.ts'], // what differs
          globalSetup: ['test/support/global-setup.ts'],
        },
      },
      {
        extends: true,
        test: {
          name: 'truth',
          include: ['test/truth/**/*.test.ts'],
          exclude: ['**/node_modules/**'],
          globalSetup: ['test/support/global-setup.ts'],
        },
      },
      {
        extends: true,
        test: {
          name: 'package',
          include: ['test/package/*.test.ts'],
          globalSetup: ['test/package/global-setup.ts'],
          testTimeout: 60_000,
        },
      },
      {
        extends: true,
        test: { name: 'documentation', include: ['test/docs/*.test.ts'], testTimeout: 60_000 },
      },
    ],
  },
})
