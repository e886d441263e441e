// Budgets: what keys, users and tenants may spend in a window, whatever the clock, the time zone and the callers do.
import { randomUUID } from 'node:crypto'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { createBillingModule, pgRpc } from '../../src/index.ts'
import { budgeting, type Scope } from '../support/budgets.ts'
import { movableClock } from '../support/clock.ts'
import { database, type Row } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { idAt } from '../support/ids.ts'
import { holdsTrue } from '../support/ledger.ts'
import { type Payer, payer } from '../support/payer.ts'

const budgets = suite('budgets')
const db = await database(budgets)
const { operator, gateway } = db
const test = (name: string, run: () => Promise<void>) =>
  budgets(name, async () => {
    await run()
    if (ahead) await advance(-ahead)
    // seen from a time when no entry is of the future
    await db.sql('update clock.ahead set seconds = seconds + 1e8')
    await holdsTrue(db.sql)
    await db.sql('update clock.ahead set seconds = seconds - 1e8')
  })

const move = await movableClock(db.sql)
let ahead = 0
const advance = async (seconds: number) => {
  ahead += seconds
  await move(seconds)
  await operator('select api.maintain()') // months ahead
}
const now = () => new Date(Date.now() + ahead * 1000)

const { setBudget, shown, team } = budgeting(db)
const brief = ({ status, code }: Row) => [status, code].filter(Boolean).join(' ')
const asks = async (account: Payer, amount: string, more: Row = {}): Promise<string> =>
  brief((await account.place(account.request(amount, more)))[0]!)
const events = (account: Payer, usd: string, at: Date) => account.use(usd, { id: idAt(at) })

test('a budget is set, shown, changed and removed', async () => {
  const account = await payer(db, { funds: '10' })
  const set = await setBudget(account, 'user', '5', { period: 'day' })
  const { id, window_start, window_end, created_at, ...rest } = set
  assert.equal(rest, {
    account_id: account.accountId,
    scope: 'user',
    scope_id: account.userId,
    amount: '5.0000000000',
    period: 'day',
    spent: '0.0000000000',
    held: '0.0000000000',
    remaining: '5.0000000000',
  })
  assert.is(window_end - window_start, 86_400_000)
  assert.is(window_start.toISOString().slice(10), 'T00:00:00.000Z')
  assert.ok(window_start <= now() && now() < window_end && created_at)

  await account.hold('2')
  const again = await setBudget(account, 'user', '6.5', { period: 'day' })
  assert.equal([again.id, await shown(id)], [id, '0 + 2 of 6.5, 4.5'])
  assert.is(await asks(account, '4.6'), 'refused user_budget_exceeded')
  const [removed] = await operator('select * from api.remove_budget($1)', [id])
  assert.equal(removed, again)
  assert.is(await asks(account, '4.6'), 'held')
  assert.equal(await operator('select from api.budgets where account_id = $1', [account.accountId]), [])
  assert.is((await failure(operator('select api.remove_budget($1)', [id]))).message, 'budget_not_found')
  const total = await setBudget(account, 'user', '0', { period: 'total' })
  assert.equal([total.window_start, total.window_end], [null, null])
})

