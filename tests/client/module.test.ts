// The billing module on real servers, through both transports: from a virtual key to an exact
// charge, and its failures.
import { inspect } from 'node:util'
import { Redis } from 'ioredis'
import type pg from 'pg'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { startPostgrest } from '../../scripts/servers.ts'
import { until } from '../../scripts/supervise.ts'
import { KeyledgerError } from '../../src/errors.ts'
import {
  type BillingModule,
  type BillingModuleOptions,
  createBillingModule,
  newId as makeId,
  pgRpc,
  postgrestRpc,
  type Rpc,
  type UsageEvent,
  type UserContext,
} from '../../src/index.ts'
import { database } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { newId } from '../support/ids.ts'
import { holdsTrue } from '../support/ledger.ts'
import { ownPostgres } from '../support/postgres.ts'
import { startProxy } from '../support/proxy.ts'
import { seed, type World } from '../support/seed.ts'

const test = suite('module')
const db = await database(test)
const server = await db.postgrest()
const rpcs: Record<string, () => Rpc> = {
  postgrest: () =>
    postgrestRpc({ url: server.url, token: () => server.token({ role: 'keyledger_gateway' }) }),
  pg: () => pgRpc({ connectionString: db.loginUrl }),
}

const refused = async (promise: Promise<unknown>, code: string, status: number) => {
  const error = await failure(promise)
  assert.instance(error, KeyledgerError, inspect(error))
  assert.equal([error.code, error.status], [code, status], inspect(error))
  return error as KeyledgerError
}

// An rpc that counts its calls, and fails those that `fails` names.
function counted(rpc: Rpc, fails: (fn: string) => unknown = () => undefined) {
  const calls: { fn: string; args?: Record<string, unknown> }[] = []
  const counting: Rpc = {
    ...rpc,
    async call<T>(fn: string, ...rest: [args?: Record<string, unknown>]) {
      calls.push({ fn, args: rest[0] })
      const error = fails(fn)
      if (error) throw error
      return rpc.call<T>(fn, ...rest)
    },
  }
  return { ...counting, calls, of: (fn: string) => calls.filter((call) => call.fn === fn) }
}

const tokens = { input_tokens: 374, output_tokens: 44 } // 0.000935 + 0.00044
const COST = '0.0013750000'
const use = (context: UserContext, world: World, more = {}): UsageEvent => ({
  ...context,
  config_node_id: world.nodeId,
  meters: tokens,
  ...more,
})
async function lockAccount(holder: pg.Client, { accountId }: World) {
  await holder.query('begin')
  await holder.query('select from data.account_balance where account_id = $1 for update', [accountId])
}
const usageOf = (id: string) =>
  db.sql('select account_id, cost::text from api.usage_logs where id = $1', [id])

