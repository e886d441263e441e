// Members: which user a token's claims mean, and the rows left to see after a move or a suspension.
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database, type Row } from '../support/database.ts'
import { payer } from '../support/payer.ts'

const test = suite('members')
const db = await database(test)
const { operator } = db

const tenant = async (name: string): Promise<string> =>
  (await operator('insert into api.tenants (name) values ($1) returning id', [name]))[0]!.id
const [a, b] = (await Promise.all(['a', 'b'].map(tenant))) as [string, string]
const update = async (id: string, set: string, values: unknown[] = []): Promise<Row> =>
  (
    await operator(`update api.user_profiles set ${set} where id = $1 returning tenant_id, tenant_role`, [
      id,
      ...values,
    ])
  )[0]!
const admin = async (tenantId: string) => {
  const it = await payer(db, { tenantId })
  await update(it.userId, `tenant_role = 'admin'`)
  return it
}
const count = async (claims: Row, view: string): Promise<number> =>
  Number((await db.as('keyledger_member', claims)(`select count(*) as n from api.${view}`))[0]!.n)

test('a user who moves to another tenant becomes a member of it, unless the same update names a role', async () => {
  const { userId } = await admin(a)
  const others = await payer(db, { tenantId: b, funds: '1' })
  await others.use('1')
  assert.is(await count({ user_id: userId }, 'usage_logs'), 0)
  assert.equal(await update(userId, 'tenant_id = $2', [b]), { tenant_id: b, tenant_role: 'member' })
  assert.is(await count({ user_id: userId }, 'usage_logs'), 0)
  assert.is(await count({ user_id: userId }, 'billing_transactions'), 0)
  // a role named by an earlier update doesn't count for a move, even in one transaction
  const session = await db.session('keyledger_operator')
  try {
    await session.query('begin')
    await session.query(`update api.user_profiles set tenant_role = 'admin' where id = $1`, [userId])
    const { rows } = await session.query(
      'update api.user_profiles set tenant_id = $2 where id = $1 returning tenant_role',
      [userId, a],
    )
    assert.equal(rows, [{ tenant_role: 'member' }])
    await session.query('rollback')
  } finally {
    await session.end()
  }
  // a role named with the move is kept, even if it stays the same
  assert.is((await update(userId, `tenant_id = $2, tenant_role = 'admin'`, [a])).tenant_role, 'admin')
  assert.is((await update(userId, `tenant_role = 'admin', tenant_id = $2`, [b])).tenant_role, 'admin')
  assert.is(await count({ user_id: userId }, 'usage_logs'), 1)
  // an update without a move changes no role
  assert.is((await update(userId, 'tenant_id = $2, display_name = $3', [b, 'x'])).tenant_role, 'admin')
  assert.is((await update(userId, 'tenant_id = null')).tenant_role, 'member')
  // several at once, each by itself
  const two = [await admin(a), await payer(db, { tenantId: b })].map(({ userId }) => userId)
  const rows = await operator(
    'update api.user_profiles set tenant_id = $2 where id = any ($1) returning id, tenant_role',
    [two, a],
  )
  assert.equal(
    rows.map(({ tenant_role }) => tenant_role),
    ['admin', 'member'],
  )
})

test('through PostgREST a move keeps the role that its body names', async () => {
  const { userId } = await admin(a)
  const { url, token } = await db.postgrest()
  const patch = async (body: Row) => {
    const answer = await fetch(`${url}/user_profiles?id=eq.${userId}&select=tenant_role`, {
      method: 'PATCH',
      headers: {
        authorization: `Bearer ${await token({ role: 'keyledger_operator' })}`,
        'content-type': 'application/json',
        prefer: 'return=representation',
      },
      body: JSON.stringify(body),
    })
    return ((await answer.json()) as Row[])[0]!.tenant_role
  }
  assert.is(await patch({ tenant_id: b, tenant_role: 'admin' }), 'admin')
  assert.is(await patch({ tenant_id: a }), 'member')
})

test('a suspended or closed user reads their own rows, but neither the tenant’s figures nor others’ rows', async () => {
  const it = await admin(a)
  const mate = await payer(db, { tenantId: a })
  await it.topUp('10')
  await it.use('1')
  await mate.use('1')
  await it.hold('1')
  const views = [
    'usage_logs',
    'holds',
    'virtual_keys',
    'user_profiles',
    'account_balances',
    'billing_accounts',
    'billing_transactions',
    'tenants',
  ]
  const sees = async () => {
    const seen: Row = {}
    for (const view of views) seen[view] = await count({ user_id: it.userId }, view)
    return seen
  }
  const before = await sees()
  assert.ok(before.usage_logs > 1 && before.user_profiles > 1 && before.billing_transactions > 1)
  assert.is(before.billing_accounts, 2)
  const own = {
    usage_logs: 1,
    holds: 1,
    virtual_keys: 1,
    user_profiles: 1,
    account_balances: 0,
    billing_accounts: 1, // one's own, unused
    billing_transactions: 0,
    tenants: 1,
  }
  await update(it.userId, `status = 'suspended'`)
  assert.equal(await sees(), own)
  await update(it.userId, `status = 'active'`)
  assert.equal(await sees(), before)
  await update(it.userId, `status = 'closed'`)
  assert.equal(await sees(), own)
  // a user who pays alone still reads all their own rows
  const alone = await payer(db, { funds: '10' })
  await update(alone.userId, `status = 'suspended'`)
  for (const view of ['account_balances', 'billing_accounts', 'billing_transactions'])
    assert.is(await count({ user_id: alone.userId }, view), 1, view)
})

test('claim user_id, else sub, holds keyledger’s id or the host’s', async () => {
  const it = await payer(db)
  const victim = await payer(db)
  await update(it.userId, 'external_id = $2', ['42'])
  const who = async (claims: Row): Promise<string | undefined> =>
    (await db.as('keyledger_member', claims)('select id from api.user_profiles'))[0]?.id
  for (const claims of [
    { user_id: it.userId },
    { user_id: '42' },
    { user_id: 42 },
    { sub: '42' },
    { sub: it.userId },
    { user_id: '', sub: '42' },
    { user_id: null, sub: '42' },
    { user_id: '42', sub: victim.userId },
  ])
    assert.is(await who(claims), it.userId, JSON.stringify(claims))
  for (const claims of [{}, { user_id: '' }, { user_id: '', sub: '' }, { user_id: 'nobody', sub: '42' }])
    assert.is(await who(claims), undefined, JSON.stringify(claims))
  // keyledger's id comes first where a host's id looks the same
  await update(it.userId, 'external_id = $2', [victim.userId])
  assert.is(await who({ user_id: victim.userId }), victim.userId)
})

test('a NUL in a claim changes no identity, and fails no call', async () => {
  const it = await payer(db)
  const claims = { user_id: it.userId, note: 'a\0b\0\0', path: 'c:\\u0000', '\0': '\\\0' }
  assert.is(await count(claims, 'user_profiles'), 1)
  assert.is(await count({ user_id: `${it.userId}\0` }, 'user_profiles'), 0)
  const { url, token } = await db.postgrest()
  const answer = await fetch(`${url}/user_profiles?select=id`, {
    headers: { authorization: `Bearer ${await token({ role: 'keyledger_member', ...claims })}` },
  })
  assert.equal([answer.status, await answer.json()], [200, [{ id: it.userId }]])
  const [entry] = await db.as('keyledger_operator', { user_id: '', sub: 'ann\0' })(
    'select actor from api.top_up($1, 1)',
    [it.accountId],
  )
  assert.is(entry!.actor, 'ann\ufffd')
})

test.run()
