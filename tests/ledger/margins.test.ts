// Our own cost beside the charge: cost books, the provider's own figure, margins, and bills against usage.
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database, type Row } from '../support/database.ts'
import { newId } from '../support/ids.ts'
import { holdsTrue } from '../support/ledger.ts'
import { type Payer, payer } from '../support/payer.ts'

const test = suite('margins')
const db = await database(test)
test.after.each(() => holdsTrue(db.sql))

const LONG_AGO = '2020-01-01T00:00:00Z'
const today = new Date().toISOString().slice(0, 10)
const setRates = (node: string, rates: object, book: string | null = null, currency = 'USD') =>
  db.operator('select * from api.set_rates($1, $2, $3, $4, $5)', [
    node,
    JSON.stringify(Object.entries(rates).map(([meter, unit_price]) => ({ meter, unit_price }))),
    book,
    currency,
    LONG_AGO,
  ])
const books: Record<string, string> = {}
for (const currency of ['USD', 'EUR'])
  books[currency] = (
    await db.operator(
      `insert into api.price_books (name, currency, kind) values ($1, $2, 'cost') returning id`,
      [`our costs in ${currency}`, currency],
    )
  )[0]!.id
const costs = (account: Payer) =>
  db.operator(
    `select trim_scale(cost)::text as cost, currency, is_upstream from api.usage_costs where account_id = $1
    order by cost`,
    [account.accountId],
  )
const margins = async (by: string, key: string): Promise<Row[]> =>
  (
    await db.operator(
      `select * from api.margins($1, now() - interval '1 day', now() + interval '1 day') where key = $2`,
      [by, key],
    )
  ).map(({ events, charged, currency, cost, cost_currency, margin }) => ({
    of: `${events} in ${currency}`,
    charged: Number(charged),
    cost: cost && `${Number(cost)} ${cost_currency}`,
    margin: margin && Number(margin),
  }))

test('an event has its cost by the cost book, and a missing one never parks', async () => {
  const account = await payer(db, { funds: '100' })
  await setRates(account.nodeId, { input_tokens: '2', output_tokens: '8' })
  await setRates(account.nodeId, { input_tokens: '0.5' }, books.USD)
  const [both] = await account.record(account.event('', { meters: { input_tokens: 1, output_tokens: 1 } }))
  assert.is(both!.status, 'charged')
  assert.equal(await costs(account), [])
  await account.record(account.event('', { meters: { input_tokens: 3 } }))
  assert.equal(await costs(account), [{ cost: '1.5', currency: 'USD', is_upstream: false }])
  assert.equal(await margins('account', account.accountId), [
    { of: '1 in USD', charged: 10, cost: null, margin: null },
    { of: '1 in USD', charged: 6, cost: '1.5 USD', margin: 4.5 },
  ])
  // rates that come later give the cost of older events too
  await setRates(account.nodeId, { output_tokens: '1' }, books.USD)
  assert.equal(await margins('account', account.accountId), [
    { of: '2 in USD', charged: 16, cost: '3 USD', margin: 13 },
  ])
})

test("a node's minimum and a customer's book are no cost of ours", async () => {
  const account = await payer(db, { funds: '100' })
  await setRates(account.nodeId, { input_tokens: '2' })
  await setRates(account.nodeId, { input_tokens: '0.5' }, books.USD)
  await db.operator(
    `insert into api.minimum_charges (config_node_id, minimum, effective_from) values ($1, 5, $2)`,
    [account.nodeId, LONG_AGO],
  )
  assert.is(Number((await account.record(account.event('', { meters: { input_tokens: 1 } })))[0]!.cost), 5)
  assert.equal(await costs(account), [{ cost: '0.5', currency: 'USD', is_upstream: false }])
})

