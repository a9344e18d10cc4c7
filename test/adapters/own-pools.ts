import { type AmbientDatabase, defineDatabase } from 'ambient-db'
import type { AdapterHarness, EngineProbe, HarnessOptions } from 'ambient-db/conformance'
import type { Adapter } from '../../src/adapter.ts'
import { until } from '../support/gate.ts'

/** An engine of a library that makes its pool itself, and what became of its connections. */
export interface OwnPoolProbe extends EngineProbe {
  readonly living: ReadonlySet<unknown>
}

/** An engine as its library makes it, at once or later. */
interface Opened<Made, Probe> {
  readonly engine: Made
  readonly probe: Probe
}

/** Defines a database; `taken` hears of each engine that is more than what queries are built with, which needs no context. */
export function defineOverOwnPool<Handle, Engine extends object, Made extends Engine | Promise<Engine>, Probe>(
  adapterOf: (factory: (host: string) => Made) => Adapter<Handle, Engine, object>,
  open: (host?: string) => Opened<Made, Probe>,
  options: HarnessOptions<Handle>,
  taken: (probe: Probe) => void,
): AmbientDatabase<Handle, Engine> {
  const probes = new WeakMap<object, Probe>()
  const make = (host?: string): Made => {
    const { engine, probe } = open(host)
    if (engine instanceof Promise) return engine.then((made: Engine) => probes.set(made, probe) && made) as Made
    probes.set(engine, probe)
    return engine
  }
  const adapter = adapterOf(options.host === undefined ? () => make() : (host: string) => make(host))
  const createEngine = async (host: string | undefined) => {
    const engine = await adapter.createEngine(host)
    taken(probes.get(engine) as Probe) // make has set it
    return engine
  }
  return defineDatabase({ name: 'main', ...options, adapter: { ...adapter, createEngine } })
}

/** A harness for a driver, with engines over the pool of a library. */
export function withOwnPools<
  Handle,
  Engine extends object,
  Made extends Engine | Promise<Engine>,
  Harness extends AdapterHarness<Handle>,
>(
  base: Harness,
  adapterOf: (factory: (host: string) => Made) => Adapter<Handle, Engine, object>,
  open: (connections: number, host?: string) => Opened<Made, OwnPoolProbe>,
): Harness {
  let probes: OwnPoolProbe[] = []
  return {
    ...base,
    engines: () => probes,
    async reset() {
      probes = []
      await base.reset()
    },
    async kill() {
      await base.kill?.()
      await until(async () => probes.every(({ living }) => living.size === 0), 'the clients to notice')
    },
    define({ connections = 10, ...options }: HarnessOptions<Handle> = {}) {
      return defineOverOwnPool(
        adapterOf,
        (host) => open(connections, host),
        options,
        (probe) => probes.push(probe),
      )
    },
  }
}
