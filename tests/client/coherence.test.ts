// What keeps the cache right on bad days: floods, busy pools, clocks, processes that stand still,
// strangers in Redis.
import { createHash, randomUUID } from 'node:crypto'
import { mock } from 'node:test'
import { Redis } from 'ioredis'
import pg from 'pg'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import type { Server } from '../../scripts/servers.ts'
import { until } from '../../scripts/supervise.ts'
import { createKeyCache } from '../../src/cache.ts'
import { serverNow, setServerTime } from '../../src/clock.ts'
import { fromNetwork, fromServer, isAway } from '../../src/errors.ts'
import { newId } from '../../src/ids.ts'
import { createBillingModule, KeyledgerError, pgRpc, type Rpc } from '../../src/index.ts'
import { createSeal } from '../../src/seal.ts'
import { createTrust } from '../../src/trust.ts'
import { createLoop } from '../../src/wake.ts'
import { forkClient, startClient } from '../support/client.ts'
import { database } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { startProxy } from '../support/proxy.ts'
import { seed } from '../support/seed.ts'

const test = suite('coherence')
const db = await database(test)
let redis: Server
let admin: Redis
const open: (() => unknown)[] = []

test.before(async () => {
  redis = await db.redis()
  admin = new Redis(redis.url).on('error', () => {})
  db.onClose(() => admin.disconnect())
})
test.before.each(async () => {
  await admin.flushall()
})
test.after.each(async () => {
  for (const close of open.splice(0).reverse()) await close()
})

const hashOf = (key: string) => createHash('sha256').update(key).digest('hex')
const madeUp = () => `vk_${randomUUID()}`
const revoke = (keyId: string) => db.operator('select api.revoke_virtual_key($1)', [keyId])

function rpcOf(options: Parameters<typeof pgRpc>[0] = { connectionString: db.loginUrl }): Rpc {
  const rpc = pgRpc(options)
  open.push(() => rpc.close())
  return rpc
}

function moduleOf(options: Parameters<typeof createBillingModule>[0]) {
  const billing = createBillingModule(options)
  open.push(() => billing.stop())
  return billing
}

function redisClient(url = redis.url): Redis {
  const client = new Redis(url, { retryStrategy: () => 50 }).on('error', () => {})
  open.push(() => client.disconnect())
  return client
}

/** The clocks as the test sets them; `put` gives them back. */
function clocks() {
  const at = { monotonic: 1_000_000, wall: Date.now() }
  const mocks = [mock.method(performance, 'now', () => at.monotonic), mock.method(Date, 'now', () => at.wall)]
  const restore = () => {
    for (const each of mocks) each.mock.restore()
  }
  return { at, restore }
}

test('with every connection of the pool in use, changes are read: a revoked key is refused, and not answered as stale', async () => {
  const pool = new pg.Pool({ connectionString: db.loginUrl, max: 2 }).on('error', () => {})
  open.push(() => pool.end())
  const billing = moduleOf({ rpc: rpcOf({ pool, timeout: 1000 }) })
  await billing.start()
  const world = await seed(db.operator)
  await billing.validate(world.key)
  await until(() => billing.health().maintenance.at, 'the upkeep')
  const busy = await Promise.all([pool.connect(), pool.connect()])
  try {
    await revoke(world.keyId)
    const error = await until(
      () =>
        billing.validate(world.key).then(
          () => undefined,
          (reason) => reason,
        ),
      'a refusal',
      10,
    )
    assert.is(error.code, 'unavailable')
    assert.ok(billing.health().cache.memory, 'the changes are read')
    assert.is(billing.health().cache.answers.stale, 0)
  } finally {
    for (const client of busy) client.release()
  }
  assert.is((await failure(billing.validate(world.key))).code, 'virtual_key_disabled')
})

test('a busy pool is not Postgres away', () => {
  const busy = { code: 'PGRST003', message: 'Timed out acquiring connection from connection pool.' }
  assert.not(isAway(fromServer(busy)))
  assert.not(isAway(new KeyledgerError('overloaded', 503)))
  assert.not(isAway(new KeyledgerError('invalid_token', 401)))
  assert.ok(isAway(fromNetwork(new Error('ECONNREFUSED'), 'Postgres')))
  assert.ok(isAway(fromServer({ code: 'PGRST001', message: 'connection refused' })))
  assert.ok(isAway(fromServer({ code: '57P03', message: 'starting up' })))
})