test("the provider's own figure wins, and an unfit one is left out", async () => {
  const account = await payer(db, { funds: '100' })
  await setRates(account.nodeId, { usd: '0.25' }, books.USD)
  const unfit = [
    'x',
    -1,
    {},
    { amount: '1' },
    { amount: 'x', currency: 'USD' },
    { amount: '1', currency: 'usd' },
    [],
    // their texts would be far longer than they are
    1e300,
    1e-300,
  ]
  const answers = await account.record(
    account.event('1', { upstream_cost: '0.1' }),
    account.event('1', { upstream_cost: { amount: '0.2', currency: 'EUR' } }),
    account.event('1', { upstream_cost: { amount: 0.1 + 0.2, currency: 'USD' } }),
    account.event('1', { upstream_cost: null }),
    ...unfit.map((upstream_cost) => account.event('1', { upstream_cost })),
  )
  assert.equal(
    answers.map(({ status, left_out }) => `${status} ${left_out ?? ''}`),
    [...Array(4).fill('charged '), ...unfit.map(() => 'charged upstream_cost')],
  )
  assert.equal(await costs(account), [
    { cost: '0.1', currency: 'USD', is_upstream: true },
    { cost: '0.2', currency: 'EUR', is_upstream: true },
    ...Array(unfit.length + 1).fill({ cost: '0.25', currency: 'USD', is_upstream: false }),
    { cost: '0.3', currency: 'USD', is_upstream: true },
  ])
})

test('a cost in another currency gives no margin', async () => {
  const account = await payer(db, { funds: '100' })
  await setRates(account.nodeId, { usd: '0.9' }, books.EUR, 'EUR')
  await account.use('2')
  for (const [by, key] of [
    ['node', account.nodeId],
    ['user', account.userId],
    ['account', account.accountId],
  ] as const)
    assert.equal(await margins(by, key), [{ of: '1 in USD', charged: 2, cost: '1.8 EUR', margin: null }])
  // the account's currency counts first
  await setRates(account.nodeId, { usd: '0.5' }, books.USD)
  await account.use('2')
  assert.equal(
    (await margins('account', account.accountId)).map(({ margin }) => margin),
    [null, 1],
  )
  assert.ok((await margins('day', today)).length)
})

test('margins refuse what they can not sum', async () => {
  const calls = [
    [`'meter', now() - interval '1 day', now()`, 'invalid_by'],
    [`'node', now(), now()`, 'invalid_period'],
  ]
  for (const [args, code] of calls)
    await db.operator(`select * from api.margins(${args})`).then(
      () => assert.unreachable(code),
      (error: Error) => assert.is(error.message, code),
    )
})

test('one cost book per currency', async () => {
  await db.operator(`insert into api.price_books (name, kind) values ('another', 'cost')`).then(
    () => assert.unreachable(),
    (error: Row) => assert.is(error.constraint, 'one_cost_book_per_currency'),
  )
})

test('a bill is kept once, corrected, and compared per node, day and meter', async () => {
  const account = await payer(db, { funds: '100' })
  await setRates(account.nodeId, { input_tokens: '2', output_tokens: '8' })
  await setRates(account.nodeId, { input_tokens: '0.5', output_tokens: '4' }, books.USD)
  await account.record(account.event('', { meters: { input_tokens: 10, output_tokens: 1 } }))
  await account.record(account.event('', { meters: { input_tokens: 5 } }))
  const line = {
    config_node_id: account.nodeId,
    day: today,
    meter: 'input_tokens',
    quantity: 17,
    amount: '8.5',
  }
  const bill = async (...lines: unknown[]): Promise<Row[]> =>
    (await db.operator('select api.import_provider_bill($1) as answers', [JSON.stringify(lines)]))[0]!.answers
  const other = { ...line, meter: 'web_searches', quantity: '2', amount: '0.02' }
  assert.equal(await bill(line, other), [{ status: 'imported' }, { status: 'imported' }])
  assert.equal(await bill(other, { ...line, quantity: '17.0', amount: '8.50' }), [
    { status: 'unchanged' },
    { status: 'unchanged' },
  ])
  assert.equal(await bill({ ...line, quantity: 16, amount: '8' }), [{ status: 'replaced' }])
  assert.equal(
    await bill(
      7,
      { ...line, day: 'yesterday' },
      { ...line, day: '0026-11-30' },
      { ...line, day: '2026-1-5' },
      { ...line, quantity: -1 },
      { ...line, amount: 'x' },
      { ...line, config_node_id: newId() },
      { ...line, config_node_id: 'x' },
      { ...line, meter: 'A' },
      { ...line, currency: 'usd' },
    ),
    [
      'invalid_line',
      'invalid_day',
      'invalid_day',
      'invalid_day',
      'invalid_quantity',
      'invalid_amount',
      'config_node_not_found',
      'invalid_config_node_id',
      'invalid_meter',
      'invalid_currency',
    ].map((code) => ({ status: 'refused', code })),
  )
  const differences = await db.operator(
    `select meter, billed_quantity::float, recorded_quantity::float, quantity_difference::float, billed_amount::float,
      recorded_cost::float, amount_difference::float
    from api.provider_differences() where config_node_id = $1 order by meter`,
    [account.nodeId],
  )
  assert.equal(
    differences.map((row) => Object.values(row)),
    [
      ['input_tokens', 16, 15, 1, 8, 7.5, 0.5],
      ['output_tokens', 0, 1, -1, 0, 4, -4],
      ['web_searches', 2, 0, 2, 0.02, null, null],
    ],
  )
})

