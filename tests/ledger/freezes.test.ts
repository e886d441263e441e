// An operator's freeze: a hold without expiry. Only the operator ends it, and no event draws on it.
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { callers, errors } from '../support/callers.ts'
import { movableClock } from '../support/clock.ts'
import { database, type Row } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { newId } from '../support/ids.ts'
import { holdsTrue } from '../support/ledger.ts'
import { type Payer, payer } from '../support/payer.ts'
import { hold, seed } from '../support/seed.ts'

const freezes = suite('freeze')
const db = await database(freezes)
const advance = await movableClock(db.sql)
const test = (name: string, run: () => Promise<void>) =>
  freezes(name, async () => {
    await run()
    await holdsTrue(db.sql)
  })

const freeze = (account: Payer, amount: string, args: Row = {}) =>
  account.post('freeze_funds', { amount, reason: 'disputed', ...args })
const unfreeze = (account: Payer, id: string, args: Row = {}) =>
  account.post('unfreeze_funds', { id, ...args })
const brief = ({ status, code }: Row) => [status, code].filter(Boolean).join(' ')
const refused = async (promise: Promise<unknown>) => {
  const { code, message } = await failure(promise)
  return `${code} ${message}`
}

test('a freeze sets money aside, keeps its reason and actor, and stays until it is ended', async () => {
  const account = await payer(db, { funds: '10' })
  const operator = db.as('keyledger_operator', { sub: 'olga' })
  const [frozen] = await operator(
    `select * from api.freeze_funds($1, 4, 'disputed', reference => 'case-1')`,
    [account.accountId],
  )
  assert.equal(
    [frozen!.status, frozen!.amount, frozen!.expires_at, frozen!.reason, frozen!.actor, frozen!.reference],
    ['open', '4.0000000000', null, 'disputed', 'olga', 'case-1'],
  )
  assert.equal(await account.figures(), { balance: '10', frozen_balance: '4', available: '6' })
  assert.is(brief((await account.place(account.request('6.1')))[0]!), 'refused insufficient_funds')
  await advance(400 * 24 * 3600)
  await db.operator('select api.maintain()') // the months of holds to come
  assert.equal(await account.figures(), { balance: '10', frozen_balance: '4', available: '6' })
  assert.is(await account.holdNow(frozen!.id), 'open 0/4')
  await unfreeze(account, frozen!.id, { reason: 'settled' })
  const [ended] = await db.operator('select * from api.holds where id = $1', [frozen!.id])
  assert.equal(
    [ended!.status, ended!.ended_by, ended!.end_reason, ended!.reason],
    ['released', 'keyledger_operator', 'settled', 'disputed'],
  )
  assert.equal(await account.figures(), { balance: '10', available: '10' })
  assert.is(await account.version(), '1') // a freeze is no entry
})

test('ending a freeze again changes nothing; a hold is no freeze', async () => {
  const account = await payer(db, { funds: '10' })
  const [one, two] = [await freeze(account, '4'), await freeze(account, '3')]
  const ended = await unfreeze(account, one.id, { reason: 'first' })
  assert.equal(await unfreeze(account, one.id, { reason: 'again' }), ended)
  assert.equal(await account.figures(), { balance: '10', frozen_balance: '3', available: '7' })
  const other = await payer(db, { funds: '10' })
  for (const [of, id] of [
    [account, await account.hold('1')],
    [account, newId()],
    [account, null],
    [other, two.id],
  ] as [Payer, string][])
    assert.is(await refused(unfreeze(of, id)), 'PT404 freeze_not_found')
  assert.is(
    await refused(db.operator('select api.unfreeze_funds($1, $1)', [newId()])),
    'PT404 account_not_found',
  )
})

test('a freeze takes at most the money that outlasts all grants', async () => {
  const account = await payer(db, { funds: '5', limit: '1' })
  await account.grant('10', { expires_at: new Date(Date.now() + 500 * 24 * 3600 * 1000) })
  await account.grant('2')
  await account.hold('3', { expires_in: 60 })
  assert.is(await refused(freeze(account, '8.1')), 'PT402 insufficient_funds')
  await freeze(account, '8')
  assert.is(await refused(freeze(account, '0.1')), 'PT402 insufficient_funds')
  assert.equal(await account.figures(), {
    balance: '5',
    credit_limit: '1',
    free_credit: '12',
    frozen_balance: '11',
    available: '7',
  })
})