for (const [name, make] of Object.entries(rpcs)) {
  const the = (
    what: string,
    run: (billing: BillingModule, rpc: ReturnType<typeof counted>) => Promise<void>,
  ) =>
    test(`${name}: ${what}`, async () => {
      const rpc = counted(make())
      const billing = createBillingModule({ rpc })
      try {
        await run(billing, rpc)
      } finally {
        await billing.stop()
        await rpc.close()
      }
      await holdsTrue(db.sql)
    })

  the('from a key to an exact charge', async (billing) => {
    const world = await seed(db.operator, { funds: '1' })
    const context = await billing.validate(world.key)
    assert.equal(context, {
      virtual_key_id: world.keyId,
      user_id: world.userId,
      tenant_id: world.tenantId,
      account_id: world.accountId,
      currency: 'USD',
      name: null,
      key_prefix: context.key_prefix,
      config_node_ids: [world.nodeId],
    })
    assert.ok(context.key_prefix.length < 16 && world.key.startsWith(context.key_prefix))
    assert.equal(await billing.checkBudget(context, '1.00'), {
      allowed: true,
      code: null,
      available: '1.0000000000',
      remaining: null,
      account_id: world.accountId,
      currency: 'USD',
    })
    assert.is((await billing.checkBudget(context, '1.01')).code, 'insufficient_funds')

    const hold = await billing.hold(context, { config_node_id: world.nodeId, meters: tokens, expires_in: 60 })
    assert.equal(
      { ...hold, id: '', expires_at: '' },
      { id: '', account_id: world.accountId, amount: COST, available: '0.9986250000', expires_at: '' },
    )
    assert.ok(Date.parse(hold.expires_at) - Date.now() < 61_000)
    const answer = await billing.recordUsage(use(context, world, { hold_id: hold.id, request_id: 'r1' }))
    assert.equal(answer, {
      id: answer.id,
      status: 'charged',
      cost: COST,
      available: '0.9986250000',
      seq: 2,
    })
    assert.match(answer.id, /^[0-9a-f]{8}-[0-9a-f]{4}-7/)
    assert.equal(await usageOf(answer.id), [{ account_id: world.accountId, cost: COST }])
    const balance = await billing.getBalance(world.userId)
    assert.equal(balance, {
      user_id: world.userId,
      tenant_id: world.tenantId,
      account_id: world.accountId,
      owner: 'tenant',
      currency: 'USD',
      balance: '0.9986250000',
      free_credit: '0.0000000000',
      credit_limit: '0.0000000000',
      frozen_balance: '0.0000000000',
      outstanding_amount: '0.0000000000',
      overdue_amount: '0.0000000000',
      available: '0.9986250000',
      balance_version: 2,
    })
  })

  the('keys that may not be used, each with its code', async (billing, rpc) => {
    const { userId, keyId, key, tenantId } = await seed(db.operator)
    await refused(billing.validate(`${key}x`), 'virtual_key_unknown', 401)
    for (const impossible of ['', undefined, null, 5, {}, [key], 'x'.repeat(4097)]) {
      const asked = rpc.calls.length
      await refused(billing.validate(impossible as string), 'virtual_key_unknown', 401)
      assert.is(rpc.calls.length, asked)
    }
    for (const odd of ['\u0000', '\ud800', 'é😀', "'; drop schema api", ' '])
      await refused(billing.validate(odd), 'virtual_key_unknown', 401)

    await db.operator(`update api.tenants set status = 'suspended' where id = $1`, [tenantId])
    await refused(billing.validate(key), 'tenant_suspended', 403)
    await db.operator(`update api.tenants set status = 'active' where id = $1`, [tenantId])
    await db.operator(`update api.user_profiles set status = 'suspended' where id = $1`, [userId])
    await refused(billing.validate(key), 'user_suspended', 403)
    await db.operator(`update api.user_profiles set status = 'active' where id = $1`, [userId])
    await billing.validate(key)
    await db.operator('select api.revoke_virtual_key($1)', [keyId])
    const error = await refused(billing.validate(key), 'virtual_key_disabled', 401)
    assert.not.match(inspect(error, { depth: 9 }), key.slice(12))
    const [old] = await db.operator(
      `select virtual_key from api.create_virtual_key($1, expires_at => now() + interval '1 second')`,
      [userId],
    )
    await billing.validate(old!.virtual_key)
    await until(
      () =>
        billing.validate(old!.virtual_key).then(
          () => false,
          ({ code }) => code === 'virtual_key_expired',
        ),
      'the key to expire',
    )
  })

  the('an amount that can be no hold, and money that is not there', async (billing) => {
    const world = await seed(db.operator, { funds: '10' })
    const context = await billing.validate(world.key)
    const error = await refused(billing.hold(context, { amount: '10.01' }), 'insufficient_funds', 402)
    assert.is(error.detail, '10.0100000000 asked, 10.0000000000 available')
    const { detail } = await refused(
      billing.hold(context, { amount: '1', expires_in: -1 }),
      'invalid_expires_in',
      422,
    )
    assert.is(detail, undefined, 'not for want of money')
    for (const amount of ['0', '-1', 'NaN', 'Infinity', '1e3', '1,5', '', '0.00000000001', '1'.repeat(40)])
      await refused(billing.hold(context, { amount }), 'invalid_amount', 422)
    await refused(billing.hold(context, { amount: '1', id: 'x' }), 'invalid_id', 422)
    await refused(
      billing.hold(context, { amount: '1', id: '00000000-0000-4000-8000-000000000000' }),
      'invalid_id',
      422,
    )
    await refused(billing.hold(context, { amount: '1', expires_in: -1 }), 'invalid_expires_in', 422)
    const meters = tokens
    const elsewhere = await seed(db.operator)
    await refused(
      billing.hold(context, { config_node_id: elsewhere.nodeId, meters }),
      'node_not_mounted',
      403,
    )
    await refused(
      billing.hold(context, { config_node_id: world.nodeId, meters: { images: 1 } }),
      'price_not_found',
      422,
    )
    await refused(
      billing.hold({ ...context, virtual_key_id: newId() }, { amount: '1' }),
      'virtual_key_unknown',
      404,
    )
    await refused(
      billing.hold({ ...context, account_id: elsewhere.accountId }, { amount: '1' }),
      'invalid_account',
      422,
    )
    await refused(billing.hold(context, { amount: 5n as never }), 'invalid_input', 400)
    assert.is((await billing.getBalance(world.userId)).available, '10.0000000000')
    await refused(billing.getBalance(newId()), 'user_not_found', 404)
    await refused(billing.getBalance('zz'), 'invalid_input', 400)
    await refused(billing.checkBudget(context, 'NaN'), 'invalid_amount', 422)
    await refused(billing.checkBudget({ ...context, user_id: newId() }, '1'), 'user_not_found', 404)
  })

  the('a hold repeated, extended, released, used up', async (billing) => {
    const world = await seed(db.operator, { funds: '10' })
    const context = await billing.validate(world.key)
    const id = newId()
    const hold = await billing.hold(context, { id, amount: '4' })
    assert.is(hold.id, id)
    assert.equal(await billing.hold(context, { id, amount: '4' }), hold)
    await refused(billing.hold(context, { id, amount: '5' }), 'hold_mismatch', 409)
    const extended = await billing.extend(hold, 3600)
    assert.is(extended.status, 'extended')
    assert.ok(Date.parse(extended.expires_at!) > Date.parse(hold.expires_at))
    assert.equal(await billing.release(hold), { id, status: 'released', available: '10.0000000000' })
    assert.equal(
      [(await billing.release(hold)).code, (await billing.extend(hold)).code],
      ['hold_released', 'hold_released'],
    )
    await refused(billing.hold(context, { id, amount: '4' }), 'hold_released', 409)
    const used = await billing.hold(context, { amount: '1' })
    await billing.recordUsage(use(context, world, { hold_id: used.id, final: false }))
    assert.is((await billing.getBalance(world.userId)).frozen_balance, '0.9986250000')
    await billing.recordUsage(use(context, world, { hold_id: used.id }))
    await refused(billing.hold(context, { id: used.id, amount: '1' }), 'hold_captured', 409)
    assert.is((await billing.getBalance(world.userId)).available, '9.9972500000')
  })

  the('usage: charged, repeated, altered, parked', async (billing) => {
    const world = await seed(db.operator)
    const context = await billing.validate(world.key)
    const event = use(context, world, { id: newId(), metadata: { note: `é😀 ' \\ "` } })
    const first = await billing.recordUsage(event)
    assert.equal([first.id, first.status], [event.id, 'charged'])
    const again = await billing.recordUsage(event)
    assert.equal(
      [again.status, again.cost, again.seq, again.mismatch],
      ['duplicate', COST, first.seq, undefined],
    )
    const other = await billing.recordUsage({ ...event, meters: { input_tokens: 1 } })
    assert.equal([other.status, other.cost, other.mismatch], ['duplicate', COST, true])
    const parked: [more: object, code: string][] = [
      [{ config_node_id: newId() }, 'config_node_not_found'],
      [{ meters: { images: 1 } }, 'price_not_found'],
      [{ meters: { input_tokens: -1 } }, 'invalid_meters'],
      [{ id: 'x' }, 'invalid_id'],
      [{ id: '018f0000-0000-7000-8000-000000000000' }, 'id_outside_window'],
      [{ account_id: undefined }, 'invalid_account_id'],
    ]
    for (const [more, code] of parked) {
      const answer = await billing.recordUsage(use(context, world, more))
      assert.equal([answer.status, answer.code], ['parked', code])
    }
    assert.is((await usageOf(event.id!)).length, 1)
  })

  the('one bad event among 999 good ones: the good are charged, the bad answered', async (billing, rpc) => {
    const world = await seed(db.operator)
    const context = await billing.validate(world.key)
    const bad: Record<number, object> = {
      500: { meters: { input_tokens: 'x' } },
      700: { meters: { input_tokens: 5n } },
    }
    const answers = await Promise.all(
      Array.from({ length: 1001 }, (_, i) =>
        billing.recordUsage(use(context, world, bad[i])).catch((error) => error),
      ),
    )
    assert.is(answers.filter(({ status }) => status === 'charged').length, 999)
    assert.equal([answers[500]!.status, answers[500]!.code], ['parked', 'invalid_meters'])
    assert.equal([answers[700]!.status, answers[700]!.code], [400, 'invalid_input'])
    assert.ok(rpc.of('record_usage').length <= 4)
    assert.is((await billing.getBalance(world.userId)).balance, '98.6263750000') // 100 - 999 * 0.001375
    assert.is(billing.health().queues.record.failed, 1)
  })

  the('a character that Postgres cannot store costs no charge', async (billing) => {
    const world = await seed(db.operator)
    const context = await billing.validate(world.key)
    const metadata = { 'a\0\0b': '\\u0000 \ud83d \0\udc00', whole: '😀 \\\0 \ufffd \u0007' }
    const event = use(context, world, { id: newId(), request_id: 'r\0', metadata })
    const { status, cost } = await billing.recordUsage(event)
    assert.equal([status, cost], ['charged', COST])
    assert.equal(await db.sql('select request_id, metadata from api.usage_logs where id = $1', [event.id]), [
      {
        request_id: 'r\ufffd',
        metadata: { 'a\ufffd\ufffdb': '\\u0000 \ufffd \ufffd\ufffd', whole: '😀 \\\ufffd \ufffd \u0007' },
      },
    ])
    const again = await billing.recordUsage(event)
    assert.equal([again.status, again.mismatch], ['duplicate', undefined])
  })

  the('events and holds keep the payer that validating gave', async (billing) => {
    const world = await seed(db.operator)
    const { tenantId: elsewhere } = await seed(db.operator)
    const context = await billing.validate(world.key)
    const hold = await billing.hold(context, { amount: '1' })
    await db.operator('update api.user_profiles set tenant_id = $1 where id = $2', [elsewhere, world.userId])
    const event = use(context, world, { id: newId(), hold_id: hold.id })
    assert.is((await billing.recordUsage(event)).status, 'charged')
    assert.is((await billing.recordUsage(event)).status, 'duplicate')
    assert.equal(await usageOf(event.id!), [{ account_id: world.accountId, cost: COST }])
    assert.is((await billing.validate(world.key)).account_id, elsewhere)
    assert.is((await db.sql('select id from data.usage_log where account_id = $1', [elsewhere])).length, 0)
  })

  the('calls batch by themselves: one call, one ledger entry', async (billing, rpc) => {
    const world = await seed(db.operator)
    const context = await billing.validate(world.key)
    const holds = await Promise.all(
      Array.from({ length: 200 }, () => billing.hold(context, { amount: '0.25' })),
    )
    assert.is(rpc.of('place_holds').length, 1)
    assert.is(new Set(holds.map(({ id }) => id)).size, 200)
    const answers = await Promise.all(
      holds.map(({ id }) => billing.recordUsage(use(context, world, { hold_id: id }))),
    )
    assert.is(rpc.of('record_usage').length, 1)
    assert.equal([...new Set(answers.map(({ seq }) => seq))], [2])
    const releases = await Promise.all(holds.map((hold) => billing.release(hold)))
    assert.is(rpc.of('release_holds').length, 1)
    assert.ok(releases.every(({ code }) => code === 'hold_captured'))
  })

  the('stop delivers what is queued', async (billing) => {
    const world = await seed(db.operator)
    const context = await billing.validate(world.key)
    await billing.start()
    const answers = Array.from({ length: 50 }, () => billing.recordUsage(use(context, world)))
    await billing.stop()
    const queues = Object.values(billing.health().queues)
    assert.ok(queues.every(({ queued, in_flight }) => queued + in_flight === 0))
    assert.ok((await Promise.all(answers)).every(({ status }) => status === 'charged'))
    await refused(billing.recordUsage(use(context, world)), 'stopped', 503)
    await refused(billing.hold(context, { amount: '1' }), 'stopped', 503)
    await refused(billing.start(), 'stopped', 503)
    billing.recordUsage(use(context, world)) // unhandled: must not end this process
  })
}

