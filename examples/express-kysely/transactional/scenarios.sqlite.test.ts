import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { describe } from 'vitest'
import { testScenarios } from '../real-commit/scenarios.contract.ts'
import { sandboxed } from './sandboxed.ts'

describe('the scenarios in a sandbox on SQLite', () => {
  testScenarios(async () => {
    const folder = await mkdtemp(join(tmpdir(), 'ambient-db-scenarios-'))
    const url = pathToFileURL(join(folder, 'test.db'))
    return sandboxed(url.href, () => rm(folder, { recursive: true }))
  })
})
