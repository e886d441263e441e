// What was parked is charged once it can be, and once only: by replays at once, and with the gateway trying again.
import type pg from 'pg'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database, type Role, type Row, type Sql } from './support/database.ts'
import { holdsTrue, newId } from './support/ledger.ts'
import { idAt, payer } from './support/payer.ts'

const test = suite('replay')
const db = await database(test)

const brief = (answers: Row[]) => answers.map((answer) => answer.code ?? answer.status)

// Parked for want of a price, and then priced: at 2 from the event's own time on, at 5 since.
async function parked(...more: Row[]) {
  const account = await payer(db, { funds: '200' })
  const events = more.map((each) =>
    account.event('', { id: idAt(new Date(Date.now() - 60_000)), meters: { late: '1' }, ...each }),
  )
  assert.equal(
    (await account.record(...events)).map(({ status }) => status),
    events.map(() => 'parked'),
  )
  const price = () =>
    db.operator(
      `insert into api.prices (config_node_id, meter, unit_price, effective_from)
      values ($1, 'late', 2, now() - interval '1 hour'), ($1, 'late', 5, now() - interval '30 s')`,
      [account.nodeId],
    )
  const kept = () =>
    db.operator(
      'select id, code, resolution, event from api.rejected_usage where account_id = $1 order by usage_id',
      [account.accountId],
    )
  return { account, events, price, kept }
}
const replay = async (run: Sql, ids?: string[]): Promise<Row[]> =>
  (await run('select api.replay_rejected_usage($1) as answers', [ids ?? null]))[0]!.answers
const session = async (role: Role): Promise<[pg.Client, Sql]> => {
  const client = await db.session(role)
  return [client, async (text, values) => (await client.query(text, values)).rows]
}

test('an event named to be charged without its hold, and still not chargeable, stays the one row it is', async () => {
  const { account, events, price, kept } = await parked({ hold_id: newId() }, { hold_id: newId() })
  const [first, second] = (await kept()) as [Row, Row]
  assert.equal([first.code, second.code], ['invalid_hold', 'invalid_hold'])
  const [answer] = await replay(db.operator, [first.id])
  assert.equal([answer!.status, answer!.code, answer!.rejected_id], ['parked', 'price_not_found', first.id])
  assert.equal(await kept(), [first, second])
  // the gateway's retry neither
  await account.record(...events)
  assert.equal(await kept(), [first, second])
  await price()
  assert.equal(await replay(db.operator), [])
  assert.equal(brief(await replay(db.operator, [first.id])), ['charged'])
  assert.equal(await kept(), [{ ...first, resolution: 'charged' }, second])
  assert.equal(await account.entries(1), ['usage -2: balance -2'])
})

test('what can be charged is, beside what still cannot, each answered in its place', async () => {
  const { account, price, kept } = await parked({}, { meters: { never: 1 } }, {}, { hold_id: newId() })
  await price()
  const rows = await kept()
  const answers = await replay(
    db.operator,
    rows.map(({ id }) => id),
  )
  const of = Object.fromEntries(answers.map(({ rejected_id, code, status }) => [rejected_id, code ?? status]))
  for (const { id, event } of rows)
    assert.is(of[id], event.meters.never ? 'price_not_found' : 'charged', JSON.stringify(event))
  assert.equal(
    answers.filter(({ cost }) => cost).map(({ cost }) => cost),
    ['2.0000000000', '2.0000000000', '2.0000000000'],
  )
  assert.equal(await account.entries(1), ['usage -6: balance -6'])
  assert.is((await kept()).length, rows.length)
  await db.operator(
    `insert into api.prices (config_node_id, meter, unit_price, effective_from) values ($1, 'never', 1, '2020-01-01')`,
    [account.nodeId],
  )
  assert.equal(brief(await replay(db.operator)), ['charged'])
})

test('two replays at once, and the gateway trying again: charged once', async () => {
  const { account, events, price, kept } = await parked({}, {}, {})
  await price()
  const [one, asOne] = await session('keyledger_operator')
  const [gateway, asGateway] = await session('keyledger_gateway')
  await one.query('begin')
  assert.equal(brief(await replay(asOne)), ['charged', 'charged', 'charged'])
  assert.equal(await replay(db.operator), [], 'the other has them')
  const again = asGateway('select api.record_usage($1) as answers', [JSON.stringify(events)])
  await db.blocked(gateway)
  await one.query('commit')
  assert.equal(brief((await again)[0]!.answers), ['duplicate', 'duplicate', 'duplicate'])
  assert.equal(
    (await kept()).map(({ resolution }) => resolution),
    ['charged', 'charged', 'charged'],
  )
  assert.equal(await account.entries(1), ['usage -6: balance -6'])
  await one.end()
  await gateway.end()
})

test('the gateway trying again while two replays wait: charged once', async () => {
  const { account, events, price, kept } = await parked({}, {})
  await price()
  const [gateway, asGateway] = await session('keyledger_gateway')
  const [one, asOne] = await session('keyledger_operator')
  await gateway.query('begin')
  const [{ answers }] = (await asGateway('select api.record_usage($1) as answers', [
    JSON.stringify(events),
  ])) as [Row]
  assert.equal(brief(answers), ['charged', 'charged'])
  const waiting = replay(asOne)
  await db.blocked(one)
  assert.equal(await replay(db.operator), [], 'the other has them')
  await gateway.query('commit')
  assert.equal(brief(await waiting), ['duplicate', 'duplicate'])
  assert.equal(
    (await kept()).map(({ resolution }) => resolution),
    ['duplicate', 'duplicate'],
  )
  assert.equal(await account.entries(1), ['usage -4: balance -4'])
  await one.end()
  await gateway.end()
})

test('replays and retries in a crowd: each event is charged once', async () => {
  const { account, events, price, kept } = await parked(...Array.from({ length: 60 }, () => ({})))
  await price()
  const crowd = Array.from({ length: 12 }, (_, i) =>
    i % 3 ? replay(db.operator) : account.record(...events.slice(i * 5)),
  )
  const statuses = (await Promise.all(crowd)).flat().map(({ status }) => status)
  await replay(db.operator)
  assert.is(statuses.filter((status) => status === 'charged').length, events.length)
  assert.ok(
    (await kept()).every(({ resolution }) => resolution),
    'all are resolved',
  )
  assert.is((await account.figures()).balance, `${200 - 2 * events.length}`)
})

test('the ledger is whole after all of it', () => holdsTrue(db.sql))

test.run()
