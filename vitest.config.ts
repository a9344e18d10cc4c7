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
    include: ['test/**/*.test.ts', 'examples/**/*.test.ts'],
    globalSetup: ['test/support/global-setup.ts'],
    pool: 'forks',
    testTimeout: 15_000,
    hookTimeout: 30_000,
    typecheck: { enabled: true, include: ['test/**/*.test-d.ts'], tsconfig: 'tsconfig.json' },
    coverage: { include: ['src/**/*.ts'] },
  },
})
