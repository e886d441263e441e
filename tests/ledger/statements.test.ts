// Statements: what they say, that they join without a gap, never disagree with the chain, and hold up nobody.
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { until } from '../../scripts/supervise.ts'
import { database, type Row } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { idAt } from '../support/ids.ts'
import { holdsTrue, units } from '../support/ledger.ts'
import { type Payer, payer } from '../support/payer.ts'
import { code, transports } from '../support/transports.ts'

const test = suite('statements')
const db = await database(test)
const { operator } = db

const now = async (): Promise<string> => (await db.sql(`select clock_timestamp()::text as now`))[0]!.now
/** The moment, so many microseconds later. */
const later = async (moment: string, micros: number): Promise<string> =>
  (
    await db.sql(`select ($1::timestamptz + make_interval(secs => $2 / 1e6))::text as it`, [moment, micros])
  )[0]!.it
const passed = (moment: string) =>
  until(
    async () => (await db.sql(`select from (select) x where clock_timestamp() > $1`, [moment])).length,
    `${moment} to pass`,
  )

/** Closes the period for this account alone. */
async function close({ accountId }: { accountId: string }, end: string): Promise<Row> {
  // the page that begins just before it
  const before =
    accountId.slice(0, -12) + (BigInt(`0x${accountId.slice(-12)}`) - 1n).toString(16).padStart(12, '0')
  const [row] = await operator('select * from api.close_period($1, $2, 1)', [end, before])
  assert.is(row!.account_id, accountId)
  return row!
}

const statement = async (accountId: string, start: string, reader = operator): Promise<Row> =>
  (await reader('select api.statement($1, $2) as it', [accountId, start]))[0]!.it

const starts = async (accountId: string): Promise<string[]> =>
  (
    await operator(
      'select period_start::text as at from api.accounting_snapshots where account_id = $1 order by 1',
      [accountId],
    )
  ).map(({ at }) => at)

const balanceAtSql = `
  select jsonb_build_object('account_id', account_id, 'at', at, 'seq', seq, 'balance', balance::text, 'free_credit', free_credit::text,
    'outstanding_amount', outstanding_amount::text, 'credit_limit', credit_limit::text) as it
  from api.balance_at($1, $2)`
const balanceAt = async ({ accountId }: { accountId: string }, at: string): Promise<Row> =>
  (await operator(balanceAtSql, [accountId, at]))[0]!.it

/** An object's money without its zeros at the end. */
const short = (money: Row): Row =>
  Object.fromEntries(
    Object.entries(money).map(([name, value]) => [
      name,
      typeof value === 'string' && /^-?\d+\.\d+$/.test(value) ? value.replace(/\.?0+$/, '') : value,
    ]),
  )
const figures = (of: Row) => {
  const { balance, free_credit, outstanding_amount } = short(of)
  return [balance, free_credit, outstanding_amount].join(' ')
}
const closing = (row: Row) =>
  figures({
    balance: row.balance_closing,
    free_credit: row.free_credit_closing,
    outstanding_amount: row.outstanding_closing,
  })
const overdue = async ({ accountId }: { accountId: string }): Promise<string> => {
  const [row] = await operator(
    `select trim_scale(a.overdue_amount)::text as overdue, trim_scale(b.overdue_amount)::text as again
    from api.billing_accounts a join api.account_balances b using (account_id) where account_id = $1`,
    [accountId],
  )
  assert.is(row!.again, row!.overdue)
  return row!.overdue
}

/** Buckets of every movement, added to the opening, must be the closing; and so must the usage be the charges. */
function addsUp(doc: Row) {
  for (const bucket of ['balance', 'free_credit', 'outstanding_amount']) {
    const moved = Object.values(doc.movements as Record<string, Row>).map((movement) =>
      units(movement[bucket]),
    )
    assert.is(
      moved.reduce((sum, each) => sum + each, units(doc.opening[bucket])),
      units(doc.closing[bucket]),
      bucket,
    )
  }
  let used = 0n
  let events = 0
  for (const node of doc.usage as Row[]) {
    const metered = Object.values(node.meters as Record<string, Row>).reduce(
      (sum, { cost }) => sum + units(cost),
      0n,
    )
    assert.is(metered + units(node.rounding), units(node.cost), 'meters and rounding are the cost')
    used += units(node.cost)
    events += node.events
  }
  assert.is(-used, units(doc.movements.usage?.amount ?? '0'), 'usage is what was charged')
  assert.is(events === 0, doc.movements.usage === undefined)
  const listed: Record<string, bigint> = {}
  for (const { kind, amount } of doc.entries as Row[]) listed[kind] = (listed[kind] ?? 0n) + units(amount)
  for (const [kind, movement] of Object.entries(doc.movements as Record<string, Row>))
    if (kind !== 'usage') assert.is(listed[kind], units(movement.amount), `entries of kind ${kind}`)
}