test('an impossible budget is refused, with a code', async () => {
  const { first } = await team()
  const other = await payer(db)
  const valid = { scope: 'user', scope_id: first.userId, amount: '1', period: 'day' }
  const refusals: [Row, string][] = [
    [{ scope: 'node' }, 'PT422 invalid_scope'],
    [{ scope: null }, 'PT422 invalid_scope'],
    [{ period: 'year' }, 'PT422 invalid_period'],
    [{ period: null }, 'PT422 invalid_period'],
    [{ amount: '-0.1' }, 'PT422 invalid_amount'],
    [{ amount: 'NaN' }, 'PT422 invalid_amount'],
    [{ amount: null }, 'PT422 invalid_amount'],
    [{ scope_id: randomUUID() }, 'PT404 user_not_found'],
    [{ scope_id: null }, 'PT404 user_not_found'],
    [{ scope_id: first.keyId }, 'PT404 user_not_found'],
    [{ scope: 'virtual_key' }, 'PT404 virtual_key_unknown'],
    [{ scope: 'tenant' }, 'PT404 tenant_not_found'],
    [{ scope_id: other.userId }, 'PT422 invalid_account'],
    [{ scope: 'virtual_key', scope_id: other.keyId }, 'PT422 invalid_account'],
  ]
  for (const [wrong, expected] of refusals) {
    const { code, message } = await failure(first.post('set_budget', { ...valid, ...wrong }))
    assert.is(`${code} ${message}`, expected, JSON.stringify(wrong))
  }
  const tenantOfAnother = { scope: 'tenant', scope_id: first.accountId, amount: '1', period: 'day' }
  assert.is((await failure(other.post('set_budget', tenantOfAnother))).message, 'invalid_account')
  const nobody = { ...first, accountId: randomUUID() }
  assert.is(
    (
      await failure(
        operator(`select api.set_budget($1, 'user', $2, 1, 'day')`, [nobody.accountId, first.userId]),
      )
    ).message,
    'account_not_found',
  )
  assert.equal(await operator('select from api.budgets where account_id = $1', [first.accountId]), [])
  // a member's own account, which is theirs again once they leave, may have one already
  const own = await operator(`select account_id from api.set_budget($1, 'user', $1, 1, 'day')`, [
    first.userId,
  ])
  assert.equal(own, [{ account_id: first.userId }])
})

test('each budget refuses its own: a key’s, its user’s, its tenant’s; the narrowest that is over says so', async () => {
  const { first, second, otherKey } = await team()
  const key = await setBudget(first, 'virtual_key', '10')
  const user = await setBudget(first, 'user', '20')
  const tenant = await setBudget(first, 'tenant', '40', { period: 'total' })
  const byOther = { virtual_key_id: otherKey }
  assert.is(await asks(first, '10.0000000001'), 'refused key_budget_exceeded')
  assert.is(await asks(first, '10'), 'held')
  assert.is(await asks(first, '0.0000000001'), 'refused key_budget_exceeded')
  assert.is(await asks(first, '10.1', byOther), 'refused user_budget_exceeded')
  assert.is(await asks(first, '10', byOther), 'held')
  assert.is(await asks(first, '0.1', byOther), 'refused user_budget_exceeded')
  const [refused] = await second.place(second.request('20.5'))
  assert.equal(
    [brief(refused!), refused!.remaining, refused!.available],
    ['refused tenant_budget_exceeded', '20.0000000000', '980.0000000000'],
  )
  assert.is(await asks(second, '19'), 'held')
  assert.is(await asks(first, '5000'), 'refused insufficient_funds')
  assert.equal(
    [await shown(key.id), await shown(user.id), await shown(tenant.id)],
    ['0 + 10 of 10, 0', '0 + 20 of 20, 0', '0 + 39 of 40, 1'],
  )
})

test('the tightest of several periods decides', async () => {
  const account = await payer(db, { funds: '100' })
  for (const [period, amount] of [
    ['total', '9'],
    ['day', '4'],
    ['month', '6'],
  ])
    await setBudget(account, 'virtual_key', amount!, { period })
  assert.is(await asks(account, '4.5'), 'refused key_budget_exceeded')
  assert.is(await asks(account, '4'), 'held')
  await setBudget(account, 'virtual_key', '50', { period: 'day' })
  assert.is(await asks(account, '2.5'), 'refused key_budget_exceeded')
  assert.is(await asks(account, '2'), 'held')
})

