// Parked events: an event that can't be charged yet keeps its hold's money set aside.
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { movableClock } from '../support/clock.ts'
import { database, type Row } from '../support/database.ts'
import { idAt, newId } from '../support/ids.ts'
import { holdsTrue } from '../support/ledger.ts'
import { type Payer, payer } from '../support/payer.ts'

const test = suite('parked')
const db = await database(test)
const move = await movableClock(db.sql)
const hour = 3600
const unpriced = { late: '2' }
const price = (account: Payer) =>
  db.operator(
    `insert into api.prices (config_node_id, meter, unit_price, effective_from) values ($1, 'late', 1, '2020-01-01')`,
    [account.nodeId],
  )
const parkedOf = ({ accountId }: Payer) =>
  db.operator(
    'select id, hold_id, resolution from api.parked_usage where account_id = $1 order by created_at',
    [accountId],
  )
const replay = async (ids: string[]): Promise<Row[]> =>
  (await db.operator('select api.replay_parked_usage($1) as answers', [ids]))[0]!.answers
const sound = async (account: Payer) =>
  assert.equal(await db.operator('select * from api.verify_balances($1)', [account.accountId]), [])

test('strict funds stay strict: the hold of a parked event does not expire', async () => {
  const account = await payer(db, { funds: '10' })
  const hold_id = await account.hold('10', { expires_in: 60 })
  const event = account.event('', { meters: unpriced, hold_id })
  assert.is((await account.record(event))[0]!.status, 'parked')
  await move(hour)
  assert.is(await account.holdNow(hold_id), 'parked 0/10')
  assert.equal(await account.figures(), { balance: '10', frozen_balance: '10' })
  assert.is((await account.place(account.request('1')))[0]!.code, 'insufficient_funds')
  const [released] = await account.release(hold_id)
  assert.equal([released!.status, released!.code], ['closed', 'hold_parked'])
  assert.is((await account.extend(hold_id))[0]!.code, 'hold_parked')
  const [again] = await account.place({ ...account.request('10'), id: hold_id, expires_in: 60 })
  assert.equal([again!.status, again!.hold_status], ['duplicate', 'parked'])
  await sound(account)

  await price(account)
  const [parked] = await parkedOf(account)
  assert.is(parked!.hold_id, hold_id)
  assert.is((await replay([parked!.id]))[0]!.status, 'charged')
  assert.is(await account.holdNow(hold_id), 'captured 2/10')
  assert.equal(await account.figures(), { balance: '8', available: '8' })
  await sound(account)
})

test('a mended event under the same id is charged, resolves the parked one, and frees its money', async () => {
  for (const more of [{}, { hold_id: null }, { final: false }]) {
    const account = await payer(db, { funds: '10' })
    const hold_id = await account.hold('5')
    const event = account.event('', { meters: unpriced, hold_id })
    await account.record(event)
    // two forms of one event share the money set aside
    await account.record({ ...event, meters: { later: 1 } })
    assert.equal(await account.figures(), { balance: '10', frozen_balance: '5', available: '5' })
    const [answer] = await account.record({ ...event, meters: { usd: '3' }, ...more })
    assert.is(answer!.status, 'charged')
    assert.equal(await account.figures(), { balance: '7', available: '7' })
    assert.equal(
      (await parkedOf(account)).map(({ resolution }) => resolution),
      ['duplicate', 'duplicate'],
    )
    await sound(account)
  }
})

test('dismissing a parked event frees its money', async () => {
  const account = await payer(db, { funds: '10' })
  const hold_id = await account.hold('5')
  await account.record(account.event('', { meters: unpriced, hold_id }))
  const [parked] = await parkedOf(account)
  await db.as('keyledger_operator', { sub: 'erin' })('select from api.dismiss_parked_usage($1, $2)', [
    [parked!.id],
    'a test',
  ])
  assert.equal(await account.figures(), { balance: '10', available: '10' })
  const [hold] = await db.operator('select status, ended_by, end_reason from api.holds where id = $1', [
    hold_id,
  ])
  assert.equal(hold, { status: 'released', ended_by: 'erin', end_reason: 'a test' })
  // the same event again stays dismissed, and sets nothing aside
  const [again] = await account.record(
    account.event('', { meters: unpriced, hold_id: await account.hold('1') }),
  )
  assert.is(again!.status, 'parked')
  await sound(account)
})

test('a hold that several events share ends with the last parked one', async () => {
  const account = await payer(db, { funds: '10' })
  const hold_id = await account.hold('6')
  const [one, two] = ['a', 'b'].map((meter) =>
    account.event('', { meters: { [meter]: '1' }, hold_id, final: false }),
  ) as [Row, Row]
  await account.record(one, two)
  // other events draw on it all the same, and don't end it
  const [drawn] = await account.record(account.event('2', { hold_id }))
  assert.is(drawn!.status, 'charged')
  assert.is(await account.holdNow(hold_id), 'parked 2/6')
  await account.record({ ...one, meters: { usd: '1' } })
  assert.is(await account.holdNow(hold_id), 'parked 3/6')
  await account.record({ ...two, meters: { usd: '1' }, final: true })
  assert.is(await account.holdNow(hold_id), 'captured 4/6')
  assert.equal(await account.figures(), { balance: '6', available: '6' })
  await sound(account)
})

