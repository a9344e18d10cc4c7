import { type SQL, sql } from 'drizzle-orm'

/** SQL with the placeholders of a driver as Drizzle has it. */
export function statement(text: string, parameters: unknown[] = []): SQL {
  const [first = '', ...rest] = text.split(parameters.length > 0 ? /\$\d|\?/ : /(?!)/)
  const chunks = rest.flatMap((part, index) => [sql`${parameters[index]}`, sql.raw(part)])
  return sql.join([sql.raw(first), ...chunks])
}
