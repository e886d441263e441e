// A call's reads don't grow with the tables, whenever its plans were made, nor under an old snapshot.
import type pg from 'pg'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database, type Role, type Row } from '../support/database.ts'
import { newId } from '../support/ids.ts'
import { type Payer, payer } from '../support/payer.ts'

const test = suite('plans')
const db = await database(test)
// autovacuum's analyze would replace the plans under test, and calls would count the blocks of planning
await db.sql(`
  do $$ declare t regclass; begin
    for t in select oid from pg_class where relnamespace = 'data'::regnamespace and relkind = 'r' loop
      execute format('alter table %s set (autovacuum_enabled = off)', t);
    end loop;
  end $$`)

type Call = [role: Role, text: string, ...values: unknown[]]
interface Known {
  event: Row
  hold: string
  /** To be released. */
  spares: string[]
  /** Two keys of the same user: one to be rotated, one that is revoked. */
  keys: [string, string]
  reference: string
  cursor: unknown
}

// Each with ids of its own, since an id counts once; `size` is how many elements a batch has.
function callsOf(
  payer: Payer,
  { event: first, hold, spares, keys: [spareKeyId, endedKeyId], reference, cursor }: Known,
  size = 10,
): Record<string, Call> {
  const { accountId, userId, keyId, key, nodeId, event, request } = payer
  const batch = (fn: string, make: (i: number) => Row): Call => [
    'keyledger_gateway',
    `select api.${fn}($1)`,
    JSON.stringify(Array.from({ length: size }, (_, i) => make(i))),
  ]
  const gateway = (text: string, ...values: unknown[]): Call => ['keyledger_gateway', text, ...values]
  const operator = (text: string, ...values: unknown[]): Call => ['keyledger_operator', text, ...values]
  const priced = { amount: undefined, config_node_id: nodeId, meters: { usd: '0.01' } }
  return {
    place_holds: batch('place_holds', () => request('0.01')),
    'place_holds by meters': batch('place_holds', () => request('0', priced)),
    record_usage: batch('record_usage', () => event('0.01')),
    'record_usage of a hold': batch('record_usage', () => event('0.01', { hold_id: hold, final: false })),
    'record_usage again': batch('record_usage', () => first),
    'record_usage, parked': batch('record_usage', () => event('0.01', { meters: { unpriced: 1 } })),
    extend_holds: batch('extend_holds', () => ({ id: hold, account_id: accountId })),
    release_holds: batch('release_holds', (i) => ({ id: spares[i] ?? newId(), account_id: accountId })),
    resolve_virtual_key: gateway(`select api.resolve_virtual_key(encode(sha256($1::bytea), 'hex'))`, key),
    resolve_virtual_keys: gateway(
      `select api.resolve_virtual_keys(array_fill(encode(sha256($1::bytea), 'hex'), array[${size}]))`,
      key,
    ),
    resolve_billing_account: gateway('select api.resolve_billing_account($1)', key),
    check_budget: gateway('select api.check_budget($1, 1, $2)', userId, keyId),
    cache_changes: gateway('select api.cache_changes($1)', cursor),
    account_news: gateway('select api.account_news($1)', cursor),
    account_balances: gateway('select * from api.account_balances where user_id = $1', userId),
    billing_accounts: operator('select * from api.billing_accounts where account_id = $1', accountId),
    virtual_keys: operator('select * from api.virtual_keys where id = $1', keyId),
    budgets: operator('select * from api.budgets where account_id = $1', accountId),
    usage_logs: operator(
      'select * from api.usage_logs where account_id = $1 and id = $2',
      accountId,
      first.id,
    ),
    holds: operator('select * from api.holds where account_id = $1 and id = $2', accountId, hold),
    top_up: operator('select api.top_up($1, 1, reference => $2)', accountId, newId()),
    'top_up again': operator('select api.top_up($1, 1, reference => $2)', accountId, reference),
    grant_credit: operator(
      `select api.grant_credit($1, 1, expires_at => now() + interval '1 day')`,
      accountId,
    ),
    refund_charge: operator(
      `select api.refund_charge($1, usage_id => $2, amount => 0.0001, reason => 'test')`,
      accountId,
      first.id,
    ),
    freeze_funds: operator(`select api.freeze_funds($1, 0.01, 'test', $2)`, accountId, newId()),
    adjust_balance: operator(`select api.adjust_balance($1, 1, 'test')`, accountId),
    reverse_top_up: operator(
      `select api.reverse_top_up($1, top_up_reference => $2, amount => 0.0001, reason => 'test')`,
      accountId,
      reference,
    ),
    set_credit_limit: operator('select api.set_credit_limit($1, 1 + random()::numeric(4, 4))', accountId),
    set_low_balance_threshold: operator(
      'select api.set_low_balance_threshold($1, 1 + random()::numeric(4, 4))',
      accountId,
    ),
    set_budget: operator(
      `select api.set_budget($1, 'user', $2, 100 + random()::numeric(4, 4), 'week')`,
      accountId,
      userId,
    ),
    set_status: operator(`select api.set_status('user_profile', $1, 'active', 'test')`, userId),
    create_virtual_key: operator('select api.create_virtual_key($1)', userId),
    rotate_virtual_key: operator('select api.rotate_virtual_key($1)', spareKeyId),
    revoke_virtual_key: operator('select api.revoke_virtual_key($1)', endedKeyId),
    import_virtual_keys: operator(
      'select api.import_virtual_keys($1)',
      JSON.stringify([{ user_id: userId, virtual_key: newId(), config_node_ids: [nodeId] }]),
    ),
    explain_charge: operator('select api.explain_charge($1, $2)', accountId, first.id),
    balance_at: operator(`select api.balance_at($1, now() - interval '1 second')`, accountId),
  }
}

