// Roads of dbmate that lead nowhere say so: a rollback is none, and a load without grants is no install.
import { execFile } from 'node:child_process'
import { readdirSync, readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { resolveBinary as dbmate } from 'dbmate'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { pgRpc } from '../../src/rpc-pg.ts'
import { postgrestRpc } from '../../src/rpc-postgrest.ts'
import { database } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { seed } from '../support/seed.ts'

const test = suite('rollback')
const db = await database(test)
const migrations = new URL('../../db/migrations/', import.meta.url)
const files = readdirSync(migrations).sort()

const run = (command: string): Promise<{ stdout: string; stderr: string }> => {
  const flags = ['--migrations-dir', fileURLToPath(migrations), '--migrations-table', 'keyledger.migrations']
  return promisify(execFile)(dbmate(), ['--url', db.url, ...flags, '--no-dump-schema', command])
}
const versions = async () => await db.sql('select version from keyledger.migrations order by 1')
const counts = () =>
  db.sql(`
    select (select count(*) from pg_proc where pronamespace in ('data'::regnamespace, 'api'::regnamespace)) as functions,
      (select count(*) from pg_class where relnamespace in ('data'::regnamespace, 'api'::regnamespace)) as relations,
      (select count(*) from data.account_balance) as accounts`)

test('dbmate rollback fails in plain words, changes nothing, and up goes on as before', async () => {
  await seed(db.operator)
  const before = [await versions(), await counts()]
  assert.is(before[0]!.length, files.length)
  for (const command of ['rollback', 'down', 'rollback']) {
    const { stderr } = await failure(run(command))
    assert.match(stderr, "keyledger can't be rolled back: a ledger keeps its history. Nothing was changed")
    assert.equal([await versions(), await counts()], before)
    await run('up')
    assert.equal([await versions(), await counts()], before)
  }
})

test('each file refuses to be rolled back, as the last applied', async () => {
  const all = await versions()
  for (const file of files.toReversed()) {
    assert.match(
      readFileSync(new URL(file, migrations), 'utf8'),
      /\n-- migrate:down\ndo \$\$ begin\n {2}raise /,
    )
    const { stderr } = await failure(run('rollback'))
    assert.match(stderr, "keyledger can't be rolled back", file)
    const last = file.slice(0, 14)
    const left = await db.sql('delete from keyledger.migrations where version = $1 returning version', [last])
    assert.equal(left, [{ version: last }], 'it was still recorded')
  }
  await db.sql('insert into keyledger.migrations select unnest($1::text[])', [all.map((row) => row.version)])
})

test('a database loaded without grants is told by both transports', async () => {
  const { url, token } = await db.postgrest()
  const rpcs = [
    pgRpc({ connectionString: db.loginUrl }),
    postgrestRpc({ url, token: () => token({ role: 'keyledger_gateway' }) }),
  ]
  const hints = async () => {
    for (const rpc of rpcs) {
      const { code, hint } = await failure(rpc.call('new_id'))
      assert.is(code, 'permission_denied')
      assert.match(hint, 'loaded from a dump without privileges: install by `dbmate up`')
    }
  }
  for (const rpc of rpcs) await rpc.call('new_id')
  await db.sql(`revoke usage on schema api from keyledger_gateway, keyledger_operator, keyledger_member`)
  await hints()
  await db.sql(`grant usage on schema api to keyledger_gateway, keyledger_operator, keyledger_member`)
  for (const rpc of rpcs) {
    // another refusal keeps its own hint
    const denied = await failure(rpc.call('top_up', { account_id: crypto.randomUUID(), amount: '1' }))
    assert.is(denied.code, 'permission_denied')
    assert.not.match(denied.hint, 'dump')
    await rpc.close?.()
  }
})

test.run()
