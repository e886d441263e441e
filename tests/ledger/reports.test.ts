// What was spent, by key, user, node, meter or tag: whose it is to see, and that it adds up to the last digit in each way.
import { randomUUID } from 'node:crypto'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database, type Row, type Sql } from '../support/database.ts'
import { idAt } from '../support/ids.ts'
import { units } from '../support/ledger.ts'
import { payer } from '../support/payer.ts'
import { code, transports } from '../support/transports.ts'

const test = suite('spend')
const db = await database(test)
const through = await transports(db)

const month = new Date(Date.UTC(new Date().getUTCFullYear(), new Date().getUTCMonth()))
const at = (ms: number) => new Date(month.getTime() + ms)
const from = new Date(0).toISOString()
const to = '2099-01-01T00:00:00Z'

// A tenant of two users, and one who pays alone, in euros. All events were in the first second of this month.
const [{ id: tenantId }] = (await db.operator('insert into api.tenants (name) values ($1) returning id', [
  't',
])) as [Row]
const [mary, nora] = [await payer(db, { tenantId }), await payer(db, { tenantId })]
const [{ id: admin }] = (await db.operator(
  `insert into api.user_profiles (tenant_id, tenant_role) values ($1, 'admin') returning id`,
  [tenantId],
)) as [Row]
const [{ id: euro }] = (await db.operator(
  `insert into api.user_profiles (currency) values ('EUR') returning id`,
)) as [Row]
const [euroKey] = (await db.operator('select id from api.create_virtual_key($1)', [euro])) as [Row]
await db.operator(`update api.user_profiles set display_name = 'Mary' where id = $1`, [mary.userId])
await db.operator(`update api.config_nodes set name = 'big' where id = $1`, [mary.nodeId])
await db.sql(`update data.virtual_key set name = 'laptop' where id = $1`, [mary.keyId])
await db.operator(
  `insert into api.prices (config_node_id, meter, unit_price, unit_size, currency, effective_from) values
    ($1, 'a', 1, 3, 'USD', '2020-01-01'), ($1, 'b', 0.0000000001, 9, 'USD', '2020-01-01'),
    ($1, 'c', 0.0000000001, 2, 'USD', '2020-01-01'), ($1, 'usd', 2, 1, 'EUR', '2020-01-01')`,
  [mary.nodeId],
)
const recorded = await mary.record(
  mary.event('1', { id: idAt(at(0)), metadata: { team: 'red', n: 1 } }),
  mary.event('2', { id: idAt(at(10)), metadata: { team: 'blue' } }),
  mary.event('', { id: idAt(at(20)), meters: { a: 1, b: 4, c: 1, free: 0 }, metadata: { team: 'red' } }),
  mary.event('', { id: idAt(at(30)), meters: { a: 2, b: 1, c: 1 } }),
  {
    ...nora.event('4', { id: idAt(at(40)) }),
    config_node_id: mary.nodeId,
    metadata: { team: { x: 1 }, 'a.b': 'c' },
  },
  { ...mary.event('3', { id: idAt(at(50)) }), account_id: euro, virtual_key_id: euroKey!.id },
)
assert.equal(
  recorded.map(({ status }) => status),
  recorded.map(() => 'charged'),
)

const spend = async (run: Sql, by: string, args: Row = {}): Promise<Row[]> => {
  const given: Row = { by, since: from, before: to, ...args }
  const names = Object.keys(given)
  return run(
    `select key, name, currency, events::int, trim_scale(quantity)::text as quantity, cost::text
    from api.spend(${names.map((name, i) => `"${name}" => $${i + 1}`).join(', ')})`,
    Object.values(given),
  )
}
const brief = (rows: Row[]) => rows.map(({ key, currency, events, cost }) => [key, currency, events, cost])

test('by key, user and node: one row each and currency, named, most expensive first', async () => {
  // a third and two thirds round down and up, with the ten-billionths beside them
  const maryCost = '4.0000000001'
  assert.equal(await spend(db.operator, 'user'), [
    { key: euro, name: null, currency: 'EUR', events: 1, quantity: null, cost: '6.0000000000' },
    ...[
      { key: mary.userId, name: 'Mary', currency: 'USD', events: 4, quantity: null, cost: maryCost },
      { key: nora.userId, name: null, currency: 'USD', events: 1, quantity: null, cost: '4.0000000000' },
    ],
  ])
  assert.equal(
    (await spend(db.operator, 'virtual_key')).map(({ key, name, cost }) => [key, name, cost]),
    [
      [euroKey!.id, null, '6.0000000000'],
      [mary.keyId, 'laptop', maryCost],
      [nora.keyId, null, '4.0000000000'],
    ],
  )
  assert.equal(
    (await spend(db.operator, 'config_node')).map(({ key, name, currency, cost }) => [
      key,
      name,
      currency,
      cost,
    ]),
    [
      [mary.nodeId, 'big', 'USD', '8.0000000001'],
      [mary.nodeId, 'big', 'EUR', '6.0000000000'],
    ],
  )
})

