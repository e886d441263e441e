// The last use of a key: kept to the minute, without a write per request, a wait or an eviction.
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { movableClock } from '../support/clock.ts'
import { database, type Row } from '../support/database.ts'
import { idAt } from '../support/ids.ts'
import { type Payer, payer } from '../support/payer.ts'

const test = suite('key use')
const db = await database(test)
const move = await movableClock(db.sql)

const used = async ({ keyId }: Payer): Promise<Date | null> =>
  (await db.operator('select last_used_at from api.virtual_keys where id = $1', [keyId]))[0]!.last_used_at
const writes = async ({ keyId }: Payer): Promise<string> =>
  (await db.sql('select xmin::text as it from data.virtual_key_use where virtual_key_id = $1', [keyId]))[0]!
    .it
const at = (ms: number) => ({ id: idAt(new Date(ms)) })

test('the first use shows at once, later ones to the minute', async () => {
  const account = await payer(db, { funds: '10' })
  assert.is(await used(account), null)
  const first = Date.now()
  await account.use('0.1', at(first))
  assert.is((await used(account))!.getTime(), first)
  const written = await writes(account)
  for (let i = 1; i < 30; i++) await account.use('0.1', at(first + i))
  assert.equal([(await used(account))!.getTime(), await writes(account)], [first, written])

  await move(61)
  const later = first + 61_000
  await account.use('0.1', at(later))
  assert.is((await used(account))!.getTime(), later)
  await move(-61)
})

test('the time is that of the use, not of its recording, and never goes back or ahead of the clock', async () => {
  const account = await payer(db, { funds: '10' })
  const hourAgo = Date.now() - 3_600_000
  await account.record(account.event('0.1', at(hourAgo - 60_000)), account.event('0.1', at(hourAgo)))
  assert.is((await used(account))!.getTime(), hourAgo)
  await account.use('0.1', at(hourAgo - 7_200_000))
  assert.is((await used(account))!.getTime(), hourAgo)
  const before = Date.now()
  await account.use('0.1', at(before + 100_000))
  const ahead = (await used(account))!.getTime()
  assert.ok(before <= ahead && ahead <= Date.now())
})

test('a hold, a parked event or advice is no use', async () => {
  const account = await payer(db, { funds: '10' })
  await account.hold('1')
  await account.use('1', { meters: { nothing: 1 } })
  await db.gateway('select api.check_budget($1, 1, $2)', [account.userId, account.keyId])
  assert.is(await used(account), null)
})

test('each key of a call has its own', async () => {
  const [one, two, three] = [
    await payer(db, { funds: '1' }),
    await payer(db, { funds: '1' }),
    await payer(db),
  ]
  const moment = Date.now() - 1000
  await one.record(one.event('0.1', at(moment)), two.event('0.1', at(moment - 500)))
  assert.equal(
    [(await used(one))!.getTime(), (await used(two))!.getTime(), await used(three)],
    [moment, moment - 500, null],
  )
})

test('a use evicts nothing', async () => {
  const account = await payer(db, { funds: '1' })
  const changes = async (cursor?: Row) =>
    (await db.gateway('select api.cache_changes($1) as c', [cursor]))[0]!.c
  const { cursor } = await changes()
  await account.use('0.1')
  assert.ok(await used(account))
  const { keys, reset } = await changes(cursor)
  assert.equal([keys, reset], [[], false])
})

test('a call waits neither for another that marks the same key, nor for its rotation', async () => {
  const account = await payer(db, { funds: '1' })
  const session = await db.session()
  try {
    await session.query('begin')
    await session.query('select from data.virtual_key_use where virtual_key_id = $1 for update', [
      account.keyId,
    ])
    await session.query('select api.rotate_virtual_key($1)', [account.keyId])
    assert.is((await account.use('0.1')).status, 'charged')
    assert.is(await used(account), null)
    await session.query('commit')
    const moment = Date.now()
    await account.use('0.1', at(moment))
    assert.is((await used(account))!.getTime(), moment)
  } finally {
    await session.end()
  }
})

test('a deleted key takes its row along; a member sees the last use of their own keys', async () => {
  const account = await payer(db, { funds: '1' })
  await account.use('0.1')
  const seen = await db.member(account.userId)('select id, last_used_at from api.virtual_keys')
  assert.equal(seen, [{ id: account.keyId, last_used_at: await used(account) }])
  await db.sql('delete from data.virtual_key where id = $1', [account.keyId])
  assert.equal(
    await db.sql('select from data.virtual_key_use where virtual_key_id = $1', [account.keyId]),
    [],
  )
})

test.run()
