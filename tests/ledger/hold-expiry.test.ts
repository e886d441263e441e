// Expired holds: they refuse nothing, however many there are, and no answer calls them open.
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { movableClock, now } from '../support/clock.ts'
import { type Database, database, type Row } from '../support/database.ts'
import { holdsTrue } from '../support/ledger.ts'
import { payer } from '../support/payer.ts'
import { hold, seed } from '../support/seed.ts'

const test = suite('hold expiry')
let db: Database
let forward: (seconds: number) => Promise<void>
test.before(async () => {
  db = await database(test)
  forward = await movableClock(db.sql)
})

const send = async (fn: string, elements: unknown[]): Promise<Row[]> =>
  (await db.gateway(`select api.${fn}($1) as answers`, [JSON.stringify(elements)]))[0]!.answers

test('12,000 expired holds refuse nothing, though one call settles only some of them', async () => {
  const world = await seed(db.operator, { funds: '120' })
  // more than one call takes
  for (const length of [10_000, 2000]) {
    const requests = Array.from({ length }, () => ({ ...hold(world, '0.01'), expires_in: 600 }))
    assert.ok((await send('place_holds', requests)).every(({ status }) => status === 'held'))
  }
  const due = `select from data.hold where account_id = $1 and status = 'open' and expires_at <= clock.now()`
  await forward(600)
  assert.is((await db.sql(due, [world.accountId])).length, 12_000)
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

test('no answer calls an expired hold open, even when its key may hold no more', async () => {
  const world = await seed(db.operator)
  const request = { ...hold(world, '1'), expires_in: 60 }
  await send('place_holds', [request])
  await db.operator('select id from api.revoke_virtual_key($1)', [world.keyId])
  assert.is((await send('place_holds', [request]))[0]!.hold_status, 'open')
  await forward(60)
  const [answer] = await send('place_holds', [request])
  assert.equal([answer!.status, answer!.hold_status], ['duplicate', 'expired'])
  await holdsTrue(db.sql)
})

test('a hold that waited for a lock begins when it gets the lock', async () => {
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
    const [{ freed }] = (await holder.query('select clock.clock_timestamp()::text as freed')).rows
    await holder.query('commit')
    const { rows } = await asked
    const [answer] = rows[0]!.answers as Row[]
    assert.is(answer!.status, 'held')
    const [{ whole }] = (await db.sql(
      `select $1::timestamptz >= $2::timestamptz + interval '1 second' as whole`,
      [answer!.expires_at, freed],
    )) as [Row]
    assert.ok(whole, 'the hold lost the time that it waited')
  } finally {
    await holder.end()
    await waiter.end()
  }
})

// with this DateStyle a time that is written as text could not be read again
test('a session with another DateStyle and time zone settles expired credit and draws on a hold', async () => {
  const account = await payer(db, { funds: '10' })
  const { accountId } = account
  const held = await account.hold('1')
  await account.grant('5', { expires_at: new Date(now() + 60_000) })
  await forward(60)
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
