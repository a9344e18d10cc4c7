/** A place in a page that is written by a command, and what stands there. */
export function withSection(page: string, name: string, command: string, text: string): string {
  const begin = `<!-- ${name}: written by ${command} -->`
  const end = `<!-- end of ${name} -->`
  const [before, rest] = page.split(begin)
  const after = rest?.split(end)[1]
  if (before === undefined || after === undefined) throw new Error(`The page has no place for ${name}: ${begin} ${end}`)
  return `${before}${begin}\n\n${text}\n\n${end}${after}`
}

export function table(titles: readonly string[], rows: readonly (readonly string[])[]): string {
  const line = (cells: readonly string[]) => `| ${cells.map((cell) => cell.replaceAll('|', '\\|')).join(' | ')} |`
  return [line(titles), line(titles.map(() => '---')), ...rows.map(line)].join('\n')
}
