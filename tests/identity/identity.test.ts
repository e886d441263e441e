// Writes through the views, and their refusals, for every role: identities are fixed, history is append-only.
import { randomUUID } from 'node:crypto'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database, type Role, type Row } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { seed } from '../support/seed.ts'

const test = suite('identity')
const db = await database(test)
const { operator, gateway } = db

test('an operator writes every writable view through PostgREST, and no column beyond', async () => {
  const { url, token } = await db.postgrest()
  const authorization = `Bearer ${await token({ role: 'keyledger_operator' })}`
  const send = async (method: string, path: string, body?: object): Promise<[number, Row]> => {
    const headers = { authorization, 'content-type': 'application/json', prefer: 'return=representation' }
    const response = await fetch(`${url}/${path}`, { method, headers, body: body && JSON.stringify(body) })
    const answer = JSON.parse((await response.text()) || '{}')
    return [response.status, Array.isArray(answer) ? answer[0] : answer]
  }
  const insert = async (view: string, row: object): Promise<Row> => {
    const [status, answer] = await send('POST', view, row)
    assert.is(status, 201, `${view}: ${JSON.stringify(answer)}`)
    return answer
  }
  const tenant = await insert('tenants', {
    name: 'by http',
    external_id: 'x',
    currency: 'EUR',
    status: 'active',
  })
  const user = await insert('user_profiles', {
    tenant_id: tenant.id,
    tenant_role: 'admin',
    external_id: 'by http',
    display_name: 'd',
    currency: 'EUR',
    status: 'active',
  })
  assert.is(user.account_id, tenant.id)
  const node = await insert('config_nodes', { name: 'by http', provider: 'p', model: 'm', endpoint: 'e' })
  await insert('prices', {
    config_node_id: node.id,
    meter: 'input_tokens',
    unit_price: '2.5',
    unit_size: 1000000,
    currency: 'EUR',
    effective_from: '2020-01-01T00:00:00Z',
  })
  const [key] = await operator('select id from api.create_virtual_key($1)', [user.id])
  await insert('virtual_key_config_nodes', { virtual_key_id: key!.id, config_node_id: node.id })
  const patch = (path: string, row: object) => send('PATCH', path, row).then(([status]) => status)
  assert.is(
    await patch(`tenants?id=eq.${tenant.id}`, { name: 'n', external_id: 'y', status: 'suspended' }),
    200,
  )
  assert.is(await patch(`user_profiles?id=eq.${user.id}`, { tenant_id: null, status: 'suspended' }), 200)
  assert.is(await patch(`config_nodes?id=eq.${node.id}`, { status: 'disabled' }), 200)
  assert.is((await send('DELETE', `virtual_key_config_nodes?virtual_key_id=eq.${key!.id}`))[0], 200)

  const refused: [path: string, row: object][] = [
    [`tenants?id=eq.${tenant.id}`, { id: randomUUID() }],
    [`tenants?id=eq.${tenant.id}`, { currency: 'USD' }],
    [`user_profiles?id=eq.${user.id}`, { id: randomUUID() }],
    [`user_profiles?id=eq.${user.id}`, { currency: 'USD' }],
    [`prices?config_node_id=eq.${node.id}`, { unit_price: '0' }],
    [`virtual_keys?id=eq.${key!.id}`, { status: 'active' }],
    [`billing_accounts?account_id=eq.${tenant.id}`, { balance: '1' }],
    [`billing_transactions?account_id=eq.${tenant.id}`, { amount: '1' }],
  ]
  for (const [path, row] of refused) {
    const [, { code }] = await send('PATCH', path, row)
    // a fixed column, no right; 55000: a view of several tables, which nobody can write
    const fixed = 'id' in row || 'currency' in row
    assert.ok(
      (fixed ? ['PT409'] : ['42501', '55000']).includes(code),
      `${path} ${JSON.stringify(row)}: ${code}`,
    )
  }
  for (const view of ['tenants', 'user_profiles', 'config_nodes', 'prices'])
    assert.is((await send('DELETE', `${view}?created_at=lt.2000-01-01`))[0], 403, view)
})

