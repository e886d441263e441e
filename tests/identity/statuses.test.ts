// The history of statuses: every change, whatever made it, with its actor, and its reason if one was given.
import { randomUUID } from 'node:crypto'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database, type Row, type Sql } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { seed } from '../support/seed.ts'

const test = suite('statuses')
const db = await database(test)
const olga = db.as('keyledger_operator', { sub: 'olga' })

const history = async (id: string | null, sql: Sql = db.operator) =>
  (await sql('select * from api.status_changes where entity_id = $1 order by id', [id])).map(
    ({ entity, old_status, new_status, actor, reason }) =>
      `${entity} ${old_status} > ${new_status} by ${actor}: ${reason}`,
  )
const set = (entity: string | null, id: string | null, status: string | null, reason?: string) =>
  olga('select * from api.set_status($1, $2, $3, $4)', [entity, id, status, reason ?? null])

test('the history keeps a plain update, a function’s change and the owner’s change', async () => {
  const { tenantId, userId, keyId, nodeId } = await seed(db.operator)
  await olga(`update api.tenants set status = 'suspended' where id = $1`, [tenantId])
  await db.sql(`update data.tenant set status = 'active' where id = $1`, [tenantId])
  await olga(`update api.user_profiles set display_name = 'x', status = 'suspended' where id = $1`, [userId])
  await olga('select id from api.revoke_virtual_key($1)', [keyId])
  await olga(`update api.config_nodes set status = 'disabled' where id = $1`, [nodeId])
  const [{ me }] = (await db.sql('select current_user as me')) as [Row]
  assert.equal(await history(tenantId), [
    'tenant active > suspended by olga: null',
    `tenant suspended > active by ${me}: null`,
  ])
  assert.equal(await history(userId), ['user_profile active > suspended by olga: null'])
  assert.equal(await history(keyId), ['virtual_key active > revoked by olga: null'])
  assert.equal(await history(nodeId), ['config_node active > disabled by olga: null'])
})

test('an update without a new status, or one that fails, leaves no history; a row inserted as suspended does', async () => {
  const { tenantId, userId } = await seed(db.operator)
  await olga(`update api.tenants set status = 'active', name = 'n' where id = $1`, [tenantId])
  await olga('update api.user_profiles set tenant_id = null where id = $1', [userId])
  assert.is(
    (await failure(olga(`update api.tenants set status = 'gone' where id = $1`, [tenantId]))).code,
    '23514',
  )
  assert.equal([...(await history(tenantId)), ...(await history(userId))], [])
  for (const [view, entity, column, status] of [
    ['tenants', 'tenant', 'name', 'suspended'],
    ['user_profiles', 'user_profile', 'display_name', 'suspended'],
    ['config_nodes', 'config_node', 'name', 'disabled'],
  ]) {
    const [row] = await olga(`insert into api.${view} (${column}, status) values ('new', $1) returning id`, [
      status,
    ])
    assert.equal(await history(row!.id), [`${entity} null > ${status} by olga: null`])
  }
})

test('set_status keeps the reason for its own change only', async () => {
  const { tenantId, userId, keyId, nodeId } = await seed(db.operator)
  const session = await db.session('keyledger_operator', { user_id: 'otto' })
  try {
    await session.query('begin')
    const { rows } = await session.query(
      `select * from api.set_status('tenant', $1, 'suspended', 'unpaid')`,
      [tenantId],
    )
    assert.equal(
      [rows[0].entity_id, rows[0].new_status, rows[0].actor, rows[0].reason],
      [tenantId, 'suspended', 'otto', 'unpaid'],
    )
    await session.query(`update api.user_profiles set status = 'suspended' where id = $1`, [userId])
    await session.query(`select api.set_status('virtual_key', $1, 'revoked', 'leaked')`, [keyId])
    await session.query(`select api.set_status('config_node', $1, 'disabled')`, [nodeId])
    await session.query('commit')
  } finally {
    await session.end()
  }
  assert.equal(await history(tenantId), ['tenant active > suspended by otto: unpaid'])
  assert.equal(await history(userId), ['user_profile active > suspended by otto: null'])
  assert.equal(await history(keyId), ['virtual_key active > revoked by otto: leaked'])
  assert.equal(await history(nodeId), ['config_node active > disabled by otto: null'])
  const [key] = await db.operator('select status, revoked_at from api.virtual_keys where id = $1', [keyId])
  assert.ok(key!.status === 'revoked' && key!.revoked_at)
})

test('setting the same status again changes nothing, and answers the last change', async () => {
  const { tenantId, keyId } = await seed(db.operator)
  assert.is((await set('tenant', tenantId, 'active', 'x'))[0]!.id, null)
  const [first] = await set('tenant', tenantId, 'suspended', 'first')
  assert.equal(await set('tenant', tenantId, 'suspended', 'again'), [first])
  const [revoked] = await set('virtual_key', keyId, 'revoked', 'first')
  assert.equal(await set('virtual_key', keyId, 'revoked', 'again'), [revoked])
})