test('a statement sums up its period by kind, by entry, by node and meter', async () => {
  const account = await payer(db)
  const [opened] = await operator(
    'select created_at::text as at from api.billing_accounts where account_id = $1',
    [account.accountId],
  )
  await db.sql(`update data.user_profile set display_name = 'Ada "the" <first>' where id = $1`, [
    account.userId,
  ])
  await account.topUp('10', { reference: 'pi_1' })
  await account.grant('3', { reason: 'welcome' })
  await account.record(account.event('4'), account.event('0.5'))
  await account.post('refund_charge', { seq: 3, amount: '1.5', reference: 're_1', reason: 'slow' })
  await account.limit('2')
  await account.use('12.25')
  await account.post('reverse_top_up', { seq: 1, amount: '1', reference: 'cb_1' })
  await account.adjust('0.25', { reason: 'rounding' })
  const end = await now()
  await account.use('100')
  const row = await close(account, end)
  assert.equal([row.first_seq, row.last_seq], ['1', '8'])
  const doc = await statement(account.accountId, opened!.at)
  addsUp(doc)
  const at = async (seq: number) =>
    (
      await operator(
        `select to_jsonb(created_at) as at from api.billing_transactions where account_id = $1 and seq = $2`,
        [account.accountId, seq],
      )
    )[0]!.at
  const blank = {
    reference: null,
    reason: null,
    refund_of_seq: null,
    refund_of_usage_id: null,
    grant_seq: null,
    credit_limit: null,
  }
  const heads = await db.sql(
    `select encode(hash, 'hex') as head from data.billing_transaction where account_id = $1 order by seq`,
    [account.accountId],
  )
  assert.equal(
    { ...doc, opening: short(doc.opening), closing: short(doc.closing), sealed_at: typeof doc.sealed_at },
    {
      account_id: account.accountId,
      owner: 'user',
      owner_name: 'Ada "the" <first>',
      currency: 'USD',
      period_start: (await db.sql(`select to_jsonb($1::timestamptz) as at`, [opened!.at]))[0]!.at,
      period_end: (await db.sql(`select to_jsonb($1::timestamptz) as at`, [end]))[0]!.at,
      opening: { balance: '0', free_credit: '0', outstanding_amount: '0' },
      closing: {
        balance: '-2',
        free_credit: '0',
        outstanding_amount: '1',
        overdue_amount: '0',
        credit_limit: '2',
      },
      movements: doc.movements,
      entries: [
        { ...blank, seq: 1, at: await at(1), kind: 'top_up', amount: '10.0000000000', reference: 'pi_1' },
        {
          ...blank,
          seq: 2,
          at: await at(2),
          kind: 'credit_grant',
          amount: '3.0000000000',
          reason: 'welcome',
        },
        {
          ...blank,
          seq: 4,
          at: await at(4),
          kind: 'refund',
          amount: '1.5000000000',
          reference: 're_1',
          reason: 'slow',
          refund_of_seq: 3,
        },
        {
          ...blank,
          seq: 5,
          at: await at(5),
          kind: 'limit_change',
          amount: '0.0000000000',
          credit_limit: '2.0000000000',
        },
        {
          ...blank,
          seq: 7,
          at: await at(7),
          kind: 'top_up_reversal',
          amount: '-1.0000000000',
          reference: 'cb_1',
          refund_of_seq: 1,
        },
        { ...blank, seq: 8, at: await at(8), kind: 'adjustment', amount: '0.2500000000', reason: 'rounding' },
      ],
      usage: [
        {
          config_node_id: account.nodeId,
          name: doc.usage[0].name,
          provider: null,
          model: null,
          events: 3,
          cost: '16.7500000000',
          rounding: '0.0000000000',
          meters: { usd: { quantity: '16.75', cost: '16.7500000000' } },
        },
      ],
      first_seq: 1,
      last_seq: 8,
      head: heads[7]!.head,
      previous_head: '',
      sealed_at: 'string',
    },
  )
  assert.equal(
    Object.fromEntries(
      Object.entries(doc.movements as Row).map(([kind, m]) => [
        kind,
        `${m.entries}: ${short(m).amount}; ${figures(m)}`,
      ]),
    ),
    {
      top_up: '1: 10; 10 0 0',
      credit_grant: '1: 3; 0 3 0',
      usage: '2: -16.75; -13.5 -3 0.25',
      refund: '1: 1.5; 1.5 0 0',
      limit_change: '1: 0; 0 0 0',
      top_up_reversal: '1: -1; 0 0 1',
      adjustment: '1: 0.25; 0 0 -0.25',
    },
  )

  // what has another name now had this one then; its next statement has the new one
  await db.operator(`update api.user_profiles set display_name = 'Countess' where id = $1`, [account.userId])
  await db.operator(`update api.config_nodes set name = $2, provider = 'new', model = 'new' where id = $1`, [
    account.nodeId,
    `new ${account.nodeId}`,
  ])
  assert.equal(await statement(account.accountId, opened!.at), doc)

  // the next one begins where this one ended
  const next = await now()
  assert.is((await close(account, next)).period_start.getTime(), row.period_end.getTime())
  const second = await statement(account.accountId, end)
  addsUp(second)
  assert.equal(second.opening, {
    balance: '-2.0000000000',
    free_credit: '0.0000000000',
    outstanding_amount: '1.0000000000',
  })
  assert.equal([second.first_seq, second.last_seq, second.previous_head], [9, 9, doc.head])
  assert.equal([second.head, second.entries], [heads[8]!.head, []])
  const [used] = second.usage
  assert.equal([second.owner_name, used.name, used.model], ['Countess', `new ${account.nodeId}`, 'new'])
  await holdsTrue(db.sql)
})

