// The listener: which changes it sees, when it trusts, and how cursors move when servers and other
// listeners misbehave.
import { Redis } from 'ioredis'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import type { Server } from '../../scripts/servers.ts'
import { until } from '../../scripts/supervise.ts'
import { createKeyCache } from '../../src/cache.ts'
import { createListener } from '../../src/listener.ts'
import { type Coverage, createRedisTier } from '../../src/redis.ts'
import { type Between, type Client, type ClientOptions, startClient } from '../support/client.ts'
import { database } from '../support/database.ts'
import { startProxy, type TcpProxy } from '../support/proxy.ts'
import { seed, type World } from '../support/seed.ts'

const test = suite('listener')
const db = await database(test)
let redis: Server
let admin: Redis
let started: { stop(): Promise<void> }[] = []

test.before(async () => {
  redis = await db.redis()
  admin = new Redis(redis.url).on('error', () => {})
  db.onClose(() => admin.disconnect())
})
test.before.each(async () => {
  await admin.flushall()
})
test.after.each(async () => {
  await Promise.all(started.map((each) => each.stop()))
  started = []
})

async function client(by: ClientOptions['by'], options: Partial<ClientOptions> = {}, between?: Between) {
  const made = await startClient({ url: db.loginUrl, redisUrl: redis.url, by, ...options }, between)
  started.push(made)
  return made
}

async function proxy(url: string): Promise<TcpProxy> {
  const made = await startProxy(url)
  started.push({ stop: made.close })
  return made
}

/** Holds up the answer of the next read of the changes; `reached` once it is held. */
function gate() {
  let release = () => {}
  let reach = () => {}
  const reached = new Promise<void>((resolve) => {
    reach = resolve
  })
  let armed = false
  const between: Between = async (fn) => {
    if (!armed || fn !== 'cache_changes') return
    armed = false
    await new Promise<void>((resolve) => {
      release = resolve
      reach()
    })
  }
  const arm = () => {
    armed = true
    return reached
  }
  return { between, arm, open: () => release() }
}

const revoke = (world: World) => db.operator('select api.revoke_virtual_key($1)', [world.keyId])
const covered = async (): Promise<Coverage | null> => JSON.parse((await admin.get('vk:cursor')) ?? 'null')
const entry = (world: World) => admin.get(`vk:${world.keyHash}`)
const trusted = ({ cache }: Pick<Client, 'cache'>) =>
  until(() => cache.trust.live() && (cache.redis?.trust.live() ?? true), 'trust')
const listeners = `from pg_stat_activity where application_name = 'keyledger listener' and datname = current_database()`

/** A key that the client has in memory and, if it has a Redis tier, there too. */
async function warm(client: Client): Promise<World> {
  const world = await seed(db.operator)
  await readAgain(client)
  await client.validate(world.keyHash)
  const kept = async () => (await entry(world))?.includes('"code":null')
  if (client.cache.redis)
    await until(async () => {
      if (await kept()) return true
      // another client may just have moved the cursor: then this answer was not stored
      client.cache.forget([`vk:${world.keyHash}`])
      await client.validate(world.keyHash)
      return kept()
    }, 'the entry')
  assert.is((await client.validate(world.keyHash)).tier, 'memory')
  return world
}

/** Waits until the listener has evicted all that has changed by now. */
async function readAgain({ cache, listener }: Client) {
  const since = performance.now()
  const { trust } = cache.redis ?? cache
  await until(
    () => trust.provenAt() >= since && (listener.state().age ?? Infinity) < performance.now() - since,
    'a read',
  )
  await trusted({ cache })
}

/** What becomes of the client's next script that deletes entries, in place of `send`. */
function nextDelete({ redis }: Client, act: (send: () => Promise<unknown>) => Promise<unknown>) {
  const { eval: run } = redis
  redis.eval = ((...args: unknown[]) => {
    const send = () => run.apply(redis, args as never)
    if (args[1] === 1) return send()
    redis.eval = run
    return act(send)
  }) as typeof run
}

const refused = (client: Client, world: World) =>
  until(async () => !(await client.validate(world.keyHash)).accepted, 'the key to be refused')