test('holds of one call share the budget, in order; a repeated one takes nothing more', async () => {
  const { first, second, otherKey } = await team()
  await setBudget(first, 'user', '10')
  await setBudget(first, 'virtual_key', '7')
  const repeated = first.request('4')
  const answers = await first.place(
    repeated,
    first.request('4'),
    repeated,
    first.request('3'),
    first.request('4', { virtual_key_id: otherKey }),
    first.request('3', { virtual_key_id: otherKey }),
    second.request('100'),
  )
  assert.equal(answers.map(brief), [
    'held',
    'refused key_budget_exceeded',
    'duplicate',
    'held',
    'refused user_budget_exceeded',
    'held',
    'held',
  ])
})

test('a call for many accounts keeps each to its own budgets, in any order', async () => {
  const teams = await Promise.all([1, 2, 3].map(() => team()))
  for (const { first, second } of teams) {
    await setBudget(first, 'virtual_key', '4')
    await setBudget(second, 'user', '2')
  }
  const asked = [...teams, ...teams.toReversed()].flatMap(({ first, second }) => [
    first.request('3'),
    second.request('2'),
  ])
  const answers = await teams[0]!.first.place(...asked)
  assert.equal(
    answers.map(brief),
    asked.map((_, i) =>
      i < 6 ? 'held' : i % 2 ? 'refused user_budget_exceeded' : 'refused key_budget_exceeded',
    ),
  )
})

test('used money moves from held to spent, and counts past the budget too', async () => {
  const account = await payer(db, { funds: '100' })
  const { id } = await setBudget(account, 'virtual_key', '10')
  const part = await account.hold('6')
  await account.use('2', { hold_id: part, final: false })
  assert.is(await shown(id), '2 + 4 of 10, 4')
  await account.use('1', { hold_id: part })
  assert.is(await shown(id), '3 + 0 of 10, 7')
  const given = await account.hold('7')
  assert.is(await asks(account, '0.1'), 'refused key_budget_exceeded')
  await account.release(given)
  const brief = await account.hold('7', { expires_in: 10 })
  assert.is(await shown(id), '3 + 7 of 10, 0')
  await advance(11)
  assert.is(await shown(id), '3 + 0 of 10, 7')
  assert.is(await asks(account, '7'), 'held')
  await account.use('9', { hold_id: brief, id: idAt(now()) }) // it had expired
  assert.is(await shown(id), '12 + 7 of 10, -9')
  assert.is(await asks(account, '0.1'), 'refused key_budget_exceeded')
})

test('an event counts once, however often it comes; one that is parked not at all', async () => {
  const account = await payer(db, { funds: '100' })
  const { id } = await setBudget(account, 'user', '10')
  const event = account.event('3')
  await account.record(event, event)
  await account.record(account.event('1'), event, account.event('1', { meters: { nothing: 1 } }))
  for (let i = 0; i < 3; i++) await account.record(event)
  assert.is(await shown(id), '4 + 0 of 10, 6')
})

test('a refund gives back money, not budget', async () => {
  const account = await payer(db, { funds: '10' })
  const { id } = await setBudget(account, 'user', '5')
  const { seq } = await account.use('5')
  await account.post('refund_charge', { seq })
  assert.equal([await shown(id), (await account.figures()).available], ['5 + 0 of 5, 0', '10'])
})

test('a freeze is nobody’s spending', async () => {
  const account = await payer(db, { funds: '10' })
  const { id } = await setBudget(account, 'user', '5')
  await account.post('freeze_funds', { amount: '4', reason: 'dispute' })
  assert.is(await shown(id), '0 + 0 of 5, 5')
  assert.is(await asks(account, '5'), 'held')
})

test('a rotated key keeps its budget', async () => {
  const account = await payer(db, { funds: '10' })
  const { id } = await setBudget(account, 'virtual_key', '5')
  await account.use('3')
  await operator('select api.rotate_virtual_key($1)', [account.keyId])
  assert.is(await asks(account, '2.1'), 'refused key_budget_exceeded')
  assert.is(await shown(id), '3 + 0 of 5, 2')
})