test('ids, currencies and owners are fixed, closed and revoked are final', async () => {
  const { tenantId, keyId } = await seed(operator)
  const other = await seed(operator, { alone: true })
  const cases: [sql: string, code: string, message?: string][] = [
    [`update data.tenant set id = gen_random_uuid() where id = '${tenantId}'`, 'PT409', 'id_is_fixed'],
    [`update data.tenant set currency = 'EUR' where id = '${tenantId}'`, 'PT409', 'currency_is_fixed'],
    [
      `update data.user_profile set currency = 'EUR' where id = '${other.userId}'`,
      'PT409',
      'currency_is_fixed',
    ],
    [`update data.virtual_key set user_id = '${other.userId}' where id = '${keyId}'`, 'PT409', 'id_is_fixed'],
    [`delete from data.tenant where id = '${tenantId}'`, '23503'],
    [`delete from data.user_profile where id = '${other.userId}'`, '23503'],
    [`insert into data.user_profile (id) values ('${tenantId}')`, '23505'],
    [`insert into data.tenant (id, name) values ('${other.userId}', 'x')`, '23505'],
  ]
  for (const [sql, code, message] of cases) {
    const error = await failure(db.sql(sql))
    assert.is(error.code, code, `${sql}: ${error.message}`)
    if (message) assert.is(error.message, message, sql)
  }
  await operator(`update api.tenants set status = 'closed' where id = $1`, [tenantId])
  const reopened = await failure(
    operator(`update api.tenants set status = 'active' where id = $1`, [tenantId]),
  )
  assert.equal([reopened.code, reopened.message], ['PT409', 'closed_is_final'])
  await operator('select status from api.revoke_virtual_key($1)', [keyId])
  const revived = await failure(
    db.sql(`update data.virtual_key set status = 'active', revoked_at = null where id = $1`, [keyId]),
  )
  assert.equal([revived.code, revived.message], ['PT409', 'revoked_is_final'])
})

test('an owner and its account commit together, or not at all', async () => {
  const id = randomUUID()
  const two =
    'insert into api.tenants (id, name, external_id) values ($1, $2, $2), (gen_random_uuid(), $2, $3)'
  const account = () => db.sql('select currency from data.account_balance where account_id = $1', [id])
  assert.is((await failure(db.sql(two, [id, 'same', 'same']))).code, '23505')
  assert.equal(await account(), [])
  await db.sql(two, [id, 'one', 'other'])
  assert.equal(await account(), [{ currency: 'USD' }])
})

test("history can't be changed: not by a role, nor by the owner of the database", async () => {
  const { accountId, keyId, nodeId } = await seed(operator)
  const [{ status }] = (await gateway(
    `select api.record_usage(jsonb_build_array(jsonb_build_object('id', api.new_id(), 'account_id', $1::text,
      'virtual_key_id', $2::text, 'config_node_id', $3::text, 'meters', '{"input_tokens": 1}'::jsonb))) -> 0 ->> 'status' as status`,
    [accountId, keyId, nodeId],
  )) as [Row]
  assert.is(status, 'charged')
  const partitions = await db.sql(`select inhrelid::regclass::text as name from pg_inherits
    where inhparent = 'data.usage_log'::regclass order by 1`)
  const months = partitions.map(({ name }) => name)
  const [{ month }] = (await db.sql('select tableoid::regclass::text as month from data.usage_log')) as [Row]
  assert.ok(months.length >= 4 && months.includes(month))
  const history = ['data.billing_transaction', 'data.usage_log', 'data.price']
  const statements = [
    'update data.billing_transaction set reason = reason',
    'update data.usage_log set cost = cost',
    `update ${month} set cost = 0`,
    'update data.price set unit_price = unit_price',
    ...[...history, month].map((table) => `delete from ${table}`),
    ...[...history, ...months].map((table) => `truncate ${table} cascade`),
    ...['account_balance', 'tenant', 'user_profile', 'config_node'].map(
      (table) => `truncate data.${table} cascade`,
    ),
    'truncate data.virtual_key cascade',
    'truncate data.virtual_key_config_node',
  ]
  for (const sql of statements) {
    const { code, message } = await failure(db.sql(sql))
    assert.is(code, 'PT409', `${sql}: ${message}`)
    assert.ok(
      ['append_only', 'truncate_forbidden', 'account_is_fixed'].includes(message),
      `${sql}: ${message}`,
    )
    for (const role of ['keyledger_gateway', 'keyledger_operator', 'keyledger_member'] as Role[])
      assert.is((await failure(db.as(role)(sql))).code, '42501', `${role}: ${sql}`)
  }
})

test.run()
