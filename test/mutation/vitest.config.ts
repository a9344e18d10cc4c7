import { defineConfig } from 'vitest/config'
import { publicEntries } from '../../scripts/entries.ts'

/**
 * The tests of the core: of adapters, and of one middleware for what only middlewares reach. They run in the process that holds
 * the mutant, so those that start a Node of their own see none.
 */
export default defineConfig({
  resolve: {
    alias: publicEntries().map(({ specifier, source }) => ({
      find: new RegExp(`^${specifier}$`),
      replacement: source,
    })),
  },
  test: {
    pool: 'forks',
    testTimeout: 20_000, // a busy machine must not kill
    hookTimeout: 40_000,
    include: ['test/core/**/*.test.ts', 'test/adapters/**/*.test.ts', 'test/frameworks/node-http.test.ts'],
    exclude: ['**/node_modules/**', 'test/core/memory.test.ts', 'test/core/secrets.test.ts'], // they start a Node or a server of their own
    globalSetup: ['test/support/global-setup.ts'],
  },
})
