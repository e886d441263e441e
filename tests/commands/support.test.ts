// The helpers the other tests stand on.
import { spawn } from 'node:child_process'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database, once, testServer } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { seed } from '../support/seed.ts'

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
  // one that did not wait is not waited for
  await db.blocked(second, second.query('select 1'))
  await first.end()
  await second.end()
})

// a file that does `what`, and how it ended
async function file(what: string) {
  const at = (path: string) => JSON.stringify(new URL(path, import.meta.url).href)
  const code = `
    import { suite } from 'uvu'
    import { database } from ${at('../support/database.ts')}
    const test = suite('leaks')
    const db = await database(test)
    test('one', async () => { ${what} })
    test.run()`
  const argv = [...process.execArgv, '--input-type=module', '-e', code]
  const child = spawn(process.execPath, argv, { stdio: ['ignore', 'pipe', 'pipe'] })
  let said = ''
  for (const stream of [child.stdout, child.stderr]) stream.on('data', (text) => (said += text))
  const start = performance.now()
  const exit = await new Promise((resolve) => child.on('close', resolve))
  return {
    exit,
    said,
    seconds: (performance.now() - start) / 1000,
    name: `${testServer().template}_${child.pid}`,
  }
}

test('a client on its way back at the end of a file is waited for', async () => {
  const { exit, said } = await file(`void db.sql('select pg_sleep(0.3)')`)
  assert.is(exit, 0, said)
})

const leaks: Record<string, [what: string, says: RegExp]> = {
  'a client of its pools': [
    `await db.as('keyledger_gateway')('select 1'); void db.sql('select pg_sleep(60)').catch(() => {})`,
    /a client was never released/,
  ],
  'a session': [`await db.session('keyledger_gateway')`, /connections left open/],
  'what onClose throws': [`db.onClose(() => { throw new Error('could not close') })`, /could not close/],
}
for (const [name, [what, says]] of Object.entries(leaks))
  test(`a file that leaves ${name} fails, says so after its results, and ends`, async () => {
    const { exit, said, seconds, name } = await file(what)
    assert.is(exit, 1, said)
    assert.match(said, says)
    assert.match(said, /Passed: +1/)
    assert.ok(seconds < 30, `${seconds} s`)
    assert.equal(await db.sql('select from pg_database where datname = $1', [name]), [])
  })

test.run()