const pgOptions = { connectionString: db.loginUrl }
async function withModule(
  options: Partial<BillingModuleOptions> & { rpc: Rpc },
  run: (billing: BillingModule) => Promise<void>,
) {
  const billing = createBillingModule(options)
  try {
    await run(billing)
  } finally {
    await billing.stop()
    await options.rpc.close()
  }
}

test('a started module answers from memory, follows changes, and says how it is', async () => {
  const rpc = counted(pgRpc(pgOptions))
  await withModule({ rpc, changes: { listen: db.loginUrl } }, async (billing) => {
    const world = await seed(db.operator)
    assert.equal([billing.health().status, billing.health().http_status], ['down', 503])
    await billing.start()
    await billing.start()
    await until(() => billing.health().listener.listening, 'LISTEN')
    await until(() => billing.health().maintenance.at, 'the maintenance')
    assert.is(rpc.of('maintain').length, 1)
    const context = await billing.validate(world.key)
    await billing.validate(world.key)
    assert.is(rpc.of('resolve_virtual_keys').length, 1)

    // a caller may change its own context
    context.account_id = newId()
    ;(context.config_node_ids as string[]).push(newId())
    const fresh = await billing.validate(world.key)
    assert.equal([fresh.account_id, fresh.config_node_ids], [world.accountId, [world.nodeId]])

    const health = billing.health()
    const idle = { queued: 0, in_flight: 0, failed: 0, error: null }
    assert.equal(JSON.parse(JSON.stringify(health)), {
      status: 'ok',
      http_status: 200,
      stale: false,
      cache: {
        memory: true,
        redis: null,
        entries: 1,
        answers: { memory: 2, redis: 0, database: 1, stale: 0 },
        error: null,
      },
      listener: { listening: true, age: health.listener.age, error: null },
      news: { age: null, error: null },
      queues: { hold: idle, release: idle, extend: idle, record: idle },
      maintenance: { at: health.maintenance.at, error: null },
    })
    assert.not.match(JSON.stringify(health), world.keyHash)

    await db.operator('select api.revoke_virtual_key($1)', [world.keyId])
    await until(
      () =>
        billing.validate(world.key).then(
          () => false,
          () => true,
        ),
      'the revoke to be seen',
    )
    await refused(billing.validate(world.key), 'virtual_key_disabled', 401)
  })
})

