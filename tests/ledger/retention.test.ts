// Retention: whole months of usage dropped once statements cover them, never to be charged again, and what ended purged.
import { randomUUID } from 'node:crypto'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database, type Row } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { idAt } from '../support/ids.ts'
import { type Payer, payer } from '../support/payer.ts'
import { code, transports } from '../support/transports.ts'

const test = suite('retention')
const db = await database(test)
const { operator } = db

// two years of months, from the first one on
const first = new Date(Date.UTC(new Date().getUTCFullYear() - 2, 0, 15))
await db.sql(
  `update data.accepted_ids set floor = date_trunc('month', $1::timestamptz, 'UTC'), purged_before = '2000-01-01'`,
  [first],
)
await operator('select api.maintain()')
// so that a call waits as long as the test looks at it
await db.sql(`alter function api.record_usage(jsonb) set lock_timeout = '60s'`)
/** The middle of the month, so many after the first. */
const month = (n: number) => new Date(Date.UTC(first.getUTCFullYear(), n, 15))
const start = (n: number) => new Date(Date.UTC(first.getUTCFullYear(), n, 1))
const partition = (n: number) => `usage_log_${month(n).toISOString().slice(0, 7).replace('-', '_')}`
let next = 0

/** The first call that finds months closes them, the next one drops them. */
const call = async (older_than: Date): Promise<Row> =>
  (await operator('select api.drop_usage_partitions($1) as it', [older_than]))[0]!.it
const drop = async (older_than: Date): Promise<Row> => {
  const closed = await call(older_than)
  return closed.closed.length ? call(older_than) : closed
}
const months = async (): Promise<string[]> =>
  (
    await db.sql(
      `select inhrelid::regclass::text as name from pg_inherits where inhparent = 'data.usage_log'::regclass order by 1`,
    )
  ).map(({ name }) => name.replace('data.', ''))
const floor = async (): Promise<string> =>
  (await db.sql('select floor from data.accepted_ids'))[0]!.floor.toISOString()
const closeAll = () => operator('select account_id from api.close_period(clock_timestamp(), null, 10000)')
const proved = async (...accounts: Payer[]) => {
  assert.equal(await db.sql('select * from api.verify_balances()'), [])
  for (const { accountId } of accounts)
    assert.equal(await operator('select * from api.verify_ledger($1)', [accountId]), [])
}
/** A hold of the middle of that month: made today, since the clock is not then. */
const holdOf = async (account: Payer, n: number): Promise<string> => {
  const id = idAt(month(n))
  await db.sql('update data.hold set id = $1 where id = $2', [id, await account.hold('1')])
  return id
}
/** An event of the middle of that month. */
const of = (account: Payer, n: number, usd = '1') => account.event(usd, { id: idAt(month(n)) })

test('usage that no statement covers is not dropped, and the floor stays as it was', async () => {
  const n = next++
  const [covered, not] = await Promise.all([payer(db, { funds: '10' }), payer(db, { funds: '10' })])
  await covered.record(of(covered, n))
  await closeAll()
  await not.record(of(not, n))
  const before = [await floor(), await months()]
  const refused = await failure(drop(start(n + 1)))
  assert.equal([refused.code, refused.message], ['PT409', 'usage_not_sealed'])
  assert.match(refused.detail, new RegExp(`${partition(n)} has usage of account ${not.accountId}`))
  // of an account with a statement, recorded after it
  await closeAll()
  await covered.record(of(covered, n))
  assert.is((await failure(drop(start(n + 1)))).message, 'usage_not_sealed')
  assert.equal([await floor(), await months()], before)
  await closeAll()
  assert.equal(await drop(start(n + 1)), {
    floor: (await drop(start(n + 1))).floor,
    closed: [],
    dropped: [partition(n)],
    events: 3,
  })
  assert.is(await floor(), start(n + 1).toISOString())
  await proved(covered, not)
})