// Blocks read by a call, with all that it calls.
async function blocks(session: pg.Client, [role, text, ...values]: Call): Promise<number> {
  await session.query(`select set_config('role', $1, false)`, [role])
  try {
    const { rows } = await session.query(`explain (analyze, buffers, format json) ${text}`, values)
    const { Plan: plan } = rows[0]['QUERY PLAN'][0]
    return plan['Shared Hit Blocks'] + plan['Shared Read Blocks'] + plan['Temp Read Blocks']
  } finally {
    await session.query('reset role')
  }
}

const sessions: pg.Client[] = []
async function opened(): Promise<pg.Client> {
  const session = await db.session()
  sessions.push(session)
  return session
}
test.after.each(async () => {
  for (const session of sessions.splice(0)) await session.end()
})

// with money of every kind, and budgets of every scope
async function account(): Promise<Payer> {
  const made = await payer(db, { funds: '1000', limit: '10' })
  const { accountId, userId, keyId } = made
  await made.grant('10', { expires_at: new Date(Date.now() + 3_600_000) })
  await made.grant('10', { expires_at: new Date(Date.now() + 600_000) })
  for (const [scope, id, period] of [
    ['virtual_key', keyId, 'day'],
    ['user', userId, 'month'],
    ['user', userId, 'total'],
  ])
    await db.operator('select api.set_budget($1, $2, $3, 100, $4)', [accountId, scope, id, period])
  return made
}

const cursorNow = async () =>
  JSON.stringify((await db.gateway('select api.cache_changes() as c'))[0]!.c.cursor)

const another = async ({ userId }: Payer): Promise<string> =>
  (await db.operator('select id from api.create_virtual_key($1)', [userId]))[0]!.id

async function known(account: Payer): Promise<Known> {
  const event = account.event('0.01')
  const reference = newId()
  await account.record(event)
  await account.topUp('1', { reference })
  const keys = [await another(account), await another(account)] as [string, string]
  await db.operator('select api.revoke_virtual_key($1)', [keys[1]])
  return { event, reference, hold: await account.hold('1'), spares: [], keys, cursor: await cursorNow() }
}

// a function may keep a plan from its sixth call on
const WARM = 6

// Blocks that each call reads; one hold is due and settled by the next posting, no more holds stay open.
async function measure(session: pg.Client, payer: Payer, there: Known): Promise<Map<string, number>> {
  for (let i = 0; i < WARM; i++)
    for (const call of Object.values(callsOf(payer, there))) await blocks(session, call).catch(() => {})
  const found = new Map<string, number>()
  for (const name of Object.keys(callsOf(payer, there))) {
    const open = await db.sql(
      `select id, account_id from data.hold where status = 'open' and expires_at is not null and id <> $1`,
      [there.hold],
    )
    await db.gateway('select api.release_holds($1)', [JSON.stringify(open)])
    const [due, spare] = [await payer.hold('0.01'), await payer.hold('0.01')]
    await db.sql(`update data.hold set expires_at = now() - interval '1 s' where id = $1`, [due])
    found.set(name, await blocks(session, callsOf(payer, { ...there, spares: [spare] })[name]!))
  }
  return found
}