test('the Redis tier serves the next process, which only polls', async () => {
  const { url } = await db.redis()
  const world = await seed(db.operator)
  const redis = new Redis(url)
  try {
    await withModule({ rpc: pgRpc(pgOptions), redis }, async (first) => {
      await first.start()
      await until(() => first.health().cache.redis, 'trust in Redis')
      await first.validate(world.key)
      const rpc = counted(pgRpc(pgOptions))
      await withModule({ rpc, redis, changes: 'follow' }, async (second) => {
        await second.start()
        await until(() => second.health().cache.redis, 'trust in Redis')
        assert.is((await second.validate(world.key)).account_id, world.accountId)
        // the upkeep, and which database it is
        assert.equal([...new Set(rpc.calls.map(({ fn }) => fn))].sort(), ['cache_changes', 'maintain'])
        assert.is(second.health().status, 'ok')
      })
      assert.is(redis.status, 'ready') // its owner's to close
    })
    assert.not.match(JSON.stringify(await redis.keys('*')), world.key)
    const values = await Promise.all((await redis.keys('*')).map((key) => redis.get(key)))
    assert.not.match(JSON.stringify(values), world.key)
  } finally {
    redis.disconnect()
  }
  assert.throws(() => createBillingModule({ rpc: pgRpc(pgOptions), changes: 'follow' }), /needs `redis`/)
})

