import {
  Body,
  Catch,
  Controller,
  type ExecutionContext,
  Get,
  HttpCode,
  Inject,
  Module,
  Param,
  Post,
  SetMetadata,
  Sse,
  UseFilters,
  UseGuards,
  UseInterceptors,
  UsePipes,
} from '@nestjs/common'
import { HttpAdapterHost, NestFactory, Reflector } from '@nestjs/core'
import { ExpressAdapter } from '@nestjs/platform-express'
import { FastifyAdapter } from '@nestjs/platform-fastify'
import { defineDatabase, hasContext, isAmbientError } from 'ambient-db'
import { Atomic, DatabaseContextModule, getHandleToken, InjectHandle } from 'ambient-db/nestjs'
import { pgAdapter } from 'ambient-db/pg'
import { Pool } from 'pg'
import { from, map, tap } from 'rxjs'
import { describe, expect, it } from 'vitest'
import { useNotebook } from './notebook.ts'

const notebook = useNotebook()
const { note, doom, notes, open, ask, closing } = notebook

type Class = new (...args: never[]) => object

/** Applies decorators to a method, from the last to the first, as TypeScript does with `experimentalDecorators`. */
function decorate(target: Class, name: string, ...decorators: unknown[]): void {
  const descriptor = Object.getOwnPropertyDescriptor(target.prototype, name) as PropertyDescriptor
  for (const each of (decorators as MethodDecorator[]).reverse()) each(target.prototype, name, descriptor)
  Object.defineProperty(target.prototype, name, descriptor)
}

/** Applies a decorator to a method as the standard has it. */
function decorateByStandard(target: Class, name: string, decorator: ReturnType<typeof Atomic>): void {
  const context = { kind: 'method', name, static: false, private: false } as unknown as ClassMethodDecoratorContext
  const { value: method } = Object.getOwnPropertyDescriptor(target.prototype, name) as PropertyDescriptor
  Object.defineProperty(target.prototype, name, { value: decorator(method, context) })
}

interface Served {
  readonly port: number
  close(): Promise<void>
  get(token: unknown): unknown
}

async function start(
  platform: 'express' | 'fastify',
  controllers: Class[],
  { filters = [], options = {}, databases = [] as never[] } = {},
): Promise<Served> {
  class App {}
  for (const controller of controllers) Controller()(controller)
  Module({ imports: [DatabaseContextModule.forRoot({ ...options, databases })], controllers })(App)
  const adapter = platform === 'express' ? new ExpressAdapter() : new FastifyAdapter()
  const app = await NestFactory.create(App, adapter as never, { logger: false, forceCloseConnections: true })
  app.useGlobalFilters(...(filters as never[]))
  await app.listen(0, '127.0.0.1')
  closing(() => app.close())
  return {
    port: Number(new URL(await app.getUrl()).port),
    close: () => app.close(),
    get: (token) => app.get(token as string),
  }
}

