// A host's security definer function, owned by an operator, called by a login without rights.
// The function moves money and gets the answer that a reader would see; the login itself sees nothing.
import pg from 'pg'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database, type Row } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { payer } from '../support/payer.ts'

const test = suite('answers')
const db = await database(test)
const { operator } = db

const owner = `${db.name}_host`
const login = `${db.name}_plain`
await db.sql(`create role ${owner}`)
await db.sql(`grant keyledger_operator to ${owner}`)
await db.sql(`create role ${login} login password 'plain'`)
await db.sql(`create schema host authorization ${owner}`)
await db.sql(`grant usage on schema host to ${login}`)
await db.sql(`create function host.call(query text) returns jsonb language plpgsql security definer as $$
  declare
    v_row jsonb;
  begin
    execute format('select to_jsonb(t) from (%s) t', query) into v_row;
    return v_row;
  end $$`)
await db.sql(`alter function host.call(text) owner to ${owner}`)
const url = new URL(db.url)
Object.assign(url, { username: login, password: 'plain' })
const pool = new pg.Pool({ connectionString: url.href })
db.onClose(async () => {
  await pool.end()
  await db.sql('drop schema host cascade')
  await db.sql(`drop role ${login}`)
  await db.sql(`drop role ${owner}`)
})
const host = async (query: string): Promise<Row> =>
  (await pool.query('select host.call($1) as it', [query])).rows[0].it
const seen = async (query: string): Promise<Row> =>
  (await operator(`select to_jsonb(t) as it from (${query}) t`))[0]!.it

const it = await payer(db, { tenantId: null })
const entry = (seq: number) =>
  `select * from api.billing_transactions where account_id = '${it.accountId}' and seq = ${seq}`
const account = `select * from api.billing_accounts where account_id = '${it.accountId}'`
const a = `account_id => '${it.accountId}'`

// in this order: each posts the next entry
const answers: [call: string, read: (answer: Row) => string][] = [
  [`top_up(${a}, amount => 50, reference => 'paid', metadata => '{"a": 1}')`, () => entry(1)],
  [`reverse_top_up(${a}, top_up_reference => 'paid', amount => 1)`, () => entry(2)],
  [`adjust_balance(${a}, amount => -1, reason => 'test')`, () => entry(3)],
  [`grant_credit(${a}, amount => 1)`, () => entry(4)],
  [`set_credit_limit(${a}, credit_limit => 7)`, () => account],
  [`set_low_balance_threshold(${a}, amount => 7)`, () => account],
  [`set_time_zone(${a}, time_zone => 'Europe/Berlin')`, () => account],
  [
    `set_budget(${a}, scope => 'user', scope_id => '${it.userId}', amount => 5, period => 'day')`,
    ({ id }) => `select * from api.budgets where id = '${id}'`,
  ],
  [
    `freeze_funds(${a}, amount => 2, reason => 'test', reference => 'r')`,
    ({ id }) => `select * from api.holds where id = '${id}'`,
  ],
  [
    `set_status(entity => 'user_profile', id => '${it.userId}', status => 'suspended', reason => 'test')`,
    ({ id }) => `select * from api.status_changes where id = ${id}`,
  ],
  [
    `revoke_virtual_key(id => '${it.keyId}')`,
    ({ id }) => `select * from api.virtual_keys where id = '${id}'`,
  ],
  [
    `close_period(period_end => clock_timestamp())`,
    () => `select * from api.accounting_snapshots where account_id = '${it.accountId}'`,
  ],
]
for (const [call, read] of answers)
  test(`${call.split('(')[0]} answers the row that a reader sees`, async () => {
    const answer = await host(`select * from api.${call}`)
    assert.equal(answer, await seen(read(answer)))
  })

test('refund_charge, unfreeze_funds and remove_budget answer the row that a reader sees', async () => {
  const { seq } = await it.use('3')
  assert.equal(await host(`select * from api.refund_charge(${a}, seq => ${seq})`), await seen(entry(seq + 1)))
  const [freeze] = await operator(`select id from api.holds where account_id = $1 and expires_at is null`, [
    it.accountId,
  ])
  assert.equal(
    await host(`select * from api.unfreeze_funds(${a}, id => '${freeze!.id}')`),
    await seen(`select * from api.holds where id = '${freeze!.id}'`),
  )
  const before = await seen(`select * from api.budgets where account_id = '${it.accountId}'`)
  assert.equal(await host(`select * from api.remove_budget(id => '${before.id}')`), before)
})

test('a revoke stays, and its key is refused', async () => {
  assert.is((await it.place(it.request('1')))[0]!.code, 'virtual_key_disabled')
})

test('the login sees and does nothing; a reader’s function inside the host’s reads as the session’s reader', async () => {
  for (const sql of ['select from api.top_up(null, 1)', 'select from api.billing_accounts'])
    assert.is((await failure(pool.query(sql))).code, '42501', sql)
  assert.is(await host('select * from api.billing_accounts'), null)
  const [{ period_start: start }] = (await operator(
    'select period_start::text from api.accounting_snapshots where account_id = $1',
    [it.accountId],
  )) as [Row]
  const statement = `select api.statement(${a}, period_start => '${start}')`
  assert.is((await failure(host(statement))).message, 'statement_not_found')
  // the host sets the claims of the reader
  const claims = JSON.stringify({ user_id: it.userId })
  assert.ok(
    await host(
      `select s.* from (select set_config('request.jwt.claims', '${claims}', true)) c, lateral (${statement}) s`,
    ),
  )
})

test('each `_shown` view has exactly the rows of its api view', async () => {
  await it.use('1')
  await it.post('set_budget', { scope: 'user', scope_id: it.userId, amount: '5', period: 'day' })
  for (const [view, table] of Object.entries({
    billing_accounts: 'account_now',
    billing_transactions: 'entry_shown',
    virtual_keys: 'key_shown',
    holds: 'hold_shown',
    budgets: 'budget_shown',
    status_changes: 'status_change',
    accounting_snapshots: 'accounting_snapshot',
  })) {
    const [row] = await db.sql(
      `with v as (select to_jsonb(v) as it from api.${view} v), t as (select to_jsonb(t) as it from data.${table} t)
      select (select count(*)::int from (table v except table t) d) + (select count(*)::int from (table t except table v) d) as differ,
        (select count(*)::int from t) as rows`,
    )
    assert.ok(row!.rows > 0, view)
    assert.is(row!.differ, 0, view)
  }
})

test.run()