test('a failure is never an unknown key', async () => {
  const world = await seed(db.operator)
  const causes: unknown[] = [
    new KeyledgerError('unavailable', 503),
    new KeyledgerError('timeout', 504),
    new KeyledgerError('permission_denied', 403),
    new KeyledgerError('invalid_token', 401),
    new KeyledgerError('function_not_found', 404),
    new TypeError('a bug'),
  ]
  for (const cause of causes) {
    const rpc = counted(pgRpc(pgOptions), (fn) => fn === 'resolve_virtual_keys' && cause)
    await withModule({ rpc }, async (billing) => {
      const error = await refused(billing.validate(world.key), 'unavailable', 503)
      assert.is(error.cause, cause)
    })
  }
})

test('Postgres away: known keys are answered and that is said, usage waits, and all is well again after', async () => {
  const proxy = await startProxy(db.loginUrl)
  const world = await seed(db.operator)
  try {
    await withModule(
      { rpc: pgRpc({ connectionString: proxy.url }), changes: { listen: proxy.url } },
      async (billing) => {
        await billing.start()
        await until(() => billing.health().status === 'ok' && billing.health().maintenance.at, 'trust')
        const context = await billing.validate(world.key)
        proxy.mode = 'refuse'
        proxy.cut()
        await until(() => !billing.health().cache.memory, 'trust to end')
        assert.equal(await billing.validate(world.key), context)
        const health = billing.health()
        assert.equal([health.status, health.http_status, health.stale], ['degraded', 200, true])
        assert.ok(health.listener.error)
        await refused(billing.validate(`${world.key}x`), 'unavailable', 503)
        await refused(billing.checkBudget(context, '1'), 'unavailable', 503)

        const answer = billing.recordUsage(use(context, world))
        await until(() => billing.health().queues.record.error === 'unavailable', 'a first try')
        proxy.mode = 'pass'
        assert.is((await answer).status, 'charged')
        // a look-up that succeeds clears the error of the last one from health
        await refused(billing.validate(`${world.key}y`), 'virtual_key_unknown', 401)
        await until(() => billing.health().status === 'ok' && !billing.health().stale, 'health')
        assert.is(billing.health().queues.record.error, null)
      },
    )
  } finally {
    await proxy.close()
  }
})

