// Proof to others: verify_ledger names the first thing that is not as it was recorded, explain_charge says why a charge is what it is.
import { randomUUID } from 'node:crypto'
import type pg from 'pg'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database, type Row } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { idAt, newId } from '../support/ids.ts'
import { holdsTrue } from '../support/ledger.ts'
import { payer } from '../support/payer.ts'
import { code, transports } from '../support/transports.ts'

const test = suite('proof')
const db = await database(test)
const through = await transports(db)

// 1 limit_change, 2 top_up, 3 credit_grant, 4 usage of three, 5 usage of one, 6 top_up, 7 usage of two, 8 refund
const account = await payer(db, { funds: '10', limit: '2' })
const bystander = await payer(db, { funds: '10' })
await bystander.use('1')
await account.grant('3', { reason: 'welcome' })
const three = ['1', '0.5', '0.25'].map((usd) => account.event(usd, { metadata: { team: 'a' } }))
await account.record(...three)
await account.use('2')
await account.topUp('5', { reference: 'pi_1' })
const heads: string[] = []
const head = async (): Promise<string> =>
  (await db.operator('select head from api.billing_accounts where account_id = $1', [account.accountId]))[0]!
    .head
heads[6] = await head()
// a moment apart, so that retention can cut between them
const now = Date.now()
const two = [
  account.event('3', { id: idAt(new Date(now)) }),
  account.event('4', { id: idAt(new Date(now + 50)) }),
]
await account.record(...two)
heads[7] = await head()
await account.post('refund_charge', { usage_id: two[0]!.id, amount: '1' })
heads[8] = await head()

const verify = async (run: (text: string, values: unknown[]) => Promise<Row[]>, expected?: string) =>
  run('select * from api.verify_ledger($1, $2)', [account.accountId, expected ?? null])
const hash = (text: string) => /^[0-9a-f]{64}$/.test(text)
const ids = three.map(({ id }) => id).sort()
const own = `account_id = '${account.accountId}'`

test('an honest ledger has no row, whichever of its heads is asked for', async () => {
  assert.equal(await verify(db.operator), [])
  for (const each of [heads[6]!, heads[8]!, `\\x${heads[7]}`, heads[7]!.toUpperCase()])
    assert.equal(await verify(db.operator, each), [], each)
  const [{ seq }] = (await db.operator('select seq from api.billing_transactions where hash = $1', [
    Buffer.from(heads[7]!, 'hex'),
  ])) as [Row]
  assert.is(seq, '7')
  await holdsTrue(db.sql)
})

test('an account without entries is proved, and contains no head', async () => {
  const empty = await payer(db)
  const [{ head }] = (await db.operator('select head from api.billing_accounts where account_id = $1', [
    empty.accountId,
  ])) as [Row]
  assert.is(head, '')
  const ask = (expected: string) =>
    db.operator('select problem from api.verify_ledger($1, $2)', [empty.accountId, expected])
  assert.equal(await ask(''), [])
  assert.equal(await ask(heads[8]!), [{ problem: 'head_not_found' }])
})

for (const [name, { operator }] of Object.entries(through)) {
  test(`a wrong call is refused with a code, by ${name}`, async () => {
    const ask = (args: Row) => code(operator.call<unknown>('verify_ledger', args))
    assert.is(await ask({ account_id: randomUUID() }), '404 account_not_found')
    for (const expected_head of ['', 'x', '0', `${heads[8]}0`, `0x${heads[8]}`])
      assert.is(await ask({ account_id: account.accountId, expected_head }), '422 invalid_expected_head')
    assert.equal(await operator.call('verify_ledger', { account_id: account.accountId }), [])
    assert.equal(
      await operator.call('verify_ledger', { account_id: account.accountId, expected_head: '0'.repeat(64) }),
      [
        {
          account_id: account.accountId,
          problem: 'head_not_found',
          seq: null,
          usage_id: null,
          expected: '0'.repeat(64),
          actual: heads[8],
        },
      ],
    )
  })
}