test('by meter: its quantity and its share, which add up to the cost to the last digit', async () => {
  const rows = await spend(db.operator, 'meter', { account_id: tenantId })
  assert.equal(
    rows.map(({ key, events, quantity, cost }) => [key, events, quantity, cost]),
    [
      ['usd', 3, '7', '7.0000000000'],
      // the sums so far, rounded: 0.3333333333 and 0.6666666667, then what b and c add to them
      ['a', 2, '3', '1.0000000000'],
      ['b', 2, '5', '0.0000000001'],
      ['c', 2, '2', '0.0000000000'],
      ['free', 1, '0', '0.0000000000'],
    ],
  )
})

test('by tag: its value as text, and null for events without it', async () => {
  assert.equal(brief(await spend(db.operator, 'metadata.team')), [
    [null, 'EUR', 1, '6.0000000000'],
    ['{"x": 1}', 'USD', 1, '4.0000000000'],
    ['blue', 'USD', 1, '2.0000000000'],
    ['red', 'USD', 2, '1.3333333334'],
    [null, 'USD', 1, '0.6666666667'],
  ])
  assert.equal(brief(await spend(db.operator, 'metadata.a.b', { account_id: tenantId })), [
    [null, 'USD', 4, '4.0000000001'],
    ['c', 'USD', 1, '4.0000000000'],
  ])
  assert.equal(brief(await spend(db.operator, 'metadata.n', { account_id: tenantId }))[1], [
    '1',
    'USD',
    1,
    '1.0000000000',
  ])
})

test('in each way the sum is that of the costs, and by meter each share is within its rounding', async () => {
  const many = await payer(db, { funds: '1000' })
  const names = ['alpha', 'beta', 'gamma', 'delta']
  const sizes = [3, 9, 1000, 3600]
  await db.operator(
    `insert into api.prices (config_node_id, meter, unit_price, unit_size, effective_from)
    select $1, m, p, s, '2020-01-01' from unnest($2::text[], $3::numeric[], $4::int[]) as x (m, p, s)`,
    [many.nodeId, names, ['0.0000000001', '0.07', '0.0000000123', '1.1'], sizes],
  )
  const events = Array.from({ length: 300 }, (_, i) =>
    many.event('', {
      id: idAt(at(i)),
      meters: Object.fromEntries(
        names
          .filter((_, n) => (i + 1) & (1 << (n % 4)) || n === i % 4)
          .map((name, n) => [name, (i * 7 + n) % 23]),
      ),
      metadata: { tag: i % 5 },
    }),
  )
  await many.record(...events)
  const [total] = await db.sql('select sum(cost)::text as cost from data.usage_log where account_id = $1', [
    many.accountId,
  ])
  for (const by of ['virtual_key', 'user', 'config_node', 'meter', 'metadata.tag', 'metadata.none']) {
    const rows = await spend(db.operator, by, { account_id: many.accountId })
    assert.is(
      rows.reduce((sum, { cost }) => sum + units(cost), 0n),
      units(total!.cost),
      by,
    )
  }
  const exact = await db.sql(
    `select e.key, sum(e.value::numeric * p.unit_price / p.unit_size) as cost, count(*)::int as events
    from data.usage_log l cross join jsonb_each(l.meters) e
    join data.price p on p.config_node_id = l.config_node_id and p.meter = e.key
    where l.account_id = $1 group by 1`,
    [many.accountId],
  )
  for (const { key, events, cost } of await spend(db.operator, 'meter', { account_id: many.accountId })) {
    const true_ = exact.find((each) => each.key === key)!
    assert.is(events, true_.events)
    assert.ok(
      Math.abs(Number(cost) - Number(true_.cost)) <= events * 1e-10,
      `${key}: ${cost}, exactly ${true_.cost}`,
    )
  }
})