test('whole months only; the ledger and the statements prove as before', async () => {
  const n = next
  next += 3
  const account = await payer(db, { funds: '100' })
  const [a, b, c] = [of(account, n), of(account, n + 1), of(account, n + 2)]
  await account.record(a, b, c, account.event('4')) // one entry over four months
  await account.record(of(account, n), of(account, n + 1))
  await account.post('refund_charge', { usage_id: a.id, amount: '0.25' })
  await closeAll()
  const [{ at }] = (await operator(
    'select period_start::text as at from api.accounting_snapshots where account_id = $1',
    [account.accountId],
  )) as [Row]
  const statement = () => operator('select api.statement($1, $2) as it', [account.accountId, at])
  const sealed = await statement()
  const kept = await months()
  // in the middle of the third one: that one stays
  assert.equal((await drop(month(n + 2))).dropped, [partition(n), partition(n + 1)])
  assert.equal(
    await months(),
    kept.filter((name) => name !== partition(n) && name !== partition(n + 1)),
  )
  assert.equal(await drop(month(n + 2)), {
    floor: (await drop(month(n + 2))).floor,
    closed: [],
    dropped: [],
    events: 0,
  })
  await proved(account)
  assert.equal(await statement(), sealed)

  // never again
  const balance = (await account.figures()).balance
  for (const event of [a, b, of(account, n + 1)])
    assert.equal(
      (await account.record(event)).map(({ status, code }) => [status, code]),
      [['parked', 'id_outside_window']],
    )
  assert.equal(
    (await account.record(c)).map(({ status }) => status),
    ['duplicate'],
  )
  assert.is((await account.place(account.request('1', { id: idAt(month(n)) })))[0]!.code, 'id_outside_window')
  const parked = await operator(
    'select id from api.parked_usage where resolved_at is null and account_id = $1',
    [account.accountId],
  )
  await operator('select api.replay_parked_usage($1)', [parked.map(({ id }) => id)])
  assert.is((await account.figures()).balance, balance)

  for (const [fn, args] of [
    ['explain_charge', { usage_id: a.id }],
    ['refund_charge', { usage_id: a.id }],
  ] as const) {
    const refused = await failure(account.post(fn, args))
    assert.equal([refused.code, refused.message], ['PT410', 'usage_dropped'], fn)
  }
  const spent = (from: Date) =>
    operator(`select events, trim_scale(cost)::text as cost from api.spend('user', $1, now(), $2)`, [
      from,
      account.accountId,
    ])
  assert.is((await failure(spent(month(n + 1)))).message, 'usage_dropped')
  assert.equal(await spent(start(n + 2)), [{ events: '2', cost: '5' }])
  // what is kept is explained and refunded as ever, and the whole entry by its seq
  assert.ok(await account.post('explain_charge', { usage_id: c.id }))
  await account.post('refund_charge', { usage_id: c.id })
  await account.post('refund_charge', { seq: 2 })
  assert.is((await failure(account.post('refund_charge', { seq: 2 }))).message, 'refund_exceeds_charge')
  await proved(account)
  await account.use('1')
  await closeAll()
  await proved(account)
})

test('a writer into the month is waited for, and its events are seen', async () => {
  const n = next++
  const account = await payer(db, { funds: '10' })
  const other = await payer(db, { funds: '10' })
  const writer = await db.session('keyledger_gateway')
  const dropper = await db.session('keyledger_operator')
  try {
    await writer.query('begin')
    await writer.query('select api.record_usage($1)', [JSON.stringify([of(account, n)])])
    // it reads the month without a lock, and closes it
    assert.is((await call(start(n + 1))).closed.at(-1), partition(n))
    assert.is((await failure(call(start(n + 1)))).code, '55P03', 'it waits for the writer, and gives up')
    const dropping = failure(dropper.query('select api.drop_usage_partitions($1)', [start(n + 1)]))
    await db.blocked(dropper)
    await writer.query('commit')
    assert.is((await dropping).message, 'usage_not_sealed')
    assert.is((await other.record(of(other, n)))[0]!.code, 'id_outside_window')
  } finally {
    await writer.end()
    await dropper.end()
  }
  await closeAll()
  await drop(start(n + 1))
  await proved(account)
})

test('while it counts a month nobody waits, not even for that month', async () => {
  const n = next++
  const account = await payer(db, { funds: '10' })
  const dropper = await db.session('keyledger_operator')
  try {
    await dropper.query(`begin; select set_config('lock_timeout', '100ms', false)`)
    const closed = await dropper.query('select api.drop_usage_partitions($1) as it', [start(n + 1)])
    assert.is(closed.rows[0].it.closed.at(-1), partition(n))
    // called again before its commit, it still only counts
    const again = await dropper.query('select api.drop_usage_partitions($1) as it', [start(n + 1)])
    assert.is(again.rows[0].it.closed.at(-1), partition(n))
    const late = await account.record(of(account, n), account.event('1'))
    assert.equal(
      late.map(({ status }) => status),
      ['charged', 'charged'],
    )
    await dropper.query('commit')
  } finally {
    await dropper.end()
  }
  assert.is((await failure(call(start(n + 1)))).message, 'usage_not_sealed')
  await closeAll()
  assert.is((await call(start(n + 1))).dropped.at(-1), partition(n))
  await proved(account)
})