test('the cost of meters is exact, and the rounding of events has its own line', async () => {
  const account = await payer(db)
  await operator(
    `insert into api.prices (config_node_id, meter, unit_price, unit_size, effective_from) values
      ($1, 'input', 1, 3, '2020-01-01'), ($1, 'output', 2, 3, '2020-01-01'), ($1, 'free', 0, 1, '2020-01-01')`,
    [account.nodeId],
  )
  const meters = { input: 1, output: 1, free: 7, unpriced: 0 }
  // a price that changes, among events recorded together
  await account.record(
    ...[1, 2, 3].map(() => account.event('0', { meters: { input: 1 } })),
    account.event('0', { meters }),
  )
  await operator(
    `insert into api.prices (config_node_id, meter, unit_price, unit_size) values ($1, 'input', 2, 3)`,
    [account.nodeId],
  )
  await until(
    async () => (await account.use('0', { meters: { input: 1 } })).cost === '0.6666666667',
    'the new price',
  )
  await account.record(account.event('0', { meters: { input: '0.5' } }))
  const end = await now()
  await close(account, end)
  const doc = await statement(account.accountId, (await starts(account.accountId))[0]!)
  addsUp(doc)
  const [node] = doc.usage
  // 4 at 1/3 and 0.5 at 2/3, beside the tries until the new price was there
  const tries = node.events - 5
  const exact = (4 + tries * 2 + 1) / 3
  assert.ok(Math.abs(Number(node.meters.input.cost) - exact) < 2e-10 * tries, `${node.meters.input.cost}`)
  assert.is(node.meters.input.quantity, `${4 + tries + 0.5}`)
  assert.equal(node.meters.output, { quantity: '1', cost: '0.6666666667' })
  assert.equal(
    [node.meters.free, node.meters.unpriced].map(({ quantity, cost }) => [quantity, cost]),
    [
      ['7', '0.0000000000'],
      ['0', '0.0000000000'],
    ],
  )
  assert.is.not(units(node.rounding), 0n)
})

test('periods follow without a gap; a repetition answers the same and changes nothing', async () => {
  const account = await payer(db, { funds: '5' })
  const ends: string[] = []
  for (const usd of ['1', null, '2', null, null, '0.5']) {
    if (usd) await account.use(usd)
    ends.push(await now())
    await close(account, ends.at(-1)!)
  }
  const rows = await operator(
    `select * from api.accounting_snapshots where account_id = $1 order by period_start`,
    [account.accountId],
  )
  assert.equal(
    rows.map((row) => [`${row.first_seq}-${row.last_seq}`, closing(row)]),
    [
      ['1-2', '4 0 0'],
      ['3-2', '4 0 0'],
      ['3-3', '2 0 0'],
      ['4-3', '2 0 0'],
      ['4-3', '2 0 0'],
      ['4-4', '1.5 0 0'],
    ],
  )
  for (const [i, row] of rows.slice(1).entries()) {
    assert.is(row.period_start.getTime(), rows[i]!.period_end.getTime())
    assert.equal(row.head_hash, row.last_seq === rows[i]!.last_seq ? rows[i]!.head_hash : row.head_hash)
  }
  await account.use('1')
  for (const [i, end] of ends.entries()) assert.equal(await close(account, end), rows[i])
  assert.is((await starts(account.accountId)).length, 6)
  const between = await later(ends[3]!, 1)
  assert.is((await failure(close(account, between))).message, 'period_is_sealed')
  await holdsTrue(db.sql)
})