for (const by of ['listen', 'poll'] as const)
  test(`a change is evicted from both tiers (${by})`, async () => {
    const one = await client(by)
    const world = await warm(one)
    await revoke(world)
    await refused(one, world)
    await until(async () => !(await entry(world))?.includes('"code":null'), 'no stale entry')
    assert.equal((await one.validate(world.keyHash)).code, 'virtual_key_disabled')
  })

test('a known key that may not be used is cached like any other', async () => {
  const one = await client('poll')
  const world = await warm(one)
  await revoke(world)
  await refused(one, world)
  await until(async () => (await one.validate(world.keyHash)).tier === 'memory', 'a hit')
  assert.ok((await admin.pttl(`vk:${world.keyHash}`)) > 86_000_000)
})

test('changed prices are evicted from Redis', async () => {
  const one = await client('listen')
  const world = await warm(one)
  await admin.set(`price:${world.nodeId}`, 'old')
  await db.operator(`insert into api.prices (config_node_id, meter, unit_price) values ($1, 'requests', 1)`, [
    world.nodeId,
  ])
  await until(async () => !(await admin.exists(`price:${world.nodeId}`)), 'the price to go')
})

test('a change of thousands of keys is evicted whole', async () => {
  const one = await client('listen')
  const world = await warm(one)
  await db.operator('select count(api.create_virtual_key($1)) from generate_series(1, 1200)', [world.userId])
  const rows = await db.sql(
    `select encode(key_hash, 'hex') as hash from data.virtual_key where user_id = $1`,
    [world.userId],
  )
  await readAgain(one)
  await Promise.all(rows.map(({ hash }) => one.validate(hash)))
  await until(async () => (await admin.dbsize()) >= 1202, 'the entries')
  await admin.config('RESETSTAT')
  await db.operator(`update api.tenants set status = 'suspended' where id = $1`, [world.tenantId])
  await refused(one, world)
  const seen = await Promise.all(rows.map(({ hash }) => one.validate(hash)))
  assert.is(seen.filter(({ code }) => code === 'tenant_suspended').length, 1201)
  // by the thousand, rather than one command a key
  const commands = await admin.info('commandstats')
  const calls = (name: string) => Number(new RegExp(`cmdstat_${name}:calls=(\\d+)`).exec(commands)?.[1] ?? 0)
  assert.ok(calls('unlink') > 0 && calls('unlink') < 100, `${calls('unlink')}`)
  assert.is(calls('del'), 0)
})

test('a forged notification is a wake-up and nothing else', async () => {
  const one = await client('listen')
  const world = await warm(one)
  const raw = await entry(world)
  const before = (await covered())!.beat
  for (const payload of ['', 'not json', '{"keys":["vk:x"],"reset":true}', 'x'.repeat(7000)])
    await db.gateway('select pg_notify($1, $2)', ['keyledger_cache', payload])
  await until(async () => (await covered())!.beat > before + 1, 'further reads')
  assert.is(one.listener.state().error, undefined)
  assert.is((await one.validate(world.keyHash)).tier, 'memory')
  assert.is(await entry(world), raw)
  // and it hides no real one
  await revoke(world)
  await refused(one, world)
})

test('a notification leads to a read sooner than the poll would', async () => {
  let reads = 0
  const one = await client('listen', {}, async (fn) => {
    if (fn === 'cache_changes') reads++
  })
  await trusted(one)
  const startedAt = performance.now()
  for (let i = 0; i < 10; i++) {
    const before = reads
    await db.gateway('select pg_notify($1, $2)', ['keyledger_cache', ''])
    await until(() => reads > before, 'a read')
  }
  assert.ok(performance.now() - startedAt < 2500, 'ten polls take 5 s')
})

test('a lost LISTEN connection ends trust at once', async () => {
  const held = gate()
  const one = await client('listen', {}, held.between)
  await warm(one)
  // no read can bring trust back meanwhile
  await held.arm()
  await db.sql(`select pg_terminate_backend(pid) ${listeners}`)
  await until(() => !one.listener.state().listening, 'the loss to be seen')
  assert.not(one.cache.trust.live())
  assert.not(one.cache.redis!.trust.live())
  held.open()
  await trusted(one)
})

test('a read that fails ends trust at once', async () => {
  let fails = false
  const one = await client('listen', { maxStaleness: 60_000 }, async (fn) => {
    if (fails && fn === 'cache_changes') throw new Error('away')
  })
  const world = await warm(one)
  fails = true
  await until(() => !one.cache.trust.live() && !one.cache.redis!.trust.live(), 'trust to end')
  assert.is(one.listener.state().error!.message, 'away')
  assert.ok(one.listener.state().listening)
  assert.is((await one.validate(world.keyHash)).tier, 'database')
  fails = false
  await trusted(one)
})

