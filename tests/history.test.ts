// An account with a long history: retries and readers find their rows by key, and what ran out long ago is in nobody's way.
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { until } from '../scripts/supervise.ts'
import { type Database, database, type Row } from './support/database.ts'
import { event, hold, holdsTrue } from './support/ledger.ts'
import { seed } from './support/seed.ts'

const test = suite('history')
let db: Database
test.before(async () => {
  db = await database(test)
})

const send = async (fn: string, elements: unknown[]): Promise<Row[]> =>
  (await db.gateway(`select api.${fn}($1) as answers`, [JSON.stringify(elements)]))[0]!.answers

test('a retry of 500 events does not read what else the account used', async () => {
  const world = await seed(db.operator, { funds: '1000' })
  const batches = Array.from({ length: 20 }, () => Array.from({ length: 1000 }, () => event(world, 1)))
  for (const events of batches) await send('record_usage', events)
  await db.sql('analyze')
  const session = await db.session('keyledger_gateway')
  try {
    // by key it takes hundredths of this; reading all that was used for each of the 500, several times it
    await session.query(`set statement_timeout = '2s'`)
    const { rows } = await session.query('select api.record_usage($1) as answers', [
      JSON.stringify(batches[7]!.slice(0, 500)),
    ])
    const answers: Row[] = rows[0]!.answers
    assert.is(answers.filter(({ status }) => status === 'duplicate').length, 500)
  } finally {
    await session.end()
  }
  await holdsTrue(db.sql)
})

test('12,000 holds that ran out refuse nothing, though one call settles only some of them', async () => {
  const world = await seed(db.operator, { funds: '120' })
  // in one call, or the next would settle the first
  const requests = Array.from({ length: 12_000 }, () => ({ ...hold(world, '0.01'), expires_in: 1 }))
  assert.ok((await send('place_holds', requests)).every(({ status }) => status === 'held'))
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
    const begun = performance.now()
    await until(() => performance.now() - begun > 1100, 'the second to pass')
    await holder.query('commit')
    const { rows } = await asked
    const [answer] = rows[0]!.answers as Row[]
    assert.is(answer!.status, 'held')
    const [{ later }] = (await db.sql('select $1::timestamptz > now() as later', [answer!.expires_at])) as [
      Row,
    ]
    assert.ok(later, 'it had run out before it was answered')
  } finally {
    await holder.end()
    await waiter.end()
  }
})

test.run()