// the chain made right again from an entry on, the account's head and figures with it: what only a kept head shows
const rechain = (from: number) => `
  do $$
  declare
    v_entry data.billing_transaction;
    v_last data.billing_transaction;
  begin
    for v_entry in select * from data.billing_transaction where ${own} and seq >= ${from} order by seq loop
      select * into v_last from data.billing_transaction where ${own} and seq = v_entry.seq - 1;
      v_entry.prev_hash := v_last.hash;
      v_entry.balance_after := v_last.balance_after + v_entry.balance_delta;
      v_entry.usage_list := (select string_agg(data.usage_seal(l), '' order by l.id) from data.usage_log l
        where ${own} and transaction_seq = v_entry.seq);
      update data.billing_transaction set prev_hash = v_entry.prev_hash, balance_after = v_entry.balance_after,
        usage_list = v_entry.usage_list, hash = data.entry_hash(v_entry) where ${own} and seq = v_entry.seq;
    end loop;
    update data.account_balance a set head_hash = t.hash, balance = t.balance_after, balance_version = t.seq, head_at = t.created_at
    from (select * from data.billing_transaction where ${own} order by seq desc limit 1) t where a.${own};
  end $$`
const refit = (seq: number) =>
  `update data.billing_transaction t set hash = data.entry_hash(t) where ${own} and seq = ${seq}`
const change = (set: string, seq: number) =>
  `update data.billing_transaction set ${set} where ${own} and seq = ${seq}`
const changeUsage = (set: string, at: number) =>
  `update data.usage_log set ${set} where ${own} and id = '${ids[at]}'`
// an entry like the last, at that seq
const forge = (seq: number, set = 'amount = 1, balance_delta = 1') => `
  create temp table forged as select * from data.billing_transaction where ${own} and seq = 6;
  update forged set seq = ${seq}, reference = null, ${set},
    prev_hash = coalesce((select hash from data.billing_transaction where ${own} and seq = ${seq} - 1), '');
  insert into data.billing_transaction select * from forged`
const shift = (from: number, by: number) => `
  update data.billing_transaction set seq = seq + 1000 where ${own} and seq >= ${from};
  update data.billing_transaction set seq = seq - 1000 + ${by} where ${own} and seq >= 1000`
const insertUsage = (id: string, seq: number | string) => `
  insert into data.usage_log (account_id, id, transaction_seq, virtual_key_id, user_id, config_node_id, final, meters, price_ids, cost, recorded_at)
  select account_id, '${id}', ${seq}, virtual_key_id, user_id, config_node_id, final, meters, price_ids, 0, recorded_at
  from data.usage_log where ${own} and id = '${ids[0]}'`
const stranger = newId()

