// Rates: service tiers, context tiers, hours, books with factors, minimum charges; their refusals, and their proof.
import fc from 'fast-check'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database, type Row } from '../support/database.ts'
import { idAt, newId } from '../support/ids.ts'
import { holdsTrue, units } from '../support/ledger.ts'
import { type Payer, payer } from '../support/payer.ts'

const rates = suite('rates')
const db = await database(rates)
const test = (name: string, run: () => Promise<void>) =>
  rates(name, async () => {
    await run()
    await holdsTrue(db.sql)
  })

const LONG_AGO = '2020-01-01T00:00:00Z'
interface Rate {
  meter: string
  unit_price: string
  variant?: string
  context_over?: number | string
  hours?: string
  unit_size?: number
}
const setRates = (node: string, rates: unknown, book: string | null = null, from = LONG_AGO) =>
  db.operator('select * from api.set_rates($1, $2, price_book_id => $3, effective_from => $4)', [
    node,
    JSON.stringify(rates),
    book,
    from,
  ])
const makeBook = async (more: Row = {}): Promise<string> =>
  (
    await db.operator(`insert into api.price_books (name, currency, kind) values ($1, $2, $3) returning id`, [
      more.name ?? newId(),
      more.currency ?? 'USD',
      more.kind ?? 'price',
    ])
  )[0]!.id
const setFactor = (book: string, factor: string, from = LONG_AGO) =>
  db.operator(
    'insert into api.price_book_factors (price_book_id, factor, effective_from) values ($1, $2, $3)',
    [book, factor, from],
  )
const assign = (account: Payer, book: string | null, from = LONG_AGO) =>
  db.operator('select * from api.assign_price_book($1, $2, $3)', [account.accountId, book, from])
const setMinimum = (of: Row, minimum: string, from = LONG_AGO) =>
  db.operator(
    `insert into api.minimum_charges (price_book_id, config_node_id, minimum, effective_from) values ($1, $2, $3, $4)`,
    [of.book ?? null, of.node ?? null, minimum, from],
  )
const costs = (answers: Row[]) => answers.map(({ cost, code }) => code ?? Number(cost))
const use = async (account: Payer, meters: Row, more: Row = {}) =>
  costs(await account.record(account.event('', { meters, ...more })))[0]
const holdOf = async (account: Payer, meters: Row, more: Row = {}) => {
  const [answer] = await account.place({
    id: newId(),
    account_id: account.accountId,
    virtual_key_id: account.keyId,
    config_node_id: account.nodeId,
    meters,
    ...more,
  })
  return answer!.code ?? Number(answer!.amount)
}
const refused = async (code: string, run: () => Promise<unknown>) => {
  try {
    await run()
  } catch (error) {
    assert.is((error as Error).message, code)
    assert.ok((error as { hint?: string }).hint, `${code} says what to do`)
    return
  }
  assert.unreachable(`${code} was expected`)
}

test('a service tier has its own rates, and an unknown one has none', async () => {
  const account = await payer(db, { funds: '100' })
  await setRates(account.nodeId, [
    { meter: 'input_tokens', unit_price: '2', variant: 'flex' },
    { meter: 'input_tokens', unit_price: '4' },
    { meter: 'output_tokens', unit_price: '8' },
  ])
  assert.is(await use(account, { input_tokens: 1 }), 4)
  assert.is(await use(account, { input_tokens: 1 }, { variant: '' }), 4)
  assert.is(await use(account, { input_tokens: 1 }, { variant: 'flex' }), 2)
  // never the base rate of another tier
  assert.is(await use(account, { input_tokens: 1 }, { variant: 'priority' }), 'price_not_found')
  assert.is(await use(account, { output_tokens: 1 }, { variant: 'flex' }), 'price_not_found')
  assert.is(await use(account, { input_tokens: 1 }, { variant: 'Flex!' }), 'invalid_variant')
  assert.is(await use(account, { input_tokens: 1 }, { variant: 7 }), 'invalid_variant')

  assert.is(await holdOf(account, { input_tokens: 1 }, { variant: 'flex' }), 2)
  assert.is(await holdOf(account, { input_tokens: 1 }, { variants: ['flex', ''] }), 4)
  assert.is(await holdOf(account, { input_tokens: 1 }, { variants: ['flex', 'priority'] }), 'price_not_found')
  assert.is(await holdOf(account, { input_tokens: 1 }, { variants: [] }), 'invalid_variant')
  assert.is(
    await holdOf(account, { input_tokens: 1 }, { variants: ['flex'], variant: 'flex' }),
    'invalid_variant',
  )
})