test('a full pool of pgRpc, and a wait that ended, do not say that Postgres is away', async () => {
  const pool = new pg.Pool({ connectionString: db.loginUrl, max: 1 }).on('error', () => {})
  open.push(() => pool.end())
  const rpc = rpcOf({ pool, timeout: 200 })
  const client = await pool.connect()
  const error = await failure(rpc.call('new_id'))
  client.release()
  assert.is(error.code, 'unavailable')
  assert.not(isAway(error))
  assert.not(isAway(new KeyledgerError('timeout', 504)))
})

test('a follower whose pool is full does not answer a revoked key as stale', async () => {
  const leader = moduleOf({ rpc: rpcOf(), redis: redisClient() })
  await leader.start()
  const pool = new pg.Pool({ connectionString: db.loginUrl, max: 2 }).on('error', () => {})
  open.push(() => pool.end())
  const follower = moduleOf({ rpc: rpcOf({ pool, timeout: 1000 }), redis: redisClient(), changes: 'follow' })
  await follower.start()
  const world = await seed(db.operator)
  await until(() => follower.health().cache.redis, 'trust')
  await until(() => follower.health().maintenance.at, 'the upkeep')
  await follower.validate(world.key)
  await until(async () => (await admin.get(`vk:${world.keyHash}`))?.includes('"code":null'), 'the entry')
  await follower.validate(world.key)
  assert.is(follower.health().cache.entries, 0, 'nothing evicts its memory')
  const busy = await Promise.all([pool.connect(), pool.connect()])
  try {
    await revoke(world.keyId)
    await until(
      async () => !(await admin.get(`vk:${world.keyHash}`))?.includes('"code":null'),
      'the eviction',
    )
    assert.is((await failure(follower.validate(world.key))).code, 'unavailable')
    assert.is(follower.health().cache.answers.stale, 0)
  } finally {
    for (const client of busy) client.release()
  }
})

test('PostgREST whose pool is full is waited for, and no reason for a stale answer', async () => {
  const real = rpcOf()
  let full = false
  const rpc = {
    rows: real.rows,
    close: real.close,
    async call(fn: string, args?: Record<string, unknown>, options?: object) {
      if (!full) return real.call<unknown>(fn, args, options)
      // longer than the cache waits
      await until(() => performance.now() - since > 2500, 'the pool')
      throw fromServer({ code: 'PGRST003', message: 'Timed out acquiring connection from connection pool.' })
    },
  } as Rpc
  let since = 0
  const billing = moduleOf({ rpc, maxStaleness: 1500 })
  await billing.start()
  const world = await seed(db.operator)
  await billing.validate(world.key)
  since = performance.now()
  full = true
  await revoke(world.keyId)
  await until(() => !billing.health().cache.memory, 'trust to end')
  since = performance.now()
  assert.is((await failure(billing.validate(world.key))).code, 'unavailable')
  assert.is(billing.health().cache.answers.stale, 0)
  full = false
})

test('a follower that reaches neither Redis nor Postgres is down', async () => {
  const leader = moduleOf({ rpc: rpcOf(), redis: redisClient() })
  await leader.start()
  const [toRedis, toPostgres] = [await startProxy(redis.url), await startProxy(db.loginUrl)]
  open.push(
    () => toRedis.close(),
    () => toPostgres.close(),
  )
  const rpc = rpcOf({ connectionString: toPostgres.url })
  const follower = moduleOf({ rpc, redis: redisClient(toRedis.url), changes: 'follow', staleIfError: 1000 })
  await follower.start()
  await until(() => follower.health().status === 'ok', 'health')
  toRedis.mode = toPostgres.mode = 'refuse'
  toRedis.cut()
  await until(() => follower.health().cache.redis === false, 'Redis to be gone')
  assert.is(follower.health().status, 'degraded', 'Postgres answers')
  toPostgres.cut()
  await until(() => follower.health().status === 'down', 'health to be down')
  assert.is(follower.health().http_status, 503)
  toRedis.mode = toPostgres.mode = 'pass'
  await until(() => follower.health().http_status === 200, 'health to be back')
})

