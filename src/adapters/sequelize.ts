import type { Sequelize } from 'sequelize'
import { type Adapter, callFactory } from '../adapter.ts'
import { detach } from '../context.ts'
import { byDriver, type ChosenDriver } from '../driver-choice.ts'
import { ambientSequelize, type Part } from './sequelize/handle.ts'
import { type ConnectionManager, type Inside, inside, type RawConnection, unsupported } from './sequelize/inside.ts'
import { parentOf } from './sequelize/turn.ts'

/**
 * The adapter for Sequelize 6, with its dialects `postgres` (on `pg`) and `mysql` (on `mysql2`). The handle is a Sequelize for models
 * to be defined on, of which every query finds the session when it runs; `db.transaction()`, with a callback or without, is a
 * savepoint of the session.
 *
 * @param factory makes the Sequelize whose pool the sessions take their connections from; gets the host if one is configured. It is
 *   called when the first model is defined, connects to nothing then, and defines no models itself.
 * @example
 * ```ts
 * import { defineDatabase, newContext } from 'ambient-db'
 * import { sequelizeAdapter } from 'ambient-db/sequelize'
 * import { DataTypes, Sequelize } from 'sequelize'
 *
 * const main = defineDatabase({
 *   name: 'main',
 *   adapter: sequelizeAdapter(() => new Sequelize(process.env.DATABASE_URL ?? 'postgres://localhost/app', { logging: false })),
 * })
 * const Visit = main.db.define('visit', { path: DataTypes.TEXT })
 * await newContext(() => Visit.create({ path: '/' }))
 * ```
 */
export function sequelizeAdapter<Engine extends Sequelize>(
  factory: (host: string) => Engine,
): Adapter<Engine, Engine, object> {
  const byHost = new Map<string | undefined, Engine>()
  const engines = new WeakSet<Engine>()
  const servers = new WeakMap<Engine, ChosenDriver>()
  const parts = new WeakMap<object, Part>()
  let defined = false
  const engineFor = (host: string | undefined) => {
    const known = byHost.get(host)
    if (known) return known
    const made = detach(() => callFactory(factory, host))
    assertSupported(inside(made))
    byHost.set(host, made)
    return made
  }
  const serverOf = (engine: Engine) => servers.get(engine) as ChosenDriver // createEngine has set it
  const driver = byDriver(serverOf)
  return {
    ...driver,
    capabilities: (engine) => ({ ...driver.capabilities(engine), streaming: false }),
    async createEngine(host) {
      // One that is an engine already is about to be closed (a host that was left), or of another database.
      if (engines.has(engineFor(host))) byHost.delete(host)
      const engine = engineFor(host)
      engines.add(engine)
      servers.set(engine, await makeServer(inside(engine)))
      return engine
    },
    closeEngine: (engine) => engine.close(),
    traits: (error) => driver.traits(parentOf(error) ?? error), // `retry` asks about wrapped ones
    createHandle(statements) {
      const models = defined ? 'none' : 'its own' // after the first one, each is of a session
      defined = true
      return lazy(() => ambientSequelize(() => engineFor(statements.host()), statements, parts, models))
    },
  }
}

/** An object that is made when it is first looked into: the factory is not to be called when the database is defined. */
function lazy<Made extends object>(make: () => Made): Made {
  let known: Made | undefined
  const made = () => {
    known ??= make()
    return known
  }
  return new Proxy({} as Made, {
    get: (_, key) => (key === 'then' ? undefined : Reflect.get(made(), key)), // it may be awaited before there is a host
    has: (_, key) => Reflect.has(made(), key),
    defineProperty: (_, key, property) => Reflect.defineProperty(made(), key, property),
    getOwnPropertyDescriptor: (_, key) => Reflect.getOwnPropertyDescriptor(made(), key),
    getPrototypeOf: () => Reflect.getPrototypeOf(made()),
  })
}

function assertSupported({ options: { dialect, native }, modelManager }: Inside): void {
  if (native || (dialect !== 'postgres' && dialect !== 'mysql')) {
    const what = native ? 'pg-native' : `The dialect '${dialect}' of Sequelize`
    throw unsupported(`${what} is not supported: 'postgres' and 'mysql' are, on pg and mysql2.`)
  }
  if (modelManager.models.length > 0) {
    throw unsupported(
      'The factory defined models, which would bypass the session: define them on `db` of the database.',
    )
  }
}

/** How the adapters of the drivers get along with connections that Sequelize makes. */
async function makeServer({ connectionManager: manager, options }: Inside): Promise<ChosenDriver> {
  const never = () => {
    throw new Error('The pool is that of Sequelize.')
  }
  let last: RawConnection | undefined
  const take = (done: (error: unknown, connection?: object) => void) =>
    manager.getConnection({}).then(
      (connection) => {
        last = pooled(manager, connection)
        done(null, connection)
      },
      (error) => done(error),
    )
  if (options.dialect === 'postgres') {
    const { pgAdapter } = await import('./pg.ts')
    const pool = {
      connect: take,
      get options() {
        return last?.connectionParameters ?? {}
      },
      Client: manager.lib.Client,
    }
    return { driver: pgAdapter(never) as Adapter<unknown, unknown, object>, pool } // it takes of a pool what this one has
  }
  const { mysql2Adapter } = await import('./mysql2.ts')
  const pool = {
    pool: {
      getConnection: take,
      get config() {
        return { connectionConfig: last?.config }
      },
    },
  }
  return { driver: mysql2Adapter(never) as Adapter<unknown, unknown, object>, pool } // likewise
}

/** Gives a connection of Sequelize the ends that connections of the driver's own pool have. */
function pooled(manager: ConnectionManager, connection: RawConnection): RawConnection {
  if (connection.release) return connection
  const { end, destroy } = connection
  const discard = () => {
    manager.destroyConnection(connection).catch(() => {}) // it is gone either way
  }
  return Object.assign(connection, {
    release: (broken?: Error) => (broken ? discard() : manager.releaseConnection(connection)),
    /** Waits for no farewell of the server, as the pool would, and with it whoever waits for the pool. */
    end(done?: () => void) {
      end.call(connection)
      done?.()
    },
    ...(destroy && {
      destroy() {
        destroy.call(connection)
        discard()
      },
    }),
  })
}