test('all tokens pay the rate that the whole context chooses, of each meter', async () => {
  const account = await payer(db, { funds: '100000000' })
  await setRates(account.nodeId, [
    { meter: 'input_tokens', unit_price: '2' },
    { meter: 'input_tokens', unit_price: '4', context_over: 200 },
    { meter: 'input_tokens', unit_price: '6', context_over: 500 },
    { meter: 'cached_input_tokens', unit_price: '1' },
    { meter: 'output_tokens', unit_price: '10' },
    { meter: 'output_tokens', unit_price: '15', context_over: 200 },
  ])
  assert.is(await use(account, { input_tokens: 200, output_tokens: 1 }), 410)
  assert.is(await use(account, { input_tokens: 201, output_tokens: 1 }), 819)
  assert.is(await use(account, { input_tokens: 500 }), 2000)
  assert.is(await use(account, { input_tokens: 501 }), 3006)
  // cached tokens are part of the context, and output is not
  assert.is(await use(account, { input_tokens: 100, cached_input_tokens: 101, output_tokens: 1 }), 516)
  assert.is(await use(account, { input_tokens: 100, cached_input_tokens: 100, output_tokens: 1000 }), 10300)
  assert.is(await use(account, { output_tokens: 1 }), 10)
})

test('a node may name the meters of its context, until it has prices', async () => {
  const account = await payer(db, { funds: '100000' })
  const [{ id: node }] = (await db.operator(
    `insert into api.config_nodes (name, context_meters) values ($1, '{pages}') returning id`,
    [newId()],
  )) as [Row]
  await setRates(node, [
    { meter: 'pages', unit_price: '1' },
    { meter: 'pages', unit_price: '2', context_over: 10 },
    { meter: 'input_tokens', unit_price: '0' },
  ])
  const at = { config_node_id: node }
  assert.is(await use(account, { pages: 10, input_tokens: 1000 }, at), 10)
  assert.is(await use(account, { pages: 11, input_tokens: 1000 }, at), 22)
  await refused('context_meters_are_fixed', () =>
    db.operator('update api.config_nodes set context_meters = null where id = $1', [node]),
  )
  // any other change is free
  await db.operator(`update api.config_nodes set model = 'm', context_meters = '{pages}' where id = $1`, [
    node,
  ])
})

// the cost of an event at a moment, whose id may be of months that are not accepted
const priced = async (
  node: string,
  meters: Row,
  at: string,
  { variant = '', book = null as string | null } = {},
) =>
  costs(
    await db.sql(
      'select cost::text, code from data.terms_in_use u cross join lateral data.price_meters($1, $2, $3, $4, $5, $6, u)',
      [node, JSON.stringify(meters), 'USD', at, variant, book],
    ),
  )[0]

test('a window of hours counts before always, to the minute, with its own context tiers', async () => {
  const account = await payer(db)
  // Monday 09:00 to 17:00, and the end of Sunday
  const hours = '{[540,1020),[10000,10080)}'
  await setRates(account.nodeId, [
    { meter: 'input_tokens', unit_price: '2' },
    { meter: 'input_tokens', unit_price: '3', context_over: 100 },
    { meter: 'input_tokens', unit_price: '20', hours },
    { meter: 'input_tokens', unit_price: '30', hours, context_over: 100 },
  ])
  const cost = (at: string, tokens = 1) => priced(account.nodeId, { input_tokens: tokens }, at)
  assert.is(await cost('2026-11-30T08:59:59.999Z'), 2)
  assert.is(await cost('2026-11-30T09:00:00Z'), 20)
  assert.is(await cost('2026-11-30T16:59:59.999Z'), 20)
  assert.is(await cost('2026-11-30T17:00:00Z'), 2)
  assert.is(await cost('2026-11-29T23:59:59.999Z'), 20)
  assert.is(await cost('2026-11-30T00:00:00Z'), 2)
  assert.is(await cost('2026-12-01T12:00:00Z'), 2)
  assert.is(await cost('2026-11-30T12:00:00Z', 101), 3030)
  assert.is(await cost('2026-11-30T20:00:00Z', 101), 303)
})

