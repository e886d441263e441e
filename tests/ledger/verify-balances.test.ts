// Proof: the hash chain computed again from its documented form, and every kind of tampering found by verify_balances.
import { createHash } from 'node:crypto'
import type pg from 'pg'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database, type Row } from '../support/database.ts'
import { newId } from '../support/ids.ts'
import { holdsTrue } from '../support/ledger.ts'
import { type Payer, payer } from '../support/payer.ts'

const test = suite('verify')
const db = await database(test)

// Every kind of entry there is a function for; texts that JSON must escape.
async function history(): Promise<Payer> {
  const account = await payer(db, { funds: '10', limit: '2' })
  await db.operator(
    `insert into api.prices (config_node_id, meter, unit_price, effective_from) values ($1, 'eur', 1, '2020-01-01')`,
    [account.nodeId],
  )
  await account.grant('3', { expires_at: '2099-01-01T00:00:00.123456Z', reference: 'g "1"' })
  await account.grant('2', { priority: 5, reason: 'ünïcode \u2028 \\ "quoted"\n\ttab \u0001 😀' })
  const hold_id = await account.hold('5')
  const small = account.event('0.25')
  await account.record(
    account.event('', {
      meters: { usd: '1.4', eur: '0.1' },
      hold_id,
      final: false,
      request_id: 'réq/1',
      metadata: { z: 1, aa: [1.5, null, 'x'], b: {} },
    }),
    small,
    account.event('0'),
  )
  await account.use('20')
  await account.adjust('-0.0000000001', { reference: 'adj', metadata: '{"why": "a\\u00e9", "n": 1e3}' })
  await account.topUp('50', { reference: 'pi_1' })
  await account.grant('4', { expires_at: '2099-01-01' })
  await account.limit('0')
  await account.post('refund_charge', {
    usage_id: small.id,
    amount: '0.2',
    reference: 'r "1"',
    reason: 'sorry',
  })
  await account.post('refund_charge', { seq: 5, amount: '0.3' })
  await account.post('reverse_top_up', { top_up_reference: 'pi_1', amount: '1' })
  return account
}
const account = await history()
const bystander = await history()

test('an honest ledger has no problem', () => holdsTrue(db.sql))

// Postgres writes jsonb with a space after each comma and colon; numbers as they are stored.
const json = (value: unknown): string => JSON.stringify(value)
const array = (parts: string[]) => `[${parts.join(', ')}]`
const or = (value: unknown, text = json) => (value === null ? 'null' : text(value))
const raw = (value: unknown) => String(value)
const sha256 = (...parts: (string | Buffer)[]) => {
  const hash = createHash('sha256')
  for (const part of parts) hash.update(part)
  return hash.digest()
}

test('the chain follows from the rows by its documented form', async () => {
  const entries = await db.sql(
    `select *, amount::text, metadata::text, (extract(epoch from created_at) * 1000000)::bigint as micros
    from api.billing_transactions where account_id = $1 order by seq`,
    [account.accountId],
  )
  assert.is(entries.length, 13)
  let previous = Buffer.alloc(0)
  for (const [i, entry] of entries.entries()) {
    const usage = await db.sql(
      `select *, metadata::text, meters::text, to_json(price_ids)::text as price_ids, (extract(epoch from recorded_at) * 1000000)::bigint as micros
      from data.usage_log where account_id = $1 and transaction_seq = $2 order by id`,
      [account.accountId, entry.seq],
    )
    const lines = usage.map((row) =>
      array([
        ...[row.account_id, row.id].map(json),
        raw(row.transaction_seq),
        ...[row.virtual_key_id, row.user_id, row.config_node_id].map(json),
        or(row.hold_id),
        ...[row.final, row.meters, row.price_ids, row.cost].map(raw),
        or(row.request_id),
        or(row.metadata, raw),
        row.micros,
      ]),
    )
    // of each usage row its id and the first half of its line's hash
    const list = usage.flatMap((row, n) => [
      Buffer.from(row.id.replaceAll('-', ''), 'hex'),
      sha256(lines[n]!).subarray(0, 16),
    ])
    const digest = usage.length ? sha256(...list) : undefined
    assert.is(entry.usage_digest?.toString('hex'), digest?.toString('hex'), `digest of entry ${entry.seq}`)
    assert.is(entry.usage_count, usage.length)
    const line = array([
      json(entry.account_id),
      entry.seq,
      json(entry.kind),
      ...[entry.amount, entry.balance_delta, entry.free_credit_delta, entry.outstanding_delta],
      ...[entry.balance_after, entry.free_credit_after, entry.outstanding_after, entry.credit_limit_after],
      or(entry.reference),
      json(entry.actor),
      or(entry.reason),
      raw(entry.usage_count),
      or(entry.refund_of_seq, raw),
      or(entry.refund_of_usage_id),
      or(entry.metadata, raw),
      entry.micros,
    ])
    assert.is(entry.seq, `${i + 1}`)
    assert.is(entry.prev_hash.toString('hex'), previous.toString('hex'), `entry ${entry.seq} follows`)
    previous = sha256(previous, line, digest ?? '')
    assert.is(entry.hash.toString('hex'), previous.toString('hex'), `hash of entry ${entry.seq}: ${line}`)
  }
})