test('look-ups that are refused are in health', async () => {
  const billing = moduleOf({ rpc: rpcOf() })
  await billing.start()
  await until(() => billing.health().status === 'ok', 'health')
  const world = await seed(db.operator)
  await db.sql('revoke execute on function api.resolve_virtual_keys from keyledger_gateway')
  try {
    assert.is((await failure(billing.validate(world.key))).code, 'unavailable')
    const { status, http_status, cache } = billing.health()
    assert.equal([status, http_status, cache.error], ['degraded', 200, 'permission_denied'])
  } finally {
    await db.sql('grant execute on function api.resolve_virtual_keys to keyledger_gateway')
  }
  await billing.validate(world.key)
  assert.is(billing.health().cache.error, null)
})

for (const [what, away, changesRead, expected] of [
  ['an error that is no absence', false, false, 'rejected'],
  ['an absence', true, false, 'stale'],
  ['an error while the changes are read', true, true, 'rejected'],
] as const)
  test(`stale answers: ${what} is ${expected}`, async () => {
    let fails = false
    const cache = createKeyCache<{ valid_until: null }>({
      async load() {
        if (!fails) return { valid_until: null }
        await until(() => performance.now() > asked, 'the clock')
        if (changesRead) cache.trust.prove(performance.now())
        cache.trust.end()
        throw new Error('failed')
      },
      isAway: () => away,
    })
    let asked = 0
    cache.trust.prove(performance.now())
    await cache.get('a')
    fails = true
    cache.trust.end()
    asked = performance.now()
    const seen = await cache.get('a').then(
      ({ tier }) => tier,
      () => 'rejected',
    )
    assert.is(seen, expected)
  })

test('wake-ups without end lead to a read every 20 ms, and not more', async () => {
  let reads = 0
  const sent: number[] = []
  const loop = createLoop(async () => {
    reads++
    sent.push(performance.now())
  })
  const forged = setInterval(loop.wake, 1)
  await until(() => reads >= 10, 'reads')
  clearInterval(forged)
  await loop.stop()
  for (let i = 1; i < sent.length; i++)
    assert.ok(sent[i]! - sent[i - 1]! >= 18, `${sent[i]! - sent[i - 1]!} ms`)
})

test('trust ends where a process stood still, by either clock, until a read that was sent after', () => {
  for (const clock of ['monotonic', 'wall'] as const) {
    const { at, restore } = clocks()
    try {
      const trust = createTrust(5000)
      const wait = (ms: number) => {
        at.monotonic += ms
        at.wall += ms
      }
      trust.beat()
      trust.prove(at.monotonic)
      for (let i = 0; i < 20; i++) {
        wait(100)
        trust.beat()
        assert.ok(trust.live(), 'at work')
      }
      const sentAt = at.monotonic
      at[clock] += 600
      assert.not(trust.live(), 'before anything else has run')
      trust.beat()
      assert.not(trust.live(), 'nor after')
      trust.prove(sentAt)
      assert.not(trust.live(), 'not by what was under way')
      wait(1)
      trust.prove(at.monotonic)
      assert.ok(trust.live())
    } finally {
      restore()
    }
  }
})

test('a process that was stopped refuses a key revoked meanwhile from its first answer on', async () => {
  const one = await forkClient({ url: db.loginUrl, redisUrl: redis.url, by: 'listen' })
  try {
    const world = await seed(db.operator)
    await until(async () => (await one.validate(world.keyHash)).tier === 'memory', 'a hit')
    process.kill(one.pid, 'SIGSTOP')
    await revoke(world.keyId)
    const since = performance.now()
    const asked = Array.from({ length: 20 }, () => one.validate(world.keyHash))
    await until(() => performance.now() - since > 1100, 'a second to pass')
    process.kill(one.pid, 'SIGCONT')
    for (const { code, tier } of await Promise.all(asked)) assert.is(code, 'virtual_key_disabled', tier)
  } finally {
    process.kill(one.pid, 'SIGCONT')
    await one.stop()
  }
})