test('a newer list replaces all rates of its meter and tier at once, and no others', async () => {
  const account = await payer(db)
  await setRates(account.nodeId, [
    { meter: 'input_tokens', unit_price: '2' },
    { meter: 'input_tokens', unit_price: '4', context_over: 100 },
    { meter: 'input_tokens', unit_price: '1', variant: 'flex' },
    { meter: 'output_tokens', unit_price: '8' },
  ])
  await setRates(account.nodeId, [{ meter: 'input_tokens', unit_price: '3' }], null, '2026-06-01T00:00:00Z')
  const cost = (meters: Row, at: string, variant = '') => priced(account.nodeId, meters, at, { variant })
  assert.is(await cost({ input_tokens: 101 }, '2026-05-31T23:59:59.999Z'), 404)
  // the tier of the old list is gone
  assert.is(await cost({ input_tokens: 101 }, '2026-06-01T00:00:00Z'), 303)
  assert.is(await cost({ input_tokens: 1, output_tokens: 1 }, '2026-06-01T00:00:00Z'), 11)
  assert.is(await cost({ input_tokens: 1 }, '2026-06-01T00:00:00Z', 'flex'), 1)
  assert.is(await cost({ input_tokens: 1 }, '2019-12-31T23:59:59Z'), 'price_not_found')
})

test('the same rates again change nothing; others from the same moment are refused', async () => {
  const { nodeId } = await payer(db)
  const list: Rate[] = [
    { meter: 'input_tokens', unit_price: '2.50', unit_size: 1_000_000 },
    { meter: 'input_tokens', unit_price: '5', unit_size: 1_000_000, context_over: 10 },
    { meter: 'input_tokens', unit_price: '1', unit_size: 1_000_000, hours: '{[0,10)}' },
    { meter: 'input_tokens', unit_price: '2', unit_size: 1_000_000, hours: '{[0,10)}', context_over: '10' },
  ]
  const first = await setRates(nodeId, list)
  assert.is(first.length, 4)
  assert.equal(await setRates(nodeId, [...list].reverse()), first)
  await refused('rates_exist', () => setRates(nodeId, [{ ...list[0], unit_price: '3' }]))
  await refused('rates_exist', () => setRates(nodeId, [{ meter: 'input_tokens', unit_price: '3' }]))
  // a list is closed: nothing is added to it either, by the function or by the view
  await refused('rates_exist', () =>
    setRates(nodeId, [{ meter: 'input_tokens', unit_price: '3', context_over: 99 }]),
  )
  await refused('rates_exist', () =>
    setRates(nodeId, [{ meter: 'input_tokens', unit_price: '3', hours: '{[20,30)}' }]),
  )
  await refused('rates_exist', () =>
    db.operator(
      `insert into api.prices (config_node_id, meter, unit_price, unit_size, context_over, effective_from)
      values ($1, 'input_tokens', 3, 1, 99, $2), ($1, 'input_tokens', 3, 1, 98, $2)`,
      [nodeId, LONG_AGO],
    ),
  )
  // nothing of a refused call stays
  await refused('rates_exist', () =>
    setRates(nodeId, [
      { meter: 'output_tokens', unit_price: '3' },
      { meter: 'input_tokens', unit_price: '3' },
    ]),
  )
  assert.equal(
    await db.operator('select id from api.prices where config_node_id = $1 and meter = $2', [
      nodeId,
      'output_tokens',
    ]),
    [],
  )
})

