// Refunds of charges and reversed top-ups: where the money goes, once per reference, never more than came.
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { type Call, callers, errors } from '../support/callers.ts'
import { movableClock, now } from '../support/clock.ts'
import { database, type Row } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { newId } from '../support/ids.ts'
import { chances, holdsTrue } from '../support/ledger.ts'
import { type Payer, payer } from '../support/payer.ts'
import { code, refusals, short, transports } from '../support/transports.ts'

const refunds = suite('refunds')
const db = await database(refunds)
const test = (name: string, run: () => Promise<void>) =>
  refunds(name, async () => {
    await run()
    await holdsTrue(db.sql)
  })

const refund = (account: Payer, args: Row) => account.post('refund_charge', args)
const reverse = (account: Payer, args: Row) => account.post('reverse_top_up', args)
const soon = (seconds: number) => new Date(now() + seconds * 1000).toISOString()
const refused = async (call: Promise<unknown>, message: string, detail?: string) => {
  const error = await failure(call)
  assert.equal([error.code, error.message], ['PT409', message])
  if (detail) assert.is(error.detail, detail)
}
const grants = async ({ accountId }: Payer): Promise<string> => {
  const rows = await db.sql(
    'select trim_scale(remaining)::text as it from data.credit_grant where account_id = $1 order by seq',
    [accountId],
  )
  return rows.map(({ it }) => it).join(' ')
}