test('pages go over every account in order, those opened by then, closed owners too', async () => {
  const opened = await Promise.all(Array.from({ length: 5 }, () => payer(db, { funds: '1' })))
  await db.sql(`update data.user_profile set status = 'closed' where id = $1`, [opened[0]!.userId])
  const end = await now()
  const young = await payer(db, { funds: '1' })
  const all = (
    await db.sql(`select account_id as id from data.account_balance where account_id <> $1 order by 1`, [
      young.accountId,
    ])
  ).map(({ id }) => id)
  const pages: string[][] = []
  for (let after: string | null = null; ; after = pages.at(-1)!.at(-1)!) {
    const page: Row[] = await operator('select account_id from api.close_period($1, $2, 4)', [end, after])
    pages.push(page.map(({ account_id }) => account_id))
    if (!page.length) break
  }
  assert.equal(pages.flat(), all)
  assert.ok(pages.slice(0, -2).every(({ length }) => length === 4))
  assert.equal(await starts(young.accountId), [])
  await holdsTrue(db.sql)
})

test('credit that expired is gone from the period of its moment, whenever its entry is posted', async () => {
  const account = await payer(db, { funds: '1' })
  const soon = await later(await now(), 2_000_000)
  await account.grant('4', { expires_at: soon })
  await account.grant('3', { expires_at: '2099-01-01', priority: 200 })
  await account.use('1.5')
  const before = await now()
  const first = await close(account, before)
  assert.is(closing(first), '1 5.5 0')
  await passed(soon)
  // nobody has posted the expiry: the figures are the clock's
  const second = await now()
  const row = await close(account, second)
  assert.equal([closing(row), Number(row.expiry_due), row.last_seq], ['1 3 0', 2.5, first.last_seq])
  const expiry = { kind: 'credit_expiry', amount: '-2.5000000000', seq: null, grant_seq: 2 }
  const pick = (doc: Row) =>
    doc.entries.map(({ kind, amount, seq, grant_seq }: Row) => ({ kind, amount, seq, grant_seq }))
  const doc = await statement(account.accountId, before)
  addsUp(doc)
  assert.equal(pick(doc), [expiry])
  assert.is(new Date(doc.entries[0].at).getTime(), new Date(soon).getTime())
  // an idle period after it, then its entry, and again an idle period
  const third = await now()
  assert.is(closing(await close(account, third)), '1 3 0')
  const idle = await statement(account.accountId, second)
  assert.equal([idle.movements, idle.entries], [{}, []])
  await account.use('2')
  const fourth = await now()
  assert.is(closing(await close(account, fourth)), '1 1 0')
  const posted = await statement(account.accountId, third)
  addsUp(posted)
  assert.equal([pick(posted), Object.keys(posted.movements)], [[], ['usage']])
  assert.equal([posted.first_seq, posted.last_seq], [5, 6])
  await close(account, await now())

  // sealed afterwards, with the entry posted, it is the same
  const other = await payer(db, { funds: '1' })
  const then = await later(await now(), 2_000_000)
  await other.grant('4', { expires_at: then })
  await passed(then)
  const end = await now()
  await other.use('1')
  const late = await close(other, end)
  assert.equal([closing(late), Number(late.expiry_due), late.last_seq], ['1 0 0', 4, '2'])
  addsUp(await statement(other.accountId, (await starts(other.accountId))[0]!))
  assert.is(closing(await close(other, await now())), '0 0 0')
  await holdsTrue(db.sql)
})

test('the metadata of a payment is the app’s own business, by any name', async () => {
  const account = await payer(db)
  const soon = await later(await now(), 1_000_000)
  await account.grant('4', { expires_at: soon })
  await account.topUp('1', { metadata: { grant_seq: 'of the year' } })
  await account.topUp('1', { metadata: { grant_seq: 1 } })
  await passed(soon)
  await account.topUp('1', { metadata: { grant_seq: 'of the year' } })
  await close(account, await now())
  const doc = await statement(account.accountId, (await starts(account.accountId))[0]!)
  addsUp(doc)
  assert.equal(
    doc.entries.map(({ kind, grant_seq }: Row) => [kind, grant_seq]),
    [
      ['credit_grant', null],
      ['top_up', null],
      ['top_up', null],
      ['credit_expiry', 1],
      ['top_up', null],
    ],
  )
  await holdsTrue(db.sql)
})

test('an expiry exactly at the end belongs to the period, an entry exactly at the end to the next', async () => {
  const account = await payer(db, { funds: '1' })
  const soon = await later(await now(), 2_000_000)
  await account.grant('4', { expires_at: soon })
  await passed(soon)
  await account.use('1')
  const [{ at }] = (await operator(
    `select created_at::text as at from api.billing_transactions where account_id = $1 and kind = 'credit_expiry'`,
    [account.accountId],
  )) as [Row]
  assert.is(closing(await close(account, soon)), '1 0 0')
  const row = await close(account, at)
  assert.equal([row.last_seq, closing(row)], ['2', '1 0 0'])
  const next = await close(account, await later(at, 1))
  assert.equal([next.first_seq, next.last_seq, next.movements], ['3', '3', {}])
  await holdsTrue(db.sql)
})