// Tampering with every trigger off; the one row found: problem, seq, usage row.
const tampering: [sql: string, problem: string, seq: number | null, usageId?: string][] = [
  // an entry's content
  ...[
    'amount = amount + 1',
    'balance_delta = balance_delta + 1',
    'balance_after = balance_after - 1',
    "metadata = '{}'",
    "actor = 'x'",
    "reason = 'x'",
    "reference = 'x'",
    "kind = 'adjustment'",
    "created_at = created_at + interval '1 us'",
    "hash = sha256('x')",
    "prev_hash = sha256('x')",
    'usage_list = usage_list || usage_list',
    'usage_count = usage_count + 1',
    'usage_list = null',
  ].map((set): [string, string, number] => [change(set, 4), 'entry_altered', 4]),
  // …and its hash made to fit: the next entry vouches for the old one
  [`${change('amount = amount + 1', 4)}; ${refit(4)}`, 'entry_altered', 4],
  [`${change("actor = 'x'", 1)}; ${refit(1)}`, 'entry_altered', 1],
  [`${change("actor = 'x'", 8)}; ${refit(8)}`, 'entry_altered', 8],
  // nothing vouches for the third any more: it may be what was altered
  [`${change("prev_hash = sha256('x')", 4)}; ${refit(4)}`, 'entry_altered', 3],
  [`${change("actor = 'x'", 3)}; ${refit(3)}; ${change("actor = 'x'", 4)}; ${refit(4)}`, 'entry_altered', 3],
  // the first of several
  [`${change("actor = 'x'", 7)}; ${change("actor = 'x'", 5)}`, 'entry_altered', 5],
  [`${change("actor = 'x'", 7)}; ${changeUsage('cost = 0', 1)}`, 'usage_altered', 4, ids[1]],
  // usage rows, of which the entry has three
  ...[
    'cost = cost + 1',
    `meters = '{"usd": 9}'`,
    `metadata = '{"team": "b"}'`,
    "request_id = 'x'",
    'user_id = gen_random_uuid()',
    'virtual_key_id = gen_random_uuid()',
    'config_node_id = gen_random_uuid()',
    'hold_id = gen_random_uuid()',
    'price_ids = array[99]',
    "recorded_at = recorded_at + interval '1 us'",
    'final = not final',
  ].flatMap((set, n): [string, string, number, string][] => [
    [changeUsage(set, n % 3), 'usage_altered', 4, ids[n % 3]!],
  ]),
  ...[0, 1, 2].map((at): [string, string, number, string] => [
    `delete from data.usage_log where ${own} and id = '${ids[at]}'`,
    'usage_missing',
    4,
    ids[at]!,
  ]),
  [`delete from data.usage_log where ${own} and transaction_seq = 5`, 'usage_missing', 5],
  [`delete from data.usage_log where ${own}`, 'usage_missing', 4, ids[0]],
  [insertUsage(stranger, 4), 'usage_inserted', 4, stranger],
  [insertUsage(stranger, 2), 'usage_inserted', 2, stranger],
  [insertUsage(stranger, 99), 'usage_inserted', 99, stranger],
  [insertUsage(stranger, -1), 'usage_inserted', -1, stranger],
  // costs exchanged: count and sum are right
  [
    `update data.usage_log set cost = 0.75 - cost where ${own} and id in ('${three[1]!.id}', '${three[2]!.id}')`,
    'usage_altered',
    4,
  ],
  [
    `update data.usage_log set account_id = '${bystander.accountId}' where ${own} and id = '${ids[2]}'`,
    'usage_missing',
    4,
    ids[2],
  ],
  // entries gone
  ...[1, 2, 4, 5, 7, 8].map((seq): [string, string, number] => [
    `delete from data.billing_transaction where ${own} and seq = ${seq}`,
    'entry_missing',
    seq,
  ]),
  [
    `delete from data.billing_transaction where ${own} and seq = 7; delete from data.usage_log where ${own} and transaction_seq = 7`,
    'entry_missing',
    7,
  ],
  [`delete from data.billing_transaction where ${own} and seq >= 6`, 'entry_missing', 6],
  [`delete from data.billing_transaction where ${own} and seq in (3, 4)`, 'entry_missing', 3],
  [`delete from data.billing_transaction where ${own}`, 'entry_missing', 1],
  // …and the hashes closed over it: the seq alone tells
  [
    `delete from data.billing_transaction where ${own} and seq = 7; delete from data.usage_log where ${own} and transaction_seq = 7;
    ${change(`prev_hash = decode('${heads[6]}', 'hex')`, 8)}; ${refit(8)};
    update data.account_balance set head_hash = (select hash from data.billing_transaction where ${own} and seq = 8) where ${own}`,
    'entry_missing',
    7,
  ],
  // …and the gap closed
  [`delete from data.billing_transaction where ${own} and seq = 3; ${shift(4, -1)}`, 'entry_missing', 3],
  // two exchanged
  [`${change('seq = 1000', 5)}; ${change('seq = 5', 6)}; ${change('seq = 6', 1000)}`, 'entry_altered', 5],
  // entries that were never posted: after the last, before the first, in between with the others moved on
  [forge(9), 'entry_inserted', 9],
  [`${forge(9)}; ${refit(9)}`, 'entry_inserted', 9],
  [`${forge(9)}; ${refit(9)}; drop table forged; ${forge(10)}; ${refit(10)}`, 'entry_inserted', 9],
  [forge(0), 'entry_inserted', 0],
  [`${shift(3, 1)}; ${forge(3)}`, 'entry_inserted', 3],
  [`${shift(3, 1)}; ${forge(3)}; ${refit(3)}`, 'entry_inserted', 3],
  // the account
  [`update data.account_balance set head_hash = sha256('x') where ${own}`, 'entry_altered', 8],
  [`delete from data.account_balance where ${own}`, 'account_missing', null],
]

