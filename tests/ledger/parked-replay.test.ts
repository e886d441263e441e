// Replays: a parked event is charged once, when it can be, also by several replays and the gateway at once.
import type pg from 'pg'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database, type Role, type Row, type Sql } from '../support/database.ts'
import { idAt, newId } from '../support/ids.ts'
import { holdsTrue } from '../support/ledger.ts'
import { payer } from '../support/payer.ts'

const test = suite('replay')
const db = await database(test)

// events that are still parked would disturb the next test
test.after.each(async () => {
  await db.operator(`
    select from api.dismiss_parked_usage(array(select id from api.parked_usage where resolved_at is null), 'the test is over')`)
})

const brief = (answers: Row[]) => answers.map((answer) => answer.code ?? answer.status)

// Parks an event without a price, then adds prices: 2 from the event's own time on, 5 since.
async function parked(...more: Row[]) {
  const account = await payer(db, { funds: '200' })
  const since = Date.now() - 60_000
  const events = more.map((each, i) =>
    account.event('', { id: idAt(new Date(since + i)), meters: { late: '1' }, ...each }),
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
      'select id, code, resolution, event from api.parked_usage where account_id = $1 order by usage_id',
      [account.accountId],
    )
  return { account, events, price, kept }
}
const replay = async (run: Sql, ids?: string[]): Promise<Row[]> =>
  (await run('select api.replay_parked_usage($1) as answers', [ids ?? null]))[0]!.answers
const session = async (role: Role): Promise<[pg.Client, Sql]> => {
  const client = await db.session(role)
  return [client, async (text, values) => (await client.query(text, values)).rows]
}

test('an event replayed by name without its hold, and still not chargeable, stays one row', async () => {
  const { account, events, price, kept } = await parked({ hold_id: 'x' }, { hold_id: 'y' })
  const [first, second] = (await kept()) as [Row, Row]
  assert.equal([first.code, second.code], ['invalid_hold', 'invalid_hold'])
  const [answer] = await replay(db.operator, [first.id])
  assert.equal([answer!.status, answer!.code, answer!.parked_id], ['parked', 'price_not_found', first.id])
  assert.equal(await kept(), [first, second])
  // the gateway's retry charges nothing either
  await account.record(...events)
  assert.equal(await kept(), [first, second])
  await price()
  assert.equal(await replay(db.operator), [])
  assert.equal(brief(await replay(db.operator, [first.id])), ['charged'])
  assert.equal(await kept(), [{ ...first, resolution: 'charged' }, second])
  assert.equal(await account.entries(1), ['usage -2: balance -2'])
})

