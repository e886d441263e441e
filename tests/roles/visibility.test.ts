// Visibility: the rows that each reader sees through the views.
import { randomUUID } from 'node:crypto'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { postgrestRpc } from '../../src/rpc-postgrest.ts'
import { database, type Row, type Sql } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { seed } from '../support/seed.ts'

const test = suite('visibility')
const db = await database(test)
const { operator, gateway } = db

// Two tenants, and sam, who pays alone. In tenant a: adam (admin), mary, nora (paid alone before).
// eve was in tenant a too, and has left.
const ids: Record<string, string> = {}
const add = async (name: string, sql: string, values: unknown[] = []) => {
  ids[name] = (await operator(sql, values))[0]!.id
}
const { nodeId } = await seed(operator)
for (const name of ['a', 'b'])
  await add(name, 'insert into api.tenants (name, external_id) values ($1, $1) returning id', [name])
const people: [name: string, tenant: string | null, role: string][] = [
  ['adam', 'a', 'admin'],
  ['mary', 'a', 'member'],
  ['nora', null, 'member'],
  ['eve', 'a', 'member'],
  ['bob', 'b', 'admin'],
  ['sam', null, 'admin'], // of no tenant
]
for (const [name, tenant, role] of people)
  await add(
    name,
    `insert into api.user_profiles (tenant_id, tenant_role, external_id) values ($1, $2, $3) returning id`,
    [tenant && ids[tenant], role, `host|${name}`],
  )
const keys: Record<string, string> = {}
for (const [name] of people)
  keys[name] = (await operator('select id from api.create_virtual_key($1)', [ids[name]]))[0]!.id

// one charge and one hold of each person on the account that paid then, and a parked event of a's
const use = async (name: string, account: string) => {
  await operator('select seq from api.top_up($1, 10)', [ids[account]])
  const common = `'account_id', $1::text, 'virtual_key_id', $2::text`
  const [{ held }] = (await gateway(
    `select api.place_holds(jsonb_build_array(jsonb_build_object('id', api.new_id(), ${common}, 'amount', '1'))) -> 0 ->> 'status' as held`,
    [ids[account], keys[name]],
  )) as [Row]
  const [{ charged }] = (await gateway(
    `select api.record_usage(jsonb_build_array(jsonb_build_object('id', api.new_id(), ${common}, 'config_node_id', $3::text,
      'meters', '{"input_tokens": 1000}'::jsonb))) -> 0 ->> 'status' as charged`,
    [ids[account], keys[name], nodeId],
  )) as [Row]
  assert.equal([held, charged], ['held', 'charged'])
}
await use('nora', 'nora')
for (const [name, tenant] of people) if (tenant) await use(name, tenant)
await use('sam', 'sam')
await operator('update api.user_profiles set tenant_id = $2 where id = $1', [ids.nora, ids.a])
await use('nora', 'a')
const budget = (account: string, scope: string, id: string | undefined) =>
  operator(`select id from api.set_budget($1, $2, $3, 5, 'day')`, [ids[account], scope, id])
await budget('a', 'user', ids.eve)
await operator('update api.user_profiles set tenant_id = null where id = $1', [ids.eve])
await use('eve', 'eve')
await gateway(`select api.record_usage(jsonb_build_array(jsonb_build_object('account_id', $1::text)))`, [
  ids.a,
])
for (const account of ['a', 'b', 'sam'])
  await db.sql(
    `insert into data.accounting_snapshot select $1, '2026-01-01', '2026-02-01', 1, 0, null, 'USD', 0, 0, 0, 0, 0, 0, 0, 0, '{}', '[]', ''`,
    [ids[account]],
  )

// each view's rows, named after the people and accounts they belong to
const shown: Record<string, string> = {
  account_balances: `select user_id as a, account_id as b from api.account_balances`,
  accounting_snapshots: `select account_id as a from api.accounting_snapshots`,
  billing_accounts: `select account_id as a from api.billing_accounts`,
  budgets: `select distinct scope_id as a, account_id as b from api.budgets`,
  billing_transactions: `select distinct account_id as a from api.billing_transactions`,
  holds: `select id, account_id as b, virtual_key_id as a from api.holds`,
  tenants: `select id as a from api.tenants`,
  usage_logs: `select user_id as a, account_id as b from api.usage_logs`,
  user_profiles: `select id as a from api.user_profiles`,
  virtual_keys: `select user_id as a from api.virtual_keys`,
}
const nameOf = (id: string) =>
  [...Object.entries(ids), ...Object.entries(keys)].find(([, value]) => value === id)?.[0] ?? 'others'

