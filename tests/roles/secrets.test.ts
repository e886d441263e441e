// The raw key is shown once, at creation: no table, cache, notification, error or log has it.
import { createHash } from 'node:crypto'
import { inspect } from 'node:util'
import { Redis } from 'ioredis'
import pg from 'pg'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { type Server, startPostgrest, startRedis } from '../../scripts/servers.ts'
import { until } from '../../scripts/supervise.ts'
import { createBillingModule, pgRpc, postgrestRpc, type Rpc } from '../../src/index.ts'
import { database, type Sql } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { newId } from '../support/ids.ts'
import { ownPostgres } from '../support/postgres.ts'
import { seed, type World } from '../support/seed.ts'

const test = suite('secrets')
const db = await database(test)
const closes: (() => unknown)[] = []
test.after.each(async () => {
  for (const close of closes.splice(0).reverse()) await close()
})

// The key as it is, and as a dump or a log would write its bytes.
function assertAbsent(key: string, text: string, where: string) {
  const bytes = Buffer.from(key)
  const forms = [key, encodeURIComponent(key), bytes.toString('hex'), bytes.toString('base64').slice(0, -4)]
  // past the display prefix, no part of it either
  for (const form of [...forms, key.slice(12)]) assert.not(text.includes(form), `the key is in ${where}`)
}

async function dump(sql: Sql): Promise<string> {
  const tables = await sql(`
    select format('%I.%I', n.nspname, c.relname) as name
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where n.nspname in ('data', 'api') and c.relkind in ('r', 'p', 'v', 'm')`)
  assert.ok(tables.length > 25)
  const lines: string[] = []
  for (const { name } of tables) {
    const rows = await sql(`select t::text as text from ${name} t`)
    lines.push(...rows.map(({ text }) => `${name} ${text}`))
  }
  return lines.join('\n')
}

// The whole path of the client, with a request that it turns away too.
async function walk(rpc: Rpc, world: World, redis: Redis, listen: string) {
  const billing = createBillingModule({ rpc, redis, changes: { listen } })
  await billing.start()
  try {
    const context = await billing.validate(world.key)
    await billing.validate(world.key)
    const request: { headers: Record<string, string>; userContext?: unknown } = {
      headers: { authorization: `Bearer ${world.key}` },
    }
    await new Promise<void>((next) => billing.middleware()(request as never, {} as never, () => next()))
    assert.equal(request.userContext, context)
    await billing.checkBudget(context, '1')
    const held = await billing.hold(context, { amount: '1' })
    const meters = { input_tokens: 10 }
    await billing.recordUsage({ ...context, config_node_id: world.nodeId, meters, hold_id: held.id })
    await billing.release(held)
    await billing.getBalance(world.userId)
    for (const refused of [
      await failure(billing.validate(`${world.key}x`)),
      await failure(billing.hold(context, { amount: '1000000' })),
    ])
      assertAbsent(world.key, inspect(refused, { depth: null }), 'an error')
    assertAbsent(world.key, JSON.stringify([context, billing.health()]), 'the answers of the client')
  } finally {
    await billing.stop()
  }
}

test('validate, hold and record leave no key in tables, Redis, notifications or a full log', async () => {
  const server = await ownPostgres([
    ...['log_statement=all', 'log_min_duration_statement=0', 'log_min_messages=debug1'],
    ...['log_error_verbosity=verbose', 'log_parameter_max_length=-1', 'log_parameter_max_length_on_error=-1'],
  ])
  closes.push(() => server.stop())
  const postgrest = await startPostgrest({ databaseUrl: server.loginUrl })
  closes.push(() => postgrest.stop())
  const redisServer = (await startRedis()) as Server
  closes.push(() => redisServer.stop())
  const redis = new Redis(redisServer.url)
  closes.push(() => redis.disconnect())
  const client = new pg.Client(server.url)
  await client.connect()
  closes.push(() => client.end())
  const sql: Sql = async (text, values) => (await client.query(text, values)).rows
  const operator: Sql = async (text, values) => {
    await client.query('set role keyledger_operator')
    const { rows } = await client.query(text, values)
    await client.query('reset role')
    return rows
  }
  const notified: pg.Notification[] = []
  client.on('notification', (notification) => notified.push(notification))
  await client.query('listen keyledger_cache')

  const pgTransport = pgRpc({ connectionString: server.loginUrl })
  const overHttp = postgrestRpc({
    url: postgrest.url,
    token: await postgrest.token({ role: 'keyledger_gateway' }),
  })
  closes.push(
    () => pgTransport.close(),
    () => overHttp.close(),
  )
  const keys: World[] = []
  for (const rpc of [pgTransport, overHttp]) {
    const world = await seed(operator)
    keys.push(world)
    await walk(rpc, world, redis, server.loginUrl)
    // the new text is secret too, and the old one stays secret through its grace
    const [rotated] = await operator('select virtual_key from api.rotate_virtual_key($1)', [world.keyId])
    const key: string = rotated!.virtual_key
    const next = { ...world, key, keyHash: createHash('sha256').update(key).digest('hex') }
    keys.push(next)
    await walk(rpc, next, redis, server.loginUrl)
    await operator('select api.revoke_virtual_key($1)', [world.keyId])
  }
  await until(() => notified.length >= 4, 'notifications')

  const dumped = await dump(sql)
  const log = `${server.log()}\n${postgrest.log()}`
  const cached: string[] = []
  for (const name of await redis.keys('*')) {
    const type = await redis.type(name)
    const value =
      type === 'hash' ? await redis.hgetall(name) : type === 'string' ? await redis.get(name) : type
    assert.ok(value !== type, `${name} is a ${type}: read it here too`)
    cached.push(`${name} ${JSON.stringify(value)}`)
  }
  for (const { key, keyHash, keyId } of keys) {
    // these texts must be there: else the search for the key proves nothing
    for (const there of [keyHash, keyId]) assert.ok(dumped.includes(there), `${there} in the dump`)
    for (const there of [keyHash, keyId, 'api.create_virtual_key(', 'api.rotate_virtual_key('])
      assert.ok(log.includes(there), `${there} in the log`)
    assertAbsent(key, dumped, 'a table')
    assertAbsent(key, log, 'the log')
    assertAbsent(key, cached.join('\n'), 'Redis')
    assertAbsent(key, inspect(notified, { depth: 9 }), 'a notification')
  }
  // a rotated key shows its new prefix
  assert.ok(dumped.includes(keys.at(-1)!.key.slice(0, 10)))
  // the others were evicted by the next module
  assert.ok(cached.some((line) => line.startsWith(`vk:${keys.at(-1)!.keyHash} `)))
})

