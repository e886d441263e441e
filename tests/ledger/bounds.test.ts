// Small inputs that could cost much, such as absurd numbers or thousands of grants: cost stays linear in size.
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { movableClock } from '../support/clock.ts'
import { database, type Row } from '../support/database.ts'
import { holdsTrue } from '../support/ledger.ts'
import { type Payer, payer } from '../support/payer.ts'

const test = suite('bounds')
const db = await database(test)
const move = await movableClock(db.sql)
const account = await payer(db, { funds: '1000000' })

/** The JSON of an event with a field put in as it is written: numbers that JSON.stringify would never write. */
const withField = (field: string, json: string): string => {
  const { [field]: _, ...event } = account.event('1')
  return `${JSON.stringify(event).slice(0, -1)}, "${field}": ${json}}`
}
const record = async (...events: string[]): Promise<Row[]> =>
  (await db.gateway('select api.record_usage($1) as answers', [`[${events.join(',')}]`]))[0]!.answers
const good = () => JSON.stringify(account.event('1'))
const list = (n: number, json: string) => Array.from({ length: n }, () => json).join(',')

/** The least ms of three calls: a call that makes long texts in memory takes many times a plain call's. */
const tries = async (call: () => Promise<unknown>): Promise<number> => {
  let best = Number.POSITIVE_INFINITY
  for (let i = 0; i < 3; i++) {
    const started = performance.now()
    await call()
    best = Math.min(best, performance.now() - started)
  }
  return best
}

const grants = (to: Payer, n: number, expires: string) =>
  db.operator(
    `select api.grant_credit($1, 0.01, ${expires}, case when n % 2 = 0 then 100 else 50 end) from generate_series(1, $2::int) n`,
    [to.accountId, n],
  )

const absurd = ['1e131071', '-1e131071', '1e-16383', '-1e-16383', '0e-16383']
for (const number of absurd) {
  test(`metadata with numbers like ${number} is left out, cheaply, and its neighbour is charged`, async () => {
    for (const n of [1, 4000]) {
      const started = performance.now()
      const [first, second] = await record(withField('metadata', `{"a": [${list(n, number)}]}`), good())
      const took = performance.now() - started
      assert.equal([first!.status, first!.left_out], ['charged', ['metadata']])
      assert.is(second!.status, 'charged')
      // seconds and gigabytes before
      assert.ok(took < 1500, `${n} numbers took ${took.toFixed()} ms`)
    }
  })

  test(`meters with numbers like ${number} are parked, cheaply, without the numbers`, async () => {
    const meters = `{${Array.from({ length: 12_000 }, (_, i) => `"m${i}": ${number}`).join(',')}}`
    const started = performance.now()
    const [first, second] = await record(withField('meters', meters), good())
    assert.ok(performance.now() - started < 1500)
    assert.equal([first!.status, first!.code, second!.status], ['parked', 'invalid_meters', 'charged'])
    const [kept] = await db.sql('select event from data.parked_usage where usage_id = $1', [first!.id])
    assert.is(kept!.event.meters, 'absurd number')
  })

  test(`${number} in any other field is refused by that field's own rule`, async () => {
    const started = performance.now()
    for (const field of [
      'id',
      'account_id',
      'virtual_key_id',
      'config_node_id',
      'hold_id',
      'final',
      'other',
    ]) {
      const [first, second] = await record(withField(field, `[${list(300, number)}]`), good())
      assert.is(first!.status, field === 'other' ? 'charged' : 'parked', field)
      assert.is(second!.status, 'charged')
    }
    const holds = ['id', 'account_id', 'virtual_key_id', 'amount', 'expires_in'].map((field) => {
      const { [field]: _, ...request } = account.request('1')
      return `${JSON.stringify(request).slice(0, -1)}, "${field}": ${number}}`
    })
    const [{ answers }] = (await db.gateway('select api.place_holds($1) as answers', [
      `[${holds.join(',')}]`,
    ])) as [Row]
    assert.equal([...new Set(answers.map(({ status }: Row) => status))], ['refused'])
    assert.ok(performance.now() - started < 5000)
  })
}