// of each person and key on the account that pays now, of nora alone as well, and of tenant a
for (const [name, tenant] of people) {
  const account = { nora: 'a', eve: 'eve' }[name] ?? tenant ?? name
  await budget(account, 'user', ids[name])
  await budget(account, 'virtual_key', keys[name])
}
await budget('nora', 'user', ids.nora)
await budget('a', 'tenant', ids.a)

async function sees(reader: Sql): Promise<Record<string, string>> {
  const seen: Record<string, string> = {}
  for (const [view, sql] of Object.entries(shown)) {
    const names = (await reader(sql)).map(({ a, b }) => nameOf(a) + (b ? `@${nameOf(b)}` : ''))
    if (names.length) seen[view] = names.sort().join(' ')
  }
  return seen
}

const nothing = {}
const alone = (name: string) => ({
  account_balances: `${name}@${name}`,
  billing_accounts: name,
  billing_transactions: name,
  budgets: `${name}@${name} ${name}@${name}`,
  holds: `${name}@${name}`,
  usage_logs: `${name}@${name}`,
  user_profiles: name,
  virtual_keys: name,
})
const mary = {
  account_balances: 'mary@a',
  billing_accounts: 'a mary',
  budgets: 'mary@a mary@a',
  holds: 'mary@a',
  tenants: 'a',
  usage_logs: 'mary@a',
  user_profiles: 'mary',
  virtual_keys: 'mary',
}
const sam = { ...alone('sam'), accounting_snapshots: 'sam' }

const readers: [who: string, claims: Record<string, unknown>, sees: Record<string, string>][] = [
  ["a member: own rows, the paying account's figures", { user_id: ids.mary }, mary],
  [
    "a tenant's admin: the whole tenant, with the use of past members, and no other user's own account",
    { user_id: ids.adam },
    {
      account_balances: 'adam@a mary@a nora@a',
      accounting_snapshots: 'a',
      billing_accounts: 'a adam',
      billing_transactions: 'a',
      budgets: 'a@a adam@a adam@a eve@a mary@a mary@a nora@a nora@a',
      holds: 'adam@a eve@a mary@a nora@a',
      tenants: 'a',
      usage_logs: 'adam@a eve@a mary@a nora@a',
      user_profiles: 'adam mary nora',
      virtual_keys: 'adam mary nora',
    },
  ],
  [
    'the admin of another tenant',
    { user_id: ids.bob },
    {
      account_balances: 'bob@b',
      accounting_snapshots: 'b',
      billing_accounts: 'b bob',
      billing_transactions: 'b',
      budgets: 'bob@b bob@b',
      holds: 'bob@b',
      tenants: 'b',
      usage_logs: 'bob@b',
      user_profiles: 'bob',
      virtual_keys: 'bob',
    },
  ],
  ['a user who pays alone, and is an admin of no tenant', { user_id: ids.sam }, sam],
  [
    'a user who joined: rows from when they paid alone stay visible',
    { user_id: ids.nora },
    {
      account_balances: 'nora@a',
      billing_accounts: 'a nora',
      billing_transactions: 'nora',
      budgets: 'nora@a nora@a nora@nora',
      holds: 'nora@a nora@nora',
      tenants: 'a',
      usage_logs: 'nora@a nora@nora',
      user_profiles: 'nora',
      virtual_keys: 'nora',
    },
  ],
  ["a user who left: the tenant's account is no longer visible", { user_id: ids.eve }, alone('eve')],
  ['by `sub`, keyledger’s id', { sub: ids.mary }, mary],
  ["by `sub`, the host's id", { sub: 'host|mary' }, mary],
  ['`user_id` null leaves `sub`', { user_id: null, sub: 'host|mary' }, mary],
  ['`user_id` goes before `sub`', { user_id: ids.sam, sub: 'host|mary' }, sam],
  ["by `user_id`, the host's id", { user_id: 'host|mary' }, mary],
  ["an unknown `user_id` doesn't fall back to `sub`", { user_id: randomUUID(), sub: 'host|mary' }, nothing],
  ['an empty `user_id` leaves `sub`', { user_id: '', sub: 'host|mary' }, mary],
  ['a stranger', { user_id: randomUUID() }, nothing],
  ['no claim at all', {}, nothing],
  ['an object for an id', { user_id: { id: ids.mary } }, nothing],
  ['an array of ids', { user_id: [ids.mary, ids.sam] }, nothing],
  ['a number', { user_id: 1 }, nothing],
  ['SQL in a claim', { user_id: `${ids.mary}' or true --` }, nothing],
  [
    'claims of rights, which only the tables decide',
    { user_id: ids.mary, tenant_role: 'admin', tenant_id: ids.b },
    mary,
  ],
]
for (const [who, claims, expected] of readers)
  test(`${who}`, async () => {
    assert.equal(await sees(db.as('keyledger_member', claims)), expected)
  })

