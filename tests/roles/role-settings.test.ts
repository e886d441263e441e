// Settings of roles, which PostgREST applies to requests; and the warnings about decisions left to an operator.
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database, type Row } from '../support/database.ts'

const test = suite('role settings')
const db = await database(test)
await db.sql(`create function api.timeouts() returns jsonb language sql as $$
  select jsonb_build_object('statement', current_setting('statement_timeout'), 'lock', current_setting('lock_timeout')) $$`)
await db.sql(`create function api.dawdle() returns text language sql as 'select pg_sleep(60)::text'`)
await db.sql(`grant execute on function api.timeouts(), api.dawdle()
  to keyledger_gateway, keyledger_operator, keyledger_member`)

const call = async (fn: string, role: string) => {
  const { url, token } = await db.postgrest()
  const answer = await fetch(`${url}/rpc/${fn}`, {
    method: 'POST',
    headers: { authorization: `Bearer ${await token({ role })}`, 'content-type': 'application/json' },
    body: '{}',
  })
  return (await answer.json()) as Row
}

test('PostgREST applies the settings of each role', async () => {
  assert.equal(await call('timeouts', 'keyledger_member'), { lock: '0', statement: '5s' })
  assert.equal(await call('timeouts', 'keyledger_gateway'), { lock: '0', statement: '10s' })
  assert.equal(await call('timeouts', 'keyledger_operator'), { lock: '4s', statement: '0' })
})

test('a member’s statement ends when its time is over', async () => {
  assert.is((await call('dawdle', 'keyledger_member')).code, '57014')
})

test('installation_warnings reports an open database and a role without a timeout', async () => {
  const warnings = async (): Promise<string[]> =>
    (await db.operator('select code from api.installation_warnings()')).map(({ code }) => code)
  assert.equal(await warnings(), ['every_login_may_connect'])
  const [{ hint }] = (await db.operator('select hint from api.installation_warnings()')) as [Row]
  const login = new URL(db.loginUrl).username
  for (const line of hint.split('; ')) await db.sql(line.replace(/<.*>/, login))
  assert.equal(await warnings(), [])
  assert.is((await db.operator('select 1 as it'))[0]!.it, 1)
  // in this transaction only: roles belong to the cluster, and other files need the settings
  const session = await db.session()
  try {
    await session.query('begin; alter role keyledger_member reset statement_timeout')
    const { rows } = await session.query('select code, detail from api.installation_warnings()')
    assert.equal(
      rows.map(({ code }) => code),
      ['no_statement_timeout'],
    )
    assert.match(rows[0].detail, 'keyledger_member')
    await session.query('rollback')
  } finally {
    await session.end()
  }
})

// they lock nothing
const none = ['new_id', 'spend']

test('every function that may wait for a lock has a bound', async () => {
  const unbound = await db.sql(`
    select p.proname::text as name from pg_proc p
    where p.pronamespace = 'api'::regnamespace and p.provolatile = 'v' and p.prosecdef
      and not exists (select from unnest(p.proconfig) c where c ~ '^lock_timeout=' and c <> 'lock_timeout=0')
    order by 1`)
  assert.equal(
    unbound.map(({ name }) => name).filter((name) => !none.includes(name)),
    [],
  )
})

test.run()