test('PostgREST sets a status and keeps its reason too', async () => {
  const { tenantId } = await seed(db.operator)
  const { url, token } = await db.postgrest()
  const response = await fetch(`${url}/rpc/set_status`, {
    method: 'POST',
    headers: {
      authorization: `Bearer ${await token({ role: 'keyledger_operator', sub: 'http' })}`,
      'content-type': 'application/json',
    },
    body: JSON.stringify({ entity: 'tenant', id: tenantId, status: 'suspended', reason: 'unpaid' }),
  })
  const answer = (await response.json()) as Row
  assert.equal([response.status, answer.reason, answer.new_status], [200, 'unpaid', 'suspended'])
  assert.equal(await history(tenantId), ['tenant active > suspended by http: unpaid'])
})

const refusals: [name: string, args: () => Promise<Parameters<typeof set>>, expected: string][] = [
  ['an unknown entity', async () => ['price', randomUUID(), 'active'], 'PT422 invalid_entity'],
  ['no entity', async () => [null, randomUUID(), 'active'], 'PT422 invalid_entity'],
  ['an unknown tenant', async () => ['tenant', randomUUID(), 'active'], 'PT404 tenant_not_found'],
  ['an unknown user', async () => ['user_profile', randomUUID(), 'active'], 'PT404 user_not_found'],
  ['an unknown node', async () => ['config_node', null, 'active'], 'PT404 config_node_not_found'],
  ['an unknown key', async () => ['virtual_key', randomUUID(), 'revoked'], 'PT404 virtual_key_unknown'],
  [
    "a tenant's status for a node",
    async () => ['config_node', (await seed(db.operator)).nodeId, 'suspended'],
    'PT422 invalid_status',
  ],
  ['no status', async () => ['tenant', (await seed(db.operator)).tenantId, null], 'PT422 invalid_status'],
  [
    'an active status for a revoked key',
    async () => ['virtual_key', (await seed(db.operator)).keyId, 'active'],
    'PT422 invalid_status',
  ],
  [
    'an active status for a closed tenant',
    async () => {
      const { tenantId } = await seed(db.operator)
      await set('tenant', tenantId, 'closed')
      return ['tenant', tenantId, 'active']
    },
    'PT409 closed_is_final',
  ],
]
for (const [name, args, expected] of refusals)
  test(`${name}: refused`, async () => {
    const given = await args()
    const before = await db.sql('select count(*) from data.status_change')
    const { code, message } = await failure(set(...given))
    assert.is(`${code} ${message}`, expected)
    assert.equal(await db.sql('select count(*) from data.status_change'), before)
  })

test('the history is append-only, even for its owner', async () => {
  const { tenantId } = await seed(db.operator)
  await set('tenant', tenantId, 'suspended', 'unpaid')
  for (const change of [
    `update data.status_change set reason = 'x' where entity_id = '${tenantId}'`,
    `delete from data.status_change where entity_id = '${tenantId}'`,
    'truncate data.status_change',
  ])
    assert.is((await failure(db.as('keyledger_owner')(change))).message, 'append_only', change)
})

test('each status is the last of its history, else active, also when changes overlap', async () => {
  const { tenantId } = await seed(db.operator)
  await Promise.all(
    Array.from({ length: 40 }, (_, i) =>
      db.operator('update api.tenants set status = $2 where id = $1', [
        tenantId,
        i % 2 ? 'suspended' : 'active',
      ]),
    ),
  )
  const changes = await db.operator(
    `select old_status, new_status, created_at >= lag(created_at, 1, '-infinity') over (order by id) as later
    from api.status_changes where entity_id = $1 order by id`,
    [tenantId],
  )
  assert.ok(changes.length > 0)
  changes.forEach(({ old_status, new_status, later }, i) => {
    assert.is(old_status, changes[i - 1]?.new_status ?? 'active')
    assert.ok(old_status !== new_status && later)
  })
  for (const table of ['tenant', 'user_profile', 'virtual_key', 'config_node'])
    assert.equal(
      await db.sql(`select e.id from data.${table} e where status <> coalesce((
        select c.new_status from data.status_change c where c.entity = '${table}' and c.entity_id = e.id
        order by c.id desc limit 1), 'active')`),
      [],
    )
})

test('a member sees changes of themselves and their keys, an admin those of the whole tenant', async () => {
  const { tenantId, userId, keyId, nodeId } = await seed(db.operator)
  const [admin] = await db.operator(
    `insert into api.user_profiles (tenant_id, tenant_role) values ($1, 'admin') returning id`,
    [tenantId],
  )
  const other = await seed(db.operator)
  for (const world of [{ tenantId, userId, keyId, nodeId }, other]) {
    await set('user_profile', world.userId, 'suspended')
    await set('tenant', world.tenantId, 'suspended')
    await set('virtual_key', world.keyId, 'revoked')
    await set('config_node', world.nodeId, 'disabled')
  }
  await set('user_profile', admin!.id, 'suspended')
  const seen = async (id: string) =>
    (await db.member(id)('select entity_id from api.status_changes order by id')).map(
      ({ entity_id }) => entity_id,
    )
  assert.equal(await seen(userId), [userId, keyId])
  assert.equal(await seen(admin!.id), [admin!.id], 'a suspended member sees their own changes')
  await set('user_profile', admin!.id, 'active')
  assert.equal(await seen(admin!.id), [userId, tenantId, keyId, admin!.id, admin!.id])
  assert.equal(await seen(randomUUID()), [])
})

test.run()
