// No line of the server's log has the key of a call: of a plain, slow, failed or cancelled statement.
import { createHash, randomBytes } from 'node:crypto'
import pg from 'pg'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { startPostgrest } from '../../scripts/servers.ts'
import { until } from '../../scripts/supervise.ts'
import type { Rpc } from '../../src/rpc.ts'
import { pgRpc } from '../../src/rpc-pg.ts'
import { postgrestRpc } from '../../src/rpc-postgrest.ts'
import { failure } from '../support/failure.ts'
import { ownPostgres } from '../support/postgres.ts'
import { seed } from '../support/seed.ts'

const test = suite('server log')
const server = await ownPostgres([
  ...['log_statement=all', 'log_min_duration_statement=0', 'log_min_error_statement=debug5'],
  ...['log_parameter_max_length=-1', 'log_parameter_max_length_on_error=-1'],
])
const postgrest = await startPostgrest({ databaseUrl: server.loginUrl })
const dba = new pg.Client(server.url)
await dba.connect()
const operator = async (text: string, values?: unknown[]) => {
  await dba.query('set role keyledger_operator')
  const { rows } = await dba.query(text, values)
  await dba.query('reset role')
  return rows
}
const rpcs: Record<string, Rpc> = {
  pg: pgRpc({ connectionString: server.loginUrl, timeout: 1000 }),
  postgrest: postgrestRpc({
    url: postgrest.url,
    token: await postgrest.token({ role: 'keyledger_gateway' }),
    timeout: 1000,
  }),
}
test.after(async () => {
  await rpcs.pg!.close()
  await dba.end()
  await postgrest.stop()
  await server.stop()
})

const hashOf = (key: string) => createHash('sha256').update(key).digest('hex')

for (const [name, rpc] of Object.entries(rpcs)) {
  const resolve = (vk: string, column = 'account_id') =>
    rpc.call<{ account_id: string }>('resolve_billing_account' as string, { vk }, { select: [column] })

  test(`${name}: the log has the hash and not the key, of a call that succeeds, fails or times out`, async () => {
    const { key, accountId } = await seed(operator)
    const unknown = `sk-${randomBytes(16).toString('hex')}`
    assert.is((await resolve(key)).account_id, accountId)
    assert.is((await failure(resolve(unknown))).code, 'virtual_key_unknown')
    assert.is((await failure(resolve(key, 'no_such_column'))).code, 'column_not_found')
    await dba.query('begin; lock table data.virtual_key in access exclusive mode')
    try {
      assert.is((await failure(resolve(key))).code, 'lock_timeout')
      assert.is((await failure(resolve(unknown))).code, 'lock_timeout')
    } finally {
      await dba.query('commit')
    }
    for (const each of [key, unknown])
      await until(() => server.log().includes(hashOf(each)), 'the call to be logged')
    if (name === 'pg') assert.match(server.log(), 'canceling statement due to lock timeout')
    for (const each of [key, unknown])
      assert.not.ok(`${server.log()}${postgrest.log()}`.includes(each.slice(5)))
  })

  test(`${name}: the key’s hash resolves the account; a malformed key or hash is refused`, async () => {
    const { key, accountId } = await seed(operator)
    const by = (args: Record<string, unknown>) =>
      rpc.call<{ account_id: string }>('resolve_billing_account' as string, args)
    assert.is((await by({ key_hash: hashOf(key) })).account_id, accountId)
    for (const args of [
      {},
      { vk: null },
      { key_hash: key },
      { key_hash: hashOf(key).toUpperCase() },
      { vk: hashOf(key) },
    ])
      assert.is((await failure(by(args))).code, 'virtual_key_unknown')
    for (const vk of ['\0', '\ud800', `${key}\0`])
      assert.is((await failure(by({ vk }))).code, 'invalid_input')
  })
}

test.run()