test('a stream goes on with its hold once a part of it that was parked is charged or dismissed', async () => {
  for (const end of ['replay', 'dismiss']) {
    const account = await payer(db, { funds: '10' })
    const hold_id = await account.hold('10')
    await account.record(account.event('', { meters: unpriced, hold_id, final: false }))
    const [parked] = await parkedOf(account)
    await price(account)
    if (end === 'replay') await replay([parked!.id])
    else await db.operator(`select from api.dismiss_parked_usage($1, 'a test')`, [[parked!.id]])
    const drawn = end === 'replay' ? 2 : 0
    assert.is(await account.holdNow(hold_id), `open ${drawn}/10`)
    assert.is((await account.place(account.request('1')))[0]!.code, 'insufficient_funds')
    assert.is((await account.extend(hold_id))[0]!.status, 'extended')
    await account.use('3', { hold_id })
    assert.is(await account.holdNow(hold_id), `captured ${drawn + 3}/10`)
    assert.equal(await account.figures(), { balance: `${7 - drawn}`, available: `${7 - drawn}` })
    await sound(account)
  }
})

test('an event without a hold, or whose hold has ended, sets nothing aside', async () => {
  const account = await payer(db, { funds: '10' })
  const [ended, expired] = [await account.hold('1'), await account.hold('1', { expires_in: 1 })]
  await account.release(ended)
  await move(2)
  for (const hold_id of [undefined, ended, expired, newId()])
    assert.is((await account.record(account.event('', { meters: unpriced, hold_id })))[0]!.status, 'parked')
  assert.equal(await account.figures(), { balance: '10', available: '10' })
  assert.equal(
    (await parkedOf(account)).map(({ hold_id }) => hold_id),
    [null, null, null, null],
  )
  await sound(account)
})

test('money of parked holds counts against budgets, and shrinks when credit under it expires', async () => {
  const account = await payer(db, { funds: '2' })
  await account.grant('5', { expires_at: new Date((await now()) + 2 * hour * 1000) })
  await account.post('set_budget', {
    scope: 'virtual_key',
    scope_id: account.keyId,
    amount: '6',
    period: 'total',
  })
  const hold_id = await account.hold('6')
  await account.record(account.event('', { meters: unpriced, hold_id }))
  await move(hour)
  assert.is((await account.place(account.request('1')))[0]!.code, 'key_budget_exceeded')
  await move(2 * hour)
  // as the view shows it, and as the next call posts it
  const shrunk = { balance: '2', frozen_balance: '2' }
  assert.equal(await account.figures(), shrunk)
  assert.is((await account.release(newId()))[0]!.code, 'hold_not_found')
  assert.equal(await account.figures(), shrunk)
  assert.is(await account.holdNow(hold_id), 'parked 0/2')
  await sound(account)
})

test('many events parked, charged and dismissed at once: no money is lost or stays frozen', async () => {
  const account = await payer(db, { funds: '100' })
  const events = await Promise.all(
    Array.from({ length: 24 }, async () =>
      account.event('', { meters: unpriced, hold_id: await patient(() => account.hold('2')) }),
    ),
  )
  await Promise.all(events.map((event) => patient(() => account.record(event))))
  assert.is((await account.figures()).frozen_balance, '48')
  const ids = (await parkedOf(account)).map(({ id }) => id)
  await price(account)
  await Promise.all(
    ids.flatMap((id, i) => [
      patient(() => replay([id])),
      patient(() => account.record(events[i]!)),
      patient(() =>
        db.operator(`select from api.dismiss_parked_usage($1, 'a test')`, [[ids[(i + 7) % ids.length]]]),
      ),
    ]),
  )
  for (const event of events) await account.record(event)
  const rows = await parkedOf(account)
  assert.ok(rows.every(({ resolution }) => resolution))
  assert.equal(await account.figures(), { balance: '52', available: '52' })
  await sound(account)
})

test('an event ahead of its time is parked, and charged by the upkeep when its time has come', async () => {
  const account = await payer(db, { funds: '10' })
  const event = account.event('1', { id: idAt(new Date((await now()) + 10 * 60_000)) })
  assert.is((await account.record(event))[0]!.code, 'id_not_of_now')
  await db.gateway('select api.maintain()')
  assert.is((await parkedOf(account))[0]!.resolution, null)
  await move(15 * 60)
  await db.gateway('select api.maintain()')
  assert.is((await parkedOf(account))[0]!.resolution, 'charged')
  assert.equal(await account.figures(), { balance: '9', available: '9' })
})

test('verify_balances reports money set aside behind the ledger’s back', async () => {
  const account = await payer(db, { funds: '10' })
  const hold_id = await account.hold('2')
  await account.record(account.event('', { meters: unpriced, hold_id }))
  const problems = async (change: string) => {
    const owner = await db.session()
    await owner.query('begin')
    await owner.query(change, [account.accountId])
    const { rows } = await owner.query('select problem from api.verify_balances($1)', [account.accountId])
    await owner.query('rollback')
    await owner.end()
    return rows.map(({ problem }) => problem)
  }
  assert.equal(
    await problems(
      `update data.parked_usage set resolution = 'dismissed', resolved_at = now(), reason = 'x', actor = 'x'
      where account_id = $1`,
    ),
    ['parked_hold_without_event'],
  )
  assert.equal(await problems(`update data.hold set status = 'open' where account_id = $1`), [
    'parked_event_without_hold',
  ])
})

async function now(): Promise<number> {
  const [row] = await db.sql('select clock.clock_timestamp() as at')
  return row!.at.getTime()
}

// a call that waited too long for its account did nothing
async function patient<T>(call: () => Promise<T>): Promise<T> {
  for (;;) {
    try {
      return await call()
    } catch (error) {
      if ((error as { code?: string }).code !== '55P03') throw error
    }
  }
}

test('the ledger is whole after all these tests', () => holdsTrue(db.sql))

test.run()