test("a member sees the prices of the models on their keys, and neither list, book, cost nor others'", async () => {
  const account = await payer(db, { funds: '100' })
  const other = await payer(db, { funds: '100' })
  await setRates(account.nodeId, { input_tokens: '2', output_tokens: '8' })
  await db.operator(`update api.config_nodes set name = $2, model = 'm-1' where id = $1`, [
    account.nodeId,
    `node ${account.nodeId}`,
  ])
  const [{ id: book }] = (await db.operator(`insert into api.price_books (name) values ($1) returning id`, [
    newId(),
  ])) as [Row]
  const member = db.member(account.userId)
  const prices = async () =>
    (
      await member(
        `select name, model, meter, trim_scale(unit_price)::text as price, minimum::float from api.my_prices order by meter`,
      )
    ).map(({ name, model, meter, price, minimum }) => {
      assert.equal([name, model], [`node ${account.nodeId}`, 'm-1'])
      return [meter, price, minimum].filter((part) => part !== null).join(' ')
    })
  assert.equal(await prices(), ['input_tokens 2', 'output_tokens 8', 'usd 1'])
  await setRates(account.nodeId, { output_tokens: '5' }, book)
  await db.operator('select api.assign_price_book($1, $2, $3)', [account.accountId, book, LONG_AGO])
  assert.equal(await prices(), ['output_tokens 5'])
  await db.operator(
    'insert into api.price_book_factors (price_book_id, factor, effective_from) values ($1, 1.2, $2)',
    [book, LONG_AGO],
  )
  await db.operator(
    'insert into api.minimum_charges (price_book_id, minimum, effective_from) values ($1, 0.5, $2)',
    [book, LONG_AGO],
  )
  assert.equal(await prices(), ['input_tokens 2.4 0.5', 'output_tokens 5 0.5', 'usd 1.2 0.5'])

  const event = account.event('', { meters: { input_tokens: 1 }, upstream_cost: '0.1' })
  assert.is(Number((await account.record(event))[0]!.cost), 2.4)
  assert.equal(await member('select price_ids, price_book_id, factor, cost::float from api.usage_logs'), [
    { price_ids: null, price_book_id: null, factor: null, cost: 2.4 },
  ])
  const explain = `select api.explain_charge('${account.accountId}', '${event.id}') as it`
  const [seen, whole] = [(await member(explain))[0]!.it, (await db.operator(explain))[0]!.it]
  assert.equal(
    [seen.meters[0].price.unit_price, seen.meters[0].price.id, seen.price_book],
    ['2.4', undefined, null],
  )
  assert.equal([whole.price_book.id, whole.price_book.factor], [book, '1.2'])
  assert.ok(whole.meters[0].price.id)
  for (const view of [
    'prices',
    'price_books',
    'price_book_factors',
    'minimum_charges',
    'usage_costs',
    'config_nodes',
  ])
    await member(`select from api.${view}`).then(
      () => assert.unreachable(),
      (error: Row) => assert.is(error.code, '42501'),
    )
  assert.is((await db.member(other.userId)('select from api.my_prices where meter <> $1', ['usd'])).length, 0)

  // a gateway sees list rates alone
  const list = 'select distinct price_book_id is null as is_list from api.prices where config_node_id = $1'
  assert.equal(await db.gateway(list, [account.nodeId]), [{ is_list: true }])
  assert.is((await db.operator(list, [account.nodeId])).length, 2)
})

test.run()