test("a role in the claims counts for nothing: the database's role decides", async () => {
  const session = await db.session('keyledger_member')
  try {
    const claims = JSON.stringify({ role: 'keyledger_operator', user_id: ids.mary })
    await session.query(`select set_config('request.jwt.claims', $1, false)`, [claims])
    assert.equal(await sees(async (sql) => (await session.query(sql)).rows), mary)
    // no claims, as a text that is none, and as JSON that is no object
    for (const [text, expected] of [
      ['', nothing],
      ['null', nothing],
      ['[]', nothing],
      ['"keyledger_operator"', nothing],
    ] as const) {
      await session.query(`select set_config('request.jwt.claims', $1, false)`, [text])
      assert.equal(await sees(async (sql) => (await session.query(sql)).rows), expected, text)
    }
    await session.query(`select set_config('request.jwt.claims', 'no json', false)`)
    for (const sql of Object.values(shown)) assert.is((await failure(session.query(sql))).code, '22P02', sql)
  } finally {
    await session.end()
  }
})

test('a member sees no list price, node, mount or parked event', async () => {
  const member = db.member(ids.mary!)
  for (const view of ['prices', 'config_nodes', 'virtual_key_config_nodes', 'parked_usage'])
    assert.is((await failure(member(`select from api.${view}`))).code, '42501', view)
})

test('gateway and operator see every row', async () => {
  const everyone = people.map(([name]) => name)
  for (const reader of [gateway, operator]) {
    const seen = (await reader('select user_id from api.account_balances')).map(({ user_id }) =>
      nameOf(user_id),
    )
    assert.equal(seen.filter((name) => name !== 'others').sort(), [...everyone].sort())
  }
  const seen = await sees(operator)
  assert.is(seen.accounting_snapshots, 'a b sam')
  assert.is(seen.usage_logs, 'adam@a bob@b eve@a eve@eve mary@a nora@a nora@nora sam@sam')
  assert.is((await operator('select from api.parked_usage')).length, 1)
})

test("the figures that a member sees are the account's", async () => {
  const read =
    'select account_id, balance::text, frozen_balance::text, available::text from api.account_balances'
  // four members topped up 10, held 1 and used 0.0025 each
  assert.equal(await db.member(ids.mary!)(read), [
    {
      account_id: ids.a,
      balance: '39.9900000000',
      frozen_balance: '4.0000000000',
      available: '35.9900000000',
    },
  ])
})

test("a member's token gets the same rows through PostgREST", async () => {
  const { url, token } = await db.postgrest()
  for (const [name, expected] of [
    ['mary', mary],
    ['sam', sam],
  ] as const) {
    const rpc = postgrestRpc({ url, token: await token({ role: 'keyledger_member', user_id: ids[name] }) })
    const rows = await rpc.rows<Row>('usage_logs', { select: ['user_id', 'account_id'] })
    assert.is(
      rows.map((row) => `${nameOf(row.user_id)}@${nameOf(row.account_id)}`).join(' '),
      expected.usage_logs,
    )
    const refused = await failure(rpc.call<unknown>('top_up', { account_id: ids[name], amount: '1' }))
    assert.equal([refused.code, refused.status], ['permission_denied', 403])
  }
})

test.run()