test('usage committed whose answer was lost is sent again with the same ids, and charged once', async () => {
  const proxy = await startProxy(db.loginUrl)
  const world = await seed(db.operator)
  const holder = await db.session()
  try {
    await withModule({ rpc: pgRpc({ connectionString: proxy.url }) }, async (billing) => {
      const context = await billing.validate(world.key)
      await lockAccount(holder, world)
      const answers = Array.from({ length: 5 }, () => billing.recordUsage(use(context, world)))
      const blocked = `select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'`
      await until(async () => (await db.sql(blocked)).length, 'the call to wait')
      proxy.mode = 'hang'
      await holder.query('commit')
      const charged = 'select from data.usage_log where account_id = $1'
      await until(async () => (await db.sql(charged, [world.accountId])).length === 5, 'the commit')
      proxy.mode = 'pass'
      proxy.cut()
      for (const { status, cost } of await Promise.all(answers))
        assert.equal([status, cost], ['duplicate', COST])
      assert.is((await db.sql(charged, [world.accountId])).length, 5)
      assert.is(billing.health().queues.record.failed, 0)
    })
  } finally {
    await holder.end()
    await proxy.close()
  }
  await holdsTrue(db.sql)
})

test('a hold given up at its deadline says so, and can be asked for again', async () => {
  const proxy = await startProxy(db.loginUrl)
  const world = await seed(db.operator)
  const rpc = pgRpc({ connectionString: proxy.url })
  try {
    await withModule({ rpc, holdDeadline: 2000 }, async (billing) => {
      const context = await billing.validate(world.key)
      proxy.mode = 'refuse'
      proxy.cut()
      const id = newId()
      await refused(billing.hold(context, { id, amount: '1' }), 'unavailable', 503)
      assert.equal(billing.health().queues.hold, { queued: 0, in_flight: 0, failed: 1, error: 'unavailable' })
      proxy.mode = 'pass'
      // a new connection may take longer than the deadline
      const again = () => billing.hold(context, { id, amount: '1' }).catch(() => undefined)
      assert.is((await until(again, 'the hold, asked for again')).available, '99.0000000000')
    })
  } finally {
    await proxy.close()
  }
})