for (const [period, days] of [
  ['day', 1],
  ['week', 7],
  ['month', 31],
] as const)
  test(`a ${period} ends by the clock alone: the next is whole, and an event counts in its own`, async () => {
    const account = await payer(db, { funds: '100' })
    const { id, window_end } = await setBudget(account, 'virtual_key', '10', { period })
    const total = await setBudget(account, 'user', '50', { period: 'total' })
    // begun before the end: used up, and more
    const toEnd = (window_end - now().getTime()) / 1000
    await advance(toEnd - 100)
    const late = account.event('1', { id: idAt(now()) })
    await account.use('7', { id: idAt(now()) })
    const open = await account.hold('2')
    await events(account, '4', new Date(window_end.getTime() + 1)) // a caller whose clock is ahead
    assert.is(await shown(id), '7 + 2 of 10, 1')
    assert.is(await asks(account, '1.5'), 'refused key_budget_exceeded')

    await advance(101)
    assert.is(await shown(id), '4 + 2 of 10, 4')
    await account.record(late)
    assert.is(await shown(id), '4 + 2 of 10, 4')
    await account.use('1', { id: idAt(new Date(window_end.getTime() - 1)), hold_id: open })
    assert.is(await shown(id), '4 + 0 of 10, 6')
    assert.is(await asks(account, '6.1'), 'refused key_budget_exceeded')
    await account.use('0.5', { id: idAt(window_end) })
    assert.is(await shown(id), '4.5 + 0 of 10, 5.5')

    const [row] = await operator('select window_start, window_end from api.budgets where id = $1', [id])
    assert.equal(row!.window_start, window_end)
    await advance(days * 86_400)
    assert.is(await shown(id), '0 + 0 of 10, 10')
    assert.is(await shown(total.id), '13.5 + 0 of 50, 36.5')
    const [{ windows }] = (await db.sql(
      'select count(*)::int as windows from data.budget_spend where budget_id = $1',
      [id],
    )) as [Row]
    assert.is(windows, 2)
  })

test('a budget set late counts what was used in its window; a total counts all usage that is kept', async () => {
  const { first, second, otherKey } = await team()
  const day = await setBudget(first, 'user', '1', { period: 'day', id: first.userId })
  const midnight = day.window_start.getTime()
  await events(first, '2', new Date(midnight - 1))
  await events(first, '3', new Date(midnight))
  await first.use('4', { id: idAt(now()), virtual_key_id: otherKey })
  await second.use('5', { id: idAt(now()) })
  const set = async (account: Payer, scope: Scope, period: string) =>
    shown((await setBudget(account, scope, '100', { period })).id)
  assert.equal(
    [
      await set(first, 'virtual_key', 'day'),
      await set(first, 'user', 'day'),
      await set(first, 'tenant', 'day'),
    ],
    ['3 + 0 of 100, 97', '7 + 0 of 100, 93', '12 + 0 of 100, 88'],
  )
  assert.equal(
    [
      await set(first, 'virtual_key', 'total'),
      await set(first, 'user', 'total'),
      await set(second, 'user', 'total'),
    ],
    ['5 + 0 of 100, 95', '9 + 0 of 100, 91', '5 + 0 of 100, 95'],
  )
  assert.is(await set(first, 'tenant', 'total'), '14 + 0 of 100, 86')
})

test('after a user moved each account counts its own: holds and late events stay with the payer of that time', async () => {
  const [from, to] = [await team(), await team()]
  const user = from.first
  const old = await setBudget(user, 'user', '10')
  const open = await user.hold('4')
  const late = user.event('3', { hold_id: open })
  await operator('update api.user_profiles set tenant_id = $1 where id = $2', [
    to.first.accountId,
    user.userId,
  ])
  const moved = { ...user, accountId: to.first.accountId }
  const next = await setBudget(
    { ...to.first, userId: user.userId, accountId: moved.accountId } as Payer,
    'user',
    '10',
    {
      id: user.userId,
    },
  )
  assert.equal([await shown(old.id), await shown(next.id)], ['0 + 4 of 10, 6', '0 + 0 of 10, 10'])
  const [placed] = await user.place(user.request('10', { account_id: moved.accountId }))
  assert.is(brief(placed!), 'held')
  await user.record(late)
  assert.equal([await shown(old.id), await shown(next.id)], ['3 + 0 of 10, 7', '0 + 10 of 10, 0'])
  // a budget of one who has left can be removed, not set
  assert.is((await failure(setBudget(user, 'user', '5'))).message, 'invalid_account')
  await operator('select api.remove_budget($1)', [old.id])
})