test('LISTEN comes back however long Postgres was away, and nothing that changed meanwhile is missed', async () => {
  const postgres = await proxy(db.loginUrl)
  const one = await client('listen', { url: postgres.url })
  const world = await warm(one)
  postgres.mode = 'refuse'
  postgres.cut()
  await until(() => !one.cache.trust.live(), 'the loss to be seen')
  await revoke(world)
  assert.equal(await one.validate(world.keyHash), { accepted: true, code: null, tier: 'stale' })
  // pg-listen by itself gives up after 3 s; its attempts, at most two a second, are counted
  // together with the polls'
  const since = performance.now()
  await until(() => postgres.refused > 14 && performance.now() - since > 3500, 'many attempts')
  assert.not(one.listener.state().listening)
  postgres.mode = 'pass'
  await trusted(one)
  assert.is((await one.validate(world.keyHash)).code, 'virtual_key_disabled')
  await until(() => one.listener.state().listening, 'LISTEN')
  assert.is(one.listener.state().error, undefined)
  assert.is((await db.sql(`select ${listeners} and query ilike 'listen%'`)).length, 1)
})

test('LISTEN survives being killed again and again, also while it is connecting', async () => {
  const one = await client('listen')
  const world = await warm(one)
  let killed = 0
  await until(async () => {
    killed += (await db.sql(`select pg_terminate_backend(pid) ${listeners}`)).length
    return killed >= 6
  }, 'six kills')
  await until(() => one.listener.state().listening, 'LISTEN')
  await trusted(one)
  await revoke(world)
  await refused(one, world)
})

test('a listener that starts while Postgres is away works once it is there', async () => {
  const postgres = await proxy(db.loginUrl)
  postgres.mode = 'refuse'
  const cache = createKeyCache({ load: async () => undefined })
  const away = createListener({
    cache,
    rpc: { call: () => Promise.reject(new Error('away')) },
    connectionString: postgres.url,
  })
  await away.start()
  assert.equal([away.state().listening, away.state().age], [false, null])
  assert.instance(away.state().error, Error)
  assert.not(cache.trust.live())
  postgres.mode = 'pass'
  await until(() => away.state().listening, 'LISTEN')
  await away.stop()
})

test('stop while Postgres is away leaves nothing trying', async () => {
  const postgres = await proxy(db.loginUrl)
  const one = await client('listen', { url: postgres.url })
  await trusted(one)
  postgres.mode = 'refuse'
  postgres.cut()
  await until(() => postgres.refused > 2, 'attempts')
  await one.listener.stop()
  const { refused } = postgres
  const since = performance.now()
  await until(() => performance.now() - since > 1200, 'two more turns')
  assert.is(postgres.refused, refused)
  assert.not(one.cache.trust.live())
})

test('nothing is trusted after stop', async () => {
  const one = await client('poll')
  await trusted(one)
  await one.listener.stop()
  assert.not(one.cache.trust.live())
  assert.not(one.cache.redis!.trust.live())
})

test('half-open: trust ends maxStaleness after the last answered read was sent', async () => {
  const postgres = await proxy(db.loginUrl)
  const one = await client('listen', { url: postgres.url, maxStaleness: 1500 })
  await trusted(one)
  postgres.mode = 'hang'
  const age = () => one.listener.state().age!
  await until(() => age() > 1000, 'reads to stay without an answer')
  assert.ok(one.cache.trust.live())
  await until(() => !one.cache.trust.live() && !one.cache.redis!.trust.live(), 'trust to end')
  assert.ok(age() >= 1500 && age() < 2500, `${age()}`)
  assert.is(one.listener.state().error, undefined)
  postgres.cut()
  postgres.mode = 'pass'
  await trusted(one)
})

test('entries in memory from before the first read are dropped, whatever cursor Redis has', async () => {
  const other = await client('poll')
  const late = await client('nothing')
  const world = await seed(db.operator)
  assert.ok((await late.validate(world.keyHash)).accepted)
  await revoke(world)
  await refused(other, world)
  const before = (await covered())!.beat
  await until(async () => (await covered())!.beat > before, 'Redis to be past the change')
  const listener = createListener({ cache: late.cache, rpc: { call: fromGateway } })
  started.push(listener)
  await listener.start()
  assert.not((await late.validate(world.keyHash)).accepted)
})