test('usage of long before is found, and missing usage is not sealed', async () => {
  const account = await payer(db, { funds: '10' })
  const [{ floor }] = (await db.sql('select floor from data.accepted_ids')) as [Row]
  await account.record(account.event('1', { id: idAt(floor) }), account.event('2'))
  const session = await db.session()
  try {
    await session.query('begin; set local session_replication_role = replica')
    await session.query('delete from data.usage_log where account_id = $1 and cost = 1', [account.accountId])
    await session.query('select data.seal($1, clock_timestamp())', [account.accountId])
    assert.unreachable('sealed without its usage')
  } catch (error) {
    assert.is((error as Error).message, 'usage_is_incomplete')
  } finally {
    await session.query('rollback')
    await session.end()
  }
  await close(account, await now())
  const doc = await statement(account.accountId, (await starts(account.accountId))[0]!)
  addsUp(doc)
  assert.equal([doc.usage[0].events, doc.usage[0].cost], [2, '3.0000000000'])
})

test('while a page is being closed, charges on the accounts it has sealed go through', async () => {
  const accounts = await Promise.all([1, 2, 3].map(() => payer(db, { funds: '10' })))
  const closer = await db.session('keyledger_operator')
  const charger = await db.session('keyledger_gateway')
  try {
    await closer.query('begin')
    const { rows } = await closer.query(
      'select account_id from api.close_period(clock_timestamp(), null, 10000)',
    )
    for (const { accountId } of accounts) assert.ok(rows.some(({ account_id }) => account_id === accountId))
    await charger.query(`set lock_timeout = '10s'`)
    const events = accounts.map((account) => account.event('1'))
    const charged = await charger.query('select api.record_usage($1) as answers', [JSON.stringify(events)])
    for (const { status } of charged.rows[0].answers) assert.is(status, 'charged')
    await closer.query('commit')
  } finally {
    await closer.end()
    await charger.end()
  }
  for (const account of accounts) {
    const end = await now()
    const row = await close(account, end)
    assert.equal([row.first_seq, row.last_seq, closing(row)], ['2', '2', '9 0 0'])
  }
  await holdsTrue(db.sql)
})

test('an entry that is being posted at the cut is waited for', async () => {
  const account = await payer(db, { funds: '10' })
  const writer = await db.session('keyledger_operator')
  const closer = await db.session('keyledger_operator')
  try {
    await writer.query('begin')
    await writer.query('select seq from api.top_up($1, 5)', [account.accountId])
    const end = await now()
    const closing = closer.query('select * from api.close_period($1, null, 10000)', [end])
    await db.blocked(closer)
    await writer.query('commit')
    const row = (await closing).rows.find(({ account_id }) => account_id === account.accountId)
    assert.equal([row.last_seq, Number(row.balance_closing)], ['2', 15])
  } finally {
    await writer.end()
    await closer.end()
  }
})

test('two close the same accounts at once: the same statements; another end waits its turn', async () => {
  await Promise.all([1, 2, 3].map(() => payer(db, { funds: '10' })))
  const [first, second, third] = await Promise.all([1, 2, 3].map(() => db.session('keyledger_operator')))
  const end = await now()
  const after = await now()
  const closing = 'select * from api.close_period($1, null, 10000)'
  try {
    await first!.query('begin')
    const rows = (await first!.query(closing, [end])).rows
    const same = second!.query(closing, [end])
    const next = third!.query(closing, [after])
    await db.blocked(second!)
    await db.blocked(third!)
    await first!.query('commit')
    assert.equal((await same).rows, rows)
    const followed = (await next).rows
    assert.is(followed.length, rows.length)
    for (const [i, row] of followed.entries())
      assert.is(row.period_start.getTime(), rows[i]!.period_end.getTime())
  } finally {
    for (const session of [first, second, third]) await session!.end()
  }
  await holdsTrue(db.sql)
})

