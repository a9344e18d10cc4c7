/** How code without a query builder adds a row. */
export const insert = 'insert into marks (label) values ($1)'

/** The label in the path of a request. */
export function labelOf(path = ''): string {
  return path.slice('/marks/'.length)
}
