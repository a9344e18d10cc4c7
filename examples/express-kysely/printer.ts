import type { Order } from './orders.ts'

/** A label that is being printed. */
export interface PrintJob {
  finish(): void
}

/** Stands for any slow thing that is no database: a label printer, a payment provider, a mail server. */
export interface LabelPrinter {
  print(order: Order): Promise<string>
  /** Resolves when a label is being printed, and leaves it to the caller when that is done. */
  nextJob(): Promise<PrintJob>
}

/** @param duration milliseconds for a label that nobody waits for. */
export function createPrinter(duration = 2000): LabelPrinter {
  let watcher: ((job: PrintJob) => void) | undefined
  return {
    print: (order) =>
      new Promise((resolve) => {
        const finish = () => resolve(`Order ${order.id}, for ${order.customer}`)
        if (watcher) watcher({ finish })
        else setTimeout(finish, duration)
        watcher = undefined
      }),
    nextJob: () =>
      new Promise((resolve) => {
        watcher = resolve
      }),
  }
}
