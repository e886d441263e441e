// Posting: the normal form, free credit and its grants, expiry by the clock, references, versions.
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { movableClock, now } from '../support/clock.ts'
import { database, type Row } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { newId } from '../support/ids.ts'
import { holdsTrue } from '../support/ledger.ts'
import { type Payer, payer } from '../support/payer.ts'

const money = suite('money')
const db = await database(money)
const test = (name: string, run: () => Promise<void>) =>
  money(name, async () => {
    await run()
    await holdsTrue(db.sql)
  })

// each step, the entry it posts, and the figures after it (those that are not zero)
type Step = [run: (account: Payer) => Promise<unknown>, entry: string, figures: Row]
const posting: Record<string, Step[]> = {
  'the part of a charge that nothing covers is debt, and is paid before anything else': [
    [(a) => a.use('5'), 'usage -5: outstanding 5', { outstanding_amount: '5', available: '-5' }],
    [(a) => a.topUp('3'), 'top_up 3: outstanding -3', { outstanding_amount: '2', available: '-2' }],
    [(a) => a.grant('1'), 'credit_grant 1: outstanding -1', { outstanding_amount: '1', available: '-1' }],
    [
      (a) => a.grant('1.5'),
      'credit_grant 1.5: free_credit 0.5, outstanding -1',
      { free_credit: '0.5', available: '0.5' },
    ],
    [
      (a) => a.use('2'),
      'usage -2: free_credit -0.5, outstanding 1.5',
      { outstanding_amount: '1.5', available: '-1.5' },
    ],
    [
      (a) => a.adjust('2'),
      'adjustment 2: balance 0.5, outstanding -1.5',
      { balance: '0.5', available: '0.5' },
    ],
  ],
  'free credit is spent first, then balance, then down to the limit, then debt': [
    [(a) => a.topUp('4'), 'top_up 4: balance 4', { balance: '4', available: '4' }],
    [
      (a) => a.grant('3'),
      'credit_grant 3: free_credit 3',
      { balance: '4', free_credit: '3', available: '7' },
    ],
    [
      (a) => a.limit('2'),
      'limit_change 0: ',
      { balance: '4', free_credit: '3', credit_limit: '2', available: '9' },
    ],
    [
      (a) => a.use('1'),
      'usage -1: free_credit -1',
      { balance: '4', free_credit: '2', credit_limit: '2', available: '8' },
    ],
    [
      (a) => a.use('3'),
      'usage -3: balance -1, free_credit -2',
      { balance: '3', credit_limit: '2', available: '5' },
    ],
    [(a) => a.use('4'), 'usage -4: balance -4', { balance: '-1', credit_limit: '2', available: '1' }],
    [
      (a) => a.use('3'),
      'usage -3: balance -1, outstanding 2',
      { balance: '-2', credit_limit: '2', outstanding_amount: '2', available: '-2' },
    ],
    [
      (a) => a.topUp('3'),
      'top_up 3: balance 1, outstanding -2',
      { balance: '-1', credit_limit: '2', available: '1' },
    ],
  ],
  'a raised limit pays debt, a lowered one makes it; `available` moves by the limit alone': [
    [(a) => a.use('5'), 'usage -5: outstanding 5', { outstanding_amount: '5', available: '-5' }],
    [
      (a) => a.limit('2'),
      'limit_change 0: balance -2, outstanding -2',
      { balance: '-2', credit_limit: '2', outstanding_amount: '3', available: '-3' },
    ],
    [
      (a) => a.limit('10'),
      'limit_change 0: balance -3, outstanding -3',
      { balance: '-5', credit_limit: '10', available: '5' },
    ],
    [
      (a) => a.limit('1.5'),
      'limit_change 0: balance 3.5, outstanding 3.5',
      { balance: '-1.5', credit_limit: '1.5', outstanding_amount: '3.5', available: '-3.5' },
    ],
    [
      (a) => a.limit('0'),
      'limit_change 0: balance 1.5, outstanding 1.5',
      { outstanding_amount: '5', available: '-5' },
    ],
  ],
  'a lowered limit takes free credit before it makes debt': [
    [(a) => a.limit('3'), 'limit_change 0: ', { credit_limit: '3', available: '3' }],
    [(a) => a.use('3'), 'usage -3: balance -3', { balance: '-3', credit_limit: '3' }],
    [
      (a) => a.grant('2'),
      'credit_grant 2: free_credit 2',
      { balance: '-3', free_credit: '2', credit_limit: '3', available: '2' },
    ],
    [
      (a) => a.limit('0'),
      'limit_change 0: balance 3, free_credit -2, outstanding 1',
      { outstanding_amount: '1', available: '-1' },
    ],
  ],
  'a negative adjustment takes balance, then free credit, then makes debt': [
    [(a) => a.topUp('2'), 'top_up 2: balance 2', { balance: '2', available: '2' }],
    [
      (a) => a.grant('3'),
      'credit_grant 3: free_credit 3',
      { balance: '2', free_credit: '3', available: '5' },
    ],
    [(a) => a.adjust('-1'), 'adjustment -1: balance -1', { balance: '1', free_credit: '3', available: '4' }],
    [
      (a) => a.adjust('-2'),
      'adjustment -2: balance -1, free_credit -1',
      { free_credit: '2', available: '2' },
    ],
    [
      (a) => a.adjust('-5'),
      'adjustment -5: free_credit -2, outstanding 3',
      { outstanding_amount: '3', available: '-3' },
    ],
  ],
  'all ten decimals are kept': [
    [
      (a) => a.topUp('999999999999.9999999999'),
      'top_up 999999999999.9999999999: balance 999999999999.9999999999',
      { balance: '999999999999.9999999999', available: '999999999999.9999999999' },
    ],
    [
      (a) => a.use('0.0000000001'),
      'usage -0.0000000001: balance -0.0000000001',
      { balance: '999999999999.9999999998', available: '999999999999.9999999998' },
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

test('setting the same limit posts nothing', async () => {
  const account = await payer(db, { limit: '5' })
  await account.limit('5.0')
  assert.is(await account.version(), '1')
})

test('one entry is posted per account and call, for all its events', async () => {
  const [a, b] = [await payer(db, { funds: '10' }), await payer(db, { funds: '10' })]
  const answers = await a.record(a.event('1'), b.event('2'), a.event('3'), b.event('4'))
  assert.equal(
    answers.map(({ status, cost, seq, available }) => [status, cost, seq, available]),
    [
      ['charged', '1.0000000000', 2, '6.0000000000'],
      ['charged', '2.0000000000', 2, '4.0000000000'],
      ['charged', '3.0000000000', 2, '6.0000000000'],
      ['charged', '4.0000000000', 2, '4.0000000000'],
    ],
  )
  assert.equal(await a.entries(1), ['usage -4: balance -4'])
})

const remaining = async ({ accountId }: Payer): Promise<string> => {
  const rows = await db.sql(
    'select trim_scale(remaining)::text as it from data.credit_grant where account_id = $1 order by seq',
    [accountId],
  )
  return rows.map(({ it }) => it).join(' ')
}
const forward = await movableClock(db.sql)
const soon = (seconds: number) => new Date(now() + seconds * 1000).toISOString()

test('grants are spent by priority, then expiry, then age', async () => {
  const account = await payer(db, { funds: '5' })
  // the order they are spent in: 4th, 2nd, 5th, 3rd, 1st
  await account.grant('1', { expires_at: soon(200) })
  await account.grant('1', { expires_at: soon(100) })
  await account.grant('1')
  await account.grant('1', { expires_at: soon(150) })
  await account.grant('1', { priority: 50 })
  for (const [usd, left] of [
    ['0.4', '1 1 1 1 0.6'],
    ['0.6', '1 1 1 1 0'],
    ['1.5', '1 0 1 0.5 0'],
    ['1', '0.5 0 1 0 0'],
    ['1', '0 0 0.5 0 0'],
    ['1', '0 0 0 0 0'],
  ] as const) {
    await account.use(usd)
    assert.is(await remaining(account), left, usd)
  }
  assert.equal(await account.figures(), { balance: '4.5', available: '4.5' })
  const twins = await payer(db)
  await twins.grant('1')
  await twins.grant('1')
  await twins.use('0.5')
  assert.is(await remaining(twins), '0.5 1')
})

test('a grant that pays debt has only the rest to spend', async () => {
  const account = await payer(db)
  await account.use('2')
  await account.grant('5')
  assert.is(await remaining(account), '3')
  assert.equal(await account.figures(), { free_credit: '3', available: '3' })
})

test('the clock alone takes an expired grant away, in every answer, before any posting', async () => {
  const account = await payer(db, { funds: '10' })
  await account.grant('4', { expires_at: soon(60) })
  await account.use('1')
  await account.grant('2', { expires_at: soon(100) })
  assert.equal(await account.figures(), { balance: '10', free_credit: '5', available: '15' })
  await forward(60)
  const expected = { balance: '10', free_credit: '2', available: '12' }
  assert.equal(await account.figures(), expected)
  const [balances] = await db.member(account.userId)(
    'select trim_scale(free_credit)::text as free_credit, trim_scale(available)::text as available from api.account_balances',
  )
  assert.equal(balances, { free_credit: '2', available: '12' })
  const [resolved] = await db.gateway(
    'select trim_scale(free_credit)::text as free_credit, trim_scale(available)::text as available from api.resolve_billing_account($1)',
    [account.key],
  )
  assert.equal(resolved, { free_credit: '2', available: '12' })
  for (const [amount, allowed] of [
    ['12', true],
    ['12.0000000001', false],
  ]) {
    const [budget] = await db.gateway('select allowed, code from api.check_budget($1, $2)', [
      account.userId,
      amount,
    ])
    assert.equal(budget, { allowed, code: allowed ? null : 'insufficient_funds' }, `${amount}`)
  }
  assert.is(await account.version(), '4') // nothing was posted by looking
  const [refused] = await account.place(account.request('12.5'))
  assert.equal([refused!.code, refused!.available], ['insufficient_funds', '12.0000000000'])
  assert.equal(await account.entries(4), ['credit_expiry -3: free_credit -3'])
  assert.equal(await account.figures(), expected)
})

test('several grants that expire at once expire in one entry, and take no paid money', async () => {
  const account = await payer(db, { funds: '100' })
  const at = soon(60)
  for (const amount of ['5', '7', '11']) await account.grant(amount, { expires_at: at })
  await forward(60)
  assert.is((await account.figures()).free_credit, undefined)
  await account.use('1')
  const entries = await account.entries(4)
  assert.equal(entries, ['credit_expiry -23: free_credit -23', 'usage -1: balance -1'])
  assert.equal(await account.figures(), { balance: '99', available: '99' })
})

test('a thousand grants may expire at once', async () => {
  const account = await payer(db, { funds: '1' })
  const at = soon(60)
  await db.operator(`select api.grant_credit($1, 1, $2, n) from generate_series(1, 1000) n`, [
    account.accountId,
    at,
  ])
  await forward(60)
  assert.is((await account.figures()).free_credit, undefined)
  await account.use('1')
  assert.equal((await account.entries(1001)).slice(0, 1), ['credit_expiry -1000: free_credit -1000'])
  assert.equal(await account.figures(), {})
})

// the operator's postings, each with its reference
const referenced: [fn: string, args: Row, other: Row][] = [
  ['top_up', { amount: '5' }, { amount: '6' }],
  ['top_up', { amount: '5' }, { amount: '5', metadata: '{"n":1}' }],
  ['top_up', { amount: '5', metadata: '{"n":1,"m":[2]}' }, { amount: '5', metadata: '{"n":2}' }],
  ['adjust_balance', { amount: '-5', reason: 'r' }, { amount: '5', reason: 'r' }],
  ['grant_credit', { amount: '5' }, { amount: '5', priority: 1 }],
  ['grant_credit', { amount: '5' }, { amount: '5', expires_at: soon(86_400) }],
  ['grant_credit', { amount: '5', expires_at: '2030-01-01' }, { amount: '5', expires_at: '2031-01-01' }],
]
for (const [fn, args, other] of referenced)
  test(`${fn} ${JSON.stringify(args)} is done once per reference; ${JSON.stringify(other)} under it is refused`, async () => {
    const account = await payer(db, { funds: '1' })
    const reference = newId()
    const first = await account.post(fn, { ...args, reference })
    await account.topUp('1')
    const figures = await account.figures()
    const again = await account.post(fn, { ...args, reference })
    assert.equal([again.seq, again.hash.toString('hex')], [first.seq, first.hash.toString('hex')])
    const refused = await failure(account.post(fn, { ...other, reference }))
    assert.equal([refused.code, refused.message], ['PT409', 'reference_mismatch'])
    assert.equal(await account.figures(), figures)
    const elsewhere = await payer(db)
    assert.is((await elsewhere.post(fn, { ...args, reference })).seq, '1')
  })

test('a reference of another kind of entry is refused', async () => {
  const account = await payer(db)
  await account.topUp('5', { reference: 'pi_1' })
  for (const run of [
    () => account.adjust('5', { reference: 'pi_1' }),
    () => account.grant('5', { reference: 'pi_1' }),
  ])
    assert.is((await failure(run())).message, 'reference_mismatch')
})

test('an adjustment decided on an older version is refused, its retry is not', async () => {
  const account = await payer(db, { funds: '5' })
  const version = await account.version()
  const first = await account.adjust('-1', { expected_version: version, reference: 'fix' })
  const late = await failure(account.adjust('-1', { expected_version: version }))
  assert.equal([late.code, late.message], ['PT409', 'version_conflict'])
  const again = await account.adjust('-1', { expected_version: version, reference: 'fix' })
  assert.is(again.seq, first.seq)
  assert.equal(await account.figures(), { balance: '4', available: '4' })
})

test('the ledger names the actor', async () => {
  const account = await payer(db)
  const actors: [Row, string][] = [
    [{}, 'keyledger_operator'],
    [{ sub: 'host|carol' }, 'host|carol'],
    [{ sub: 'host|carol', user_id: 'carol' }, 'carol'],
  ]
  for (const [claims, actor] of actors) {
    const [entry] = await db.as('keyledger_operator', claims)('select actor from api.top_up($1, 1)', [
      account.accountId,
    ])
    assert.is(entry!.actor, actor)
  }
  await account.use('1')
  const [last] = await db.sql(
    'select actor from data.billing_transaction where account_id = $1 and seq = 4',
    [account.accountId],
  )
  assert.is(last!.actor, 'keyledger_gateway')
})

test("money follows the payer: a member's use is the tenant's, their own account stays as it was", async () => {
  const [tenant] = await db.operator(`insert into api.tenants (name) values ('t') returning id`)
  const account = await payer(db, { funds: '10', tenantId: tenant!.id })
  assert.is(account.accountId, tenant!.id)
  await account.use('1')
  assert.equal(await account.figures(), { balance: '9', available: '9' })
  // an event from before the move is charged to the payer of that time
  const event = account.event('2')
  await db.operator('update api.user_profiles set tenant_id = null where id = $1', [account.userId])
  const [answer] = await account.record(event)
  assert.is(answer!.status, 'charged')
  assert.equal(await account.figures(), { balance: '7', available: '7' })
  const own = await db.sql('select balance_version from data.account_balance where account_id = $1', [
    account.userId,
  ])
  assert.equal(own, [{ balance_version: '0' }])
})

money.run()