test('an event that was let in before the drop is charged, with its neighbours; the drop gives up', async () => {
  const n = next++
  const account = await payer(db, { funds: '10' })
  const holder = await db.session()
  const writer = await db.session('keyledger_gateway')
  try {
    await holder.query('begin')
    await holder.query('select from data.account_balance where account_id = $1 for update', [
      account.accountId,
    ])
    const late = writer.query('select api.record_usage($1) as it', [
      JSON.stringify([of(account, n), account.event('1')]),
    ])
    await db.blocked(writer)
    assert.is((await failure(drop(start(n + 1)))).code, '55P03')
    await holder.query('commit')
    const answers: Row[] = (await late).rows[0].it
    assert.equal(
      answers.map(({ status }) => status),
      ['charged', 'charged'],
    )
  } finally {
    await holder.end()
    await writer.end()
  }
  assert.is((await failure(drop(start(n + 1)))).message, 'usage_not_sealed')
  await closeAll()
  assert.equal((await drop(start(n + 1))).dropped, [partition(n)])
  assert.is((await account.figures()).balance, '8')
  await proved(account)
})

test('a call during the drop of a month finds it gone: events are parked, proofs hold, sums are refused', async () => {
  const n = next++
  const account = await payer(db, { funds: '10' })
  const event = of(account, n)
  await account.record(event)
  await closeAll()
  const dropper = await db.session('keyledger_operator')
  const writer = await db.session('keyledger_gateway')
  const readers = await Promise.all([1, 2, 3, 4].map(() => db.session('keyledger_operator')))
  const [balances, ledger, spender, explainer] = readers as [
    typeof dropper,
    typeof dropper,
    typeof dropper,
    typeof dropper,
  ]
  const { accountId } = account
  try {
    await call(start(n + 1))
    await dropper.query('begin')
    await dropper.query('select api.drop_usage_partitions($1)', [start(n + 1)])
    const late = writer.query('select api.record_usage($1) as it', [
      JSON.stringify([of(account, n), account.event('1')]),
    ])
    const problems = [
      balances.query('select * from api.verify_balances($1)', [accountId]),
      ledger.query('select * from api.verify_ledger($1)', [accountId]),
    ]
    const refused = [
      failure(spender.query(`select * from api.spend('user', $1, now(), $2)`, [month(n), accountId])),
      failure(explainer.query('select api.explain_charge($1, $2)', [accountId, event.id])),
    ]
    for (const session of [writer, ...readers]) await db.blocked(session)
    await dropper.query('commit')
    const answers: Row[] = (await late).rows[0].it
    assert.equal(
      answers.map(({ status, code }) => [status, code]),
      [
        ['parked', 'id_outside_window'],
        ['charged', undefined],
      ],
    )
    for (const found of problems) assert.equal((await found).rows, [])
    for (const error of refused) assert.is((await error).message, 'usage_dropped')
  } finally {
    for (const session of [dropper, writer, ...readers]) await session.end()
  }
  await proved(account)
})

test('a long read makes it give up at once, with nothing changed', async () => {
  const n = next++
  const account = await payer(db, { funds: '10' })
  await account.record(of(account, n))
  await closeAll()
  const reader = await db.session('keyledger_operator')
  await call(start(n + 1))
  const before = [await floor(), await months()]
  try {
    await reader.query('begin; select count(*) from api.usage_logs')
    assert.is((await failure(call(start(n + 1)))).code, '55P03')
    assert.equal([await floor(), await months()], before)
  } finally {
    await reader.end()
  }
  assert.equal((await drop(start(n + 1))).dropped, [partition(n)])
})

