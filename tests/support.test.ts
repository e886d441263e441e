// The helpers the other tests stand on.
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database, once } from './support/database.ts'
import { failure } from './support/failure.ts'
import { seed } from './support/seed.ts'

const test = suite('support')
const db = await database(test)

test('a seeded key resolves to its payer, with its money', async () => {
  for (const alone of [false, true]) {
    const world = await seed(db.operator, { alone, funds: '12.5' })
    const [key] = await db.gateway('select * from api.resolve_virtual_key($1)', [world.keyHash])
    assert.is(key!.virtual_key_id, world.keyId)
    assert.is(key!.account_id, world.accountId)
    assert.is(key!.tenant_id, world.tenantId)
    assert.is(key!.code, null)
    assert.equal(key!.config_node_ids, [world.nodeId])
    const [{ available }] = (await db.member(world.userId)(
      'select available::text from api.account_balances',
    )) as [{ available: string }]
    assert.is(Number(available), 12.5)
  }
})

test('roles are real: the login role alone can do nothing, and claims end with their transaction', async () => {
  assert.is((await failure(once(db.loginUrl, 'select api.new_id()'))).code, '42501')
  assert.is((await failure(db.gateway(`select api.top_up(gen_random_uuid(), 1)`))).code, '42501')
  const session = await db.session()
  const { rows } = await session.query(`select current_setting('request.jwt.claims', true) as claims`)
  assert.not(rows[0].claims)
  await session.end()
})

test('PostgREST answers with the token of a role', async () => {
  const { url, token } = await db.postgrest()
  const call = async (headers: Record<string, string>) =>
    (await fetch(`${url}/rpc/new_id`, { method: 'POST', headers })).status
  assert.is(await call({ authorization: `Bearer ${await token({ role: 'keyledger_gateway' })}` }), 200)
  assert.is(await call({}), 401)
  assert.is(await call({ authorization: `Bearer ${await token({ role: 'postgres' })}` }), 403)
})

test('a session that waits for a lock is seen to wait', async () => {
  const { accountId } = await seed(db.operator)
  const [first, second] = [await db.session(), await db.session()]
  const lock = `select from data.account_balance where account_id = '${accountId}' for update`
  await first.query(`begin; ${lock}`)
  const waiting = second.query(lock)
  await db.blocked(second)
  await first.query('commit')
  await waiting
  await first.end()
  await second.end()
})

test.run()
