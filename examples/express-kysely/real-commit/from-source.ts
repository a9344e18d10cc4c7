// node --import <this file>: the package by its name is its source, so that nothing need be built before a test.
// With FAULT=commit-always it plants a fault in the service, for the tour to find.
import { registerHooks } from 'node:module'
import { pathToFileURL } from 'node:url'
import { publicEntries } from '../../../scripts/entries.ts'

const sources = new Map(publicEntries().map(({ specifier, source }) => [specifier, pathToFileURL(source).href]))

registerHooks({
  resolve: (specifier, context, next) => next(sources.get(specifier) ?? specifier, context),
  load(url, context, next) {
    const loaded = next(url, context)
    if (process.env.FAULT !== 'commit-always' || !url.endsWith('/express-kysely/app.ts')) return loaded
    const source = String(loaded.source).replace('databaseContext({', "databaseContext({ outcome: () => 'commit',")
    return { ...loaded, source }
  },
})