test('bad rates are refused with their codes, by the function and by the view', async () => {
  const { nodeId } = await payer(db)
  const one = { meter: 'input_tokens', unit_price: '1' }
  const cases: [code: string, rates: Row[]][] = [
    ['hours_overlap', [one, { ...one, hours: '{[0,10)}' }, { ...one, hours: '{[9,20)}' }]],
    ['incomplete_rates', [{ ...one, hours: '{[0,10)}' }]],
    ['incomplete_rates', [{ ...one, context_over: 5 }]],
    ['incomplete_rates', [one, { ...one, context_over: 5 }, { ...one, hours: '{[0,10)}' }]],
    ['incomplete_rates', [one, { ...one, variant: 'flex', context_over: 5 }]],
    ['invalid_hours', [one, { ...one, hours: '{[0,10081)}' }]],
    ['invalid_hours', [one, { ...one, hours: '{[-1,10)}' }]],
    ['invalid_hours', [one, { ...one, hours: '{}' }]],
    ['invalid_context_over', [one, { ...one, context_over: -1 }]],
    ['invalid_context_over', [one, { ...one, context_over: '1000000000001' }]],
    ['invalid_variant', [{ ...one, variant: 'FLEX' }]],
    ['invalid_meter', [{ ...one, meter: 'minimum' }]],
    ['invalid_meter', [{ ...one, meter: 'BAD NAME' }]],
    ['invalid_unit_price', [{ ...one, unit_price: '-1' }]],
    ['invalid_unit_price', [{ ...one, unit_price: 'NaN' }]],
    ['invalid_unit_price', [{ ...one, unit_price: '0.00000000001' }]],
    ['invalid_unit_size', [{ ...one, unit_size: 7 }]],
  ]
  for (const [code, list] of cases) {
    await refused(code, () => setRates(nodeId, list))
    await refused(code, () =>
      db.operator(
        `insert into api.prices (config_node_id, meter, unit_price, unit_size, variant, context_over, hours)
        select $1, r.meter, r.unit_price, coalesce(r.unit_size, 1), coalesce(r.variant, ''), coalesce(r.context_over, 0),
          r.hours
        from json_populate_recordset(null::api.prices, $2) r`,
        [nodeId, JSON.stringify(list)],
      ),
    )
  }
  for (const list of [
    [{ ...one, unit_price: 'x' }],
    [{ ...one, hours: 'always' }],
    [{ meter: 'x' }],
    [7],
    [{ ...one, context_over: 'many' }],
    [{ ...one, context_ove: 5 }],
    [one, one],
  ])
    await refused('invalid_rates', () => setRates(nodeId, list))
  await refused('invalid_rates', () => setRates(nodeId, {}))
  await refused('config_node_not_found', () => setRates(newId(), [one]))
  await refused('price_book_not_found', () => setRates(nodeId, [one], newId()))
  await refused('currency_mismatch', async () => setRates(nodeId, [one], await makeBook({ currency: 'EUR' })))
  assert.equal(
    await db.operator(`select id from api.prices where config_node_id = $1 and meter <> 'usd'`, [nodeId]),
    [],
  )
})

test('overlapping windows are refused by a constraint too, for two writers at once', async () => {
  const { nodeId } = await payer(db)
  const write = (hours: string) =>
    `insert into data.price (config_node_id, meter, unit_price, hours, effective_from)
    values ('${nodeId}', 'input_tokens', 1, '${hours}', '${LONG_AGO}')`
  const [first, second] = [await db.session(), await db.session()]
  try {
    // without the triggers, which let one writer of a node wait for the other
    for (const session of [first, second]) await session.query('set session_replication_role = replica')
    await first.query(`begin; ${write('{[0,10)}')}`)
    const waiting = second.query(`begin; ${write('{[5,10)}')}`).catch((error: Error) => error)
    // the second has not seen the first one's row: only the constraint can
    await db.blocked(second, waiting)
    await first.query(`insert into data.price (config_node_id, meter, unit_price, effective_from)
      values ('${nodeId}', 'input_tokens', 1, '${LONG_AGO}')`)
    await first.query('commit')
    assert.is(((await waiting) as { constraint?: string }).constraint, 'windows_are_disjoint')
  } finally {
    await Promise.all([first.end(), second.end()])
  }
})

test('a book prices by its own rate, else the list times its factor, else not at all', async () => {
  const account = await payer(db, { funds: '1000' })
  const book = await makeBook()
  await setRates(account.nodeId, [
    { meter: 'input_tokens', unit_price: '2' },
    { meter: 'output_tokens', unit_price: '8' },
  ])
  await setRates(account.nodeId, [{ meter: 'output_tokens', unit_price: '5' }], book)
  const meters = { input_tokens: 10, output_tokens: 1 }
  assert.is(await use(account, meters), 28)
  await assign(account, book)
  // own rates alone: the list is not sold by this book
  assert.is(await use(account, { output_tokens: 1 }), 5)
  assert.is(await use(account, meters), 'price_not_found')
  await setFactor(book, '1.2')
  assert.is(await use(account, meters), 29)
  assert.is(await holdOf(account, meters), 29)
  await setFactor(book, '0', '2026-01-01T00:00:00Z')
  assert.is(await use(account, meters), 5)
  // list prices again
  await assign(account, null, '2026-02-01T00:00:00Z')
  assert.is(await use(account, meters), 28)
  // the parked event is charged by the one rule too
  const [{ answers }] = (await db.operator(
    `select api.replay_parked_usage(array(select id from api.parked_usage where account_id = $1)) as answers`,
    [account.accountId],
  )) as [Row]
  assert.equal(costs(answers), [28])
})