const tampered = async (sql: string, run: (session: pg.Client) => Promise<void>) => {
  const session = await db.session()
  try {
    await session.query('begin; set local session_replication_role = replica')
    const results = [await session.query(sql)].flat() as unknown as pg.QueryResult[]
    if (/^(UPDATE|INSERT|DELETE)$/.test(results.at(-1)!.command))
      assert.ok(results.at(-1)!.rowCount, 'the tampering hit a row')
    await run(session)
  } finally {
    await session.query('rollback')
    await session.end()
  }
}

for (const [n, [sql, problem, seq, usageId]] of tampering.entries())
  test(`found, ${n}: ${sql.replaceAll(own, 'mine').replace(/\s+/g, ' ').trim().slice(0, 100)}`, () =>
    tampered(sql, async (session) => {
      const [first, ...more] = await verify(async (text, values) => (await session.query(text, values)).rows)
      assert.equal(
        [first?.problem, first?.seq, more],
        [problem, seq === null ? null : `${seq}`, []],
        JSON.stringify(first),
      )
      if (usageId) assert.is(first!.usage_id, usageId)
      else assert.is(first!.usage_id !== null, problem.startsWith('usage'))
      assert.is(first!.account_id, account.accountId)
      const { rows } = await session.query('select * from api.verify_ledger($1)', [bystander.accountId])
      assert.is(rows.length, sql.includes(bystander.accountId) ? 1 : 0, 'others are proved as before')
    }))

test('a difference is shown by its hashes', async () => {
  const rows = async (sql: string, expected?: string): Promise<Row[]> => {
    let found: Row[] = []
    await tampered(sql, async (session) => {
      found = await verify(async (text, values) => (await session.query(text, values)).rows, expected)
    })
    return found
  }
  const [altered] = await rows(change("actor = 'x'", 7))
  assert.is(altered!.expected, heads[7])
  assert.ok(hash(altered!.actual) && altered!.actual !== heads[7])
  const [fitted] = await rows(`${change("actor = 'x'", 7)}; ${refit(7)}`)
  assert.equal(fitted, altered)
  const [missing] = await rows(`delete from data.billing_transaction where ${own} and seq = 7`)
  assert.equal([missing!.expected, missing!.actual], [heads[7], null])
  const [inserted] = await rows(`${forge(9)}; ${refit(9)}`)
  assert.ok(inserted!.expected === null && hash(inserted!.actual))
  const [usage] = await rows(changeUsage('cost = 9', 0))
  assert.ok(/^[0-9a-f]{32}$/.test(usage!.expected) && /^[0-9a-f]{32}$/.test(usage!.actual))
})

// the past rewritten with everything that could show it
const rewritten: [what: string, sql: string, from: number][] = [
  ['an amount', `${change('amount = amount + 1, balance_delta = balance_delta + 1', 6)}; ${rechain(6)}`, 6],
  ['a reason, at the very end', `${change("reason = 'x'", 8)}; ${rechain(8)}`, 8],
  [
    'usage, its charge with it',
    `update data.usage_log set cost = 1, meters = '{"usd": 1}' where ${own} and id = '${two[0]!.id}';
    ${change('amount = amount + 2, balance_delta = balance_delta + 2', 7)}; ${rechain(7)}`,
    7,
  ],
  [
    'the last entry taken away',
    `delete from data.billing_transaction where ${own} and seq = 8; ${rechain(7)}`,
    8,
  ],
]
for (const [what, sql, from] of rewritten)
  test(`rewritten with all hashes and figures, ${what}: only a head kept before tells`, () =>
    tampered(sql, async (session) => {
      const ask = async (expected?: string) =>
        verify(async (text, values) => (await session.query(text, values)).rows, expected)
      assert.equal(await ask(), [])
      const now = (
        await session.query(`select encode(head_hash, 'hex') as head from data.account_balance where ${own}`)
      ).rows[0].head
      for (const [seq, kept] of heads.entries())
        if (kept)
          assert.equal(
            (await ask(kept)).map(({ problem, expected, actual }) => [problem, expected, actual]),
            seq < from ? [] : [['head_not_found', kept, now]],
            `the head of entry ${seq}`,
          )
    }))