// A cursor that says nothing about this cluster's changes, found in Redis with entries of its
// generation.
const strange: Record<string, (now: Coverage) => unknown> = {
  'of another cluster': (now) => ({ ...now, cursor: { ...now.cursor, cluster: '1:00000001' } }),
  'from the future': (now) => ({ ...now, cursor: { ...now.cursor, snapshot: '900000000:900000000:' } }),
  'without a snapshot': (now) => ({ ...now, cursor: { cluster: now.cursor.cluster } }),
  'that is no JSON': () => undefined,
}
for (const [what, made] of Object.entries(strange))
  test(`a cursor ${what}: everything is dropped`, async () => {
    const one = await client('poll')
    const world = await warm(one)
    const raw = (await entry(world))!
    const before = (await covered())!
    await revoke(world)
    await refused(one, world)
    await one.listener.stop()
    // as if Redis had come from elsewhere, evicted by nobody
    await admin.set(`vk:${world.keyHash}`, raw)
    await admin.set('vk:cursor', JSON.stringify(made(before)) ?? '{')
    const next = await client('poll')
    await trusted(next)
    assert.not((await next.validate(world.keyHash)).accepted)
    assert.is.not((await covered())!.generation, before.generation)
  })

test('Redis emptied: a new generation', async () => {
  const one = await client('poll')
  const world = await warm(one)
  const raw = (await entry(world))!
  const { generation } = (await covered())!
  await admin.flushall()
  await until(
    async () => (await covered()) && (await covered())!.generation !== generation,
    'a new generation',
  )
  await admin.set(`vk:${world.keyHash}`, raw.replace('"code":null', '"code":"planted"'))
  await trusted(one)
  one.cache.forget([`vk:${world.keyHash}`])
  assert.ok((await one.validate(world.keyHash)).accepted, 'entries of the old one are dead')
})

test('memory is dropped when its own cursor says nothing any more', async () => {
  let reset = false
  const one = await client('poll', { redisUrl: undefined }, async (_, answer) => {
    // as after a failover: nobody can say which keys have changed
    if (reset) Object.assign(answer as object, { reset: true, keys: [] })
  })
  const world = await warm(one)
  reset = true
  await revoke(world)
  await refused(one, world)
})

test('memory is evicted before Redis, and is not filled again from there meanwhile', async () => {
  const one = await client('poll')
  const world = await warm(one)
  let sendDelete: (() => void) | undefined
  const held = new Promise<void>((resolve) => {
    nextDelete(one, (send) => {
      sendDelete = resolve
      return held.then(send)
    })
  })
  await revoke(world)
  await until(() => sendDelete, 'the delete')
  // Redis has the entry, and is trusted
  assert.ok((await entry(world))!.includes('"code":null'))
  assert.ok(one.cache.redis!.trust.live())
  assert.equal(await one.validate(world.keyHash), {
    accepted: false,
    code: 'virtual_key_disabled',
    tier: 'database',
  })
  sendDelete!()
  await readAgain(one)
  assert.not((await one.validate(world.keyHash)).accepted)
})

test('an eviction of Redis that takes long ends trust in it', async () => {
  const one = await client('poll')
  const world = await warm(one)
  nextDelete(one, () => new Promise(() => {}))
  await revoke(world)
  await until(() => !one.cache.redis!.trust.live(), 'trust to end')
  assert.not((await one.validate(world.keyHash)).accepted)
  await trusted(one)
  one.cache.forget([`vk:${world.keyHash}`])
  assert.not((await one.validate(world.keyHash)).accepted)
})