test('a factor is exact: one rounding of the whole sum, half up', async () => {
  const account = await payer(db, { funds: '10' })
  const book = await makeBook()
  await setRates(account.nodeId, [{ meter: 'input_tokens', unit_price: '0.0000000001' }])
  await setFactor(book, '0.5')
  await assign(account, book)
  assert.is(await use(account, { input_tokens: 1 }), 0.0000000001)
  assert.is(await use(account, { input_tokens: '0.9999999999' }), 0)
  assert.is(await use(account, { input_tokens: 3 }), 0.0000000002)
})

test('a minimum is the least that an event costs: of the book, else of the node', async () => {
  const account = await payer(db, { funds: '100' })
  await setRates(account.nodeId, [{ meter: 'input_tokens', unit_price: '1' }])
  await setMinimum({ node: account.nodeId }, '3')
  const event = account.event('', { meters: { input_tokens: 1 } })
  assert.is(costs(await account.record(event))[0], 3)
  assert.is(await holdOf(account, { input_tokens: 1 }), 3)
  assert.is(await use(account, { input_tokens: 3 }), 3)
  assert.is(await use(account, { input_tokens: 4 }), 4)
  assert.is(await use(account, { input_tokens: 0 }), 0)
  const [{ explained }] = (await db.operator('select api.explain_charge($1, $2) as explained', [
    account.accountId,
    event.id,
  ])) as [Row]
  assert.equal(
    explained.meters.map(({ meter, quantity, amount }: Row) => [meter, quantity, amount]),
    [
      ['input_tokens', '1', '1'],
      ['minimum', '1', '2'],
    ],
  )
  assert.is(explained.agrees, true)

  const book = await makeBook()
  await setFactor(book, '2')
  await assign(account, book)
  // the node's minimum is not multiplied
  assert.is(await use(account, { input_tokens: 1 }), 3)
  await setMinimum({ book }, '2.5')
  assert.is(await use(account, { input_tokens: 1 }), 2.5)
  await setMinimum({ book }, '0', '2026-01-01T00:00:00Z')
  assert.is(await use(account, { input_tokens: 1 }), 2)
  // by meter, and in a statement, the parts add up to the charges
  const sums = await db.operator(
    `select key, trim_scale(cost)::text as cost from api.spend('meter', now() - interval '1 day', now() + interval '1 day', $1) order by key`,
    [account.accountId],
  )
  assert.equal(sums, [
    { key: 'input_tokens', cost: '14' },
    { key: 'minimum', cost: '3.5' },
  ])
  const [usage] = await db.sql(`select (data.usage_of($1, 1, 100)).usage as nodes`, [account.accountId])
  const [node] = usage!.nodes
  assert.equal([Number(node.cost), Number(node.rounding)], [17.5, 0])
  assert.equal(
    Object.entries(node.meters as Record<string, Row>).map(([meter, { quantity, cost }]) => [
      meter,
      quantity,
      Number(cost),
    ]),
    [
      ['minimum', '3', 3.5],
      ['input_tokens', '11', 14],
    ],
  )
})

test('an event may carry no meter minimum', async () => {
  const account = await payer(db, { funds: '10' })
  await setMinimum({ node: account.nodeId }, '5')
  assert.is(await use(account, { usd: 1, minimum: 0 }), 'invalid_meters')
})