test('usage that retention dropped is not missing; the rest of an entry is proved as before', async () => {
  // as if the month ended between two rows of the entry, and before it
  const floor = (id: string) => `
    create or replace function pg_temp.cut() returns timestamptz language sql as $$ select data.uuid_time('${id}') + interval '1 ms' $$;
    update data.accepted_ids set floor = pg_temp.cut()`
  const both = async (session: pg.Client) => [
    await verify(async (text, values) => (await session.query(text, values)).rows),
    (await session.query('select problem, seq from api.verify_balances($1)', [account.accountId])).rows,
  ]
  await tampered(
    `${floor(two[0]!.id)}; delete from data.usage_log where ${own} and id < data.uuid_floor((select floor from data.accepted_ids))`,
    async (session) => {
      assert.equal(await both(session), [[], []])
      // nor does it hide what comes after
      await session.query(`savepoint whole; ${change("actor = 'x'", 8)}`)
      const [[later]] = (await both(session)) as [Row[]]
      assert.equal([later!.problem, later!.seq], ['entry_altered', '8'])
      await session.query('rollback to whole')
      await session.query(`insert into data.usage_log (account_id, id, transaction_seq, virtual_key_id, user_id, config_node_id, final, meters, price_ids, cost, recorded_at)
        values ('${account.accountId}', '${stranger}', 4, gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), true, '{}', '{}', 0, now())`)
      const [[first], [problem]] = (await both(session)) as [Row[], Row[]]
      assert.equal([first!.problem, first!.usage_id], ['usage_inserted', stranger])
      assert.equal(problem, { problem: 'usage_inserted', seq: '4' })
    },
  )
  // not dropped: still in the log, and proved
  await tampered(`${floor(two[0]!.id)}; ${changeUsage('cost = cost + 1', 1)}`, async (session) => {
    const [[first]] = (await both(session)) as [Row[]]
    assert.equal([first!.problem, first!.usage_id], ['usage_altered', ids[1]])
  })
  // a row above the floor is missing whatever was dropped below it
  await tampered(
    `${floor(ids[2]!)}; delete from data.usage_log where ${own} and transaction_seq in (4, 7)`,
    async (session) => {
      const [[first]] = (await both(session)) as [Row[]]
      assert.equal([first!.problem, first!.seq], ['usage_missing', '7'])
    },
  )
})

test('it reads one moment while charges go on', async () => {
  const busy = await payer(db, { funds: '1000' })
  let stop = false
  let charged = 0
  const traffic = (async () => {
    while (!stop) {
      await busy.record(...Array.from({ length: 5 }, () => busy.event('0.001')))
      charged += 5
    }
  })()
  const kept: string[] = []
  try {
    for (let i = 0; i < 25; i++) {
      const [figures] = await db.operator('select head from api.billing_accounts where account_id = $1', [
        busy.accountId,
      ])
      kept.push(figures!.head)
      for (const expected of [null, kept[0], kept.at(-1)])
        assert.equal(
          await db.operator('select * from api.verify_ledger($1, $2)', [busy.accountId, expected]),
          [],
        )
    }
  } finally {
    stop = true
    await traffic
  }
  assert.ok(charged > 0 && new Set(kept).size > 1, 'there was traffic in between')
})