test('holds that ended and resolved events of before the floor are purged, a portion at a time', async () => {
  const n = next++
  const accounts = await Promise.all([1, 2, 3].map(() => payer(db, { funds: '100' })))
  const [{ id: unpriced }] = (await operator(
    `insert into api.config_nodes (name) values ('unpriced') returning id`,
  )) as [Row]
  const open: string[] = []
  const ended: string[] = []
  const inWindow: string[] = []
  const froze: string[] = []
  for (const account of accounts) {
    const at = (n: number) => ({ id: idAt(month(n)) })
    open.push(await holdOf(account, n))
    for (let i = 0; i < 3; i++) ended.push(await holdOf(account, n))
    await account.release(...ended.slice(-3, -1))
    await account.record(account.event('0.5', { ...at(n + 1), hold_id: ended.at(-1) }))
    inWindow.push(await holdOf(account, n + 1))
    await account.release(inWindow.at(-1)!)
    // one parked and charged later, one never
    await account.record(
      account.event('1', { ...at(n), config_node_id: unpriced }),
      account.event('1', { ...at(n), meters: {} }),
    )
    const [freeze] = await operator(`select id from api.freeze_funds($1, 1, 'dispute', $2)`, [
      account.accountId,
      'case 1',
    ])
    await operator('select api.unfreeze_funds($1, $2)', [account.accountId, freeze!.id])
    froze.push(freeze!.id)
  }
  // a freeze of that time, as years later
  await db.sql('update data.hold set id = $1 where id = $2', [idAt(month(n)), froze[0]])
  await operator(
    `insert into api.prices (config_node_id, meter, unit_price, effective_from) values ($1, 'usd', 1, '2020-01-01')`,
    [unpriced],
  )
  await operator('select api.replay_parked_usage()')
  // two given up whose ids say no time: their own says it, of one long ago
  const timeless = [randomUUID(), randomUUID()]
  await accounts[0]!.record(...timeless.map((id) => accounts[0]!.event('1', { id })))
  await operator(
    `select from api.dismiss_parked_usage(array(select id from api.parked_usage where usage_id = any ($1)), 'a test')`,
    [timeless],
  )
  await db.sql('update data.parked_usage set created_at = $2 where usage_id = $1', [timeless[0], month(n)])
  // the months that parked events wait for stay, until each is charged or dismissed
  await closeAll()
  const waiting = await failure(drop(start(n + 1)))
  assert.equal([waiting.code, waiting.message], ['PT409', 'usage_is_parked'])
  await operator(
    `select from api.dismiss_parked_usage(array(
      select id from api.parked_usage where account_id = any ($1) and code = 'invalid_meters'), 'a test')`,
    [accounts.map(({ accountId }) => accountId)],
  )
  const count = async (): Promise<Row> =>
    (
      await db.sql(
        `select (select count(*)::int from data.hold where id = any ($1)) as open, (select count(*)::int from data.hold where id = any ($2)) as ended,
          (select count(*)::int from data.hold where id = any ($3)) as in_window,
          (select count(*)::int from data.hold where expires_at is null) as frozen,
          (select count(*)::int from data.parked_usage where resolved_at is not null and account_id = any ($4)) as resolved,
          (select count(*)::int from data.parked_usage where resolved_at is null and account_id = any ($4)) as unresolved`,
        [open, ended, inWindow, accounts.map(({ accountId }) => accountId)],
      )
    )[0]!
  const all = { open: 3, ended: 9, in_window: 3, frozen: 3, resolved: 8, unresolved: 0 }
  await db.sql('select data.purge_ended()')
  assert.equal(await count(), all, 'nothing of the window is purged')

  await drop(start(n + 1))
  assert.equal(await count(), all)
  const left: [number, number][] = []
  for (let i = 0; i < 6; i++) {
    const [row] = await db.sql('select holds::int, events::int from data.purge_ended(2)')
    left.push([row!.holds, row!.events])
  }
  assert.equal(left, [
    [2, 2],
    [2, 2],
    [2, 2],
    [2, 1],
    [1, 0],
    [0, 0],
  ])
  assert.equal(await count(), { ...all, ended: 0, resolved: 1 })
  const [row] = await operator('select api.maintain() as m')
  assert.equal([row!.m.holds_purged, row!.m.parked_usage_purged], [0, 0])

  // an event whose hold is gone is charged; the hold can't come back; another's hold is no hold of it
  const [account, other] = accounts as [Payer, Payer]
  assert.is((await account.use('1', { hold_id: ended[0] })).status, 'charged')
  assert.is((await account.place(account.request('1', { id: ended[0] })))[0]!.code, 'id_outside_window')
  assert.is((await account.use('1', { hold_id: await other.hold('1') })).hold, 'unknown')
  const [frozen] = await db.sql('select id from data.hold where expires_at is null and account_id = $1', [
    account.accountId,
  ])
  assert.is((await account.use('1', { hold_id: frozen!.id })).code, 'invalid_hold')
  await proved(...accounts)
})