test('closing during traffic: statements join, add up, and with the later entries are the balance', async () => {
  const accounts = await Promise.all([1, 2, 3, 4].map(() => payer(db, { funds: '3' })))
  let ends = 0
  const traffic = async (account: Payer, i: number) => {
    for (let n = 0; ends < 8 || n < 30; n++) {
      await account.record(...Array.from({ length: 1 + (n % 3) }, () => account.event('0.01')))
      if (n % 7 === i) await account.topUp('0.03')
      if (n % 11 === i) await account.grant('0.02', { expires_at: await later(await now(), 2_000_000) })
    }
  }
  const closer = async () => {
    for (; ends < 8; ends++) {
      const end = await now()
      for (let after: string | null = null; ; ) {
        const page: Row[] = await operator('select account_id from api.close_period($1, $2, 7)', [end, after])
        if (!page.length) break
        after = page.at(-1)!.account_id
      }
    }
  }
  await Promise.all([
    ...accounts.flatMap((account, i) => [traffic(account, i), traffic(account, i + 1)]),
    closer(),
  ])
  for (const { accountId } of accounts) {
    const docs = []
    for (const start of await starts(accountId)) docs.push(await statement(accountId, start))
    assert.is(docs.length, 8)
    for (const [i, doc] of docs.entries()) {
      addsUp(doc)
      if (i) {
        const { balance, free_credit, outstanding_amount } = docs[i - 1]!.closing
        assert.equal(doc.opening, { balance, free_credit, outstanding_amount })
        assert.equal([doc.first_seq, doc.previous_head], [docs[i - 1]!.last_seq + 1, docs[i - 1]!.head])
      }
    }
    const last = docs.at(-1)!
    const [rest] = await db.sql(
      `select coalesce(sum(t.balance_delta), 0) + $3::numeric = a.balance as balance,
        coalesce(sum(t.free_credit_delta), 0) + s.expiry_due + $4::numeric = a.free_credit as free_credit,
        coalesce(sum(t.outstanding_delta), 0) + $5::numeric = a.outstanding_amount as outstanding
      from data.account_balance a
      join data.accounting_snapshot s on s.account_id = a.account_id and s.last_seq = $2 and s.period_end = $6
      left join data.billing_transaction t on t.account_id = a.account_id and t.seq > s.last_seq
      where a.account_id = $1 group by a.account_id, s.expiry_due`,
      [
        accountId,
        last.last_seq,
        last.closing.balance,
        last.closing.free_credit,
        last.closing.outstanding_amount,
        last.period_end,
      ],
    )
    assert.equal(rest, { balance: true, free_credit: true, outstanding: true })
  }
  await holdsTrue(db.sql)
})

test('overdue is the debt that an earlier statement left unpaid, the oldest debt paid first', async () => {
  const account = await payer(db, { funds: '1' })
  await account.use('11')
  assert.is(await overdue(account), '0')
  assert.is(Number((await close(account, await now())).overdue_amount), 0)
  assert.is(await overdue(account), '10')
  await account.use('5')
  assert.is(await overdue(account), '10', 'new debt is not overdue')
  await account.topUp('4')
  assert.is(await overdue(account), '6')
  const second = await close(account, await now())
  assert.equal([Number(second.overdue_amount), Number(second.outstanding_closing)], [6, 11])
  assert.is(await overdue(account), '11')
  await account.grant('2')
  await account.post('refund_charge', { seq: 3, amount: '1' })
  assert.is(await overdue(account), '8')
  await account.limit('1')
  assert.is(await overdue(account), '7')
  await account.topUp('9')
  assert.equal([await overdue(account), (await account.figures()).balance], ['0', '1'])
  await account.use('4')
  assert.equal([await overdue(account), (await account.figures()).outstanding_amount], ['0', '2'])
  const third = await close(account, await now())
  assert.equal([Number(third.overdue_amount), await overdue(account)], [0, '2'])
  const [resolved] = await db.gateway('select overdue_amount from api.resolve_billing_account($1)', [
    account.key,
  ])
  assert.is(Number(resolved!.overdue_amount), 2)
  await holdsTrue(db.sql)
})