test('a hold that is being carried out is given up at its deadline too', async () => {
  const world = await seed(db.operator)
  const holder = await db.session()
  // so that the call outlives the deadline, and is carried out
  const waits = (limit: string) =>
    db.sql(`alter function api.place_holds(jsonb) set lock_timeout = '${limit}'`)
  await waits('60s')
  try {
    await withModule({ rpc: pgRpc(pgOptions), holdDeadline: 300 }, async (billing) => {
      const context = await billing.validate(world.key)
      await lockAccount(holder, world)
      const id = newId()
      const unnamed = refused(billing.hold(context, { amount: '2' }), 'timeout', 504)
      await refused(billing.hold(context, { id, amount: '1' }), 'timeout', 504)
      await unnamed
      assert.is(billing.health().queues.hold.in_flight, 2)
      await refused(billing.extend({ id, account_id: world.accountId }), 'timeout', 504)
      await holder.query('commit')
      await until(() => billing.health().queues.hold.in_flight === 0, 'the answer nobody waits for')
      // it was carried out: asked again, it is the same hold; the one whose id nobody knows is
      // released
      const held = `select amount::text, status from api.holds where account_id = $1 order by amount`
      await until(
        async () => (await db.operator(held, [world.accountId]))[1]?.status === 'released',
        'the hold without an id to be released',
      )
      assert.is((await billing.hold(context, { id, amount: '1' })).available, '99.0000000000')
    })
  } finally {
    await holder.end()
    await waits('500ms')
  }
})

const holdsOf = async (world: World) =>
  (await db.operator('select status from api.holds where account_id = $1', [world.accountId])).map(
    ({ status }) => status,
  )

test('a hold that was given up is released, though it is placed after that was tried', async () => {
  const world = await seed(db.operator)
  // sent, never answered, and carried out when nobody thinks of it any more
  const rpc = counted(pgRpc(pgOptions), (fn) =>
    fn === 'place_holds' ? new KeyledgerError('timeout', 504) : undefined,
  )
  await withModule({ rpc, holdDeadline: 100 }, async (billing) => {
    const context = await billing.validate(world.key)
    await refused(billing.hold(context, { amount: '1' }), 'timeout', 504)
    await until(() => rpc.of('release_holds').length, 'the first try')
    const [sent] = rpc.of('place_holds')
    await db.gateway('select api.place_holds($1)', [JSON.stringify(sent!.args!.requests)])
    await until(async () => `${await holdsOf(world)}` === 'released', 'the hold to be released')
  })
})

test('a hold that was given up is released by `stop` too', async () => {
  const world = await seed(db.operator)
  const holder = await db.session()
  try {
    await withModule({ rpc: pgRpc(pgOptions), holdDeadline: 300 }, async (billing) => {
      const context = await billing.validate(world.key)
      await lockAccount(holder, world)
      const given = refused(billing.hold(context, { amount: '1' }), 'timeout', 504)
      await until(() => billing.health().queues.hold.in_flight, 'it to be sent')
      const stopped = billing.stop()
      await given
      await holder.query('commit')
      await stopped
      assert.equal(await holdsOf(world), ['released'])
    })
  } finally {
    await holder.end()
  }
})