test('advice knows the budgets', async () => {
  const { first, otherKey } = await team()
  const advice = async (amount: string, key: string | null): Promise<Row> =>
    (
      await gateway('select allowed, code, remaining from api.check_budget($1, $2, $3)', [
        first.userId,
        amount,
        key,
      ])
    )[0]!
  assert.equal(await advice('1', null), { allowed: true, code: null, remaining: null })
  await setBudget(first, 'tenant', '8')
  await setBudget(first, 'user', '5')
  await setBudget(first, 'virtual_key', '2')
  await first.use('1')
  const says = async (amount: string, key: string | null) => {
    const { allowed, code, remaining } = await advice(amount, key)
    assert.is(allowed, code === null)
    return `${code} ${Number(remaining)}`
  }
  assert.is(await says('1', first.keyId), 'null 1')
  assert.is(await says('1.1', first.keyId), 'key_budget_exceeded 1')
  assert.is(await says('4', otherKey), 'null 4')
  assert.is(await says('4.1', otherKey), 'user_budget_exceeded 4')
  assert.is(await says('4.1', null), 'user_budget_exceeded 4')
  await setBudget(first, 'user', '500')
  assert.is(await says('7.1', null), 'tenant_budget_exceeded 7')
  assert.is(await says('2000', null), 'insufficient_funds 7')
})

test('the client says which budget refused, and the amount it has left', async () => {
  const account = await payer(db, { funds: '100' })
  await setBudget(account, 'user', '3')
  const rpc = pgRpc({ connectionString: db.loginUrl, role: 'keyledger_gateway' })
  const billing = createBillingModule({ rpc })
  await billing.start()
  try {
    const context = await billing.validate(account.key)
    const refused = await failure(billing.hold(context, { amount: '3.5' }))
    assert.equal([refused.code, refused.status], ['user_budget_exceeded', 402])
    assert.is(refused.detail, '3.5000000000 asked, 3.0000000000 left of the budget')
    const advice = await billing.checkBudget(context, '3.5')
    assert.equal([advice.code, advice.remaining], ['user_budget_exceeded', '3.0000000000'])
  } finally {
    await billing.stop()
    await rpc.close()
  }
})