// each step, the entry it posts, and the figures after it (those that are not zero)
type Step = [run: (account: Payer) => Promise<unknown>, entry: string, figures: Row]
const posting: Record<string, Step[]> = {
  'a charge paid with money comes back to the balance, in parts, then the rest': [
    [(a) => a.topUp('10'), 'top_up 10: balance 10', { balance: '10', available: '10' }],
    [(a) => a.use('4'), 'usage -4: balance -4', { balance: '6', available: '6' }],
    [
      (a) => refund(a, { seq: 2, amount: '0.0000000001' }),
      'refund 0.0000000001: balance 0.0000000001',
      { balance: '6.0000000001', available: '6.0000000001' },
    ],
    [
      (a) => refund(a, { seq: 2 }),
      'refund 3.9999999999: balance 3.9999999999',
      { balance: '10', available: '10' },
    ],
  ],
  'debt is paid first': [
    [(a) => a.use('5'), 'usage -5: outstanding 5', { outstanding_amount: '5', available: '-5' }],
    [(a) => a.topUp('3'), 'top_up 3: outstanding -3', { outstanding_amount: '2', available: '-2' }],
    [
      (a) => refund(a, { seq: 1, amount: '1' }),
      'refund 1: outstanding -1',
      { outstanding_amount: '1', available: '-1' },
    ],
    [(a) => refund(a, { seq: 1 }), 'refund 4: balance 3, outstanding -1', { balance: '3', available: '3' }],
  ],
  'a refund of a charge on credit lowers the debt': [
    [(a) => a.limit('5'), 'limit_change 0: ', { credit_limit: '5', available: '5' }],
    [
      (a) => a.use('7'),
      'usage -7: balance -5, outstanding 2',
      { balance: '-5', credit_limit: '5', outstanding_amount: '2', available: '-2' },
    ],
    [
      (a) => refund(a, { seq: 2, amount: '3' }),
      'refund 3: balance 1, outstanding -2',
      { balance: '-4', credit_limit: '5', available: '1' },
    ],
    [(a) => refund(a, { seq: 2 }), 'refund 4: balance 4', { credit_limit: '5', available: '5' }],
  ],
  'a charge on free credit, money and debt comes back to debt, then money, then free credit': [
    [(a) => a.topUp('3'), 'top_up 3: balance 3', { balance: '3', available: '3' }],
    [
      (a) => a.grant('4'),
      'credit_grant 4: free_credit 4',
      { balance: '3', free_credit: '4', available: '7' },
    ],
    [
      (a) => a.use('10'),
      'usage -10: balance -3, free_credit -4, outstanding 3',
      { outstanding_amount: '3', available: '-3' },
    ],
    [
      (a) => refund(a, { seq: 3, amount: '2' }),
      'refund 2: outstanding -2',
      { outstanding_amount: '1', available: '-1' },
    ],
    [
      (a) => refund(a, { seq: 3, amount: '3' }),
      'refund 3: balance 2, outstanding -1',
      { balance: '2', available: '2' },
    ],
    [
      (a) => refund(a, { seq: 3, amount: '3' }),
      'refund 3: balance 1, free_credit 2',
      { balance: '3', free_credit: '2', available: '5' },
    ],
    [
      (a) => refund(a, { seq: 3 }),
      'refund 2: free_credit 2',
      { balance: '3', free_credit: '4', available: '7' },
    ],
  ],
  'the same, in one refund': [
    [(a) => a.topUp('3'), 'top_up 3: balance 3', { balance: '3', available: '3' }],
    [
      (a) => a.grant('4'),
      'credit_grant 4: free_credit 4',
      { balance: '3', free_credit: '4', available: '7' },
    ],
    [
      (a) => a.use('10'),
      'usage -10: balance -3, free_credit -4, outstanding 3',
      { outstanding_amount: '3', available: '-3' },
    ],
    [
      (a) => refund(a, { seq: 3 }),
      'refund 10: balance 3, free_credit 4, outstanding -3',
      { balance: '3', free_credit: '4', available: '7' },
    ],
  ],
  'free credit that comes back past a later debt stays free credit': [
    [(a) => a.grant('4'), 'credit_grant 4: free_credit 4', { free_credit: '4', available: '4' }],
    [(a) => a.use('4'), 'usage -4: free_credit -4', {}],
    [(a) => a.use('3'), 'usage -3: outstanding 3', { outstanding_amount: '3', available: '-3' }],
    [
      (a) => refund(a, { seq: 2 }),
      'refund 4: free_credit 1, outstanding -3',
      { free_credit: '1', available: '1' },
    ],
  ],
  'a reversed top-up takes balance, then free credit, and the spent part becomes debt': [
    [(a) => a.topUp('10'), 'top_up 10: balance 10', { balance: '10', available: '10' }],
    [(a) => a.use('5'), 'usage -5: balance -5', { balance: '5', available: '5' }],
    [
      (a) => a.grant('2'),
      'credit_grant 2: free_credit 2',
      { balance: '5', free_credit: '2', available: '7' },
    ],
    [
      (a) => reverse(a, { seq: 1, amount: '1' }),
      'top_up_reversal -1: balance -1',
      { balance: '4', free_credit: '2', available: '6' },
    ],
    [
      (a) => reverse(a, { seq: 1 }),
      'top_up_reversal -9: balance -4, free_credit -2, outstanding 3',
      { outstanding_amount: '3', available: '-3' },
    ],
  ],
  'a top-up that paid debt is taken back whole': [
    [(a) => a.use('5'), 'usage -5: outstanding 5', { outstanding_amount: '5', available: '-5' }],
    [
      (a) => a.topUp('8', { reference: 'pi_1' }),
      'top_up 8: balance 3, outstanding -5',
      { balance: '3', available: '3' },
    ],
    [
      (a) => reverse(a, { top_up_reference: 'pi_1' }),
      'top_up_reversal -8: balance -3, outstanding 5',
      { outstanding_amount: '5', available: '-5' },
    ],
  ],
}
for (const [name, steps] of Object.entries(posting))
  test(name, async () => {
    const account = await payer(db)
    for (const [i, [run, entry, figures]] of steps.entries()) {
      await run(account)
      assert.equal(await account.entries(i), [entry], `entry ${i + 1}`)
      assert.equal(await account.figures(), figures, `after ${entry}`)
    }
  })

