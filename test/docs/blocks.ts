/** One TypeScript code block of the documentation. */
export interface Block {
  /** The file that shows it. */
  readonly file: string
  /** The number of its first line of code in that file. */
  readonly line: number
  readonly code: readonly string[]
  /** Whether it goes on from the block before it: its fence says `ts continued`. */
  readonly continued: boolean
}

const languages = ['ts', 'typescript', 'mts', 'cts']

/** The TypeScript blocks of a Markdown text. */
export function markdownBlocks(file: string, text: string): Block[] {
  return fencedBlocks(file, text.split('\n'))
}

/** The TypeScript blocks of the doc comments in a source text. */
export function docCommentBlocks(file: string, text: string): Block[] {
  let inside = false
  const lines = text.split('\n').map((line) => {
    if (line.trimStart().startsWith('/**')) inside = true
    const comment = inside ? line.replace(/^\s*\/?\*+\/? ?/, '') : ''
    if (line.includes('*/')) inside = false
    return comment
  })
  return fencedBlocks(file, lines)
}

function fencedBlocks(file: string, lines: readonly string[]): Block[] {
  const blocks: Block[] = []
  let fence: { marks: string; indent: number; language: string; continued: boolean; line: number } | undefined
  for (const [index, text] of lines.entries()) {
    const [, indent = '', marks = '', info = ''] = /^(\s*)(`{3,}|~{3,})\s*(.*)$/.exec(text) ?? []
    if (fence === undefined) {
      const [language = '', ...words] = info.split(/\s+/)
      const continued = words.includes('continued')
      if (marks) fence = { marks, indent: indent.length, language, continued, line: index + 1 }
    } else if (marks.startsWith(fence.marks) && info === '') {
      const { language, line, continued, indent: width } = fence
      const code = lines.slice(line, index).map((each) => each.slice(Math.min(width, each.search(/\S|$/))))
      if (languages.includes(language)) blocks.push({ file, line: line + 1, code, continued })
      fence = undefined
    }
  }
  if (fence) throw new Error(`${file}:${fence.line}: this code block has no end`)
  return blocks
}

/**
 * Each block as a program of its own, that begins with the blocks it goes on from. Every line stands where it stands in
 * the document, so that the compiler's line numbers are the document's.
 */
export function programs(blocks: readonly Block[]): { block: Block; text: string }[] {
  let chain: Block[] = []
  return blocks.map((block) => {
    const previous = chain.at(-1)
    if (block.continued && previous?.file !== block.file) {
      throw new Error(`${block.file}:${block.line}: this code block goes on from no other`)
    }
    chain = block.continued ? [...chain, block] : [block]
    const lines: string[] = []
    for (const { line, code } of chain) {
      while (lines.length < line - 1) lines.push('')
      lines.push(...code)
    }
    return { block, text: `${lines.join('\n')}\n` }
  })
}