const bad: [name: string, args: Row, expected: string][] = [
  ['nothing', { amount: '0' }, 'PT422 invalid_amount'],
  ['less than nothing', { amount: '-1' }, 'PT422 invalid_amount'],
  ['no number', { amount: 'NaN' }, 'PT422 invalid_amount'],
  ['no amount', { amount: null }, 'PT422 invalid_amount'],
  ['no reason', { reason: null }, 'PT422 invalid_reason'],
  ['an empty reason', { reason: ' \n' }, 'PT422 invalid_reason'],
  ['an empty reference', { reference: '' }, 'PT422 invalid_reference'],
  ['a long reference', { reference: 'x'.repeat(513) }, 'PT422 invalid_reference'],
]
for (const [name, args, expected] of bad)
  test(`${name}: refused`, async () => {
    const account = await payer(db, { funds: '10' })
    assert.is(await refused(freeze(account, '1', args)), expected)
    assert.equal(await account.figures(), { balance: '10', available: '10' })
  })

test('an unknown account is refused', async () => {
  assert.is(
    await refused(db.operator(`select api.freeze_funds($1, 1, 'x')`, [newId()])),
    'PT404 account_not_found',
  )
})

test('a reference names one freeze per account, ended or not, and may name an entry too', async () => {
  const account = await payer(db, { funds: '10' })
  await account.topUp('1', { reference: 'case-1' })
  const first = await freeze(account, '4', { reference: 'case-1' })
  assert.equal(await freeze(account, '4.00', { reference: 'case-1', reason: 'retry' }), first)
  assert.is(await refused(freeze(account, '5', { reference: 'case-1' })), 'PT409 reference_mismatch')
  const ended = await unfreeze(account, first.id)
  assert.equal(await freeze(account, '4', { reference: 'case-1' }), ended)
  assert.equal(await account.figures(), { balance: '11', available: '11' })
  const other = await payer(db, { funds: '10' })
  assert.ok((await freeze(other, '4', { reference: 'case-1' })).id !== first.id)
})

test('the gateway neither ends nor extends a freeze, and no event draws on it', async () => {
  const account = await payer(db, { funds: '10' })
  const { id } = await freeze(account, '4')
  assert.is(brief((await account.release(id))[0]!), 'refused hold_frozen')
  assert.is(brief((await account.extend(id, 60))[0]!), 'refused hold_frozen')
  const event = account.event('2', { hold_id: id })
  assert.is(brief((await account.record(event))[0]!), 'parked invalid_hold')
  assert.is(await account.holdNow(id), 'open 0/4')
  const [parked] = await db.operator('select id from api.parked_usage where usage_id = $1', [event.id])
  await db.operator('select api.replay_parked_usage($1)', [[parked!.id]])
  await account.use('20') // charged all the same, as debt
  assert.is(await account.holdNow(id), 'open 0/4')
  assert.equal(await account.figures(), { outstanding_amount: '12', frozen_balance: '4', available: '-16' })
  assert.equal((await account.place(account.request('4', { id }))).map(brief), ['duplicate'])
  await unfreeze(account, id)
  assert.is(brief((await account.release(id))[0]!), 'closed hold_released')
})

test('freezes and holds at once never set aside more than the account has; one reference makes one freeze', async () => {
  const world = await seed(db.operator, { funds: '30' })
  const calls = Array.from({ length: 120 }, (_, i) =>
    i % 2
      ? {
          role: 'keyledger_gateway' as const,
          text: `select api.place_holds($1) -> 0 ->> 'status' as status`,
          values: [JSON.stringify([hold(world, '1')])],
        }
      : {
          role: 'keyledger_operator' as const,
          text: `select status, id from api.freeze_funds($1, 1, 'test', reference => $2)`,
          values: [world.accountId, `case-${i % 20}`],
        },
  )
  const answers = await callers(db.loginUrl, calls)
  for (const error of errors(answers)) assert.equal(error, { code: 'PT402', message: 'insufficient_funds' })
  const frozen = new Set(answers.flatMap(({ rows: [row] }) => (row?.id ? [row.id] : [])))
  const held = answers.filter(({ rows: [row] }) => row?.status === 'held').length
  assert.ok(frozen.size > 0 && frozen.size <= 10)
  assert.is(frozen.size + held, 30)
  const ends = Array.from({ length: 100 }, () => ({
    role: 'keyledger_operator' as const,
    text: 'select status from api.unfreeze_funds($1, $2)',
    values: [world.accountId, [...frozen][0]],
  }))
  assert.equal(errors(await callers(db.loginUrl, ends)), [])
  const [now] = await db.operator('select available from api.billing_accounts where account_id = $1', [
    world.accountId,
  ])
  assert.is(Number(now!.available), 1)
})

freezes.run()