test('refunds of an entry and of its events are capped together, whatever their references', async () => {
  const account = await payer(db, { funds: '10' })
  const [a, b] = [account.event('2'), account.event('3')]
  await account.record(a, b)
  const by = (usage_id: string, amount?: string) => refund(account, { usage_id, amount, reference: newId() })
  const first = await by(a.id, '1')
  assert.equal([first.refund_of_seq, first.refund_of_usage_id, first.counter_account], ['2', a.id, 'revenue'])
  await refused(by(a.id, '1.0000000001'), 'refund_exceeds_charge', 'left to refund: 1.0000000000')
  assert.is((await by(a.id)).amount, '1.0000000000')
  await refused(by(a.id), 'refund_exceeds_charge', 'left to refund: 0.0000000000')
  await refused(refund(account, { seq: 2, amount: '3.5' }), 'refund_exceeds_charge')
  // the entry's own refunds leave less for each event
  assert.is((await refund(account, { seq: 2, amount: '2' })).refund_of_usage_id, null)
  await refused(by(b.id, '1.5'), 'refund_exceeds_charge', 'left to refund: 1.0000000000')
  await refused(by(a.id), 'refund_exceeds_charge')
  assert.is((await refund(account, { seq: 2, usage_id: b.id })).amount, '1.0000000000')
  for (const args of [{ seq: 2 }, { usage_id: b.id }, { seq: 2, amount: '0.0000000001' }])
    await refused(refund(account, args), 'refund_exceeds_charge')
  assert.equal(await account.figures(), { balance: '10', available: '10' })
})

test('a charge of nothing has nothing to refund', async () => {
  const account = await payer(db)
  const event = account.event('0')
  await account.record(event)
  for (const args of [{ seq: 1 }, { usage_id: event.id }, { seq: 1, amount: '1' }])
    await refused(refund(account, args), 'refund_exceeds_charge')
})

test('free credit returns to the grants it came from, the last drawn first, and is spent from them again', async () => {
  const account = await payer(db)
  // spent 4th, 2nd, 3rd, 1st
  await account.grant('1')
  await account.grant('1', { expires_at: soon(100) })
  await account.grant('1', { expires_at: soon(200) })
  await account.grant('1', { priority: 50 })
  await account.use('4')
  for (const [amount, left] of [
    ['0.5', '0.5 0 0 0'],
    ['1', '1 0 0.5 0'],
    ['1', '1 0.5 1 0'],
  ] as const) {
    await refund(account, { seq: 5, amount })
    assert.is(await grants(account), left, amount)
  }
  await account.use('1')
  assert.is(await grants(account), '1 0 0.5 0')
  await refund(account, { seq: 5 })
  assert.is(await grants(account), '1 0.5 0.5 1')
  await refund(account, { seq: 9 })
  assert.is(await grants(account), '1 1 1 1')
  assert.equal(await account.figures(), { free_credit: '4', available: '4' })
})

test('a refund is done once per reference; other content under it is refused', async () => {
  const account = await payer(db)
  await account.topUp('20', { reference: 'pi_1' })
  const events = [account.event('2'), account.event('3')]
  await account.record(...events)
  await account.use('5')
  const [byEntry, byEvent] = [
    { seq: 2, amount: '2', reference: 'entry' },
    { usage_id: events[1]!.id, amount: '1', reference: 'event' },
  ]
  const first = await refund(account, { ...byEntry, reason: 'sorry' })
  assert.equal([first.reason, first.actor], ['sorry', 'keyledger_operator'])
  const second = await refund(account, byEvent)
  const all = await refund(account, { seq: 2, reference: 'rest' })
  assert.is(all.amount, '2.0000000000')
  const figures = await account.figures()
  // each again, after everything was refunded
  for (const [entry, args] of [
    [first, byEntry],
    [first, { ...byEntry, amount: '2.000' }],
    [first, { seq: 2, reference: 'entry' }],
    [second, byEvent],
    [second, { ...byEvent, seq: 2 }],
    [second, { ...byEvent, amount: null }],
    [all, { seq: 2, reference: 'rest' }],
    [all, { seq: 2, reference: 'rest', amount: '2' }],
  ] as const)
    assert.equal(await refund(account, args), entry, JSON.stringify(args))
  for (const args of [
    { ...byEntry, amount: '1' },
    { ...byEntry, amount: '2.0000000001' },
    { ...byEntry, seq: 3 },
    { ...byEntry, usage_id: events[0]!.id },
    { ...byEvent, usage_id: events[0]!.id },
    { seq: 2, amount: '1', reference: 'event' },
    { seq: 3, reference: 'rest' },
    { ...byEntry, reference: 'pi_1' },
  ])
    await refused(refund(account, args), 'reference_mismatch')
  await refused(reverse(account, { seq: 1, reference: 'entry' }), 'reference_mismatch')
  await refused(account.topUp('2', { reference: 'entry' }), 'reference_mismatch')
  await refused(account.grant('2', { reference: 'entry' }), 'reference_mismatch')
  assert.equal(await account.figures(), figures)
  assert.is(await account.version(), '6')
})