describe.each(['express', 'fastify'] as const)('on %s', (platform) => {
  it('H1 commits before what a method returns is answered', async () => {
    class Notes {
      async make(body: { id: string }) {
        await note(body.id)
        return { made: body.id }
      }
    }
    Body()(Notes.prototype, 'make', 0)
    decorate(Notes, 'make', Post('notes'))
    const { port } = await start(platform, [Notes])
    const client = await open(port)
    client.send({ method: 'POST', path: '/notes', headers: { 'content-type': 'application/json' }, body: '{"id":"a"}' })
    await client.firstByte()
    expect(await notes()).toEqual(['a'])
    const { status, body } = await client.answer()
    expect([status, body]).toEqual([201, '{"made":"a"}'])
  })

  it('H1 gives a failed commit to the global filters, and leaves nothing of the answer', async () => {
    class Notes {
      async make() {
        await doom()
        return { first: true }
      }
    }
    decorate(Notes, 'make', Post('notes'), HttpCode(202))
    const seen: unknown[] = []
    class Filter {
      catch(
        error: unknown,
        host: { switchToHttp(): { getResponse(): { status(code: number): { send(body: string): void } } } },
      ) {
        seen.push(error)
        host.switchToHttp().getResponse().status(503).send('filtered')
      }
    }
    Catch()(Filter)
    const { port } = await start(platform, [Notes], { filters: [new Filter()] as never[] })
    const { status, body } = await ask(port, { method: 'POST', path: '/notes' })
    expect([status, body, seen]).toEqual([503, 'filtered', [expect.objectContaining({ code: '23503' })]])
  })

  it('H1 is answered by Nest itself where no filter does', async () => {
    class Notes {
      async make() {
        await doom()
        return { first: true }
      }
    }
    decorate(Notes, 'make', Post('notes'))
    const { port } = await start(platform, [Notes])
    const { status, body } = await ask(port, { method: 'POST', path: '/notes' })
    expect([status, JSON.parse(body).statusCode]).toEqual([500, 500])
  })

  it('H3 lets the status of a filter decide', async () => {
    class Known extends Error {}
    class Filter {
      catch(
        _error: unknown,
        host: { switchToHttp(): { getResponse(): { status(code: number): { send(body: string): void } } } },
      ) {
        host.switchToHttp().getResponse().status(202).send('recovered')
      }
    }
    Catch(Known)(Filter)
    class Notes {
      async known() {
        await note('known')
        throw new Known()
      }
      async unknown() {
        await note('unknown')
        throw new Error('no')
      }
    }
    decorate(Notes, 'known', Get('known'), UseFilters(new Filter()))
    decorate(Notes, 'unknown', Get('unknown'), UseFilters(new Filter()))
    const { port } = await start(platform, [Notes])
    expect((await ask(port, { path: '/known' })).status).toBe(202)
    expect((await ask(port, { path: '/unknown' })).status).toBe(500)
    expect(await notes()).toEqual(['known'])
  })

  it('H6 keeps the context in guards, pipes, interceptors and filters, and commits all of it', async () => {
    const seen: string[] = []
    const look = (name: string) => {
      if (hasContext()) seen.push(name)
      return note(name)
    }
    const guard = { canActivate: async () => look('guard').then(() => true) }
    const interceptor = {
      intercept: async (_context: ExecutionContext, next: { handle(): ReturnType<typeof from> }) => {
        await look('before')
        return next.handle().pipe(
          map((value) => [value]),
          tap(() => void look('after')),
        )
      },
    }
    const pipe = { transform: async (value: string) => look('pipe').then(() => value) }
    class Notes {
      async make(id: string) {
        await look('method')
        return id
      }
    }
    Param('id')(Notes.prototype, 'make', 0)
    decorate(Notes, 'make', Get('notes/:id'), UseGuards(guard), UseInterceptors(interceptor), UsePipes(pipe))
    const { port } = await start(platform, [Notes])
    expect((await ask(port, { path: '/notes/a' })).body).toBe('["a"]')
    expect(seen).toEqual(['guard', 'before', 'pipe', 'method', 'after'])
    expect(await notes()).toEqual(['after', 'before', 'guard', 'method', 'pipe'])
  })

  it('H5 sends events after the commit', async () => {
    class Notes {
      async watch() {
        await note('a')
        return from(['one', 'two'].map((data) => ({ data })))
      }
    }
    decorate(Notes, 'watch', Sse('watch'))
    const { port } = await start(platform, [Notes])
    const client = await open(port)
    client.send({ path: '/watch' })
    await client.firstByte()
    expect(await notes()).toEqual(['a'])
    await client.arrival('data: two')
  })

  it('takes its options by the request', async () => {
    class Notes {
      async look() {
        return hasContext()
      }
    }
    decorate(Notes, 'look', Get(['seen', 'skipped']))
    const { port } = await start(platform, [Notes], {
      options: { skip: ({ url }: { url?: string }) => url === '/skipped' },
    })
    expect([(await ask(port, { path: '/seen' })).body, (await ask(port, { path: '/skipped' })).body]).toEqual([
      'true',
      'false',
    ])
  })

  it('injects handles, and shuts the databases down with the app', async () => {
    const { connectionString } = ((await notebook.databases.main.ambient.connect()) as Pool).options
    const main = defineDatabase({ name: 'injected', adapter: pgAdapter(() => new Pool({ connectionString })) })
    class Notes {
      readonly db: Pool
      readonly host: HttpAdapterHost

      constructor(db: Pool, host: HttpAdapterHost) {
        this.db = db
        this.host = host
      }

      async make() {
        await this.db.query(`insert into notes values ('injected')`)
        return this.db === main.db && this.host.httpAdapter.getType() === platform
      }
    }
    InjectHandle('injected')(Notes, undefined, 0)
    Inject(HttpAdapterHost)(Notes, undefined, 1)
    decorate(Notes, 'make', Get('notes'))
    const { port, close, get } = await start(platform, [Notes], { databases: [main] as never[] })
    expect(get(getHandleToken('injected'))).toBe(main.db)
    expect([(await ask(port, { path: '/notes' })).body, await notes()]).toEqual(['true', ['injected']])
    await close()
    await expect(main.connect()).rejects.toSatisfy((error) => isAmbientError(error, 'AMBIENT_SHUT_DOWN'))
  })
})

describe('Atomic', () => {
  async function makeThenFail(make: () => Promise<unknown>): Promise<void> {
    class Notes {
      async both() {
        await make()
        throw new Error('after it')
      }
    }
    decorate(Notes, 'both', Get('both'))
    const { port } = await start('express', [Notes])
    expect((await ask(port, { path: '/both' })).status).toBe(500)
  }

  it('A1 commits when the method returns, as a standard decorator', async () => {
    const { ambient } = notebook.databases.main
    class Notes {
      readonly prefix = 'standard'
      async make(id: string) {
        await note(`${this.prefix} ${id}`)
        return id
      }
    }
    decorateByStandard(Notes, 'make', Atomic(ambient))
    const made = new Notes()
    await makeThenFail(async () => expect(await made.make('a')).toBe('a'))
    expect(await notes()).toEqual(['standard a'])
    expect([made.make.name, made.make.length]).toEqual(['make', 1])
  })

  it('A1 commits when the method returns, as a legacy decorator, with what others said of it', async () => {
    const { ambient } = notebook.databases.main
    class Notes {
      readonly prefix = 'legacy'
      async make(id: string) {
        await note(`${this.prefix} ${id}`)
        return id
      }
    }
    decorate(Notes, 'make', SetMetadata('above', 1), Atomic(ambient), SetMetadata('below', 2))
    const made = new Notes()
    await makeThenFail(async () => expect(await made.make('a')).toBe('a'))
    expect(await notes()).toEqual(['legacy a'])
    const reflector = new Reflector()
    expect([reflector.get('above', made.make), reflector.get('below', made.make)]).toEqual([1, 2])
  })

  it('A1 rolls back when the method throws', async () => {
    const { ambient } = notebook.databases.main
    class Notes {
      async make() {
        await note('a')
        throw new Error('no')
      }
    }
    decorateByStandard(Notes, 'make', Atomic(ambient, { readOnly: false }))
    class Routes {
      async make() {
        await new Notes().make().catch(() => {})
        return 'done'
      }
    }
    decorate(Routes, 'make', Get('make'))
    const { port } = await start('express', [Routes])
    expect((await ask(port, { path: '/make' })).status).toBe(200)
    expect(await notes()).toEqual([])
  })
})