const own = `account_id = '${account.accountId}'`
const addUsage = (
  seq: string,
) => `insert into data.usage_log (account_id, id, transaction_seq, virtual_key_id, user_id,
    config_node_id, final, meters, price_ids, cost, recorded_at)
  select account_id, '${newId()}', ${seq}, virtual_key_id, user_id, config_node_id, final, meters, price_ids, 0, recorded_at
  from data.usage_log where ${own} and cost = 20`

// Tampering with every trigger off, and what is found of it, at the least.
const tampering: [sql: string, problems: string[]][] = [
  [
    `update data.account_balance set balance = balance + 1 where ${own}`,
    ['balance_is_not_the_sum_of_deltas'],
  ],
  [
    `update data.account_balance set free_credit = 1 where ${own}`,
    ['free_credit_is_not_the_sum_of_deltas', 'free_credit_is_not_the_sum_of_grants'],
  ],
  [
    `update data.account_balance set outstanding_amount = 1, balance = 0, free_credit = 0 where ${own}`,
    ['outstanding_is_not_the_sum_of_deltas'],
  ],
  [`update data.account_balance set frozen_balance = 0 where ${own}`, ['frozen_is_not_the_sum_of_holds']],
  [
    `update data.account_balance set credit_limit = 1000 where ${own}`,
    ['credit_limit_differs_from_last_entry'],
  ],
  [
    `update data.account_balance set balance_version = balance_version + 1 where ${own}`,
    ['balance_version_is_not_the_last_seq'],
  ],
  [`update data.account_balance set head_hash = sha256('x') where ${own}`, ['head_differs_from_last_entry']],
  [`update data.billing_transaction set amount = amount + 1 where ${own} and seq = 6`, ['entry_altered']],
  [
    `update data.billing_transaction set balance_delta = balance_delta + 1 where ${own} and seq = 6`,
    ['entry_altered', 'balance_does_not_follow', 'balance_is_not_the_sum_of_deltas'],
  ],
  [
    `update data.billing_transaction set balance_after = balance_after + 1 where ${own} and seq = 6`,
    ['entry_altered', 'balance_does_not_follow'],
  ],
  ...['reason', 'reference', 'actor'].map((column): [string, string[]] => [
    `update data.billing_transaction set ${column} = 'x' where ${own} and seq = 8`,
    ['entry_altered'],
  ]),
  [`update data.billing_transaction set metadata = '{}' where ${own} and seq = 8`, ['entry_altered']],
  [
    `update data.billing_transaction set created_at = created_at - interval '1 day' where ${own} and seq = 8`,
    ['entry_altered', 'entry_older_than_the_one_before'],
  ],
  [
    `update data.billing_transaction set kind = 'top_up_reversal' where ${own} and seq = 8`,
    ['entry_altered'],
  ],
  [
    `update data.billing_transaction set hash = sha256('x') where ${own} and seq = 8`,
    ['entry_altered', 'chain_broken'],
  ],
  // an entry altered with its hash made to fit
  [
    `update data.billing_transaction set reason = 'x' where ${own} and seq = 8;
    update data.billing_transaction t set hash = data.entry_hash(t) where ${own} and seq = 8`,
    ['chain_broken'],
  ],
  [
    `update data.billing_transaction set reason = 'x' where ${own} and seq = 13;
    update data.billing_transaction t set hash = data.entry_hash(t) where ${own} and seq = 13`,
    ['head_differs_from_last_entry'],
  ],
  // more came back than came: of a charge, of a top-up, of what is not there
  [
    `update data.billing_transaction set amount = 1.6 where ${own} and seq = 12`,
    ['refunds_exceed_entry', 'entry_altered'],
  ],
  [
    `update data.billing_transaction set amount = -0.4 where ${own} and seq = 5`,
    ['refunds_exceed_entry', 'entry_altered'],
  ],
  [
    `update data.billing_transaction set amount = -50.0000000001 where ${own} and seq = 13`,
    ['refunds_exceed_entry', 'entry_altered'],
  ],
  [
    `update data.billing_transaction set refund_of_seq = 99 where ${own} and seq = 13`,
    ['refunds_exceed_entry', 'entry_altered'],
  ],
  [
    `update data.billing_transaction set amount = 0.2500000001 where ${own} and seq = 11`,
    ['refunds_exceed_event', 'entry_altered'],
  ],
  [
    `update data.billing_transaction set refund_of_usage_id = null where ${own} and seq = 11`,
    ['entry_altered'],
  ],
  [
    `delete from data.billing_transaction where ${own} and seq = 2`,
    ['seq_has_gaps', 'chain_broken', 'balance_is_not_the_sum_of_deltas'],
  ],
  [`delete from data.billing_transaction where ${own} and seq = 13`, ['balance_version_is_not_the_last_seq']],
  [
    `delete from data.billing_transaction where ${own}`,
    ['balance_version_is_not_the_last_seq', 'balance_is_not_the_sum_of_deltas'],
  ],
  [
    `update data.usage_log set cost = cost + 1 where ${own} and cost = 20`,
    ['usage_altered', 'charge_is_not_the_cost_of_usage'],
  ],
  [`update data.usage_log set meters = '{"usd": 1}' where ${own} and cost = 20`, ['usage_altered']],
  [
    `update data.usage_log set virtual_key_id = gen_random_uuid() where ${own} and cost = 20`,
    ['usage_altered'],
  ],
  [`update data.usage_log set user_id = gen_random_uuid() where ${own} and cost = 20`, ['usage_altered']],
  [
    `update data.usage_log set recorded_at = recorded_at + interval '1 s' where ${own} and cost = 20`,
    ['usage_altered'],
  ],
  [`update data.usage_log set request_id = null where ${own} and request_id is not null`, ['usage_altered']],
  [
    `update data.usage_log set metadata = metadata || '{"z": 2}' where ${own} and metadata is not null`,
    ['usage_altered'],
  ],
  [`delete from data.usage_log where ${own} and cost = 0.25`, ['usage_missing']],
  [`delete from data.usage_log where ${own} and cost = 20`, ['usage_missing']],
  ...['transaction_seq', '1', '99'].map((seq): [string, string[]] => [addUsage(seq), ['usage_inserted']]),
  [
    `update data.usage_log set account_id = '${bystander.accountId}' where ${own} and cost = 20`,
    ['usage_missing'],
  ],
  // a charge of another amount than its usage, chained as if it were right
  [
    `update data.billing_transaction set amount = amount - 1, outstanding_delta = outstanding_delta + 1 where ${own} and seq = 6;
    update data.billing_transaction t set hash = data.entry_hash(t) where ${own} and seq = 6`,
    ['charge_is_not_the_cost_of_usage', 'chain_broken', 'outstanding_does_not_follow'],
  ],
  // an event called charged, and gone with its entry
  [
    `insert into data.parked_usage (id, event, usage_id, account_id, code, resolution, resolved_at)
    values (gen_random_uuid(), '{}', '${newId()}', '${account.accountId}', 'price_not_found', 'charged', now())`,
    ['resolved_event_not_charged'],
  ],
  // entries that no posting makes: the net of the deltas, the sign of a kind, normal form, usage of no charge, a refund of what comes later
  ...[
    'amount = amount - 1 where seq = 6',
    "kind = 'refund', refund_of_seq = 1 where seq = 6",
    'free_credit_after = 1 where outstanding_after > 0',
    'balance_after = -3 where seq = 5',
    'usage_count = 3 where seq = 6',
    'usage_list = usage_list || usage_list where seq = 6',
    'refund_of_seq = 12 where seq = 12',
    'refund_of_usage_id = gen_random_uuid() where seq = 6',
    "prev_hash = '' where seq = 2",
  ].map((change): [string, string[]] => [
    `update data.billing_transaction set ${change} and ${own}`,
    ['entry_breaks_a_rule', 'entry_altered'],
  ]),
  [
    `update data.account_balance set head_at = head_at + interval '1 s' where ${own}`,
    ['head_at_differs_from_last_entry'],
  ],
  [
    `update data.account_balance set last_charged_at = null where ${own}`,
    ['last_charged_at_differs_from_last_charge'],
  ],
  [
    `set local session_replication_role = origin;
    alter table data.account_balance drop constraint debt_only_when_all_else_is_spent;
    update data.account_balance set balance = -credit_limit - 1 where ${own}`,
    ['figures_not_in_normal_form'],
  ],
  [`delete from data.account_balance where ${own}`, ['account_missing']],
  [`update data.hold set amount = amount + 1 where ${own}`, ['frozen_is_not_the_sum_of_holds']],
  [`update data.hold set captured = captured + 1 where ${own}`, ['frozen_is_not_the_sum_of_holds']],
  [
    `update data.hold set status = 'released', ended_at = now() where ${own}`,
    ['frozen_is_not_the_sum_of_holds'],
  ],
  [`delete from data.hold where ${own}`, ['frozen_is_not_the_sum_of_holds']],
  [
    `update data.credit_grant set remaining = 1 where ${own} and seq = 3`,
    ['free_credit_is_not_the_sum_of_grants'],
  ],
  [
    `update data.credit_grant set expires_at = '2199-01-01' where ${own} and seq = 9`,
    ['grant_differs_from_entry'],
  ],
  [`update data.credit_grant set amount = amount + 1 where ${own} and seq = 9`, ['grant_differs_from_entry']],
  [`update data.credit_grant set priority = 0 where ${own} and seq = 9`, ['grant_differs_from_entry']],
  // drawn again, or not at all: a refund would give back too much or too little
  [`update data.grant_draw set returned = 0 where ${own} and returned > 0`, ['grant_differs_from_draws']],
  [`update data.grant_draw set amount = amount + 1 where ${own} and seq = 6`, ['grant_differs_from_draws']],
  [
    `delete from data.grant_draw where ${own} and seq = 6`,
    ['grant_differs_from_draws', 'free_credit_spent_differs_from_draws'],
  ],
  [
    `update data.grant_draw set amount = amount + 1, returned = returned + 1 where ${own} and seq = 6`,
    ['free_credit_spent_differs_from_draws'],
  ],
  [`delete from data.credit_grant where ${own} and seq = 9`, ['free_credit_is_not_the_sum_of_grants']],
]

