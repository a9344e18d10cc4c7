import { type DynamicModule, Inject, Module, type NestModule, type OnApplicationShutdown } from '@nestjs/common'
import { HttpAdapterHost } from '@nestjs/core'
import type { AtomicOptions } from '../atomic.ts'
import type { AmbientDatabase } from '../database.ts'
import { AmbientError } from '../errors.ts'
import type { DatabaseContextOptions } from '../request.ts'
import { databaseContext as expressContext } from './express.ts'
import { databaseContext as fastifyContext } from './fastify.ts'

export type { DatabaseContextOptions } from '../request.ts'

/** What {@link DatabaseContextModule.forRoot} takes. */
export interface DatabaseContextModuleOptions<Request = PlatformRequest> extends DatabaseContextOptions<Request> {
  /** Their handles can be injected ({@link InjectHandle}), and they are shut down when the app has closed. */
  readonly databases: readonly AmbientDatabase<unknown, unknown>[]
}

/** What the requests of Express and Fastify have in common. */
export interface PlatformRequest {
  readonly method?: string | undefined
  readonly url?: string | undefined
  readonly headers: Readonly<Record<string, string | string[] | undefined>>
}

const optionsToken = 'ambient-db:options'

/**
 * Gives each request of a NestJS 12 app, on Express or Fastify, a context of its own, which holds in guards, pipes, interceptors,
 * controllers and exception filters. Work is committed before the status line leaves, or rolled back if the status is 400 or more or
 * the client went away. A commit that fails goes to the global exception filters.
 *
 * @example
 * ```ts
 * import { Module } from '@nestjs/common'
 * import { DatabaseContextModule } from 'ambient-db/nestjs'
 *
 * @Module({ imports: [DatabaseContextModule.forRoot({ databases: [main] })] })
 * export class AppModule {}
 * ```
 */
export class DatabaseContextModule implements NestModule, OnApplicationShutdown {
  readonly #host: HttpAdapterHost
  readonly #options: DatabaseContextModuleOptions

  constructor(host: HttpAdapterHost, options: DatabaseContextModuleOptions) {
    this.#host = host
    this.#options = options
  }

  static forRoot<Request = PlatformRequest>(options: DatabaseContextModuleOptions<Request>): DynamicModule {
    const handles = options.databases.map(({ name, db }) => ({ provide: getHandleToken(name), useValue: db }))
    return {
      module: DatabaseContextModule,
      global: true,
      providers: [{ provide: optionsToken, useValue: options }, ...handles],
      exports: handles.map(({ provide }) => provide),
    }
  }

  /** Called by Nest, before it registers any route. */
  configure(): void {
    const { httpAdapter } = this.#host
    if (!httpAdapter) return // an app without HTTP
    const platform: string = httpAdapter.getType()
    if (platform === 'express') httpAdapter.use(expressContext(this.#options))
    else if (platform === 'fastify') httpAdapter.getInstance().register(fastifyContext, this.#options)
    else
      throw new AmbientError('AMBIENT_UNSUPPORTED', `There is no middleware for the platform '${platform}' of NestJS.`)
  }

  /** Called by Nest, when the server has closed. */
  async onApplicationShutdown(): Promise<void> {
    await Promise.all(this.#options.databases.map(({ shutdown }) => shutdown()))
  }
}

Module({})(DatabaseContextModule)
Inject(HttpAdapterHost)(DatabaseContextModule, undefined, 0)
Inject(optionsToken)(DatabaseContextModule, undefined, 1)

/** The token under which the handle of the database with this name can be injected. */
export function getHandleToken(database: string): string {
  return `ambient-db:handle:${database}`
}

/** Injects the handle of the database with this name. */
export function InjectHandle(database: string): PropertyDecorator & ParameterDecorator {
  return Inject(getHandleToken(database))
}

/** A decorator for methods that return promises, of both kinds: with `experimentalDecorators`, and the standard. */
export interface AtomicDecorator {
  <This, Arguments extends unknown[], Result>(
    method: (this: This, ...args: Arguments) => Promise<Result>,
    context: ClassMethodDecoratorContext<This>,
  ): (this: This, ...args: Arguments) => Promise<Result>
  <Method extends (...args: never[]) => Promise<unknown>>(
    prototype: object,
    key: string | symbol,
    descriptor: TypedPropertyDescriptor<Method>,
  ): void
}

/**
 * Runs each call of a method in {@link AmbientDatabase.atomic}: committed when it returns, rolled back when it throws.
 *
 * @example
 * ```ts
 * import { Atomic } from 'ambient-db/nestjs'
 *
 * class Users {
 *   @Atomic(main)
 *   async create(name: string): Promise<void> {
 *     await main.db.insertInto('users').values({ name }).execute()
 *   }
 * }
 * ```
 */
export function Atomic(database: AmbientDatabase<unknown, unknown>, options?: AtomicOptions): AtomicDecorator {
  return function decorate(
    target: object,
    _context: unknown,
    descriptor?: TypedPropertyDescriptor<(...args: never[]) => Promise<unknown>>,
  ) {
    if (!descriptor) return wrap(target as Method)
    if (descriptor.value) descriptor.value = wrap(descriptor.value as Method)
    return undefined
  } as AtomicDecorator

  function wrap(method: Method): Method {
    function atomic(this: unknown, ...args: unknown[]): Promise<unknown> {
      return database.atomic(() => method.apply(this, args), options)
    }
    Object.defineProperty(atomic, 'name', { value: method.name })
    Object.defineProperty(atomic, 'length', { value: method.length })
    copyMetadata(method, atomic)
    return atomic
  }
}

type Method = (...args: unknown[]) => Promise<unknown>

/** What decorators below have said of the method, which Nest keeps by its function. */
function copyMetadata(from: Method, to: Method): void {
  for (const key of Reflect.getMetadataKeys(from)) Reflect.defineMetadata(key, Reflect.getMetadata(key, from), to)
}