test('a reversal is done once per reference, and all of them at most the top-up', async () => {
  const account = await payer(db)
  await account.topUp('5', { reference: 'pi_1' })
  await account.topUp('5', { reference: 'pi_2' })
  const args = { top_up_reference: 'pi_1', amount: '2', reference: 'cb_1' }
  const first = await reverse(account, args)
  assert.equal(
    [first.kind, first.amount, first.refund_of_seq, first.counter_account],
    ['top_up_reversal', '-2.0000000000', '1', 'cash'],
  )
  await refused(
    reverse(account, { seq: 1, amount: '3.0000000001' }),
    'reversal_exceeds_top_up',
    'left to reverse: 3.0000000000',
  )
  const rest = await reverse(account, { seq: 1, reference: 'cb_2' })
  assert.is(rest.amount, '-3.0000000000')
  for (const more of [{ seq: 1 }, { seq: 1, amount: '1' }, { top_up_reference: 'pi_1', reference: 'cb_3' }])
    await refused(reverse(account, more), 'reversal_exceeds_top_up')
  for (const again of [
    args,
    { ...args, seq: 1 },
    { seq: 1, amount: '2.0', reference: 'cb_1' },
    { ...args, amount: null },
  ])
    assert.equal(await reverse(account, again), first)
  assert.equal(await reverse(account, { seq: 1, reference: 'cb_2' }), rest)
  for (const other of [
    { ...args, amount: '1' },
    { ...args, top_up_reference: 'pi_2' },
    { seq: 2, reference: 'cb_2' },
    { ...args, reference: 'pi_2' },
  ])
    await refused(reverse(account, other), 'reference_mismatch')
  assert.equal(await account.figures(), { balance: '5', available: '5' })
})

// Refused, through both transports, with every figure as it was.
const one = await payer(db)
await one.topUp('10', { reference: 'pi_1' })
await one.grant('1')
const [mine, also] = [one.event('2'), one.event('1')]
await one.record(mine)
await one.record(also)
const other = await payer(db)
await other.topUp('1')
await other.topUp('10', { reference: 'pi_other' })
const theirs = other.event('2')
await other.record(theirs)
const through = await transports(db)
const each = refusals(refunds, db, through)
const call = (what: string, fn: string, args: Row, expected: string) =>
  each([
    `${fn} ${what}: ${short(args)}`,
    ({ operator }) => code(operator.call(fn, { account_id: one.accountId, ...args })),
    expected,
  ])
for (const amount of [
  '0',
  '-1',
  'NaN',
  'Infinity',
  '-Infinity',
  `0.${'1'.repeat(30)}`,
  '1e-11',
  '1e12',
  '9'.repeat(1000),
]) {
  call('of an amount that is none', 'refund_charge', { seq: 3, amount }, '422 invalid_amount')
  call('of an amount that is none', 'reverse_top_up', { seq: 1, amount }, '422 invalid_amount')
}
for (const reference of ['', 'x'.repeat(513)]) {
  call('under no reference', 'refund_charge', { seq: 3, reference }, '422 invalid_reference')
  call('under no reference', 'reverse_top_up', { seq: 1, reference }, '422 invalid_reference')
}
for (const args of [
  {},
  { seq: 1 },
  { seq: 2 },
  { seq: 99 },
  { seq: 0 },
  { seq: -3 },
  { usage_id: theirs.id },
  { usage_id: newId() },
  { usage_id: mine.id, seq: 4 },
  { usage_id: mine.id, seq: 1 },
  { usage_id: theirs.id, seq: 3 },
])
  call('of no charge', 'refund_charge', args, '404 charge_not_found')