for (const [sql, problems] of tampering)
  test(`found: ${sql.replaceAll(own, 'mine').replace(/\s+/g, ' ').slice(0, 110)}`, async () => {
    const session = await db.session()
    try {
      await session.query('begin; set local session_replication_role = replica')
      const results = (await session.query(sql)) as unknown as pg.QueryResult | pg.QueryResult[]
      for (const { command, rowCount } of [results].flat())
        assert.ok(rowCount || /ALTER|SET/.test(command), 'the tampering hit a row')
      const found: Row[] = (await session.query('select * from api.verify_balances()')).rows
      for (const problem of problems)
        assert.ok(
          found.some((row) => row.account_id === account.accountId && row.problem === problem),
          `${problem}: ${JSON.stringify(found)}`,
        )
      const alone = (await session.query('select * from api.verify_balances($1)', [account.accountId])).rows
      assert.equal(
        alone,
        found.filter((row) => row.account_id === account.accountId),
      )
    } finally {
      await session.query('rollback')
      await session.end()
    }
  })

test('a problem is named with its account, its entry, and both figures', async () => {
  const session = await db.session()
  await session.query('begin; set local session_replication_role = replica')
  await session.query(`update data.account_balance set balance = balance + 0.0000000001 where ${own}`)
  const { rows } = await session.query('select * from api.verify_balances()')
  await session.end()
  assert.equal(rows, [
    {
      account_id: account.accountId,
      problem: 'balance_is_not_the_sum_of_deltas',
      seq: null,
      usage_id: null,
      expected: (await db.sql(`select balance from data.account_balance where ${own}`))[0]!.balance,
      actual: '42.2500000000',
    },
  ])
})

test.run()