test('a charge explained: prices, arithmetic before rounding, hold, entry, refunds', async () => {
  const payer_ = await payer(db, { funds: '10', limit: '1' })
  const granted = await payer_.grant('0.5')
  await db.operator(
    `insert into api.prices (config_node_id, meter, unit_price, unit_size, effective_from) values
      ($1, 'input_tokens', 2.5, 1000000, '2020-01-01'), ($1, 'input_tokens', 5, 1000000, '2099-01-01'),
      ($1, 'seconds', 0.01, 3600, '2021-06-01')`,
    [payer_.nodeId],
  )
  await db.operator('update api.config_nodes set name = $2 where id = $1', [
    payer_.nodeId,
    `node ${payer_.nodeId}`,
  ])
  await db.operator('update api.user_profiles set display_name = $2, external_id = $3 where id = $1', [
    payer_.userId,
    'Ada',
    `host|${payer_.userId}`,
  ])
  const hold_id = await payer_.hold('3')
  const event = payer_.event('', {
    meters: { usd: '1', input_tokens: 374, seconds: 7, free: 0 },
    hold_id,
    request_id: 'r',
    metadata: { team: 'a' },
  })
  const [answer] = await payer_.record(event, payer_.event('2'))
  assert.is(answer!.status, 'charged')
  const refund = await payer_.post('refund_charge', { usage_id: event.id, amount: '0.25', reason: 'sorry' })
  const [{ it }] = (await db.operator('select api.explain_charge($1, $2) as it', [
    payer_.accountId,
    event.id,
  ])) as [Row]
  const [entry] = await db.operator(
    'select * from api.billing_transactions where account_id = $1 and seq = $2',
    [payer_.accountId, answer!.seq],
  )
  const prices = await db.operator('select id, meter from api.prices where config_node_id = $1', [
    payer_.nodeId,
  ])
  const price = (meter: string, unit_price: string, unit_size: number, from: string) => ({
    id: Number(prices.find((each) => each.meter === meter)!.id),
    unit_price,
    unit_size,
    effective_from: `${from}T00:00:00+00:00`,
  })
  const [key] = await db.operator('select key_prefix from api.virtual_keys where id = $1', [payer_.keyId])
  const { recorded_at, used_at, ...shownEvent } = it.event
  assert.is(new Date(used_at).getTime(), Number.parseInt(event.id.replace('-', '').slice(0, 12), 16))
  assert.ok(new Date(recorded_at) >= new Date(used_at))
  assert.equal(
    { ...it, event: shownEvent },
    {
      event: {
        id: event.id,
        account_id: payer_.accountId,
        meters: { usd: 1, input_tokens: 374, seconds: 7, free: 0 },
        hold_id,
        final: true,
        request_id: 'r',
        metadata: { team: 'a' },
        variant: null,
        estimated: null,
      },
      price_book: null,
      virtual_key: { id: payer_.keyId, name: null, key_prefix: key!.key_prefix },
      user: { id: payer_.userId, display_name: 'Ada', external_id: `host|${payer_.userId}` },
      config_node: { id: payer_.nodeId, name: `node ${payer_.nodeId}` },
      meters: [
        { meter: 'free', quantity: '0', price: null, amount: '0', is_exact: true },
        {
          meter: 'input_tokens',
          quantity: '374',
          price: price('input_tokens', '2.5', 1_000_000, '2020-01-01'),
          amount: '0.000935',
          is_exact: true,
        },
        {
          meter: 'seconds',
          quantity: '7',
          price: price('seconds', '0.01', 3600, '2021-06-01'),
          amount: '0.000019444444444444444444444444444444',
          is_exact: false,
        },
        {
          meter: 'usd',
          quantity: '1',
          price: price('usd', '1', 1, '2020-01-01'),
          amount: '1',
          is_exact: true,
        },
      ],
      sum: { amount: '1.000954444444444444444444444444444444', is_exact: false },
      rounded: '1.0009544444',
      cost: '1.0009544444',
      currency: 'USD',
      agrees: true,
      hold: { id: hold_id, amount: '3.0000000000', captured: '1.0009544444', status: 'captured' },
      entry: {
        seq: answer!.seq,
        kind: 'usage',
        created_at: it.entry.created_at,
        usage_count: 2,
        amount: '-3.0009544444',
        balance_delta: '-2.5009544444',
        free_credit_delta: '-0.5000000000',
        outstanding_delta: '0.0000000000',
        grants: [{ seq: Number(granted.seq), amount: '0.5000000000' }],
        hash: entry!.hash.toString('hex'),
      },
      refunds: [
        {
          seq: Number(refund.seq),
          amount: '0.2500000000',
          usage_id: event.id,
          reference: null,
          reason: 'sorry',
          created_at: it.refunds[0].created_at,
        },
      ],
    },
  )
  assert.is(new Date(it.entry.created_at).getTime(), entry!.created_at.getTime())

  // a cost that is not what its prices come to is told
  const session = await db.session()
  await session.query('begin; set local session_replication_role = replica')
  await session.query(
    'update data.usage_log set cost = cost + 0.0000000001 where account_id = $1 and id = $2',
    [payer_.accountId, event.id],
  )
  const told = (await session.query('select api.explain_charge($1, $2) as it', [payer_.accountId, event.id]))
    .rows[0].it
  await session.query('rollback')
  await session.end()
  assert.equal([told.rounded, told.cost, told.agrees], ['1.0009544444', '1.0009544445', false])
})