for (const args of [
  {},
  { seq: 2 },
  { seq: 3 },
  { seq: 99 },
  { top_up_reference: 'pi_other' },
  { top_up_reference: '' },
  { top_up_reference: 'pi_1', seq: 2 },
])
  call('of no top-up', 'reverse_top_up', args, '404 top_up_not_found')
for (const account_id of [newId(), null])
  for (const fn of ['refund_charge', 'reverse_top_up'])
    call('of nobody', fn, { account_id, seq: 3 }, '404 account_not_found')
call('of more', 'refund_charge', { seq: 3, amount: '2.0000000001' }, '409 refund_exceeds_charge')
call('of more', 'refund_charge', { usage_id: also.id, amount: '999999999999' }, '409 refund_exceeds_charge')
call('of more', 'reverse_top_up', { seq: 1, amount: '10.0000000001' }, '409 reversal_exceeds_top_up')
call('under a used reference', 'refund_charge', { seq: 3, reference: 'pi_1' }, '409 reference_mismatch')
call('under a used reference', 'reverse_top_up', { seq: 1, reference: 'pi_1' }, '409 reference_mismatch')

test('only the operator gives money back', async () => {
  for (const sql of [db.gateway, db.member(one.userId)])
    for (const fn of ['refund_charge', 'reverse_top_up'])
      assert.is((await failure(sql(`select api.${fn}($1, 3)`, [one.accountId]))).code, '42501')
})

// 200 at once: the arguments of each call, and the total that has come back
const storms: [what: string, fn: string, args: (i: number, usage: string) => Row, entries: number][] = [
  ['one refund', 'refund_charge', () => ({ seq: 3, amount: '7', reference: 'r' }), 1],
  ['one refund of all', 'refund_charge', () => ({ seq: 3, reference: 'r' }), 1],
  ['a refund of all under 200 references', 'refund_charge', (i) => ({ seq: 3, reference: `r${i}` }), 1],
  ['a refund of all without a reference', 'refund_charge', () => ({ seq: 3, amount: '7' }), 1],
  [
    'refunds by entry and by event',
    'refund_charge',
    (i, usage_id) => ({ ...(i % 2 ? { seq: 3 } : { usage_id }), reference: `r${i}` }),
    1,
  ],
  ['refunds of a tenth', 'refund_charge', () => ({ seq: 3, amount: '0.7' }), 10],
  ['one reversal', 'reverse_top_up', () => ({ seq: 1, reference: 'r' }), 1],
  ['a reversal under 200 references', 'reverse_top_up', (i) => ({ seq: 1, reference: `r${i}` }), 1],
  ['reversals of a fifth', 'reverse_top_up', () => ({ seq: 1, amount: '1' }), 5],
]
const passed = (fn: string, account: Payer, args: Row): Call => {
  const names = ['account_id', ...Object.keys(args)]
  return {
    role: 'keyledger_operator',
    text: `select seq, amount from api.${fn}(${names.map((name, i) => `${name} => $${i + 1}`).join(', ')})`,
    values: [account.accountId, ...Object.values(args)],
  }
}
for (const [what, fn, args, entries] of storms)
  test(`200 times at once: ${what}`, async () => {
    const account = await payer(db, { funds: '5' })
    await account.grant('3')
    const event = account.event('7')
    await account.record(event)
    const answers = await callers(
      db.loginUrl,
      Array.from({ length: 200 }, (_, i) => passed(fn, account, args(i, event.id))),
    )
    const back = await db.sql(
      'select seq, amount from data.billing_transaction where account_id = $1 and seq > 3 order by seq',
      [account.accountId],
    )
    assert.is(back.length, entries)
    const isRefund = fn === 'refund_charge'
    assert.is(back.reduce((sum, { amount }) => sum + Number(amount) * 10, 0) / 10, isRefund ? 7 : -5)
    const done = answers.filter(({ error }) => !error)
    // with one reference every caller gets the entry; else late callers get a refusal
    const sameForAll = args(1, event.id).reference === 'r'
    assert.is(done.length, sameForAll ? 200 : entries)
    assert.equal([...new Set(done.map(({ rows }) => rows[0]!.seq))].sort(), back.map(({ seq }) => seq).sort())
    const message = isRefund ? 'refund_exceeds_charge' : 'reversal_exceeds_top_up'
    assert.equal(errors(answers), Array(200 - done.length).fill({ code: 'PT409', message }))
    assert.equal(
      await account.figures(),
      isRefund
        ? { balance: '5', free_credit: '3', available: '8' }
        : { outstanding_amount: '4', available: '-4' },
    )
    assert.is(await grants(account), isRefund ? '3' : '0')
  })