test('made-up keys by the thousand: few calls, two at a time, and a bounded queue', async () => {
  const rpc = rpcOf()
  let [running, most, calls] = [0, 0, 0]
  let goOn = () => {}
  const gate = new Promise<void>((resolve) => {
    goOn = resolve
  })
  const counted = {
    ...rpc,
    async call(fn: string, args?: Record<string, unknown>, options?: object) {
      if (fn !== 'resolve_virtual_keys') return rpc.call<unknown>(fn, args, options)
      calls++
      most = Math.max(most, ++running)
      try {
        if (calls <= 2) await gate
        return await rpc.call<unknown>(fn, args, options)
      } finally {
        running--
      }
    },
  } as Rpc
  const billing = moduleOf({ rpc: counted })
  await billing.start()
  const world = await seed(db.operator)
  const context = {
    account_id: world.accountId,
    virtual_key_id: world.keyId,
  }
  const flood = Array.from({ length: 12_000 }, () => failure(billing.validate(madeUp())))
  await until(() => running === 2, 'both lanes to be taken')
  // the paying user is served while all look-ups wait
  const hold = await billing.hold(context, { amount: '1' })
  assert.is(hold.amount, '1.0000000000')
  goOn()
  const errors = await Promise.all(flood)
  const count = (code: string) => errors.filter((error) => error.code === code).length
  const overloaded = errors.filter(({ cause }) => (cause as KeyledgerError)?.code === 'overloaded')
  assert.is(count('virtual_key_unknown') + count('unavailable'), 12_000)
  assert.is(overloaded.length, count('unavailable'))
  assert.ok(overloaded.length >= 1000, `${overloaded.length}`)
  assert.is(most, 2)
  assert.ok(calls <= 30, `${calls} calls`)
  // and a real key as well, once the flood is over
  assert.is((await billing.validate(world.key)).virtual_key_id, world.keyId)
})

test('resolve_virtual_keys answers as resolve_virtual_key does, in order', async () => {
  const [one, two] = [await seed(db.operator), await seed(db.operator, { alone: true })]
  await db.sql(`update data.virtual_key set expires_at = now() + interval '1 hour' where id = $1`, [
    two.keyId,
  ])
  await revoke(one.keyId)
  const unknown = { code: 'virtual_key_unknown', virtual_key_id: null }
  const hashes = [
    one.keyHash,
    'zz',
    two.keyHash,
    null,
    hashOf('nobody'),
    one.keyHash,
    two.keyHash.toUpperCase(),
  ]
  const [{ found }] = (await db.gateway('select api.resolve_virtual_keys($1) as found', [hashes])) as [
    { found: Record<string, unknown>[] },
  ]
  const single = async (hash: string) =>
    (await db.gateway('select to_jsonb(k) as it from api.resolve_virtual_key($1) k', [hash]))[0]!.it
  assert.equal(found[0], await single(one.keyHash))
  assert.equal({ ...found[2], valid_for_ms: 0 }, { ...(await single(two.keyHash)), valid_for_ms: 0 })
  assert.ok(Math.abs((found[2]!.valid_for_ms as number) - 3_600_000) < 60_000)
  assert.equal(found[5], found[0])
  for (const i of [1, 3, 4, 6]) assert.equal(found[i], unknown)
  for (const none of [[], null])
    assert.equal((await db.gateway('select api.resolve_virtual_keys($1) as found', [none]))[0]!.found, [])
  const many = (n: number) =>
    db.gateway('select api.resolve_virtual_keys(array_fill($1::text, array[$2::integer]))', ['x', n])
  await many(10_000)
  const error = await failure(many(10_001))
  assert.equal([error.code, error.message], ['PT422', 'too_many_elements'])
})

test('a key that ends in the year 10000 is cached like any other', async () => {
  const billing = moduleOf({ rpc: rpcOf() })
  await billing.start()
  const world = await seed(db.operator)
  await db.sql(`update data.virtual_key set expires_at = '9999-12-31 23:59:59-05' where id = $1`, [
    world.keyId,
  ])
  await billing.validate(world.key)
  const { database: before } = billing.health().cache.answers
  await until(async () => {
    await billing.validate(world.key)
    return billing.health().cache.answers.memory > 3
  }, 'hits')
  assert.ok(billing.health().cache.answers.database <= before + 1)
})