test('of the first moment, not of the last', async () => {
  const count = async (first: Date | string, last: Date | string) =>
    (await spend(db.operator, 'user', { since: first, before: last, account_id: tenantId })).reduce(
      (sum, { events }) => sum + events,
      0,
    )
  assert.is(await count(at(0), at(40)), 4)
  assert.is(await count(at(10), at(41)), 4)
  assert.is(await count(at(0), at(10)), 1)
  assert.is(await count(at(1), at(10)), 0)
  // to the microsecond: an event's time is its id's millisecond
  const micros = (ms: number, us: string) => at(ms).toISOString().replace('Z', `${us}Z`)
  for (const us of ['001', '499', '501', '999']) {
    assert.is(await count(micros(10, us), at(21)), 1, `from .010${us}`)
    assert.is(await count(at(10), micros(10, us)), 1, `to .010${us}`)
  }
  assert.is(await count('0044-03-15T00:00:00Z BC', '9999-12-31T00:00:00Z'), 5)
  // the first id that a moment can have is of that moment
  const one = await payer(db)
  const hex = at(60).getTime().toString(16).padStart(12, '0')
  await one.use('1', { id: `${hex.slice(0, 8)}-${hex.slice(8)}-7000-8000-000000000000` })
  const events = async (first: Date, last: Date) =>
    (await spend(db.operator, 'user', { since: first, before: last, account_id: one.accountId })).length
  assert.equal([await events(at(59), at(60)), await events(at(60), at(61))], [0, 1])
  assert.is(await count('1900-01-01T00:00:00Z', '294000-01-01T00:00:00Z'), 5)
})

test('one account, or all that the reader may see', async () => {
  const users = async (run: Sql, args: Row = {}) =>
    (await spend(run, 'user', args))
      .map(({ key }) => ({ [mary.userId]: 'mary', [nora.userId]: 'nora', [euro]: 'euro' })[key as string])
      .filter(Boolean)
      .sort()
      .join(' ')
  assert.is(await users(db.operator), 'euro mary nora')
  assert.is(await users(db.operator, { account_id: tenantId }), 'mary nora')
  assert.is(await users(db.operator, { account_id: randomUUID() }), '')
  assert.is(await users(db.member(mary.userId)), 'mary')
  assert.is(await users(db.member(mary.userId), { account_id: tenantId }), 'mary')
  assert.is(await users(db.member(mary.userId), { account_id: euro }), '')
  assert.is(await users(db.member(admin)), 'mary nora')
  assert.is(await users(db.member(euro)), 'euro')
  assert.is(await users(db.member(randomUUID())), '')
  for (const by of ['meter', 'virtual_key', 'config_node', 'metadata.team'])
    assert.is((await spend(db.member(nora.userId), by)).map(({ cost }) => cost).join(), '4.0000000000', by)
})

test('only the months of the period are read', async () => {
  const before = new Date(Date.UTC(month.getUTCFullYear(), month.getUTCMonth() - 1))
    .toISOString()
    .slice(0, 7)
    .replace('-', '_')
  const session = await db.session()
  try {
    await session.query(`begin; lock table data.usage_log_${before} in access exclusive mode`)
    for (const by of ['user', 'meter'])
      for (const run of [db.operator, db.member(mary.userId)])
        assert.ok((await spend(run, by, { since: at(0), before: at(1000) })).length, by)
    // it waits for the month it needs
    const waiting = await db.session('keyledger_operator')
    const answer = waiting.query(`select from api.spend('user', $1, $2)`, [at(-1), at(1000)])
    await db.blocked(waiting)
    await session.query('commit')
    await answer
    await waiting.end()
  } finally {
    await session.end()
  }
})

for (const [name, { operator }] of Object.entries(through)) {
  test(`called with its names, by ${name}`, async () => {
    assert.equal(
      await operator.call<unknown>('spend', {
        by: 'config_node',
        since: at(40),
        before: at(41),
        account_id: tenantId,
      }),
      [{ key: mary.nodeId, name: 'big', currency: 'USD', events: 1, quantity: null, cost: 4 }],
    )
    assert.equal(
      await operator.call(
        'spend',
        { by: 'meter', since: from, before: to, account_id: euro },
        { select: ['key', 'quantity::text', 'cost::text'] },
      ),
      [{ key: 'usd', quantity: '3', cost: '6.0000000000' }],
    )
    assert.equal(
      await operator.call<unknown>('spend', {
        by: 'user',
        since: at(1),
        before: at(2),
        account_id: tenantId,
      }),
      [],
    )
  })

  test(`an impossible sum is refused, by ${name}`, async () => {
    const ask = (args: Row) => code(operator.call('spend', { by: 'user', since: from, before: to, ...args }))
    for (const by of [
      '',
      null,
      'users',
      'User',
      'metadata',
      'metadata.',
      'usermetadata.x',
      'cost',
      "user'; --",
    ])
      assert.is(await ask({ by }), '422 invalid_by', `${by}`)
    for (const period of [
      { since: to, before: from },
      { since: to, before: to },
      { since: null },
      { before: null },
      { before: 'infinity' },
      { since: '-infinity' },
    ])
      assert.is(await ask(period), '422 invalid_period', JSON.stringify(period))
  })
}

test.run()