test('a change of all keys: memory is not filled again from the generation that is over', async () => {
  const one = await client('poll')
  const world = await warm(one)
  const { generation } = (await covered())!
  const { eval: run } = one.redis
  // the cursor of a new generation can't be written meanwhile
  let stopped = false
  one.redis.eval = ((...args: unknown[]) => {
    if (args[2] !== 'vk:cursor' || String(args[4]).includes(generation))
      return run.apply(one.redis, args as never)
    stopped = true
    return new Promise(() => {})
  }) as typeof run
  const session = await db.session()
  started.push({ stop: () => session.end() })
  await session.query('begin')
  await session.query(`update data.virtual_key set status = 'revoked', revoked_at = now() where id = $1`, [
    world.keyId,
  ])
  await session.query('update data.cache_invalidation set keys = null where xid = pg_current_xact_id()')
  await session.query('commit')
  await until(() => stopped, 'the cursor to be on its way')
  assert.ok((await entry(world))!.includes('"code":null'), 'Redis is as it was')
  assert.ok(one.cache.redis!.trust.live())
  const { code, tier } = await one.validate(world.keyHash)
  assert.equal([code, tier], ['virtual_key_disabled', 'database'])
  one.redis.eval = run
  await until(async () => (await covered())!.generation !== generation, 'a new generation')
  await trusted(one)
  assert.not((await one.validate(world.keyHash)).accepted)
})

test('a slow listener does not write its cursor over a later one', async () => {
  const held = gate()
  const slow = await client('poll', {}, held.between)
  await trusted(slow)
  const before = (await covered())!
  await held.arm()
  const quick = await client('poll')
  await trusted(quick)
  const passed = (await covered())!
  assert.ok(passed.beat > before.beat)
  await quick.listener.stop()
  const after = (await covered())!
  held.open()
  await until(async () => (await covered())!.beat > after.beat, 'the slow one to go on')
  assert.is((await covered())!.generation, after.generation)
  await trusted(slow)
})

test('a slow listener does not write its cursor over deletes that Redis has lost', async () => {
  const held = gate()
  const slow = await client('poll', {}, held.between)
  const world = await warm(slow)
  const raw = (await entry(world))!
  const older = (await admin.get('vk:cursor'))!
  await revoke(world)
  await refused(slow, world)
  await held.arm()
  // an older copy of Redis takes over: the entry is back, and so is the cursor of its time
  await admin.set(`vk:${world.keyHash}`, raw)
  await admin.set('vk:cursor', older)
  held.open()
  await until(async () => (await admin.get('vk:cursor')) !== older, 'the cursor to move')
  assert.is.not(await entry(world), raw)
})

test('a slow listener does not bring back the generation of a Redis that was emptied', async () => {
  const held = gate()
  const slow = await client('poll', {}, held.between)
  await trusted(slow)
  await held.arm()
  await admin.flushall()
  const quick = await client('poll')
  await trusted(quick)
  const { generation, beat } = (await covered())!
  held.open()
  await until(async () => (await covered())!.beat > beat + 2, 'both to go on')
  assert.is((await covered())!.generation, generation)
  await trusted(slow)
})

test('a change while Redis cannot be reached is evicted before Redis is trusted again', async () => {
  const away = await proxy(redis.url)
  const one = await client('poll', { redisUrl: away.url })
  const world = await warm(one)
  away.mode = 'refuse'
  away.cut()
  await until(() => !one.cache.redis!.trust.live(), 'the loss to be seen')
  await revoke(world)
  await refused(one, world)
  assert.ok((await entry(world))!.includes('"code":null'), 'Redis was out of reach')
  away.mode = 'pass'
  await trusted(one)
  one.cache.forget([`vk:${world.keyHash}`])
  assert.not((await one.validate(world.keyHash)).accepted)
})

test('a delete that fails ends trust in Redis until it is replayed', async () => {
  const one = await client('poll')
  const world = await warm(one)
  let failed = false
  nextDelete(one, () => {
    failed = true
    return Promise.reject(new Error('away'))
  })
  await revoke(world)
  await until(() => failed, 'the delete')
  await refused(one, world)
  await trusted(one)
  one.cache.forget([`vk:${world.keyHash}`])
  assert.not((await one.validate(world.keyHash)).accepted)
})