test('a total that is set between closing and dropping a month does not count that month', async () => {
  const n = next++
  const account = await payer(db, { funds: '10' })
  await account.record(of(account, n, '3'), account.event('2'))
  await closeAll()
  assert.equal((await call(start(n + 1))).closed, [partition(n)])
  await operator(`select api.set_budget($1, 'user', $2, 50, 'total')`, [account.accountId, account.userId])
  await proved(account)
  await call(start(n + 1))
  await proved(account)
})

test('maintain purges', async () => {
  const n = next++
  const account = await payer(db, { funds: '10' })
  await account.release(await holdOf(account, n))
  await drop(start(n + 1))
  const [ended] = await db.sql(
    `select count(*)::int as holds from data.hold
    where status <> 'open' and expires_at is not null and id < data.uuid_floor($1)`,
    [start(n + 1)],
  )
  assert.ok(ended!.holds > 0)
  const [row] = await db.gateway('select api.maintain() as m')
  assert.is(row!.m.holds_purged, ended!.holds)
})

test('one maintain at a time: the other answers at once; a failing purge keeps no month from being made', async () => {
  const maintainer = await db.session('keyledger_operator')
  try {
    await maintainer.query('begin; select api.maintain()')
    assert.equal((await db.gateway('select api.maintain() as m'))[0]!.m, { status: 'busy' })
  } finally {
    await maintainer.end()
  }
  // whoever may take advisory locks stops nobody
  const stranger = await db.session()
  const owner = await db.session('keyledger_owner')
  try {
    await stranger.query(`select pg_advisory_lock(hashtextextended('keyledger.make_usage_partitions', 0))`)
    assert.is((await db.gateway('select api.maintain() as m'))[0]!.m.status, 'done')
    // what is purged is locked by another: the months are made all the same
    await db.sql(
      `insert into data.cache_invalidation (entity, keys, created_at) values ('vk', '{x}', now() - interval '3 days')`,
    )
    await db.sql(`update data.accepted_ids set floor = floor - interval '1 month'`)
    await owner.query('begin; lock table data.cache_invalidation in share mode')
    const [row] = await db.operator('select api.maintain() as m')
    assert.equal(
      [row!.m.status, row!.m.code, row!.m.usage_partitions_made.length],
      ['incomplete', '55P03', 1],
    )
    assert.ok((await months()).includes(row!.m.usage_partitions_made[0]))
  } finally {
    await stranger.end()
    await owner.end()
  }
  assert.is((await db.gateway('select api.maintain() as m'))[0]!.m.status, 'done')
})

test('a page of accounts at a time is looked at', async () => {
  await db.sql(`update data.accepted_ids set purged_before = '2000-01-01', purging_from = null`)
  const seen: (string | null)[] = []
  for (let done = false; !done; ) {
    await db.sql('select data.purge_ended(100000, 2)')
    const [row] = await db.sql('select purging_from, purged_before = floor as done from data.accepted_ids')
    seen.push(row!.purging_from)
    done = row!.done
  }
  const [accounts] = await db.sql('select count(*)::int as n from data.account_balance')
  assert.is(seen.length, Math.ceil(accounts!.n / 2))
  assert.is(new Set(seen).size, seen.length)
})

test('each transport refuses a wrong older_than', async () => {
  const tomorrow = new Date(Date.now() + 86_400_000).toISOString()
  for (const { operator: rpc } of Object.values(await transports(db))) {
    for (const older_than of [null, 'infinity', '-infinity', tomorrow])
      assert.is(
        await code(rpc.call<unknown>('drop_usage_partitions', { older_than })),
        '422 invalid_older_than',
        `${older_than}`,
      )
    const { dropped, events } = await rpc.call<Row>('drop_usage_partitions', {
      older_than: start(0).toISOString(),
    })
    assert.equal([dropped, events], [[], 0])
    const account = await payer(db)
    const usage_id = idAt(month(0))
    assert.is(
      await code(rpc.call('explain_charge', { account_id: account.accountId, usage_id })),
      '410 usage_dropped',
    )
  }
})

test.run()