test('a replay charges the events it can, leaves the others parked, and answers each in its place', async () => {
  const { account, price, kept } = await parked({}, { meters: { never: 1 } }, {}, { hold_id: 'x' })
  await price()
  const rows = await kept()
  const answers = await replay(
    db.operator,
    rows.map(({ id }) => id),
  )
  const of = Object.fromEntries(answers.map(({ parked_id, code, status }) => [parked_id, code ?? status]))
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

test('a replay that charges nothing says, as recording did, that the account has no such hold', async () => {
  const { account, events } = await parked({ hold_id: newId() })
  const [recorded] = await account.record(...events)
  const [replayed] = await replay(db.operator)
  assert.equal(recorded!.hold, 'unknown')
  const { parked_id: _, ...answer } = replayed!
  assert.equal(answer, recorded)
})

test('an unfit label delays no charge, and is not kept', async () => {
  const [long, large] = ['x'.repeat(513), { note: 'x'.repeat(16_384) }]
  const { account, price, kept } = await parked(
    { request_id: long },
    { metadata: large, request_id: 'fit' },
    { request_id: long, metadata: large, meters: { late: '1', never: '1' } },
    { metadata: 'no object', request_id: 'fit' },
  )
  assert.equal(
    (await kept()).map(({ code, event: { request_id, metadata } }) => [code, request_id, metadata]),
    [undefined, 'fit', undefined, 'fit'].map((fit) => ['price_not_found', fit, undefined]),
  )
  // an event that is no object delays no other
  await account.record(5 as never, [] as never)
  await price()
  assert.equal(brief(await replay(db.operator)).sort(), [
    ...['charged', 'charged', 'charged'],
    ...['invalid_event', 'invalid_event', 'price_not_found'],
  ])
  assert.equal(
    await db.operator('select request_id, metadata from api.usage_logs where account_id = $1 order by id', [
      account.accountId,
    ]),
    [
      { request_id: null, metadata: null },
      { request_id: 'fit', metadata: null },
      { request_id: 'fit', metadata: null },
    ],
  )
})

test('a mended event under the same id resolves the parked one, which is charged no second time', async () => {
  const { account, events, kept } = await parked({ meters: {} }, { meters: { late: 'NaN' } })
  const [mended] = events as [Row]
  const [charged] = await account.record({ ...mended, meters: { usd: '0.25' } })
  assert.is(charged!.status, 'charged')
  // the charge itself resolved it, without a replay
  assert.equal(
    (await kept()).map(({ resolution }) => resolution),
    ['duplicate', null],
  )
  assert.equal(brief(await replay(db.operator)), ['invalid_meters'])
  // the first form of the event isn't parked again either
  const [again] = await account.record(mended)
  assert.equal({ ...again, mismatch: undefined }, { ...charged, status: 'duplicate', mismatch: undefined })
  assert.is(again!.mismatch, true)
  assert.is((await kept()).length, 2)
})

test('an operator dismisses an event with a reason; a replay tries it again only by name', async () => {
  const { account, events, price, kept } = await parked({}, {})
  const [first, second] = (await kept()) as [Row, Row]
  const dismiss = (ids: string[] | null, reason: string | null) =>
    db.as('keyledger_operator', { sub: 'erin' })('select * from api.dismiss_parked_usage($1, $2)', [
      ids,
      reason,
    ])
  const refused = async (ids: string[] | null, reason: string | null) =>
    dismiss(ids, reason).then(
      () => 'done',
      ({ code, message }) => `${code} ${message}`,
    )
  assert.is(await refused([first.id], ' '), 'PT422 invalid_reason')
  assert.is(await refused([first.id], null), 'PT422 invalid_reason')
  assert.is(await refused([first.id, first.event.id], 'a test'), 'PT404 parked_usage_not_found')
  assert.is(await refused(null, 'a test'), 'PT404 parked_usage_not_found')
  assert.equal(await kept(), [first, second])

  const shown = ({ id, resolution, reason, actor }: Row) => ({ id, resolution, reason, actor })
  const dismissed = { id: first.id, resolution: 'dismissed', reason: 'a test', actor: 'erin' }
  assert.equal((await dismiss([first.id], 'a test')).map(shown), [dismissed])
  assert.equal((await dismiss([first.id], 'another')).map(shown), [dismissed], 'kept as it was')
  // tried again in vain, or sent again, it stays dismissed
  assert.equal(brief(await replay(db.operator, [first.id])), ['price_not_found'])
  assert.equal(brief(await account.record(events[0]!)), ['price_not_found'])
  assert.equal((await dismiss([first.id], 'another')).map(shown), [dismissed])
  await price()
  assert.equal(
    (await replay(db.operator)).map(({ parked_id }) => parked_id),
    [second.id],
  )
  assert.equal((await dismiss([second.id], 'too late')).map(shown), [
    { id: second.id, resolution: 'charged', reason: null, actor: null },
  ])
  assert.equal(await db.sql('select * from api.verify_balances($1)', [account.accountId]), [])
  // the gateway's retry charges it, dismissed or not
  assert.equal(brief(await account.record(events[0]!)), ['charged'])
  assert.equal(brief(await replay(db.operator, [first.id])), ['duplicate'])
  assert.equal(
    (await kept()).map(({ resolution }) => resolution),
    ['duplicate', 'charged'],
  )
  assert.equal(await account.entries(1), ['usage -2: balance -2', 'usage -2: balance -2'])
})

test('two replays and a retry of the gateway at once charge an event once', async () => {
  const { account, events, price, kept } = await parked({}, {}, {})
  await price()
  const [one, asOne] = await session('keyledger_operator')
  const [gateway, asGateway] = await session('keyledger_gateway')
  await one.query('begin')
  assert.equal(brief(await replay(asOne)), ['charged', 'charged', 'charged'])
  const [two, asTwo] = await session('keyledger_operator')
  const other = replay(asTwo)
  await db.blocked(two)
  // the gateway waits half a second for the account, and comes again
  const again = (async () => {
    for (;;) {
      try {
        return await asGateway('select api.record_usage($1) as answers', [JSON.stringify(events)])
      } catch (error) {
        if ((error as pg.DatabaseError).code !== '55P03') throw error
      }
    }
  })()
  await db.blocked(gateway)
  await one.query('commit')
  assert.equal(await other, [], 'the first had them')
  await two.end()
  assert.equal(brief((await again)[0]!.answers), ['duplicate', 'duplicate', 'duplicate'])
  assert.equal(
    (await kept()).map(({ resolution }) => resolution),
    ['charged', 'charged', 'charged'],
  )
  assert.equal(await account.entries(1), ['usage -6: balance -6'])
  await one.end()
  await gateway.end()
})

test('a retry of the gateway while two replays wait charges an event once', async () => {
  const { account, events, price, kept } = await parked({}, {})
  await price()
  const [gateway, asGateway] = await session('keyledger_gateway')
  const [one, asOne] = await session('keyledger_operator')
  await gateway.query('begin')
  const [{ answers }] = (await asGateway('select api.record_usage($1) as answers', [
    JSON.stringify(events),
  ])) as [Row]
  assert.equal(brief(answers), ['charged', 'charged'])
  const [two, asTwo] = await session('keyledger_operator')
  const waiting = [replay(asOne), replay(asTwo)]
  await db.blocked(one)
  await db.blocked(two)
  await gateway.query('commit')
  assert.equal(await Promise.all(waiting), [[], []])
  await two.end()
  assert.equal(
    (await kept()).map(({ resolution }) => resolution),
    ['duplicate', 'duplicate'],
  )
  assert.equal(await account.entries(1), ['usage -4: balance -4'])
  await one.end()
  await gateway.end()
})

test('many replays and retries at once charge each event once', async () => {
  const { account, events, price, kept } = await parked(...Array.from({ length: 60 }, () => ({})))
  await price()
  const crowd = Array.from({ length: 12 }, (_, i) => {
    const call = () => (i % 3 ? replay(db.operator) : account.record(...events.slice(i * 5)))
    // a call that waited too long did nothing
    const patient = (): Promise<Row[]> =>
      call().catch((error) => {
        if (error.code !== '55P03') throw error
        return patient()
      })
    return patient()
  })
  const statuses = (await Promise.all(crowd)).flat().map(({ status }) => status)
  await replay(db.operator)
  assert.is(statuses.filter((status) => status === 'charged').length, events.length)
  assert.ok(
    (await kept()).every(({ resolution }) => resolution),
    'all are resolved',
  )
  assert.is((await account.figures()).balance, `${200 - 2 * events.length}`)
})

test('the ledger is whole after all these tests', () => holdsTrue(db.sql))

test.run()