test('a megabyte of texts that look like keys, and metadata past its limit, are not searched', async () => {
  const started = performance.now()
  const [answer] = await record(withField('metadata', `{"a": "${'vk_'.repeat(350_000)}"}`))
  assert.equal([answer!.status, answer!.left_out], ['charged', ['metadata']])
  assert.ok(performance.now() - started < 500)
})

test('a hundred thousand meters are parked as too large, and keep no other event waiting', async () => {
  const meters = `{${Array.from({ length: 100_000 }, (_, i) => `"meter_${i}": 1`).join(',')}}`
  const late = Array.from({ length: 5 }, () => account.event('', { meters: { late: '1' } }))
  const answers = await record(withField('meters', meters), ...late.map((event) => JSON.stringify(event)))
  assert.equal(
    answers.map(({ code }) => code),
    ['invalid_meters', ...late.map(() => 'price_not_found')],
  )
  const [kept] = await db.sql('select event from data.parked_usage where usage_id = $1', [answers[0]!.id])
  assert.is(kept!.event.meters, 'too large')
  await db.operator(
    `insert into api.prices (config_node_id, meter, unit_price, effective_from) values ($1, 'late', 1, '2020-01-01')`,
    [account.nodeId],
  )
  const [{ replayed }] = (await db.operator('select api.replay_parked_usage() as replayed')) as [Row]
  assert.is(replayed.filter(({ status }: Row) => status === 'charged').length, 5)
})

test('a replay never sorts an array once per event, and writes nothing to disk', async () => {
  const one = await payer(db, { funds: '1000' })
  const metadata = { note: 'x'.repeat(3000) }
  await one.record(...Array.from({ length: 500 }, () => one.event('', { meters: { soon: '0.1' }, metadata })))
  await db.operator(
    `insert into api.prices (config_node_id, meter, unit_price, effective_from) values ($1, 'soon', 1, '2020-01-01')`,
    [one.nodeId],
  )
  const session = await db.session('keyledger_operator')
  try {
    const { rows } = await session.query(
      'explain (analyze, buffers, format json) select api.replay_parked_usage(max_events => 20000)',
    )
    const { Plan: plan } = rows[0]['QUERY PLAN'][0]
    assert.is(plan['Temp Written Blocks'], 0)
  } finally {
    await session.end()
  }
  assert.equal(await one.figures(), { balance: '950', available: '950' })
})

test('the time for many extensions past expiring credit grows with their number, not with that of all holds', async () => {
  const one = await payer(db, { funds: '1000' })
  await grants(one, 30, `clock.clock_timestamp() + interval '20 minutes' + n * interval '10 s'`)
  const time = async (n: number) => {
    const requests = Array.from({ length: n }, () => one.request('0.01'))
    await one.place(...requests)
    const elements = requests.map(({ id }) => ({ id, account_id: one.accountId, expires_in: 3600 }))
    const started = performance.now()
    const [{ answers }] = (await db.gateway('select api.extend_holds($1) as answers', [
      JSON.stringify(elements),
    ])) as [Row]
    const took = performance.now() - started
    assert.equal([...new Set(answers.map(({ status }: Row) => status))], ['extended'])
    return took
  }
  const few = await time(200)
  const many = await time(2000)
  assert.ok(many < few * 40, `${few.toFixed()} ms for 200, ${many.toFixed()} ms for 2,000`)
})

