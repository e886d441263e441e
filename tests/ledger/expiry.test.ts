// Holds that ran out: they are in nobody's way, however many, and never answered as open.
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { until } from '../../scripts/supervise.ts'
import { type Database, database, type Row } from '../support/database.ts'
import { hold, holdsTrue } from '../support/ledger.ts'
import { payer } from '../support/payer.ts'
import { seed } from '../support/seed.ts'

const test = suite('expiry')
let db: Database
test.before(async () => {
  db = await database(test)
})

const send = async (fn: string, elements: unknown[]): Promise<Row[]> =>
  (await db.gateway(`select api.${fn}($1) as answers`, [JSON.stringify(elements)]))[0]!.answers

test('12,000 holds that ran out refuse nothing, though one call settles only some of them', async () => {
  const world = await seed(db.operator, { funds: '120' })
  // more than a call takes: all are placed before the first runs out
  for (const length of [10_000, 2000]) {
    const requests = Array.from({ length }, () => ({ ...hold(world, '0.01'), expires_in: 10 }))
    assert.ok((await send('place_holds', requests)).every(({ status }) => status === 'held'))
  }
  const due = `select from data.hold where account_id = $1 and status = 'open' and expires_at <= now()`
  await until(async () => (await db.sql(due, [world.accountId])).length === 12_000, 'all to run out')
  const [answer] = await send('place_holds', [hold(world, '120')])
  assert.equal([answer!.status, answer!.available], ['held', '0.0000000000'])
  assert.is((await db.sql(due, [world.accountId])).length, 2000)
  const [late] = await send('release_holds', [
    {
      id: (await db.sql(`${due.replace('select', 'select id')} limit 1`, [world.accountId]))[0]!.id,
      account_id: world.accountId,
    },
  ])
  assert.is(late!.available, '0.0000000000')
  assert.is((await db.sql(due, [world.accountId])).length, 0)
  await holdsTrue(db.sql)
})

test('a hold that ran out is never answered as open, also where its key may hold no more', async () => {
  const world = await seed(db.operator)
  const request = { ...hold(world, '1'), expires_in: 1 }
  await send('place_holds', [request])
  await db.operator('select id from api.revoke_virtual_key($1)', [world.keyId])
  assert.is((await send('place_holds', [request]))[0]!.hold_status, 'open')
  const ended = `select status from api.holds where id = $1 and status = 'expired'`
  await until(async () => (await db.operator(ended, [request.id])).length, 'the hold to run out')
  const [answer] = await send('place_holds', [request])
  assert.equal([answer!.status, answer!.hold_status], ['duplicate', 'expired'])
  await holdsTrue(db.sql)
})

test('a hold that waited for the lock begins after it', async () => {
  const world = await seed(db.operator)
  const holder = await db.session()
  const waiter = await db.session('keyledger_gateway')
  try {
    await holder.query('begin')
    await holder.query('select from data.account_balance where account_id = $1 for update', [world.accountId])
    const asked = waiter.query('select api.place_holds($1) as answers', [
      JSON.stringify([{ ...hold(world, '1'), expires_in: 1 }]),
    ])
    await db.blocked(waiter)
    const [{ freed }] = (await holder.query('select clock_timestamp()::text as freed')).rows
    await holder.query('commit')
    const { rows } = await asked
    const [answer] = rows[0]!.answers as Row[]
    assert.is(answer!.status, 'held')
    const [{ whole }] = (await db.sql(
      `select $1::timestamptz >= $2::timestamptz + interval '1 second' as whole`,
      [answer!.expires_at, freed],
    )) as [Row]
    assert.ok(whole, 'the wait was taken off its second')
  } finally {
    await holder.end()
    await waiter.end()
  }
})

// what it writes of a time it could not read again
test('credit that ran out, and a hold that is drawn, by a session of another DateStyle and time zone', async () => {
  const account = await payer(db, { funds: '10' })
  const { accountId } = account
  const held = await account.hold('1')
  const expires = new Date(Date.now() + 2000) // later than the grant is made
  await account.grant('5', { expires_at: expires })
  await until(() => Date.now() > expires.getTime() + 100, 'the grant to run out')
  const session = await db.session()
  await session.query(`set datestyle = 'SQL, DMY'; set timezone = 'Pacific/Guam'`)
  const event = account.event('0.25', { hold_id: held })
  const asked = session.query('select api.record_usage($1) as answers', [JSON.stringify([event])])
  const { rows } = await asked.finally(() => session.end())
  assert.is(rows[0].answers[0].status, 'charged')
  assert.equal(await account.entries(2), ['credit_expiry -5: free_credit -5', 'usage -0.25: balance -0.25'])
  assert.equal(await db.operator('select captured from api.holds where id = $1', [held]), [
    { captured: '0.2500000000' },
  ])
  assert.equal(await db.sql('select * from api.verify_balances($1)', [accountId]), [])
})

test.run()