// Windows where clocks jump: begin and end of the day, and begin of the week, that a moment is in.
const zones: [zone: string, at: string, start: string, end: string, week: string][] = [
  ['UTC', '2026-11-22T23:59:00Z', '2026-11-22T00:00Z', '2026-11-23T00:00Z', '2026-11-16T00:00Z'],
  ['UTC', '2026-11-23T00:00Z', '2026-11-23T00:00Z', '2026-11-24T00:00Z', '2026-11-23T00:00Z'],
  ['Europe/Berlin', '2016-03-27T12:00Z', '2016-03-26T23:00Z', '2016-03-27T22:00Z', '2016-03-20T23:00Z'], // 23 hours
  ['Europe/Berlin', '2016-10-30T12:00Z', '2016-10-29T22:00Z', '2016-10-30T23:00Z', '2016-10-23T22:00Z'], // 25
  ['Asia/Kathmandu', '2016-01-01T18:20Z', '2016-01-01T18:15Z', '2016-01-02T18:15Z', '2015-12-27T18:15Z'],
  // midnight is skipped: the day begins at one
  ['America/Sao_Paulo', '2016-10-16T12:00Z', '2016-10-16T03:00Z', '2016-10-17T02:00Z', '2016-10-10T03:00Z'],
  ['America/Sao_Paulo', '2016-10-16T02:59Z', '2016-10-15T03:00Z', '2016-10-16T03:00Z', '2016-10-10T03:00Z'],
  // midnight comes twice: the day begins with the first, also seen from the second
  ['America/Havana', '2015-11-01T04:30Z', '2015-11-01T04:00Z', '2015-11-02T05:00Z', '2015-10-26T04:00Z'],
  ['America/Havana', '2015-11-01T05:30Z', '2015-11-01T04:00Z', '2015-11-02T05:00Z', '2015-10-26T04:00Z'],
  ['Atlantic/Azores', '2016-10-30T00:30Z', '2016-10-30T00:00Z', '2016-10-31T01:00Z', '2016-10-24T00:00Z'],
  // a day that never was
  ['Pacific/Apia', '2011-12-30T09:00Z', '2011-12-29T10:00Z', '2011-12-30T10:00Z', '2011-12-26T10:00Z'],
  ['Pacific/Apia', '2011-12-30T11:00Z', '2011-12-30T10:00Z', '2011-12-31T10:00Z', '2011-12-26T10:00Z'],
]
test('days and weeks begin in the account’s time zone, where clocks jump too; the view and the counters agree', async () => {
  const account = await payer(db)
  const day = await setBudget(account, 'user', '1', { period: 'day' })
  const week = await setBudget(account, 'user', '1', { period: 'week' })
  const zone = (name: string) =>
    db.sql('update data.account_balance set time_zone = $1 where account_id = $2', [name, account.accountId])
  for (const [name, at, ...expected] of zones) {
    await zone(name)
    const dates = expected.map((each) => new Date(each))
    const [counted] = await db.sql(
      `select data.window_start('day', $1, $2) as day, data.window_start('week', $1, $2) as week`,
      [name, at],
    )
    assert.equal([counted!.day, counted!.week], [dates[0], dates[2]], `counted: ${name} ${at}`)
    const ahead = (new Date(at).getTime() - Date.now()) / 1000
    await move(ahead)
    const seen = await operator(
      'select id, window_start, window_end from api.budgets where account_id = $1',
      [account.accountId],
    )
    await move(-ahead)
    const [days, weeks] = [day.id, week.id].map((id) => seen.find((each) => each.id === id)!)
    assert.equal([days!.window_start, days!.window_end, weeks!.window_start], dates, `shown: ${name} ${at}`)
  }
  await zone('UTC')
})

test('windows follow one another without a gap: any moment is in one, which begins at or before it', async () => {
  const off = await db.sql(`
    with window_of as (
      select zone, period, at, data.window_start(period, zone, at) as starts
      from unnest(array['UTC', 'Europe/Berlin', 'America/Havana', 'Atlantic/Azores', 'America/Sao_Paulo', 'Asia/Kathmandu',
        'Australia/Lord_Howe', 'Pacific/Chatham', 'Asia/Beirut', 'Africa/Casablanca']) as zone,
        unnest(array['day', 'week', 'month']) as period,
        generate_series(timestamptz '2015-09-01Z', '2016-12-01Z', interval '9 hours 13 minutes') as at
    )
    select * from window_of
    where starts > at or at - starts > interval '32 days'
      or data.window_start(period, zone, starts) <> starts
      or data.window_start(period, zone, starts - interval '1 us') >= starts
    limit 5`)
  assert.equal(off, [])
})