test('refunds, reversals, expiring grants, charges and limits at once keep every invariant', async () => {
  const accounts = await Promise.all(Array.from({ length: 4 }, () => payer(db, { funds: '1' })))
  const chance = chances(7)
  const some = (above: number) => `${(above + chance(30)) / 10}`
  const kinds: ((account: Payer) => Call)[] = [
    (account) => ({
      role: 'keyledger_gateway',
      text: 'select api.record_usage($1) as answers',
      values: [JSON.stringify([account.event(some(5)), account.event(some(20))])],
    }),
    (account) => passed('refund_charge', account, { seq: 2 + chance(100), amount: some(1) }),
    (account) => passed('refund_charge', account, { seq: 2 + chance(100) }),
    (account) => passed('reverse_top_up', account, { seq: 1 + chance(100), amount: some(1) }),
    (account) => passed('top_up', account, { amount: some(1) }),
    (account) =>
      passed('grant_credit', account, { amount: some(1), priority: chance(3), expires_at: soon(600) }),
    (account) => ({
      role: 'keyledger_operator',
      text: `select api.grant_credit($1, $2, clock_timestamp() + interval '0.3 s')`,
      values: [account.accountId, some(1)],
    }),
    (account) => ({
      role: 'keyledger_operator',
      text: 'select api.set_credit_limit($1, $2)',
      values: [account.accountId, some(0)],
    }),
  ]
  const calls = Array.from({ length: 1200 }, () => kinds[chance(8)]!(accounts[chance(4)]!))
  const expected = [
    'charge_not_found',
    'top_up_not_found',
    'refund_exceeds_charge',
    'reversal_exceeds_top_up',
    'invalid_expires_at',
  ]
  const answers = await callers(db.loginUrl, calls)
  assert.equal(
    errors(answers).filter((error) => !expected.includes(error!.message)),
    [],
  )
  const [posted] = await db.sql(
    `select count(*) filter (where kind = 'refund' and free_credit_delta > 0)::int as to_grants,
      count(*) filter (where kind = 'refund' and outstanding_delta < 0)::int as to_debt,
      count(*) filter (where kind = 'top_up_reversal')::int as reversed,
      count(*) filter (where kind = 'credit_expiry')::int as expired
    from data.billing_transaction where account_id = any ($1)`,
    [accounts.map(({ accountId }) => accountId)],
  )
  for (const [what, count] of Object.entries(posted!)) assert.ok(count > 0, `${what}: ${count}`)
})

test('the part that an expired grant paid comes back to the balance', async () => {
  const forward = await movableClock(db.sql) // last in this file: this clock is slower
  const account = await payer(db)
  const expires_at = soon(60)
  await account.grant('3', { expires_at })
  await account.grant('1', { priority: 1 })
  await account.use('3')
  assert.is(await grants(account), '1 0')
  await refund(account, { seq: 3, amount: '0.25' })
  assert.is(await grants(account), '1.25 0', 'while it lasts')
  await forward(60)
  await refund(account, { seq: 3 })
  assert.equal(await account.entries(4), [
    'credit_expiry -1.25: free_credit -1.25',
    'refund 2.75: balance 1.75, free_credit 1',
  ])
  assert.is(await grants(account), '0 1')
  assert.equal(await account.figures(), { balance: '1.75', free_credit: '1', available: '2.75' })
})

refunds.run()