test('balance_at follows from the entries before the moment, with snapshots or without', async () => {
  const account = await payer(db)
  const moments: string[] = [await later(await now(), -60_000_000)]
  const step = async (work: Promise<unknown>) => {
    await work
    moments.push(await now())
  }
  await step(account.topUp('10'))
  const soon = await later(await now(), 2_500_000)
  const sooner = await later(soon, -500_000)
  await step(account.grant('2', { expires_at: soon }))
  await step(account.grant('1', { expires_at: sooner }))
  await step(account.use('0.5'))
  await close(account, await now())
  for (const moment of [sooner, soon]) {
    await passed(moment)
    moments.push(await later(moment, -1), moment, await later(moment, 1))
  }
  await step(close(account, await now()))
  const between = moments.at(-1)!
  await step(account.use('3'))
  await step(account.limit('5'))
  await step(account.use('20'))
  await step(close(account, await now()))
  await step(account.topUp('30'))
  for (const { at } of await operator(
    `select created_at::text as at from api.billing_transactions where account_id = $1
    union select period_end::text from api.accounting_snapshots where account_id = $1`,
    [account.accountId],
  ))
    moments.push(at, await later(at, -1), await later(at, 1))

  const answers = () => Promise.all(moments.map((at) => balanceAt(account, at)))
  const sealed = await answers()
  for (const [i, answer] of sealed.entries()) {
    // the last entry before it, read plainly
    const [entry] = await db.sql(
      `select seq::int, balance_after, free_credit_after, outstanding_after, credit_limit_after from data.billing_transaction
      where account_id = $1 and created_at < $2 order by seq desc limit 1`,
      [account.accountId, moments[i]],
    )
    const [due] = await db.sql(
      `select coalesce(sum(d.amount), 0)::text as amount
      from data.billing_transaction t
      join data.grant_draw d on d.account_id = t.account_id and d.seq = t.seq
      join data.credit_grant g on g.account_id = d.account_id and g.seq = d.grant_seq
      where t.account_id = $1 and t.kind = 'credit_expiry' and t.created_at >= $2 and g.expires_at <= $2`,
      [account.accountId, moments[i]],
    )
    assert.equal(
      [answer.seq, answer.balance, answer.free_credit, answer.outstanding_amount, answer.credit_limit].map(
        (it) => units(`${it}`),
      ),
      [
        entry?.seq ?? 0,
        entry?.balance_after ?? 0,
        (Number(entry?.free_credit_after ?? 0) - Number(due!.amount)).toFixed(10),
        entry?.outstanding_after ?? 0,
        entry?.credit_limit_after ?? 0,
      ].map((it) => units(`${it}`)),
      moments[i],
    )
  }
  assert.is(figures(sealed[0]!), '0 0 0')
  assert.is(figures(await balanceAt(account, between)), '10 0 0')
  for (const row of await operator(
    `select * , period_end::text as "end" from api.accounting_snapshots where account_id = $1`,
    [account.accountId],
  ))
    assert.is(figures(await balanceAt(account, row.end)), closing(row))

  const session = await db.session()
  try {
    await session.query('begin; set local session_replication_role = replica')
    const { rowCount } = await session.query('delete from data.accounting_snapshot')
    assert.ok(rowCount! >= 3)
    for (const [i, at] of moments.entries()) {
      const { rows } = await session.query(balanceAtSql, [account.accountId, at])
      assert.equal(rows[0].it, sealed[i])
    }
  } finally {
    await session.query('rollback')
    await session.end()
  }
})

test('a statement is for the operator, and for members who see the whole account', async () => {
  const [tenant] = await operator(`insert into api.tenants (name) values ('Acme') returning id`)
  const member = await payer(db, { tenantId: tenant!.id, funds: '1' })
  const admin = await payer(db, { tenantId: tenant!.id })
  await operator(`update api.user_profiles set tenant_role = 'admin' where id = $1`, [admin.userId])
  const other = await payer(db, { funds: '1' })
  await close(member, await now())
  await close(other, await now())
  const [start] = await starts(tenant!.id)
  const doc = await statement(tenant!.id, start!)
  assert.equal([doc.owner, doc.owner_name, doc.usage], ['tenant', 'Acme', []])
  assert.equal(await statement(tenant!.id, start!, db.member(admin.userId)), doc)
  const own = (await starts(other.accountId))[0]!
  assert.is((await statement(other.accountId, own, db.member(other.userId))).closing.balance, '1.0000000000')
  for (const [reader, account, at] of [
    [db.member(member.userId), tenant!.id, start],
    [db.member(other.userId), tenant!.id, start],
    [db.member(admin.userId), other.accountId, own],
    [operator, tenant!.id, await later(start!, 1)],
    [operator, tenant!.id, null],
    [operator, null, start],
  ] as const)
    assert.is(
      (await failure(statement(account as string, at as string, reader))).message,
      'statement_not_found',
    )
})

test('statements are not changed or deleted', async () => {
  for (const sql of [
    'update data.accounting_snapshot set overdue_amount = 0',
    'delete from data.accounting_snapshot',
    'truncate data.accounting_snapshot',
  ])
    assert.is((await failure(db.sql(sql))).message, 'append_only', sql)
})