test('amounts that end are exact to the last digit, and rounding is half up on the exact sum', async () => {
  const one = await payer(db, { funds: '10' })
  await db.operator(
    `insert into api.prices (config_node_id, meter, unit_price, unit_size, effective_from) values
      ($1, 'tiny', 0.0000000001, 1024, '2020-01-01'), ($1, 'third', 0.0000000001, 3, '2020-01-01')`,
    [one.nodeId],
  )
  const explained = async (meters: Row): Promise<Row> => {
    const event = one.event('', { meters })
    await one.record(event)
    const [{ it }] = (await db.operator('select api.explain_charge($1, $2) as it', [
      one.accountId,
      event.id,
    ])) as [Row]
    assert.is(it.agrees, true)
    return [it.sum.amount, it.sum.is_exact, it.rounded]
  }
  assert.equal(await explained({ tiny: '0.0000000001' }), [
    '0.000000000000000000000009765625',
    true,
    '0.0000000000',
  ])
  assert.equal(await explained({ tiny: 512 }), ['0.00000000005', true, '0.0000000001'])
  assert.equal(await explained({ tiny: '511.9999999999' }), [
    '0.000000000049999999999990234375',
    true,
    '0.0000000000',
  ])
  assert.equal(await explained({ third: 1 }), [
    '0.000000000033333333333333333333333333',
    false,
    '0.0000000000',
  ])
  assert.equal(await explained({ third: 3 }), ['0.0000000001', true, '0.0000000001'])
  assert.equal(await explained({ third: 1, tiny: 171 }), [
    '0.000000000050032552083333333333333333',
    false,
    '0.0000000001',
  ])
})

test('a charge is explained to each reader of the event; its entry only to readers of the whole account', async () => {
  const [{ id: tenantId }] = (await db.operator('insert into api.tenants (name) values ($1) returning id', [
    't',
  ])) as [Row]
  const [mary, nora] = [await payer(db, { tenantId }), await payer(db, { tenantId })]
  const [{ id: admin }] = (await db.operator(
    `insert into api.user_profiles (tenant_id, tenant_role) values ($1, 'admin') returning id`,
    [tenantId],
  )) as [Row]
  const event = mary.event('1')
  await mary.record(event, { ...nora.event('2'), virtual_key_id: nora.keyId })
  const { seq } = (await mary.record(event))[0]!
  await mary.post('refund_charge', { usage_id: event.id, amount: '0.5' })
  await mary.post('refund_charge', { seq, amount: '1' })
  const explain = async (userId: string): Promise<Row> =>
    (await db.member(userId)('select api.explain_charge($1, $2) as it', [tenantId, event.id]))[0]!.it
  const forMary = await explain(mary.userId)
  assert.equal(
    [forMary.cost, forMary.agrees, forMary.entry, forMary.refunds.map(({ amount }: Row) => amount)],
    ['1.0000000000', true, { seq }, ['0.5000000000']],
  )
  const forAdmin = await explain(admin)
  assert.equal(
    [forAdmin.entry.amount, forAdmin.refunds.map(({ amount }: Row) => amount)],
    ['-3.0000000000', ['0.5000000000', '1.0000000000']],
  )
  for (const other of [nora.userId, bystander.userId, randomUUID()])
    assert.is((await failure(explain(other))).message, 'usage_not_found', other)
})

for (const [name, { operator }] of Object.entries(through))
  test(`an event that was not charged to the account is not explained, by ${name}`, async () => {
    const ask = (args: Row) => code(operator.call<unknown>('explain_charge', args))
    for (const args of [
      { account_id: account.accountId, usage_id: newId() },
      { account_id: bystander.accountId, usage_id: three[0]!.id },
      { account_id: null, usage_id: three[0]!.id },
      { account_id: account.accountId, usage_id: null },
    ])
      assert.is(await ask(args), '404 usage_not_found')
    const it = await operator.call<Row>('explain_charge', {
      account_id: account.accountId,
      usage_id: three[0]!.id,
    })
    assert.equal([it.cost, it.entry.seq], ['1.0000000000', 4])
  })

test.run()