test('calls read as little in a full database, by plans from an empty, small, full or analyzed one', async () => {
  const early = await opened()
  // a plan made on an empty table, or one of one row, reads the table whole: the worst moments to plan
  await early.query('vacuum analyze')
  const payer = await account()
  const { accountId, userId, keyId, nodeId } = payer
  const nothing = {
    event: payer.event('1'),
    hold: newId(),
    spares: [],
    keys: [newId(), newId()] as [string, string],
    reference: newId(),
    cursor: await cursorNow(),
  }
  for (let i = 0; i < WARM; i++)
    for (const call of Object.values(callsOf(payer, nothing))) await blocks(early, call).catch(() => {})
  const there = await known(payer)
  await early.query('vacuum analyze')
  const small = await opened()
  const before = await measure(small, payer, there)

  // a temporary table, or a change by this session, would make Postgres plan everything anew
  const rows = 'generate_series(1, 10000) n'
  const full = await opened()
  await full.query(`
    begin;
    set local session_replication_role = replica;
    with owner as (
      insert into data.user_profile (id) select gen_random_uuid() from ${rows} returning id
    ), opened as (
      insert into data.account_balance (account_id, owner_user_id, currency) select id, id, 'USD' from owner
    ), key as (
      insert into data.virtual_key (id, user_id, key_hash, key_prefix) select id, id, sha256(uuid_send(id)), 'vk_' from owner returning id
    ), used as (
      insert into data.virtual_key_use (virtual_key_id) select id from key
    ), budget as (
      insert into data.budget (account_id, scope, scope_id, amount, period, counted_from, counted_floor)
      select id, 'user', id, 1, 'day', '-infinity', '-infinity' from owner
    )
    insert into data.virtual_key_config_node (virtual_key_id, config_node_id) select id, '${nodeId}' from key;
    insert into data.config_node (name) select n::text from ${rows};
    insert into data.price (config_node_id, meter, unit_price, effective_from)
    select '${nodeId}', 'usd', 1, '2020-01-01'::timestamptz + n * interval '1 hour' from ${rows};
    insert into data.previous_key_hash (key_hash, virtual_key_id, valid_until)
    select sha256(n::text::bytea), gen_random_uuid(), now() from ${rows};
    insert into data.hold (account_id, id, amount, captured, status, expires_at, virtual_key_id, created_at, ended_at)
    select '${accountId}', api.new_id(), 1, 1, 'captured', now() - n * interval '1 s', '${keyId}', now(), now() from ${rows};
    insert into data.usage_log (account_id, id, transaction_seq, virtual_key_id, user_id, config_node_id, final, meters,
      price_ids, cost, recorded_at)
    select '${accountId}', api.new_id(), 1, '${keyId}', '${userId}', '${nodeId}', true, '{}', '{}', 0, now() from ${rows};
    insert into data.billing_transaction
    select e.*
    from ${rows}, data.billing_transaction t, jsonb_populate_record(t, jsonb_build_object('seq', 1000 + n, 'reference', 'r' || n)) e
    where t.account_id = '${accountId}' and t.seq = 1;
    insert into data.credit_grant (account_id, seq, amount, remaining, priority, expires_at)
    select '${accountId}', 1000 + n, 1, 0, 0, now() - n * interval '1 s' from ${rows};
    insert into data.budget_spend (account_id, budget_id, window_start, spent)
    select b.account_id, b.id, now() - n * interval '1 day', 0
    from ${rows}, data.budget b where b.account_id = '${accountId}' and b.period = 'day';
    insert into data.cache_invalidation (xid, entity, keys) select '4', 'vk', '{x}' from ${rows};
    insert into data.account_news (xid, account_id, seq, kind, funds, created_at)
    select '4', '${accountId}', 1, 'exhausted', 0, now() from ${rows};
    insert into data.status_change (entity, entity_id, new_status, actor) select 'user_profile', gen_random_uuid(), 'active', 'x' from ${rows};
    insert into data.parked_usage (id, event, usage_id, code) select gen_random_uuid(), '{}', api.new_id(), 'x' from ${rows};
    commit`)

  // an account whose rows come first in their tables, and one whose rows come last
  const late = await account()
  const last = await known(late)
  const fresh = await opened()
  const later: [string, Map<string, number>][] = []
  const compare = async (when: string, session: pg.Client) => {
    later.push([`${when}, of the first account`, await measure(session, payer, there)])
    later.push([`${when}, of the last`, await measure(session, late, last)])
  }
  await compare('on an empty database', early)
  await compare('on a small one', small)
  await compare('on a full one', fresh)
  await early.query('analyze')
  await compare('after an analyze', fresh)
  // Postgres plans a reader's own query each time, by the last analyze
  const counts = (when: string, name: string) => name !== 'budgets' || when.startsWith('after')
  const grown = later.flatMap(([when, found]) =>
    [...found]
      .filter(([name, count]) => counts(when, name) && count > 2 * before.get(name)! + 100)
      .map(([name, count]) => `${name}, planned ${when}: ${before.get(name)} blocks, then ${count}`),
  )
  assert.equal(grown, [])
})