test('a key is valid for a duration: no clock of this host changes that', async () => {
  for (const wrong of [-3_600_000, 3_600_000]) {
    const { at, restore } = clocks()
    try {
      const end = at.wall + 60_000
      at.wall += wrong
      let loads = 0
      const cache = createKeyCache<{ valid_until: string | null; valid_for_ms: number | null }>({
        async load() {
          loads++
          return { valid_until: new Date(end).toISOString(), valid_for_ms: 60_000 }
        },
      })
      const wait = (ms: number) => {
        at.monotonic += ms
        at.wall += ms
        cache.trust.prove(at.monotonic)
      }
      wait(0)
      await cache.get('a')
      wait(59_999)
      assert.is((await cache.get('a')).tier, 'memory')
      wait(1)
      assert.is((await cache.get('a')).tier, 'database')
      assert.is(loads, 2)
    } finally {
      restore()
    }
  }
})

test("ids are on the server's time, and go up", () => {
  const timeOf = (id: string) => Number.parseInt(id.replaceAll('-', '').slice(0, 12), 16)
  const { at, restore } = clocks()
  try {
    const real = at.wall
    // a host a day behind; its clock jumps as well
    at.wall -= 86_400_000
    setServerTime(real + 50, at.monotonic, at.monotonic + 100)
    assert.is(timeOf(newId()), real)
    at.monotonic += 1000
    at.wall += 7_200_000
    assert.is(timeOf(newId()), real + 1000)
    // a later read that puts us a little back
    setServerTime(real + 900, at.monotonic, at.monotonic)
    assert.is(timeOf(newId()), real + 1000)
    assert.is(serverNow(), real + 900)
    at.monotonic += 200
    assert.is(timeOf(newId()), real + 1100)
    // and one of a server that was wrong by far
    setServerTime(real + 99_000_000, at.monotonic, at.monotonic)
    assert.is(timeOf(newId()), real + 99_000_000)
    setServerTime(real + 2000, at.monotonic, at.monotonic)
    assert.is(timeOf(newId()), real + 2000)
    setServerTime(undefined, at.monotonic, at.monotonic)
    assert.is(timeOf(newId()), real + 2000)
  } finally {
    restore()
    setServerTime(Date.now(), performance.now(), performance.now())
  }
})

test('a module makes ids on the time that the changes are read with', async () => {
  const rpc = rpcOf()
  const ahead = 30_000
  let read = false
  const shifted = {
    ...rpc,
    async call(fn: string, args?: Record<string, unknown>, options?: object) {
      const answer = await rpc.call<{ now: number }>(fn, args, options)
      if (fn !== 'cache_changes') return answer
      read = true
      return { ...answer, now: answer.now + ahead }
    },
  } as Rpc
  const billing = moduleOf({ rpc: shifted })
  await billing.start()
  assert.ok(read)
  assert.ok(Math.abs(serverNow() - Date.now() - ahead) < 5000)
  await billing.stop()
  setServerTime(Date.now(), performance.now(), performance.now())
})

test('a seal fits one name and one text, and each of the secrets', () => {
  const [old, fresh] = ['the old secret of ours', 'the new secret of ours']
  const stored = createSeal([old]).close('vk:a', '{"x":1}')
  assert.is(createSeal([old]).open('vk:a', stored), '{"x":1}')
  assert.is(createSeal([fresh, old]).open('vk:a', stored), '{"x":1}')
  assert.is(createSeal([old, fresh]).open('vk:a', createSeal([fresh, old]).close('vk:a', '{}')), '{}')
  for (const [name, text] of [
    ['vk:b', stored],
    ['vk:a', stored.replace('1', '2')],
    ['vk:a', '{"x":1}'],
    ['vk:a', ''],
  ])
    assert.is(createSeal([old]).open(name!, text!), undefined, `${name} ${text}`)
  assert.is(createSeal([fresh]).open('vk:a', stored), undefined)
  const rpc = rpcOf()
  const client = redisClient()
  for (const redisSecret of ['short', [old, '']])
    assert.throws(() => createBillingModule({ rpc, redis: client, redisSecret }), /redisSecret/)
})

