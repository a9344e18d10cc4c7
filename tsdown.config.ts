import { defineConfig } from 'tsdown'
import { publicEntries } from './scripts/entries.ts'

export default defineConfig({
  entry: Object.fromEntries(publicEntries().map(({ module, source }) => [module, source])),
  format: 'esm',
  target: 'node22.18',
  platform: 'node',
  // One output file per source file: what is installed reads like what was written.
  unbundle: true,
  fixedExtension: false,
  dts: { oxc: {} },
  tsconfig: 'tsconfig.build.json',
})
