import { describe, expect, it } from 'vitest'
import { controlRefused, parseTransactionControl, transactionModes } from '../../src/sql.ts'

const begin = (settings = {}) => ({ kind: 'begin', settings })

describe('transaction control', () => {
  it.each([
    ['begin', begin()],
    ['BEGIN WORK', begin()],
    ['begin transaction;', begin()],
    ['start transaction', begin()],
    ['Start\n\tTransaction ;  ', begin()],
    ['commit', { kind: 'commit' }],
    ['COMMIT WORK', { kind: 'commit' }],
    ['commit  transaction ;', { kind: 'commit' }],
    ['commit and no chain', { kind: 'commit' }],
    ['commit work and  no\tchain;', { kind: 'commit' }],
    ['end', { kind: 'commit' }],
    ['end work', { kind: 'commit' }],
    ['rollback', { kind: 'rollback' }],
    ['ROLLBACK TRANSACTION AND NO CHAIN', { kind: 'rollback' }],
    ['abort', { kind: 'rollback' }],
    ['savepoint a', { kind: 'savepoint', name: 'a' }],
    ['SAVEPOINT  Upper', { kind: 'savepoint', name: 'upper' }],
    ['savepoint "Quoted Name"', { kind: 'savepoint', name: 'Quoted Name' }],
    ['rollback to a', { kind: 'rollback to', name: 'a' }],
    ['rollback\nto  savepoint a', { kind: 'rollback to', name: 'a' }],
    ['ROLLBACK TO SAVEPOINT "A"', { kind: 'rollback to', name: 'A' }],
    ['release a', { kind: 'release', name: 'a' }],
    ['release savepoint a_1;', { kind: 'release', name: 'a_1' }],
  ])('S10 reads `%s`', (text, control) => {
    expect(parseTransactionControl(text)).toEqual(control)
  })

  it.each([
    ['begin isolation level serializable', { isolationLevel: 'serializable' }],
    ['begin transaction isolation level repeatable read', { isolationLevel: 'repeatable read' }],
    ['start transaction isolation level read committed', { isolationLevel: 'read committed' }],
    ['BEGIN WORK ISOLATION LEVEL READ UNCOMMITTED', { isolationLevel: 'read uncommitted' }],
    ['begin read only', { readOnly: true }],
    ['begin read write', { readOnly: false }],
    ['begin deferrable', { deferrable: true }],
    ['begin not deferrable', { deferrable: false }],
    ['begin read only deferrable', { readOnly: true, deferrable: true }],
    ['begin read only, deferrable', { readOnly: true, deferrable: true }],
    [
      'begin isolation level serializable, read only, deferrable',
      { isolationLevel: 'serializable', readOnly: true, deferrable: true },
    ],
    [
      'begin isolation level serializable read write not deferrable',
      { isolationLevel: 'serializable', readOnly: false, deferrable: false },
    ],
  ])('A7 reads the modes of `%s`', (text, settings) => {
    expect(parseTransactionControl(text)).toEqual(begin(settings))
  })

  it.each(['   ', ';;', '-- a comment\n', '--\n', '/* one */', '/**/ /* * / ** */', '\n;-- a\n/* b */ ; '])(
    'S10 reads it behind %j',
    (leading) => {
      expect(parseTransactionControl(`${leading}commit`)).toEqual({ kind: 'commit' })
    },
  )

  it.each([
    'begin isolation level chaos',
    'begin isolation level serializablex',
    'begin x isolation level serializable',
    'begin read only x',
    'begin immediate',
    'begin not  read only',
    'commit and chain',
    'commit prepared a',
    'rollback and chain',
    'rollback to',
    'savepoint',
    'savepoint a b',
    'savepoint "a" b',
    'savepoint a-b',
    'end x',
    'abort prepared',
    'abort begin',
  ])('S10 knows `%s` for control that a session cannot do', (text) => {
    expect(parseTransactionControl(text)).toEqual({ kind: 'other' })
  })

  it.each([
    'select 1',
    'beginning',
    'commits',
    'endless',
    'insert into t values ($1) -- commit',
    '/* commit',
    '-- commit',
    "select 'commit'",
    '"commit"',
    'x commit',
    'commit; select 1',
    'begin; insert into t values (1); commit',
    '',
  ])('S10 leaves `%s` to the server', (text) => {
    expect(parseTransactionControl(text)).toBeUndefined()
  })

  it('S10 is refused with a code, the database and the remedy', () => {
    expect(controlRefused('main')).toMatchObject({
      code: 'AMBIENT_TRANSACTION_CONTROL',
      database: 'main',
      message: expect.stringMatching(/SQL that begins or ends a transaction was refused unsent/),
    })
  })
})

describe('the modes of BEGIN', () => {
  it.each([
    [{}, ''],
    [{ isolationLevel: 'repeatable read' }, ' ISOLATION LEVEL REPEATABLE READ'],
    [{ readOnly: true }, ' READ ONLY'],
    [{ readOnly: false }, ' READ WRITE'],
    [{ deferrable: true }, ' DEFERRABLE'],
    [{ deferrable: false }, ' NOT DEFERRABLE'],
    [
      { isolationLevel: 'serializable', readOnly: true, deferrable: true },
      ' ISOLATION LEVEL SERIALIZABLE READ ONLY DEFERRABLE',
    ],
  ] as const)('A7 of %j are "%s"', (settings, text) => {
    expect(transactionModes(settings)).toBe(text)
  })
})
