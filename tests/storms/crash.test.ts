// kill -9 of Postgres under load: answered calls stay, a retry settles the others, nothing is charged twice.
import pg from 'pg'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import type { Server } from '../../scripts/servers.ts'
import { until } from '../../scripts/supervise.ts'
import { createBillingModule, pgRpc, type UsageAnswer, type UsageEvent } from '../../src/index.ts'
import type { Sql } from '../support/database.ts'
import { newId } from '../support/ids.ts'
import { holdsTrue, units } from '../support/ledger.ts'
import { ownPostgres } from '../support/postgres.ts'
import { seed, type World } from '../support/seed.ts'

const test = suite('crash')
let server: Server & { loginUrl: string }
test.before(async () => {
  server = await ownPostgres()
})
test.after(() => server.stop())

// One statement on a connection of its own: none survives the crash.
const on = (url: string, role?: string): Sql => {
  return async (text, values) => {
    const client = new pg.Client(url)
    await client.connect()
    try {
      if (role) await client.query(`set role ${role}`)
      return (await client.query(text, values)).rows
    } finally {
      await client.end()
    }
  }
}

interface Sent {
  event: UsageEvent & { id: string }
  answer?: UsageAnswer
  failed?: true
}

// Holds and records on every account until the server is gone; never retries a failed call.
async function load(worlds: World[], sent: Sent[], gone: () => boolean) {
  const rpc = pgRpc({ connectionString: server.loginUrl, timeout: 2000 })
  const billing = createBillingModule({ rpc, holdDeadline: 2000, recordDeadline: 1 })
  const caller = async (world: World, n: number) => {
    const context = await billing.validate(world.key)
    while (!gone()) {
      const hold = await billing.hold(context, { amount: '0.01' }).catch(() => undefined)
      const event = {
        id: newId(),
        account_id: world.accountId,
        virtual_key_id: world.keyId,
        config_node_id: world.nodeId,
        meters: { input_tokens: 400 + n }, // 0.001 and a little
        hold_id: hold?.id,
      }
      const one: Sent = { event }
      sent.push(one)
      one.answer = await billing.recordUsage(event).catch(() => {
        one.failed = true
        return undefined
      })
    }
  }
  await Promise.all(Array.from({ length: 48 }, (_, n) => caller(worlds[n % worlds.length]!, n)))
  await billing.stop()
  await rpc.close()
}

const priced = ({ event }: Sent) => units('0.0000025') * BigInt(event.meters.input_tokens as number)

test('after each of three crashes everything verifies, and a retry of everything charges each event once', async () => {
  const operator = on(server.loginUrl, 'keyledger_operator')
  const sql = on(server.url)
  const worlds = await Promise.all(Array.from({ length: 4 }, () => seed(operator)))
  const all: Sent[] = []

  for (let crash = 0; crash < 3; crash++) {
    const sent: Sent[] = []
    let gone = false
    const loading = load(worlds, sent, () => gone)
    await until(() => sent.filter(({ answer }) => answer).length > 1000, 'a load')
    await server.kill9()
    // backends still answer the calls they had begun, and none after these
    await until(() => sent.some(({ failed }) => failed), 'a call to fail')
    gone = true
    await loading
    await server.restart()
    await holdsTrue(sql)

    // everything again, to a module that doesn't know of the crash
    const rpc = pgRpc({ connectionString: server.loginUrl })
    const billing = createBillingModule({ rpc })
    all.push(...sent)
    const again = await Promise.all(all.map(({ event }) => billing.recordUsage(event)))
    await billing.stop()
    await rpc.close()
    for (const [i, { answer }] of all.entries()) {
      const { status, cost, seq, mismatch } = again[i]!
      if (answer)
        assert.equal([status, cost, seq], ['duplicate', answer.cost, answer.seq], 'an answer was lost')
      assert.ok(status === 'duplicate' || status === 'charged')
      assert.is(mismatch, undefined)
      assert.is(units(cost!), priced(all[i]!))
      all[i]!.answer = again[i]!
    }
    await holdsTrue(sql)
  }

  const logged = await sql(
    'select id::text, count(*)::int, sum(cost) as cost from data.usage_log group by id',
  )
  assert.is(logged.length, all.length)
  assert.ok(logged.every(({ count }) => count === 1))
  const total = all.reduce((sum, one) => sum + priced(one), 0n)
  const [{ charged }] = (await sql(
    `select -sum(amount) as charged from data.billing_transaction where kind = 'usage'`,
  )) as [{ charged: string }]
  assert.is(units(charged), total)
})

test.run()
