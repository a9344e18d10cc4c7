import { DataTypes, type Model, type ModelStatic, Sequelize, type Transaction } from 'sequelize'
import type { Stack, Work } from '../../../test/truth/field/stack.ts'

export const stack: Stack = {
  name: 'sequelize',
  packages: ['sequelize', 'pg'],
  documentation: 'https://sequelize.org/docs/v6/other-topics/transactions/#managed-transactions',
  async open({ url, poolSize }) {
    const sequelize = new Sequelize(url, { dialect: 'postgres', pool: { max: poolSize }, logging: false })
    const label = { type: DataTypes.TEXT, primaryKey: true }
    const mark = sequelize.define('mark', { label }, { tableName: 'marks', timestamps: false })
    return {
      unit: (work) => sequelize.transaction((transaction) => work(workOf(sequelize, mark, transaction))),
      close: () => sequelize.close(),
    }
  },
}

function workOf(sequelize: Sequelize, mark: ModelStatic<Model>, transaction: Transaction): Work {
  return {
    write: (label) => mark.create({ label }, { transaction }),
    nested: (work) => sequelize.transaction({ transaction }, (inner) => work(workOf(sequelize, mark, inner))),
  }
}
