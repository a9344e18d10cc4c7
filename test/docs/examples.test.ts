import { spawnSync } from 'node:child_process'
import { copyFileSync, cpSync, globSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { basename, join, resolve } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { generatePrismaClient } from '../../scripts/prisma-client.mjs'
import { type Block, docCommentBlocks, markdownBlocks, programs } from './blocks.ts'

const blocks = [
  ...globSync(['README.md', 'docs/**/*.md'], { exclude: ['**/node_modules'] }).flatMap((file) =>
    markdownBlocks(file, readFileSync(file, 'utf8')),
  ),
  ...globSync('src/**/*.ts').flatMap((file) => docCommentBlocks(file, readFileSync(file, 'utf8'))),
]
const planted = markdownBlocks(
  'planted.md',
  'Text\n\n```ts\nconst a = 1\n```\n\n```ts continued\nconst b: string = a\n```',
)

describe('code blocks of the documentation', () => {
  let directory: string
  let errors: string[]

  beforeAll(() => {
    directory = mkdtempSync(join(tmpdir(), 'ambient-db-docs-'))
    symlinkSync(resolve('node_modules'), join(directory, 'node_modules'))
    for (const file of globSync('test/docs/fixtures/*.ts')) copyFileSync(file, join(directory, basename(file)))
    generatePrismaClient()
    cpSync('.tools/prisma-client', join(directory, 'generated', 'prisma'), { recursive: true })
    for (const { block, text } of programs([...blocks, ...planted])) {
      writeFileSync(join(directory, programName(block)), text)
    }
    writeFileSync(join(directory, 'package.json'), '{ "type": "module" }')
    writeFileSync(join(directory, 'tsconfig.json'), JSON.stringify(configuration()))
    const { stdout, stderr } = spawnSync(resolve('node_modules/.bin/tsc'), ['--pretty', 'false'], {
      cwd: directory,
      encoding: 'utf8',
    })
    // What belongs to an error follows it, indented.
    errors = `${stdout}${stderr}`.split(/\n(?! )/).filter((error) => error !== '')
  })

  afterAll(() => rmSync(directory, { recursive: true, force: true }))

  function errorsOf(block: Block): string[] {
    const start = `${programName(block)}(`
    return errors
      .filter((error) => error.startsWith(start))
      .map((error) => `${block.file}:${error.slice(start.length)}`.replace(/,(\d+)\)/, ':$1'))
  }

  it.each(blocks)('$file:$line compiles', (block) => {
    expect(errorsOf(block)).toEqual([])
  })

  it('are compiled at all: a wrong one is found, at its line', () => {
    expect(planted.map(errorsOf)).toEqual([[], [expect.stringMatching(/^planted\.md:8:7: error TS2322/)]])
  })

  it('stand on sources and fixtures without errors', () => {
    const names = [...blocks, ...planted].map(programName)
    expect(errors.filter((error) => !names.some((name) => error.startsWith(name)))).toEqual([])
  })
})

function programName({ file, line }: Block): string {
  return `${file.replaceAll(/[\\/]/g, '-')}.${line}.ts`
}

function configuration(): object {
  const source = (path: string) => resolve('src', path)
  return {
    extends: resolve('tsconfig.json'),
    compilerOptions: {
      moduleDetection: 'force',
      experimentalDecorators: true, // as NestJS needs them
      paths: {
        'ambient-db': [source('index.ts')],
        'ambient-db/*': [source('*.ts'), source('adapters/*.ts'), source('frameworks/*.ts')],
      },
    },
    include: ['*.ts'],
  }
}