test('a cursor that ioredis sends again, to an older Redis, takes the entries along', async () => {
  const away = await proxy(redis.url)
  const [one, other] = [
    await client('poll', { redisUrl: away.url }),
    await client('poll', { redisUrl: away.url }),
  ]
  const world = await warm(one)
  await trusted(other)
  const raw = (await entry(world))!
  const found = (await admin.get('vk:cursor'))!
  // the older Redis has seen none of the changes since
  let sent = false
  nextDelete(one, (send) => {
    away.mode = 'hang'
    sent = true
    return send()
  })
  nextDelete(other, async () => {
    await until(() => sent, 'the script')
    throw new Error('away')
  })
  await revoke(world)
  await until(() => sent, 'the script')
  await until(() => !one.cache.redis!.trust.live() && !other.cache.redis!.trust.live(), 'the loss to be seen')
  assert.is(await entry(world), raw)
  assert.ok(JSON.parse(found).beat <= (await covered())!.beat)
  const { beat } = (await covered())!
  away.mode = 'pass'
  away.cut()
  await until(async () => (await covered())!.beat > beat, 'the cursor to move')
  assert.is.not(await entry(world), raw)
  for (const each of [one, other]) {
    await trusted(each)
    each.cache.forget([`vk:${world.keyHash}`])
    assert.not((await each.validate(world.keyHash)).accepted)
  }
})

test('the cursor moves only from where it was found, and with it the keys go', async () => {
  const connection = new Redis(redis.url).on('error', () => {})
  const tier = createRedisTier(connection, { maxStaleness: 5000 })
  started.push({
    async stop() {
      tier.close()
      connection.disconnect()
    },
  })
  await until(() => connection.status === 'ready', 'redis')
  const to = { cursor: { cluster: 'c', snapshot: 's' }, generation: 'g' }
  const keys = Array.from({ length: 20_000 }, (_, i) => `vk:${i}`)
  for (const key of keys) admin.set(key, 'x')
  await admin.set('vk:other', 'x')
  const first = await tier.covered()
  assert.is((await tier.advance(first, to, keys))!.beat, 1)
  assert.equal((await admin.keys('*')).sort(), ['vk:cursor', 'vk:other'])
  await admin.set('vk:0', 'x')
  assert.is(
    (await tier.advance(first, { ...to, generation: 'h' }, ['vk:0']))!.generation,
    'g',
    'not onto another',
  )
  assert.not(await admin.exists('vk:0'), 'but rid of the key')
  assert.is((await tier.covered()).coverage!.beat, 1)
})

test('a process without a listener follows the heartbeat in Redis', async () => {
  const one = await client('listen')
  const world = await warm(one)
  const follower = await client('follow', { maxStaleness: 1500 })
  await until(async () => (await follower.validate(world.keyHash)).tier === 'redis', 'trust in Redis')
  await revoke(world)
  await refused(follower, world)
  assert.is(follower.cache.stats().memory, 0)
  await one.listener.stop()
  await until(() => !follower.cache.redis!.trust.live(), 'trust to end with the heartbeat')
  assert.is((await follower.validate(world.keyHash)).tier, 'database')
})

test('a follower trusts a beat only up to the look before the preceding beat', async () => {
  const { cursor } = await fromGateway<{ cursor: object }>('cache_changes')
  const write = (beat: number, generation = 'g') =>
    admin.set('vk:cursor', JSON.stringify({ cursor, generation, beat }))
  const looks = async () => Number(/cmdstat_get:calls=(\d+)/.exec(await admin.info('commandstats'))?.[1] ?? 0)
  const looked = async () => {
    const before = await looks()
    await until(async () => (await looks()) > before + 1, 'another look')
  }
  await write(5)
  const follower = await client('follow', { maxStaleness: 60_000 })
  const { trust } = follower.cache.redis!
  await looked()
  assert.not(trust.live(), 'one beat may be of any age')
  await write(6)
  await looked()
  assert.not(trust.live(), 'it may come from a read that was sent before our first look')
  await write(7)
  await until(() => trust.live(), 'trust')
  await write(8, 'another')
  await until(() => !trust.live(), 'trust to end with the generation')
  await looked()
  await write(10, 'another')
  await until(() => trust.live(), 'trust')
  await admin.flushall()
  await until(() => !trust.live(), 'trust to end with the cursor')
  assert.instance(follower.listener.state().error, Error)
})

test('without Redis there is nothing to follow', () => {
  const cache = createKeyCache({ load: async () => undefined })
  assert.throws(() => createListener({ cache, rpc: { call: fromGateway }, follow: true }), /redis/)
})

/** The outbox as the gateway reads it, beside any client's own connections. */
async function fromGateway<T>(fn: string, args?: Record<string, unknown>): Promise<T> {
  const [row] = await db.gateway(`select api.${fn}($1) as changes`, [JSON.stringify(args?.cursor ?? null)])
  return row!.changes
}

test.run()