test('a replay tries a parked event that makes it fail by itself, and charges the others', async () => {
  const [rich, poor] = [await payer(db, { funds: '10' }), await payer(db, { funds: '10' })]
  const events = [rich, poor].map((each) => each.event('', { meters: { much: '1' } }))
  await rich.record(events[0]!)
  await poor.record(events[1]!)
  for (const each of [rich, poor])
    await db.operator(
      `insert into api.prices (config_node_id, meter, unit_price, effective_from) values ($1, 'much', 1, '2020-01-01')`,
      [each.nodeId],
    )
  // more than a figure can hold
  await db.sql('alter table data.account_balance disable trigger user')
  await db.sql(
    'update data.account_balance set outstanding_amount = 999999999999999999, balance = 0 where account_id = $1',
    [rich.accountId],
  )
  const ids = await db.sql('select id from data.parked_usage where account_id = any ($1)', [
    [rich.accountId, poor.accountId],
  ])
  const [{ answers }] = (await db.operator('select api.replay_parked_usage($1) as answers', [
    ids.map(({ id }) => id),
  ])) as [Row]
  const of = Object.fromEntries(answers.map(({ id, status }: Row) => [id, status]))
  assert.equal([of[events[0]!.id], of[events[1]!.id]], ['parked', 'charged'])
  await db.sql('update data.account_balance set outstanding_amount = 0, balance = 10 where account_id = $1', [
    rich.accountId,
  ])
  await db.sql('alter table data.account_balance enable trigger user')
})

test('the time for a hold grows with the number of grants, not with its square', async () => {
  const [some, many] = [await payer(db, { funds: '10' }), await payer(db, { funds: '10' })]
  const soon = `clock.clock_timestamp() + interval '10 minutes' + n * interval '10 ms'`
  await grants(some, 500, soon)
  await grants(many, 4000, soon)
  const ratio = (await tries(() => many.hold('0.01'))) / (await tries(() => some.hold('0.01')))
  assert.ok(ratio < 24, `8 times the grants took ${ratio.toFixed(1)} times as long`)
})

test('thousands of expired grants are settled some at a time, and lock nobody out', async () => {
  const many = await payer(db, { funds: '1' })
  // as with 10,000 at a time and ten times the grants
  const [{ settle }] = (await db.sql(
    `select pg_get_functiondef('data.end_due_grants'::regproc) as settle`,
  )) as [Row]
  assert.ok(settle.includes('limit 10000'))
  await db.sql(settle.replace('limit 10000', 'limit 1000'))
  await grants(many, 1200, `clock.clock_timestamp() + interval '3 minutes' + n * interval '1 ms'`)
  const before = Number(await many.version())
  await move(600)
  // expired credit doesn't count, whether its entry is posted or not
  assert.equal(await many.figures(), { balance: '1', available: '1' })
  assert.is((await many.place(many.request('1.01')))[0]!.code, 'insufficient_funds')
  assert.is((await many.use('0.5')).status, 'charged')
  assert.equal(await many.entries(before), [
    'credit_expiry -10: free_credit -10',
    'credit_expiry -2: free_credit -2',
    'usage -0.5: balance -0.5',
  ])
  await db.sql(settle)
  assert.equal(await many.figures(), { balance: '0.5', available: '0.5' })
  assert.equal(await db.operator('select * from api.verify_balances($1)', [many.accountId]), [])
})

test('a grant until the last microsecond of year 9999 is kept to the microsecond', async () => {
  const one = await payer(db)
  await one.grant('1', { expires_at: '9999-12-31T23:59:59.999999Z' })
  const [grant] = await db.sql('select expires_at::text from data.credit_grant where account_id = $1', [
    one.accountId,
  ])
  assert.is(grant!.expires_at, '9999-12-31 23:59:59.999999+00')
  assert.equal(await db.operator('select * from api.verify_balances($1)', [one.accountId]), [])
})

test('an account whose last entry lies ahead goes on from that time, and is reported', async () => {
  const one = await payer(db, { funds: '10' })
  await move(3600)
  await one.use('1')
  await move(-3600)
  await one.use('1')
  const problems = await db.operator('select problem from api.verify_balances($1)', [one.accountId])
  assert.equal(problems, [{ problem: 'head_at_is_in_the_future' }])
  const close = db
    .operator('select * from api.close_period(clock.now())')
    .catch(({ code, message }) => [code, message])
  assert.equal(await close, ['PT409', 'account_is_ahead'])
  await move(3600)
  assert.equal(await db.operator('select problem from api.verify_balances($1)', [one.accountId]), [])
})

test('the ledger is whole after all these tests', () => holdsTrue(db.sql))

test.run()