test('another time zone counts the window anew; one that is none is refused', async () => {
  const account = await payer(db, { funds: '100' })
  const day = await setBudget(account, 'user', '50', { period: 'day' })
  const total = await setBudget(account, 'virtual_key', '50', { period: 'total' })
  // one event an hour of the last two days
  const noon = day.window_start.getTime() + 12 * 3_600_000
  await advance((noon - now().getTime()) / 1000)
  for (let hour = 0; hour < 48; hour++)
    await events(account, '1', new Date(noon - hour * 3_600_000 - 1_800_000))
  assert.is(await shown(day.id), '12 + 0 of 50, 38')
  const spentIn = async (zone: string) => {
    const { time_zone } = await account.post('set_time_zone', { time_zone: zone })
    assert.is(time_zone, zone)
    return shown(day.id)
  }
  assert.is(await spentIn('Asia/Tokyo'), '21 + 0 of 50, 29') // nine in the evening
  assert.is(await spentIn('Etc/GMT+10'), '2 + 0 of 50, 48') // two in the morning
  await account.use('1', { id: idAt(now()) })
  assert.is(await shown(day.id), '3 + 0 of 50, 47')
  assert.is(await spentIn('UTC'), '13 + 0 of 50, 37')
  assert.is(await shown(total.id), '49 + 0 of 50, 1')
  for (const wrong of ['Mars/Olympus', '', null, '+02', "UTC'; --"]) {
    const { code, message } = await failure(account.post('set_time_zone', { time_zone: wrong }))
    assert.is(`${code} ${message}`, 'PT422 invalid_time_zone', String(wrong))
  }
  const nobody = { ...account, accountId: randomUUID() }
  const unknown = await failure(operator(`select api.set_time_zone($1, 'UTC')`, [nobody.accountId]))
  assert.is(unknown.message, 'account_not_found')
})

test('a budget being set makes holds wait, and counts earlier holds', async () => {
  const account = await payer(db, { funds: '100' })
  const setting = await db.session('keyledger_operator')
  const holding = await db.session('keyledger_gateway')
  try {
    await setting.query('begin')
    await setting.query(`select api.set_budget($1, 'user', $1, 5, 'day')`, [account.userId])
    const waiting = holding.query('select api.place_holds($1) -> 0 as answer', [
      JSON.stringify([account.request('6')]),
    ])
    await db.blocked(holding)
    await setting.query('commit')
    assert.is(brief((await waiting).rows[0].answer), 'refused user_budget_exceeded')
  } finally {
    await setting.end()
    await holding.end()
  }
})

const tampers: [name: string, sql: string, problem: string | null][] = [
  [
    'a counter',
    'update data.budget_spend set spent = spent + 1 where account_id = $1',
    'budget_differs_from_usage',
  ],
  ['a lost counter', 'delete from data.budget_spend where account_id = $1', 'budget_differs_from_usage'],
  [
    'a counter of a window without usage',
    `insert into data.budget_spend select account_id, id, counted_from + interval '40 days', 1 from data.budget
      where account_id = $1 and period = 'month'`,
    'budget_differs_from_usage',
  ],
  [
    'a flag',
    'update data.account_balance set has_budgets = false where account_id = $1',
    'has_budgets_differs_from_budgets',
  ],
  [
    'a total that remembers what retention dropped',
    `with floor as (update data.accepted_ids set floor = floor + interval '1 day')
      update data.budget_spend set spent = spent + 1 where account_id = $1 and window_start = '-infinity'`,
    null,
  ],
  [
    'a total below what is kept, after retention',
    `with floor as (update data.accepted_ids set floor = floor + interval '1 day')
      update data.budget_spend set spent = spent - 1 where account_id = $1 and window_start = '-infinity'`,
    'budget_differs_from_usage',
  ],
]
for (const [name, sql, problem] of tampers)
  test(`verify_balances and ${name}`, async () => {
    const account = await payer(db, { funds: '10' })
    for (const period of ['day', 'month', 'total']) await setBudget(account, 'user', '5', { period })
    await account.use('2')
    const session = await db.session()
    try {
      await session.query('begin')
      await session.query(sql, [account.accountId])
      const { rows } = await session.query('select distinct problem from api.verify_balances($1)', [
        account.accountId,
      ])
      assert.equal(rows, problem ? [{ problem }] : [])
    } finally {
      await session.end()
    }
  })

budgets.run()