test('no error echoes a key, whatever function and argument got it, through either transport', async () => {
  const world = await seed(db.operator)
  const { key } = world
  const postgrest = await db.postgrest()
  const functions = await db.sql(`
    select p.proname as name, p.proargnames[1:p.pronargs] as args, p.pronargs - p.pronargdefaults as required,
      array(select format_type(t, null) from unnest(p.proargtypes) t) as types
    from pg_proc p where p.pronamespace = 'api'::regnamespace order by 1`)
  assert.ok(functions.length >= 15)
  const values: Record<string, unknown> = { uuid: newId(), numeric: '1', text: 'x', jsonb: [], integer: 1 }
  let errors = 0
  for (const role of ['keyledger_gateway', 'keyledger_operator'] as const) {
    const rpcs = [
      pgRpc({ connectionString: db.loginUrl, role }),
      postgrestRpc({ url: postgrest.url, token: await postgrest.token({ role }) }),
    ]
    for (const rpc of rpcs) {
      closes.push(() => rpc.close())
      for (const { name, args, types, required } of functions)
        for (const [i, arg] of (args ?? []).entries()) {
          const given = (args as string[]).slice(0, Math.max(required, i + 1))
          const call = Object.fromEntries(given.map((each, n) => [each, values[types[n]] ?? null]))
          call[arg] = types[i].endsWith('[]') ? [key] : key
          const error = await rpc.call(name, call).then(
            () => undefined,
            (error) => error,
          )
          if (!error) continue
          errors++
          assertAbsent(key, inspect(error, { depth: 9, showHidden: true }), `an error of ${name}(${arg})`)
          assertAbsent(key, `${error.stack} ${JSON.stringify(error)}`, `an error of ${name}(${arg})`)
        }
    }
  }
  assert.ok(errors > 50, `only ${errors} calls failed`)

  // as PostgREST itself answers, for the two functions that take a key or its hash
  const authorization = `Bearer ${await postgrest.token({ role: 'keyledger_gateway' })}`
  for (const [fn, arg] of [
    ['resolve_billing_account', 'vk'],
    ['resolve_virtual_key', 'key_hash'],
  ]) {
    const answer = await fetch(`${postgrest.url}/rpc/${fn}`, {
      method: 'POST',
      headers: { authorization, 'content-type': 'application/json' },
      body: JSON.stringify({ [arg!]: `${key}x` }),
    })
    const body = await answer.text()
    assert.is(answer.status, 404)
    assert.match(body, 'virtual_key_unknown')
    assertAbsent(key, body, fn!)
    assertAbsent(key, JSON.stringify([...answer.headers]), fn!)
  }
  assertAbsent(key, postgrest.log(), `PostgREST's log`)
})

test('a key sent by mistake where an id belongs is not kept with the event', async () => {
  const world = await seed(db.operator)
  const event = {
    id: newId(),
    account_id: world.accountId,
    virtual_key_id: world.key,
    config_node_id: world.nodeId,
    meters: { input_tokens: 1 },
    metadata: { authorization: `Bearer ${world.key}` },
  }
  const [row] = await db.gateway('select api.record_usage($1) as answers', [JSON.stringify([event])])
  assert.equal(
    row!.answers.map(({ status, code }: { status: string; code: string }) => [status, code]),
    [['parked', 'invalid_virtual_key_id']],
  )
  const dumped = await dump(db.sql)
  assert.ok(dumped.includes(event.id))
  assertAbsent(world.key, dumped, 'a table')
})

test.run()
