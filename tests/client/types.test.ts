// The types of schema api: as the catalog has them now, and checked where they are used.
import { readFileSync } from 'node:fs'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { catalogFile, catalogTypes } from '../../scripts/types.ts'
import type { Functions, Views } from '../../src/catalog.ts'
import type { Balance, BudgetAnswer, ConfigNode, KeyContext, Rpc } from '../../src/index.ts'
import { database } from '../support/database.ts'
import { seed } from '../support/seed.ts'
import { transports } from '../support/transports.ts'

const test = suite('types')
const db = await database(test)

test('src/catalog.ts agrees with the catalog', async () => {
  // biome-formatted as it is written, so that the text is the same
  const made = (await catalogTypes(db.url)).split('\n')
  const kept = readFileSync(catalogFile, 'utf8').split('\n')
  const at = made.findIndex((line, n) => line !== kept[n])
  assert.ok(
    at < 0 && made.length === kept.length,
    `line ${at + 1} is\n${kept[at]}\nand should be\n${made[at]}\nrun \`npm run types\`, and commit src/catalog.ts`,
  )
})

// tsc checks these: the names of types written by hand are the catalog's
type Named<Written, Row> =
  Exclude<keyof Written, keyof Row> extends never ? true : Exclude<keyof Written, keyof Row>
export const named: [
  Named<KeyContext, Functions['resolve_virtual_key']['result']>,
  Named<BudgetAnswer, Functions['check_budget']['result']>,
  Named<Balance, Views['account_balances']>,
  Named<ConfigNode, Views['config_nodes']>,
] = [true, true, true, true]

test('a call is typed: its arguments, its answer, and the selected columns', async () => {
  const world = await seed(db.operator)
  const through = await transports(db)
  for (const { operator } of Object.values(through)) {
    const entry = await operator.call(
      'top_up',
      { account_id: world.accountId, amount: '1.10' },
      { select: ['seq', 'amount::text'] },
    )
    const { seq, amount }: { seq: number | null; amount: string | null } = entry
    assert.equal([typeof seq, amount], ['number', '1.1000000000'])
    // @ts-expect-error it was not selected
    assert.is(entry.balance_after, undefined)
    const whole = await operator.call('set_credit_limit', { account_id: world.accountId, credit_limit: '5' })
    const limit: number | null = whole.credit_limit
    assert.is(limit, 5)
    const [row] = await operator.rows('tenants', { select: ['id', 'name'], where: { id: world.tenantId! } })
    const name: string | null = row!.name
    assert.is(name, 'tenant')
    const id: string = await operator.call('new_id')
    assert.is(id.length, 36)
  }
})

// never run: tsc must refuse each of these calls
export const refused = async (rpc: Rpc) => [
  // @ts-expect-error no such argument
  await rpc.call('top_up', { account: '', amount: '1' }),
  // @ts-expect-error money is a string
  await rpc.call('top_up', { account_id: '', amount: 1 }),
  // @ts-expect-error a misspelt name, and no type of an answer
  await rpc.call('topup', {}),
  // @ts-expect-error the same without arguments
  await rpc.call('topup'),
  // @ts-expect-error a misspelt view
  await rpc.rows('tenant', { select: ['id'] }),
  // @ts-expect-error an amount may not be null
  await rpc.call('top_up', { account_id: '', amount: null }),
  // @ts-expect-error one is missing
  await rpc.call('top_up', { account_id: '' }),
  // @ts-expect-error all are missing
  await rpc.call('top_up'),
  // @ts-expect-error no such column
  await rpc.call('top_up', { account_id: '', amount: '1' }, { select: ['amuont'] }),
  // @ts-expect-error no such column
  await rpc.rows('tenants', { select: ['nmae'] }),
  // @ts-expect-error a hold names its account
  await rpc.call('place_holds', { requests: [{ id: '', virtual_key_id: '', amount: '1' }] }),
]

// never run: tsc must accept each of these calls
export const accepted = async (rpc: Rpc, name: string) => [
  // null takes the threshold away
  await rpc.call('set_low_balance_threshold', { account_id: '', amount: null }),
  // functions and views of one's own
  await rpc.call<number>('my_function', { a: 1 }),
  await rpc.rows<{ id: string }>('my_view', { select: ['id'] }),
  await rpc.call(name, { a: 1 }),
]

test.run()