test('bad terms are refused with their codes', async () => {
  const account = await payer(db)
  const book = await makeBook()
  for (const factor of ['-0.1', '1000.000001', '1.0000001', 'NaN'])
    await refused('invalid_factor', () => setFactor(book, factor))
  await setFactor(book, '1000')
  await refused('price_book_not_found', () => setFactor(newId(), '1'))
  await refused('invalid_effective_from', () => setFactor(book, '1', 'infinity'))
  await refused('invalid_effective_from', () => setMinimum({ book }, '1', '-infinity'))
  await refused('config_node_not_found', () => setMinimum({ node: newId() }, '1'))
  await refused('invalid_minimum', () => setMinimum({}, '1'))
  await refused('invalid_minimum', () => setMinimum({ book, node: account.nodeId }, '1'))
  await refused('currency_mismatch', async () =>
    setMinimum({ book: await makeBook({ currency: 'EUR' }) }, '1'),
  )
  await refused('currency_mismatch', async () => assign(account, await makeBook({ currency: 'EUR' })))
  await refused('invalid_price_book', async () => assign(account, await makeBook({ kind: 'cost' })))
  await refused('price_book_not_found', () => assign(account, newId()))
  await refused('account_not_found', () =>
    db.operator('select api.assign_price_book($1, $2)', [newId(), book]),
  )
  await refused('invalid_effective_from', () => assign(account, book, 'infinity'))
  await assign(account, book)
  await assign(account, book)
  await refused('assignment_exists', () => assign(account, null))
  await refused('price_book_is_fixed', () =>
    db.sql('update data.price_book set currency = $2 where id = $1', [book, 'EUR']),
  )
  await refused('price_book_is_fixed', () => db.sql('delete from data.price_book where id = $1', [book]))
  await db.operator('update api.price_books set name = $2 where id = $1', [book, newId()])
  for (const table of ['price', 'price_book_factor', 'price_book_assignment'])
    await refused('append_only', () => db.sql(`delete from data.${table}`))
})

test('verify_balances finds a rate, a factor, a book or a minimum that was altered', async () => {
  const account = await payer(db, { funds: '1000' })
  const book = await makeBook()
  await setRates(account.nodeId, [
    { meter: 'input_tokens', unit_price: '2' },
    { meter: 'output_tokens', unit_price: '8' },
  ])
  await setRates(account.nodeId, [{ meter: 'output_tokens', unit_price: '5' }], book)
  await setFactor(book, '1.5')
  await account.use('1', { id: idAt(new Date(Date.now() - 1000)) })
  await assign(account, book, new Date(Date.now() - 500).toISOString())
  await setMinimum({ book }, '4')
  assert.is(await use(account, { input_tokens: 10, output_tokens: 1 }), 35)
  assert.is(await use(account, { input_tokens: 1 }), 4)
  const found = async (change: string, values: unknown[]) => {
    const session = await db.session()
    try {
      await session.query(`begin; set local session_replication_role = replica`)
      await session.query(change, values)
      const { rows } = await session.query(
        'select distinct problem from api.verify_balances($1) order by 1',
        [account.accountId],
      )
      return rows.map(({ problem }) => problem)
    } finally {
      await session.query('rollback')
      await session.end()
    }
  }
  assert.equal(await found('select 1', []), [])
  assert.equal(
    await found(`update data.price set unit_price = 3 where config_node_id = $1 and meter = 'input_tokens'`, [
      account.nodeId,
    ]),
    ['cost_is_not_of_its_rates'],
  )
  assert.equal(await found(`update data.price set unit_price = 3 where price_book_id = $1`, [book]), [
    'cost_is_not_of_its_rates',
  ])
  assert.equal(await found(`update data.price set variant = 'flex' where price_book_id = $1`, [book]), [
    'rate_is_not_of_this_event',
  ])
  assert.equal(await found(`update data.price set effective_from = now() where price_book_id = $1`, [book]), [
    'rate_is_not_of_this_event',
  ])
  assert.equal(await found(`update data.price set context_over = 10 where price_book_id = $1`, [book]), [
    'rate_is_not_of_this_event',
  ])
  assert.equal(await found(`delete from data.price where price_book_id = $1`, [book]), [
    'cost_is_not_of_its_rates',
    'meter_without_rate',
  ])
  assert.equal(await found(`update data.price_book_factor set factor = 2 where price_book_id = $1`, [book]), [
    'factor_is_not_of_its_book',
  ])
  assert.equal(
    await found(`update data.price_book_assignment set effective_from = now() where price_book_id = $1`, [
      book,
    ]),
    ['book_is_not_assigned'],
  )
  assert.equal(await found(`update data.minimum_charge set minimum = 1 where price_book_id = $1`, [book]), [
    'minimum_is_of_no_book_or_node',
  ])
  assert.equal(
    await found(`update data.price set price_book_id = $2 where config_node_id = $1 and meter = 'usd'`, [
      account.nodeId,
      book,
    ]),
    ['rate_is_not_of_this_event'],
  )
  // the row itself is under the hash
  for (const change of [
    'factor = 1',
    `variant = 'flex'`,
    'minimum = 5',
    'estimated = true',
    'price_book_id = null',
  ])
    assert.ok(
      (
        await found(
          `update data.usage_log set terms.${change} where account_id = $1 and (terms).factor is not null`,
          [account.accountId],
        )
      ).includes('usage_altered'),
      change,
    )
})

