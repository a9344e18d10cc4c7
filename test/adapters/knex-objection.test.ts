import { type AmbientDatabase, defineDatabase, newContext } from 'ambient-db'
import { knexAdapter } from 'ambient-db/knex'
import knex, { type Knex } from 'knex'
import { Model, transaction } from 'objection'
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { createMysqlDatabase } from '../support/mysql.ts'
import { createDatabase } from '../support/postgres.ts'

class Pet extends Model {
  static override tableName = 'pets'
  id!: number
  name!: string
}

class Person extends Model {
  static override tableName = 'persons'
  static override relationMappings = {
    pets: {
      relation: Model.HasManyRelation,
      modelClass: Pet,
      join: { from: 'persons.id', to: 'pets.personId' },
    },
  }
  id!: number
  name!: string
  pets?: Pet[]
}

const planned = new Error('planned')
const graph = { name: 'Ada', pets: [{ name: 'Rex' }, { name: 'Tom' }] }

const engines: Record<string, () => Promise<{ url: string; drop(): Promise<void> }>> = {
  pg: createDatabase,
  mysql2: createMysqlDatabase,
}

for (const [client, create] of Object.entries(engines)) {
  describe(`Objection over knexAdapter with ${client}`, () => {
    let main: AmbientDatabase<Knex, Knex>
    let drop: () => Promise<void>
    const inTransaction = <Result>(work: () => Promise<Result>) => newContext(work)
    const names = async () =>
      ((await (await main.connect())('persons').select('name').orderBy('id')) as { name: string }[]).map(
        ({ name }) => name,
      )
    beforeAll(async () => {
      const database = await create()
      drop = database.drop
      main = defineDatabase({ name: 'main', adapter: knexAdapter(() => knex({ client, connection: database.url })) })
      Model.knex(main.db) // before any context, or connection
      const engine = await main.connect()
      await engine.schema.createTable('persons', (table) => {
        table.increments('id')
        table.string('name')
      })
      await engine.schema.createTable('pets', (table) => {
        table.increments('id')
        table.string('name')
        table.integer('personId').unsigned().references('persons.id')
      })
    })
    beforeEach(async () => {
      const engine = await main.connect()
      await engine('pets').delete()
      await engine('persons').delete()
    })
    afterAll(async () => {
      await main.shutdown()
      await drop()
    })

    it('S2 inserts and fetches graphs in the transaction of the context', async () => {
      const fetched = await inTransaction(async () => {
        const { id } = await Person.query().insertGraph(graph)
        expect(await names()).toEqual([])
        return Person.query()
          .findById(id)
          .withGraphFetched('pets(byName)')
          .modifiers({
            byName: (query) => query.orderBy('name'),
          })
      })
      expect(fetched).toMatchObject(graph)
      expect(await names()).toEqual(['Ada'])
      const joined = await newContext(() => Person.query().withGraphJoined('pets').orderBy('pets.name'))
      expect(joined).toMatchObject([graph])
    })

    it('C4 rolls a graph back when the context throws', async () => {
      const work = inTransaction(async () => {
        await Person.query().insertGraph(graph)
        throw planned
      })
      await expect(work).rejects.toBe(planned)
      expect(await names()).toEqual([])
    })

    it('A4 makes Model.transaction a savepoint', async () => {
      await inTransaction(async () => {
        await Person.query().insert({ name: 'outer' })
        const inner = Person.transaction(async (trx) => {
          await Person.query(trx).insertGraph(graph)
          await Person.query().insert({ name: 'helper' }) // without the transaction in the hand, and in it all the same
          throw planned
        })
        await expect(inner).rejects.toBe(planned)
        await transaction(Person, Pet, async (BoundPerson) => {
          await BoundPerson.query().insert({ name: 'bound' })
        })
      })
      expect(await names()).toEqual(['outer', 'bound'])
    })

    it('A4 takes transaction.start, and refuses others beside it', async () => {
      await inTransaction(async () => {
        const trx = await transaction.start(Person)
        await Person.query(trx).insert({ name: 'in' })
        await expect(Person.query().insert({ name: 'beside' })).rejects.toMatchObject({
          code: 'AMBIENT_SESSION_BUSY',
          message: expect.stringMatching(/cannot be told from other work/), // at once, and not after `blockTimeout`
        })
        await trx.rollback()
        const other = await Person.startTransaction()
        await Person.query(other).insert({ name: 'kept' })
        await other.commit()
      })
      expect(await names()).toEqual(['kept'])
    })

    it('S8 upserts a graph, whose queries run at the same time', async () => {
      await inTransaction(async () => {
        const person = await Person.query().insertGraph(graph)
        const [first] = person.pets ?? []
        await Person.query().upsertGraph({
          id: person.id,
          name: 'Grace',
          pets: [{ id: first?.id as number, name: 'Max' }, { name: 'Kim' }, { name: 'Lou' }],
        })
        const pets = await Pet.query().orderBy('name')
        expect(pets.map(({ name }) => name)).toEqual(['Kim', 'Lou', 'Max'])
      })
      expect(await names()).toEqual(['Grace'])
    })

    it('C2 refuses models outside any context', async () => {
      await expect(Person.query()).rejects.toMatchObject({ code: 'AMBIENT_NO_CONTEXT' })
      await expect(Person.transaction(async () => {})).rejects.toMatchObject({ code: 'AMBIENT_NO_CONTEXT' })
    })
  })
}
