import { defineConfig } from 'vitest/config'
import { publicEntries } from '../../scripts/entries.ts'

/** The tests of the core: those that know nothing of web frameworks, and run in the process that holds the mutant. */
export default defineConfig({
  resolve: {
    alias: publicEntries().map(({ specifier, source }) => ({
      find: new RegExp(`^${specifier}$`),
      replacement: source,
    })),
  },
  test: {
    pool: 'forks',
    // Many mutants hang. Shorter than elsewhere, and the controls of a run tell whether it is too short.
    testTimeout: 10_000,
    hookTimeout: 20_000,
    include: ['test/core/**/*.test.ts', 'test/adapters/**/*.test.ts'],
    exclude: ['test/core/memory.test.ts'],
    globalSetup: ['test/support/global-setup.ts'],
  },
})