test('verify_balances finds a rate that was raised under a minimum', async () => {
  const account = await payer(db, { funds: '10' })
  await setMinimum({ node: account.nodeId }, '3')
  assert.is(await use(account, { usd: 1 }), 3)
  const session = await db.session()
  try {
    await session.query('begin; set local session_replication_role = replica')
    await session.query('update data.price set unit_price = 200 where config_node_id = $1', [account.nodeId])
    const { rows } = await session.query('select problem, expected from api.verify_balances($1)', [
      account.accountId,
    ])
    assert.equal(rows, [{ problem: 'cost_is_not_of_its_rates', expected: '200.0000000000' }])
  } finally {
    await session.query('rollback')
    await session.end()
  }
})

test('an event says that its quantities are estimated, and an unfit mark is left out', async () => {
  const account = await payer(db, { funds: '10' })
  const [marked, unfit] = await account.record(
    account.event('1', { estimated: true }),
    account.event('2', { estimated: 'perhaps' }),
  )
  assert.equal([marked!.status, unfit!.status, unfit!.left_out], ['charged', 'charged', ['estimated']])
  assert.equal(
    await db.operator('select estimated from api.usage_logs where account_id = $1 order by cost', [
      account.accountId,
    ]),
    [{ estimated: true }, { estimated: null }],
  )
})

test('a retry with another tier says that it differs', async () => {
  const account = await payer(db, { funds: '10' })
  await setRates(account.nodeId, [{ meter: 'usd', unit_price: '2', variant: 'flex' }])
  const event = account.event('1', { variant: 'flex' })
  assert.is(costs(await account.record(event))[0], 2)
  const [again, other] = await account.record(event, { ...event, variant: '' })
  assert.equal(
    [again!.status, again!.mismatch, other!.status, other!.mismatch],
    ['duplicate', undefined, 'duplicate', true],
  )
})

// one meter's list, at random: tiers of context, and windows that carry each of them
const price = fc.integer({ min: 0, max: 99999 }).map((n) => `0.${String(n).padStart(5, '0')}`)
const list = fc
  .record({
    meter: fc.constantFrom('input_tokens', 'cached_input_tokens', 'output_tokens'),
    variant: fc.constantFrom('', 'flex'),
    overs: fc.uniqueArray(fc.constantFrom(10, 20, 30), { maxLength: 2 }),
    windows: fc.constantFrom(
      [],
      ['{[0,5000)}'],
      ['{[0,5000)}', '{[5000,10080)}'],
      ['{[100,200),[300,10000)}'],
    ),
    prices: fc.array(price, { minLength: 9, maxLength: 9 }),
    size: fc.constantFrom(1, 60, 1000),
  })
  .map(({ meter, variant, overs, windows, prices, size }) =>
    [undefined, ...windows].flatMap((hours, w) =>
      [0, ...overs].map((context_over, c) => ({
        meter,
        variant,
        context_over,
        hours,
        unit_price: prices[w * 3 + c]!,
        unit_size: size,
      })),
    ),
  )
const quantities = fc.dictionary(
  fc.constantFrom('input_tokens', 'cached_input_tokens', 'output_tokens'),
  fc.integer({ min: 0, max: 40 }),
  { minKeys: 1 },
)