test('an id made here is a UUIDv7 of now, and no other', () => {
  const before = Date.now()
  const ids = Array.from({ length: 10_000 }, makeId)
  assert.is(new Set(ids).size, 10_000)
  for (const id of ids) {
    assert.match(id, /^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/)
    const time = Number.parseInt(id.slice(0, 8) + id.slice(9, 13), 16)
    // of the server's clock, as near as a round trip tells
    assert.ok(time >= before - 2000 && time <= Date.now() + 2000)
  }
})

test('health is down when no key can be answered, and each lesser trouble is degraded', async () => {
  const proxy = await startProxy(db.loginUrl)
  const redis = new Redis((await db.redis()).url)
  const is = (billing: BillingModule, status: string) =>
    until(() => billing.health().status === status, `health to be ${status}`)
  try {
    proxy.mode = 'refuse'
    const rpc = pgRpc({ connectionString: proxy.url })
    const options = { rpc, redis, changes: { listen: proxy.url }, maxStaleness: 1000, staleIfError: 1500 }
    await withModule(options, async (billing) => {
      await billing.start()
      assert.equal([billing.health().status, billing.health().http_status], ['down', 503])
      proxy.mode = 'pass'
      await is(billing, 'degraded') // its upkeep has failed, for the hour
      const { maintenance, ...health } = billing.health()
      assert.equal([health.http_status, maintenance.error], [200, 'unavailable'])

      await until(() => billing.health().cache.memory, 'trust')
      proxy.mode = 'refuse'
      proxy.cut()
      await until(() => !billing.health().cache.memory, 'trust to end')
      assert.is(billing.health().status, 'degraded')
      await is(billing, 'down')
      proxy.mode = 'pass'
      await is(billing, 'degraded')
    })

    await withModule({ rpc: pgRpc(pgOptions), redis, changes: { listen: proxy.url } }, async (billing) => {
      await billing.start()
      await until(() => billing.health().maintenance.at, 'the upkeep')
      await is(billing, 'ok')
      redis.disconnect()
      await until(() => billing.health().cache.redis === false, 'Redis to be gone')
      assert.is(billing.health().status, 'degraded')
      await redis.connect()
      await is(billing, 'ok')
      proxy.mode = 'refuse'
      proxy.cut()
      await until(
        () => billing.health().cache.memory && !billing.health().listener.listening,
        'LISTEN to be gone',
      )
      assert.is(billing.health().status, 'degraded')
      proxy.mode = 'pass'
      await is(billing, 'ok')
    })
  } finally {
    redis.disconnect()
    await proxy.close()
  }
})

test('a failing maintenance is in health, nowhere else, and tried again soon', async () => {
  let fails = true
  const rpc = counted(
    pgRpc(pgOptions),
    (fn) => fails && fn === 'maintain' && new KeyledgerError('permission_denied', 403),
  )
  await withModule({ rpc }, async (billing) => {
    await billing.start()
    await until(() => billing.health().maintenance.error, 'the error')
    assert.equal(billing.health().maintenance, { at: null, error: 'permission_denied' })
    assert.is(billing.health().status, 'degraded')
    fails = false
    await until(() => billing.health().status === 'ok', 'another try')
  })
})

test('the key is in no log of Postgres, with log_statement = all', async () => {
  const postgres = await ownPostgres([
    'log_statement=all',
    'log_min_duration_statement=0',
    'log_parameter_max_length=-1',
  ])
  try {
    const rest = await startPostgrest({ databaseUrl: postgres.loginUrl })
    const { key } = await seed(db.operator)
    const over = [
      pgRpc({ connectionString: postgres.loginUrl }),
      postgrestRpc({ url: rest.url, token: await rest.token({ role: 'keyledger_gateway' }) }),
    ]
    for (const rpc of over)
      await withModule({ rpc }, async (billing) => {
        await refused(billing.validate(key), 'virtual_key_unknown', 401)
      })
    const log = postgres.log()
    assert.match(log, 'resolve_virtual_keys')
    assert.ok(!log.includes(key))
    assert.ok(!rest.log().includes(key))
    await rest.stop()
  } finally {
    await postgres.stop()
  }
})

test.run()
