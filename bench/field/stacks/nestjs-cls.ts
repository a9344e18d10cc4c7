import 'reflect-metadata'
import { Controller, type DynamicModule, Inject, Injectable, Module, Param, Post } from '@nestjs/common'
import { NestFactory } from '@nestjs/core'
import {
  ClsPluginTransactional,
  Propagation,
  Transactional,
  type TransactionalAdapter,
  TransactionHost,
} from '@nestjs-cls/transactional'
import { ClsModule } from 'nestjs-cls'
import type { OpenStack, Work } from '../../../test/truth/field/stack.ts'

/** What the stacks over nestjs-cls differ in: the client, its adapter, and how a repository uses `txHost.tx`. */
export interface Client<Tx> {
  readonly token: string
  readonly client: object
  // biome-ignore lint/suspicious/noExplicitAny: the client and the options of transactions are the adapter's own
  readonly adapter: TransactionalAdapter<any, Tx, any>
  write(tx: Tx, label: string): Promise<unknown>
  close(): Promise<unknown>
}

/**
 * A Nest application with `ClsPluginTransactional`, as the documentation of the plugin builds it. Decorators are called as
 * functions, because this file runs without a compiler: `decorate` does what TypeScript makes of the `@` signs.
 */
export async function openNest<Tx>({ token, client, adapter, write, close }: Client<Tx>): Promise<OpenStack> {
  class MarkService {
    readonly txHost: TransactionHost
    constructor(txHost: TransactionHost) {
      this.txHost = txHost
    }
    write(label: string): Promise<unknown> {
      return write(this.txHost.tx as Tx, label)
    }
    createMark(label: string): Promise<unknown> {
      return this.write(label)
    }
  }
  Injectable()(MarkService)
  Inject(TransactionHost)(MarkService, undefined, 0)
  decorate(MarkService, 'createMark', Transactional())

  class MarkController {
    readonly marks: MarkService
    constructor(marks: MarkService) {
      this.marks = marks
    }
    async create(label: string): Promise<void> {
      await this.marks.createMark(label)
    }
  }
  Controller('marks')(MarkController)
  Inject(MarkService)(MarkController, undefined, 0)
  Param('label')(MarkController.prototype, 'create', 0)
  decorate(MarkController, 'create', Post(':label'))

  class ClientModule {}
  const clients: DynamicModule = {
    module: ClientModule,
    providers: [{ provide: token, useValue: client }],
    exports: [token],
  }
  class AppModule {}
  Module({
    imports: [
      ClsModule.forRoot({
        global: true,
        middleware: { mount: true },
        plugins: [new ClsPluginTransactional({ imports: [clients], adapter })],
      }),
    ],
    controllers: [MarkController],
    providers: [MarkService],
  })(AppModule)

  const app = await NestFactory.create(AppModule, { logger: false })
  await app.init()
  const txHost = app.get(TransactionHost)
  const service = app.get(MarkService)
  const work: Work = {
    write: (label) => service.write(label),
    nested: (inner) => txHost.withTransaction(Propagation.Nested, () => inner(work)),
  }
  return {
    unit: (inner) => txHost.withTransaction(() => inner(work)),
    async serve() {
      await app.listen(0, '127.0.0.1')
      return { url: (await app.getUrl()).replace('[::1]', '127.0.0.1'), close: async () => {} }
    },
    async close() {
      await app.close()
      await close()
    },
  }
}

function decorate(target: { prototype: object }, method: string, decorator: MethodDecorator): void {
  const descriptor = Object.getOwnPropertyDescriptor(target.prototype, method)
  if (!descriptor) throw new Error(`There is no method ${method}.`)
  Object.defineProperty(target.prototype, method, decorator(target.prototype, method, descriptor) ?? descriptor)
}