test('every reader reads usage, holds and entries of an account by range', async () => {
  const payer = await account()
  const { accountId, userId, keyId, nodeId } = payer
  // earlier than the others; the test reads those of the last minute
  for (let i = 0; i < 300; i++) await payer.topUp('1')
  await db.sql(`
    insert into data.usage_log (account_id, id, transaction_seq, virtual_key_id, user_id, config_node_id, final, meters,
      price_ids, cost, recorded_at)
    select '${accountId}', data.uuid_floor(now() - n * interval '1 s'), 1, '${keyId}', '${userId}', '${nodeId}', true, '{}', '{}', 0, now()
    from generate_series(1, 10000) n;
    insert into data.hold (account_id, id, amount, captured, status, expires_at, virtual_key_id, created_at, ended_at)
    select '${accountId}', data.uuid_floor(now() - n * interval '1 s'), 1, 1, 'captured', now(), '${keyId}', now(), now()
    from generate_series(1, 10000) n`)
  await db.sql('analyze')
  const range = `account_id = '${accountId}' and id >= (select api.id_at(now() - interval '1 minute')) order by id desc limit 20`
  const wanted = {
    usage_logs: `select * from api.usage_logs where ${range}`,
    holds: `select * from api.holds where ${range}`,
    billing_transactions: `select * from api.billing_transactions where account_id = '${accountId}' and seq > 290 order by seq desc limit 10`,
  }
  for (const reader of [db.operator, db.member(userId)])
    for (const [view, text] of Object.entries(wanted)) {
      const [row] = await reader(`explain (analyze, buffers, format json) ${text}`)
      const { Plan: plan } = row!['QUERY PLAN'][0]
      assert.is(plan['Actual Rows'], view === 'billing_transactions' ? 10 : 20)
      assert.ok(
        plan['Shared Hit Blocks'] + plan['Shared Read Blocks'] < 150,
        `${view}: ${JSON.stringify(plan)}`,
      )
    }
})

test('a call looks a busy account up once, not per element, though an old snapshot keeps every version', async () => {
  const payer = await account()
  const there = await known(payer)
  const session = await opened()
  const reader = await opened()
  await reader.query('begin isolation level repeatable read; select from data.account_balance')
  await db.sql(`
    do $$ begin
      for i in 1 .. 6000 loop
        update data.account_balance set last_charged_at = now() where account_id = '${payer.accountId}';
      end loop;
    end $$`)
  const elements = async (name: string, size: number) => {
    await blocks(session, callsOf(payer, there, size)[name]!)
    const spares: string[] = []
    // one after the other: each reads all those versions under the account's lock
    for (let i = 0; i < size; i++) spares.push(await payer.hold('0.01'))
    return blocks(session, callsOf(payer, { ...there, spares }, size)[name]!)
  }
  const lookUp = await blocks(session, [
    'keyledger_owner',
    'select currency from data.account_balance where account_id = $1',
    payer.accountId,
  ])
  assert.ok(lookUp > 100, `${lookUp} blocks`)
  // an extension is an exception: it looks up what its account has left once a grant has expired
  for (const name of [
    'place_holds',
    'place_holds by meters',
    'record_usage',
    'record_usage again',
    'release_holds',
  ]) {
    const each = ((await elements(name, 40)) - (await elements(name, 1))) / 39
    assert.ok(
      each < lookUp / 3,
      `${name}: ${each} blocks for each element, ${lookUp} for a look-up of the account`,
    )
  }
  await reader.query('commit')
})

test.run()