// the same rule, written again in whole numbers
function expectedCost(
  lists: Rate[][],
  own: Rate[][],
  factor: string | undefined,
  meters: Record<string, number>,
  variant: string,
  minute: number,
): string | undefined {
  const context = (meters.input_tokens ?? 0) + (meters.cached_input_tokens ?? 0)
  const pick = (of: Rate[][], meter: string) => {
    const rates = of.findLast(([rate]) => rate!.meter === meter && rate!.variant === variant) ?? []
    const inside = ({ hours }: Rate) =>
      [...hours!.matchAll(/\[(\d+),(\d+)\)/g)].some(([, a, b]) => minute >= Number(a) && minute < Number(b))
    const windowed = rates.filter((rate) => rate.hours && inside(rate))
    return (windowed.length ? windowed : rates.filter(({ hours }) => !hours))
      .filter(({ context_over }) => !context_over || Number(context_over) < context)
      .sort((a, b) => Number(b.context_over) - Number(a.context_over))[0]
  }
  let steps = 0n
  for (const [meter, quantity] of Object.entries(meters)) {
    const mine = pick(own, meter)
    const rate = mine ?? (own.length && factor === undefined ? undefined : pick(lists, meter))
    if (!rate && quantity) return undefined
    if (rate)
      steps +=
        units(rate.unit_price) *
        BigInt(quantity) *
        BigInt(3600000000 / rate.unit_size!) *
        (mine || factor === undefined ? 1_000_000n : units(factor) / 10_000n)
  }
  const step = 3_600_000_000n * 1_000_000n
  return String((2n * steps + step) / (2n * step))
}

test('at random, a hold costs what its event then costs, and both what the rule says', async () => {
  const account = await payer(db, { funds: '1000000' })
  const make = async () =>
    (await db.operator('insert into api.config_nodes (name) values ($1) returning id', [newId()]))[0]!.id
  let books = 0
  await fc.assert(
    fc.asyncProperty(
      fc.array(list, { minLength: 1, maxLength: 5 }),
      fc.array(list, { maxLength: 2 }),
      fc.option(fc.integer({ min: 0, max: 3_000_000 }), { nil: undefined }),
      fc.array(fc.tuple(quantities, fc.constantFrom('', 'flex')), { minLength: 1, maxLength: 4 }),
      async (lists, own, millionths, uses) => {
        const node = await make()
        await db.operator(
          'insert into api.virtual_key_config_nodes (virtual_key_id, config_node_id) values ($1, $2)',
          [account.keyId, node],
        )
        const factor = millionths === undefined ? undefined : (millionths / 1e6).toFixed(6)
        const book = await makeBook()
        for (const [i, rates] of lists.entries()) await setRates(node, rates, null, `202${i}-01-01T00:00:00Z`)
        for (const [i, rates] of own.entries()) await setRates(node, rates, book, `202${i}-06-01T00:00:00Z`)
        if (factor !== undefined) await setFactor(book, factor)
        const withBook = own.length > 0 || factor !== undefined
        // each run has a later assignment of its own
        books += 1
        await assign(
          account,
          withBook ? book : null,
          new Date(Date.parse('2025-01-01') + books * 60_000).toISOString(),
        )
        for (const [meters, variant] of uses) {
          const id = newId()
          const hold = {
            id,
            account_id: account.accountId,
            virtual_key_id: account.keyId,
            config_node_id: node,
            meters,
            variant,
          }
          const [held] = await account.place(hold)
          const [charged] = await account.record({ ...hold, hold_id: id })
          const minute =
            Math.floor(Number.parseInt(id.replace('-', '').slice(0, 12), 16) / 60_000 + 4320) % 10080
          const expected = expectedCost(
            lists,
            withBook ? own : [],
            withBook ? factor : undefined,
            meters,
            variant,
            minute,
          )
          const inUnits = (amount?: string) => (amount === undefined ? undefined : String(units(amount)))
          assert.equal(
            [held!.status === 'held' ? inUnits(held!.amount) : undefined, inUnits(charged!.cost)],
            [expected, expected],
          )
        }
      },
    ),
    { numRuns: 60 },
  )
})

test('holds and events of an hour ago are priced at their ids, whatever came since', async () => {
  const account = await payer(db, { funds: '100' })
  const id = idAt(new Date(Date.now() - 1_800_000))
  await setRates(account.nodeId, [{ meter: 'input_tokens', unit_price: '2' }])
  await setRates(
    account.nodeId,
    [{ meter: 'input_tokens', unit_price: '3' }],
    null,
    new Date(Date.now() - 60_000).toISOString(),
  )
  assert.is(await use(account, { input_tokens: 1 }, { id }), 2)
  assert.is(await use(account, { input_tokens: 1 }), 3)
})

rates.run()