// what each statement is checked for: tampering with every trigger off, and the one thing found
const subject = await payer(db, { funds: '3' })
await subject.grant('2', { expires_at: await later(await now(), 2_000_000) })
await subject.use('1')
await close(subject, await now())
await passed(await later(await now(), 2_100_000))
await subject.use('7')
const middle = await close(subject, await now())
await subject.topUp('1')
await close(subject, await now())
const own = `account_id = '${subject.accountId}' and first_seq = ${middle.first_seq}`
const tampering: [set: string, problem: string][] = [
  [`period_start = period_start + interval '1 us'`, 'statement_period_does_not_follow'],
  [`period_end = period_end - interval '1 us'`, 'statement_period_does_not_follow'],
  [`period_end = period_start + interval '1 us'`, 'statement_not_cut_at_its_end'],
  [`first_seq = first_seq + 1`, 'statement_seq_does_not_follow'],
  [`last_seq = last_seq - 1`, 'statement_not_cut_at_its_end'],
  [`balance_opening = balance_opening + 1`, 'statement_figures_do_not_follow'],
  [`balance_closing = balance_closing + 1`, 'statement_closing_differs_from_entry'],
  [`free_credit_closing = free_credit_closing + 1`, 'statement_closing_differs_from_entry'],
  [`outstanding_closing = outstanding_closing + 1`, 'statement_closing_differs_from_entry'],
  [`expiry_due = expiry_due + 1`, 'statement_expiries_differ_from_grants'],
  [`overdue_amount = overdue_amount + 1`, 'statement_overdue_differs_from_unpaid'],
  [`head_hash = sha256('x')`, 'statement_head_differs_from_entry'],
  [`movements = movements - 'usage'`, 'statement_movements_differ_from_entries'],
  [
    `movements = jsonb_set(movements, '{usage,balance}', '"0"')`,
    'statement_movements_do_not_lead_to_closing',
  ],
  [`usage = '[]'`, 'statement_usage_differs_from_charges'],
  [`usage = jsonb_set(usage, '{0,cost}', '"7.0000000001"')`, 'statement_usage_differs_from_charges'],
  [`usage = jsonb_set(usage, '{0,meters,usd,cost}', '"6"')`, 'statement_usage_differs_from_charges'],
  [`usage = jsonb_set(usage, '{0,events}', '2')`, 'statement_usage_differs_from_charges'],
]
for (const [set, problem] of tampering)
  test(`found: ${set}`, async () => {
    const session = await db.session()
    try {
      await session.query('begin; set local session_replication_role = replica')
      const { rowCount } = await session.query(`update data.accounting_snapshot set ${set} where ${own}`)
      assert.is(rowCount, 1)
      const { rows } = await session.query('select * from api.verify_balances()')
      assert.ok(
        rows.some((row) => row.account_id === subject.accountId && row.problem === problem),
        JSON.stringify(rows),
      )
      const alone = await session.query('select * from api.verify_balances($1)', [subject.accountId])
      assert.equal(alone.rows, rows)
    } finally {
      await session.query('rollback')
      await session.end()
    }
  })

test('each transport takes the arguments, and refuses wrong ones with a code', async () => {
  const account = await payer(db, { funds: '1' })
  const through = await transports(db)
  const tomorrow = new Date(Date.now() + 86_400_000).toISOString()
  for (const { operator: rpc } of Object.values(through)) {
    const end = await now()
    const rows: Row[] = []
    for (let after: string | undefined; ; after = rows.at(-1)!.account_id) {
      const page = await rpc.call<Row[]>(
        'close_period',
        { period_end: end, after, limit: 50 },
        {
          select: ['account_id', 'period_start', 'balance_closing::text'],
        },
      )
      if (!page.length) break
      rows.push(...page)
    }
    const row = rows.find(({ account_id }) => account_id === account.accountId)!
    assert.is(row.balance_closing, '1.0000000000')
    const doc = await rpc.call<Row>('statement', {
      account_id: account.accountId,
      period_start: row.period_start,
    })
    assert.is(doc.closing.balance, '1.0000000000')
    const at = await rpc.call(
      'balance_at',
      { account_id: account.accountId, at: end },
      { select: ['account_id', 'balance::text'] },
    )
    assert.equal([at.account_id, at.balance], [account.accountId, '1.0000000000'])

    const call = (fn: string, args: Row) => code(rpc.call(fn, args))
    for (const period_end of [null, 'infinity', '-infinity', tomorrow])
      assert.is(await call('close_period', { period_end }), '422 invalid_period_end', `${period_end}`)
    for (const limit of [0, -1, 10_001, null])
      assert.is(await call('close_period', { period_end: end, limit }), '422 invalid_limit', `${limit}`)
    assert.is(
      await call('close_period', { period_end: await later(end, -1), limit: 10_000 }),
      '409 period_is_sealed',
    )
    for (const at of [null, 'infinity', '-infinity', tomorrow])
      assert.is(await call('balance_at', { account_id: account.accountId, at }), '422 invalid_at', `${at}`)
    assert.is(await call('balance_at', { account_id: account.nodeId, at: end }), '404 account_not_found')
    assert.is(await call('balance_at', { account_id: null, at: end }), '404 account_not_found')
  }
})

test.run()
