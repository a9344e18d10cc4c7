import { readFileSync } from 'node:fs'
import { defineDatabase } from 'ambient-db'
import type { AdapterHarness } from 'ambient-db/conformance'
import { describe, expect, it } from 'vitest'
import { type MemoryHandle, MemoryStore, memoryAdapter } from './memory-adapter.ts'
import { itHoldsTheSuite } from './support.ts'

/** All engines reach the same numbers, so there is one store; each has its own end. */
let shared = new MemoryStore()
let engines: { host: string | undefined; closed: boolean }[] = []

const harness: AdapterHarness<MemoryHandle> = {
  capabilities: memoryAdapter(() => shared).capabilities(shared),
  define({ connections: _, ...options } = {}) {
    const adapter = memoryAdapter(() => shared)
    const noted = new WeakMap<object, (typeof engines)[number]>()
    return defineDatabase({
      name: 'main',
      ...options,
      adapter: {
        ...adapter,
        createEngine(host) {
          const engine = Object.create(shared) as MemoryStore
          const note = { host, closed: false }
          noted.set(engine, note)
          engines.push(note)
          return bindTo(engine, shared)
        },
        closeEngine: async (engine) => {
          const note = noted.get(engine)
          if (note) note.closed = true
        },
      },
    })
  },
  async reset() {
    shared = new MemoryStore()
    engines = []
  },
  engines: () =>
    engines.map(({ host, closed }) => ({
      host,
      open: closed ? 0 : 1,
      busy: shared.inTransaction ? 1 : 0,
      closed,
    })),
  insert: (handle, id) => handle.add(id),
  ids: (handle) => handle.list(),
  fail: (handle) => handle.add(Number.NaN),
  witness: async () => shared.committed,
}

/** An object of its own whose methods are those of the store. */
function bindTo(engine: MemoryStore, store: MemoryStore): MemoryStore {
  for (const name of ['add', 'list', 'begin', 'keep', 'undo'] as const) {
    Object.defineProperty(engine, name, { value: store[name].bind(store) })
  }
  return engine
}

describe('the adapter of docs/write-an-adapter.md holds the suite', () => {
  itHoldsTheSuite(() => harness)
})

it('the guide shows the adapter that is tested', () => {
  const shown = readFileSync('docs/write-an-adapter.md', 'utf8')
  expect(shown).toContain(readFileSync(new URL('memory-adapter.ts', import.meta.url), 'utf8').trim())
})