test('with a secret, a stranger that writes to Redis makes no key valid, and turns no key into another', async () => {
  const redisSecret = 'a secret of sixteen or more'
  const [one, two] = [await seed(db.operator), await seed(db.operator)]
  const at = ({ keyHash }: { keyHash: string }) => `vk:${keyHash}`
  const fresh = async () => {
    const billing = moduleOf({ rpc: rpcOf(), redis: redisClient(), redisSecret })
    await billing.start()
    await until(() => billing.health().cache.redis, 'trust')
    return billing
  }
  const first = await fresh()
  for (const { key } of [one, two]) await first.validate(key)
  await until(
    async () => (await admin.mget(at(one), at(two))).every((raw) => raw?.includes('"code":null')),
    'the entries',
  )
  const reader = await fresh()
  assert.is((await reader.validate(one.key)).user_id, one.userId)
  assert.is(reader.health().cache.answers.redis, 1, 'what is signed is believed')

  // forged from the entries there: the text of one under the name of the other, and a text of one's
  // own
  const raw = (await admin.get(at(one)))!
  const stranger = madeUp()
  for (const forged of [raw, raw.slice(43), raw.replace(one.userId, two.userId)]) {
    await admin.set(at(two), forged)
    await admin.set(`vk:${hashOf(stranger)}`, forged)
    const another = await fresh()
    assert.is((await another.validate(two.key)).user_id, two.userId)
    assert.is((await failure(another.validate(stranger))).code, 'virtual_key_unknown')
    assert.is(another.health().cache.answers.redis, 0)
  }

  // a cursor of one's own starts a new generation
  const cursor = JSON.parse((await admin.get('vk:cursor'))!.slice(43))
  await admin.set('vk:cursor', JSON.stringify(cursor))
  await until(async () => {
    const now = (await admin.get('vk:cursor'))!.slice(43)
    return now.startsWith('{') && JSON.parse(now).generation !== cursor.generation
  }, 'a new generation')
})

test('Redis that says nothing any more: the client connects again by itself', async () => {
  const proxy = await startProxy(redis.url)
  open.push(() => proxy.close())
  const client = redisClient(proxy.url)
  const billing = moduleOf({ rpc: rpcOf(), redis: client })
  await billing.start()
  await until(() => billing.health().cache.redis, 'trust')
  let closed = 0
  client.on('close', () => closed++)
  proxy.mode = 'hang'
  // also while it connects anew to a server that is still silent
  await until(() => closed >= 2, 'the client to hang up twice')
  proxy.mode = 'pass'
  await until(() => billing.health().cache.redis, 'trust to be back')
})

test('a follower believes the heartbeat of its own database only', async () => {
  const [{ c: changes }] = (await db.gateway('select api.cache_changes() as c')) as [
    { c: { cursor: { cluster: string } } },
  ]
  let [beat, cluster] = [0, 'another:00000001:5:6']
  const write = () =>
    admin.set(
      'vk:cursor',
      JSON.stringify({ cursor: { ...changes.cursor, cluster }, generation: 'g', beat: ++beat }),
    )
  await write()
  const beating = setInterval(write, 100)
  open.push(() => clearInterval(beating))
  const follower = await startClient({ url: db.loginUrl, redisUrl: redis.url, by: 'follow' })
  open.push(follower.stop)
  const { trust } = follower.cache.redis!
  const since = beat
  await until(() => beat > since + 10, 'many beats')
  assert.not(trust.live())
  assert.match(follower.listener.state().error!.message, 'another database')
  cluster = changes.cursor.cluster
  await until(() => trust.live(), 'trust')
  assert.is(follower.listener.state().error, undefined)
  cluster = 'another:00000001:5:6'
  await until(() => !trust.live(), 'trust to end')
})

test('a follower trusts a proof for a second', async () => {
  const listener = await startClient({ url: db.loginUrl, redisUrl: redis.url, by: 'poll' })
  const follower = await startClient({
    url: db.loginUrl,
    redisUrl: redis.url,
    by: 'follow',
    maxStaleness: 60_000,
  })
  open.push(follower.stop)
  const { trust } = follower.cache.redis!
  await until(() => trust.live(), 'trust')
  // it holds without a break while the listener lives
  const since = performance.now()
  await until(() => {
    assert.ok(trust.live())
    return performance.now() - since > 1500
  }, 'some beats')
  await listener.stop()
  await until(() => !trust.live(), 'trust to end with the listener')
  assert.ok(performance.now() - trust.provenAt() < 1500, `${performance.now() - trust.provenAt()} ms`)
})

test.run()
