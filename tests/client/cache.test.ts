// The two tiers alone: they store and trust entries, and a reader that was overtaken stores
// nothing.
import { createHash } from 'node:crypto'
import { Cluster, Redis } from 'ioredis'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { temporaryDirectory } from '../../scripts/binaries.ts'
import { type Server, startRedis } from '../../scripts/servers.ts'
import { supervise, until } from '../../scripts/supervise.ts'
import { createKeyCache, type KeyCacheOptions } from '../../src/cache.ts'
import { setServerTime } from '../../src/clock.ts'
import { failure } from '../support/failure.ts'
import { startProxy } from '../support/proxy.ts'

interface Context {
  name: string
  valid_until: string | null
  config_node_ids?: string[]
}

const test = suite('cache')
let server: Server
let admin: Redis
const open: { close(): void }[] = []
let keys = 0

test.before(async () => {
  server = (await startRedis())!
  admin = new Redis(server.url)
})
test.after.each(() => {
  for (const each of open.splice(0)) each.close()
})
test.after(async () => {
  admin.disconnect()
  await server.stop()
})

const newHash = () => createHash('sha256').update(`key ${keys++}`).digest('hex')
const answer = (name: string, valid_until: string | null = null): Context => ({ name, valid_until })

function client(): Redis {
  const redis = new Redis(server.url, { retryStrategy: () => 50 }).on('error', () => {})
  open.push({ close: () => redis.disconnect() })
  return redis
}

/**
 * A cache on a Postgres that the test plays: `holds` has its keys, `asked` the questions, and
 * `gate` delays its answers.
 */
function cacheOf(options: Partial<KeyCacheOptions<Context>> = {}) {
  const postgres = {
    holds: new Map<string, Context>(),
    asked: [] as string[],
    away: undefined as Error | undefined,
    gate: Promise.resolve(),
  }
  const cache = createKeyCache<Context>({
    async load(hash) {
      postgres.asked.push(hash)
      if (postgres.away) throw postgres.away
      const seen = postgres.holds.get(hash)
      await postgres.gate
      return seen
    },
    ...options,
  })
  open.push(cache)
  return { cache, postgres, get: cache.get }
}

/** The same with a Redis tier, both trusted as a listener would make them. */
async function sharedCache(generation: string, options: Partial<KeyCacheOptions<Context>> = {}) {
  const redis = client()
  await until(() => redis.status === 'ready', 'redis')
  const made = cacheOf({ redis, ...options })
  const prove = (as = generation) => {
    made.cache.trust.prove(performance.now())
    made.cache.redis!.prove(performance.now(), as)
  }
  prove()
  return { ...made, redis, tier: made.cache.redis!, prove }
}

function gate() {
  let open = () => {}
  const closed = new Promise<void>((resolve) => {
    open = resolve
  })
  return { closed, open }
}

/** Waits until the key's value in Redis matches the pattern; '' stands for no value. */
const inRedis = (hash: string, pattern: RegExp) =>
  until(async () => pattern.test((await admin.get(`vk:${hash}`)) ?? ''), `vk:${hash} to match ${pattern}`)

test('reads Postgres once for callers at the same time, then memory', async () => {
  const { cache, postgres, get } = cacheOf()
  cache.trust.prove(performance.now())
  const hash = newHash()
  postgres.holds.set(hash, answer('a'))
  const answers = await Promise.all([get(hash), get(hash), get(hash)])
  assert.equal(
    answers.map((a) => a.context?.name),
    ['a', 'a', 'a'],
  )
  assert.is((await get(hash)).tier, 'memory')
  assert.is(postgres.asked.length, 1)
  assert.equal(cache.stats(), { memory: 1, redis: 0, database: 3, stale: 0, entries: 1 })
})

test('answers cannot be changed by one caller for the others', async () => {
  const { cache, postgres, get } = cacheOf()
  cache.trust.prove(performance.now())
  const hash = newHash()
  postgres.holds.set(hash, { ...answer('a'), config_node_ids: ['1'] })
  const { context } = await get(hash)
  assert.throws(() => Object.assign(context!, { name: 'b' }))
  assert.throws(() => context!.config_node_ids!.push('2'))
})

test('without trust every answer is read from Postgres', async () => {
  const { cache, postgres, get } = await sharedCache('untrusted')
  const hash = newHash()
  postgres.holds.set(hash, answer('a'))
  await get(hash)
  await inRedis(hash, /"a"/)
  cache.trust.end()
  cache.redis!.trust.end()
  postgres.holds.set(hash, answer('b'))
  assert.equal(await get(hash), { context: answer('b'), tier: 'database' })
  assert.equal(await get(hash), { context: answer('b'), tier: 'database' })
})

test('trust ends maxStaleness after the last proof was sent', async () => {
  const { cache, postgres, get } = cacheOf({ maxStaleness: 150 })
  const hash = newHash()
  postgres.holds.set(hash, answer('a'))
  cache.trust.prove(performance.now())
  await get(hash)
  assert.is((await get(hash)).tier, 'memory')
  await until(() => !cache.trust.live(), 'trust to end')
  assert.is((await get(hash)).tier, 'database')
})

test('a proof that was sent before trust ended does not bring it back', async () => {
  const { cache } = cacheOf()
  const sentAt = performance.now()
  await until(() => performance.now() > sentAt, 'the clock')
  cache.trust.end()
  cache.trust.prove(sentAt)
  assert.not(cache.trust.live())
})

test('an unknown key is remembered, and found once it is created', async () => {
  const { cache, postgres, get } = await sharedCache('unknown')
  const hash = newHash()
  assert.equal(await get(hash), { context: undefined, tier: 'database' })
  assert.equal(await get(hash), { context: undefined, tier: 'memory' })
  await inRedis(hash, /"context":null/)
  assert.ok((await admin.pttl(`vk:${hash}`)) <= 60_000, 'a minute at most')
  postgres.holds.set(hash, answer('a'))
  await admin.del(`vk:${hash}`)
  cache.forget([`vk:${hash}`])
  assert.equal(await get(hash), { context: answer('a'), tier: 'database' })
})

test('a known key is kept a day in Redis', async () => {
  const { postgres, get } = await sharedCache('day')
  const hash = newHash()
  postgres.holds.set(hash, answer('a'))
  await get(hash)
  await inRedis(hash, /"a"/)
  const ttl = await admin.pttl(`vk:${hash}`)
  assert.ok(ttl > 86_000_000 && ttl <= 86_400_000, `${ttl}`)
})

test('made-up keys do not drive real ones out of memory', async () => {
  const { cache, postgres, get } = cacheOf({ maxEntries: 10 })
  cache.trust.prove(performance.now())
  const hash = newHash()
  postgres.holds.set(hash, answer('a'))
  await get(hash)
  for (let i = 0; i < 50; i++) await get(newHash())
  assert.is((await get(hash)).tier, 'memory')
  assert.is(cache.stats().entries, 2)
})

test('memory is bounded', async () => {
  const { cache, postgres, get } = cacheOf({ maxEntries: 10 })
  for (let i = 0; i < 50; i++) {
    const hash = newHash()
    postgres.holds.set(hash, answer('a'))
    await get(hash)
  }
  assert.is(cache.stats().entries, 10)
})

test('valid_until is checked at each hit, in both tiers', async () => {
  const first = await sharedCache('valid')
  const second = await sharedCache('valid')
  const hash = newHash()
  const soon = Date.now() + 2000 // all up to the wait must be done by then
  first.postgres.holds.set(hash, answer('a', new Date(soon).toISOString()))
  await first.get(hash)
  await inRedis(hash, /"a"/)
  assert.is((await first.get(hash)).tier, 'memory')
  assert.is((await second.get(hash)).tier, 'redis')
  await admin.persist(`vk:${hash}`) // so that Redis's own expiry doesn't do it
  await until(() => Date.now() > soon, 'valid_until to pass')
  const third = await sharedCache('valid')
  for (const { get, postgres } of [first, second, third]) {
    postgres.holds.set(hash, answer('b'))
    assert.equal((await get(hash)).context, answer('b'))
  }
})

test('an end that the server may have passed by now is not answered from Redis', async () => {
  const [first, second] = [await sharedCache('latest'), await sharedCache('latest')]
  const hash = newHash()
  for (const { postgres } of [first, second])
    postgres.holds.set(hash, answer('a', new Date(Date.now() + 30_000).toISOString()))
  await first.get(hash)
  await inRedis(hash, /"a"/)
  // a round trip of 50 s: the server read its clock somewhen in it
  setServerTime(Date.now(), performance.now() - 50_000, performance.now())
  try {
    assert.is((await second.get(hash)).tier, 'database')
  } finally {
    setServerTime(Date.now(), performance.now(), performance.now())
  }
})

test('a failure is never an unknown key', async () => {
  const { cache, postgres, get } = cacheOf()
  const hash = newHash()
  cache.trust.prove(performance.now())
  postgres.away = new Error('away')
  assert.is((await failure(get(hash))).message, 'away')
  postgres.away = undefined
  assert.equal(await get(hash), { context: undefined, tier: 'database' })
  cache.trust.end()
  postgres.away = new Error('away')
  assert.is((await failure(get(hash))).message, 'away')
})

test('with Postgres away a known key is answered as stale, for staleIfError', async () => {
  const { cache, postgres, get } = cacheOf({ staleIfError: 300 })
  const hash = newHash()
  postgres.holds.set(hash, answer('a'))
  cache.trust.prove(performance.now())
  await get(hash)
  cache.trust.end()
  postgres.away = new Error('away')
  assert.equal(await get(hash), { context: answer('a'), tier: 'stale' })
  const since = performance.now()
  await until(() => performance.now() - since > 300, 'staleIfError to pass')
  assert.is((await failure(get(hash))).message, 'away')
  assert.is(cache.stats().stale, 1)
})

test('a process that never had the key answers it as stale from Redis', async () => {
  const first = await sharedCache('stale')
  const second = await sharedCache('stale')
  const hash = newHash()
  first.postgres.holds.set(hash, answer('a'))
  await first.get(hash)
  await inRedis(hash, /"a"/)
  second.postgres.away = new Error('away')
  second.tier.trust.end()
  assert.equal(await second.get(hash), { context: answer('a'), tier: 'stale' })
})

test('stale does not outlive valid_until', async () => {
  const { cache, postgres, get } = cacheOf()
  const hash = newHash()
  const soon = Date.now() + 1000
  postgres.holds.set(hash, answer('a', new Date(soon).toISOString()))
  cache.trust.prove(performance.now())
  await get(hash)
  postgres.away = new Error('away')
  cache.trust.end()
  await until(() => Date.now() > soon, 'valid_until to pass')
  assert.is((await failure(get(hash))).message, 'away')
})

test('a Postgres that does not answer is away, if there is something to say instead', async () => {
  const { cache, postgres, get } = cacheOf({ maxStaleness: 200 })
  const hash = newHash()
  postgres.holds.set(hash, answer('a'))
  cache.trust.prove(performance.now())
  await get(hash)
  cache.trust.end()
  const paused = gate()
  postgres.gate = paused.closed
  const slow = get(newHash())
  assert.equal(await get(hash), { context: answer('a'), tier: 'stale' })
  paused.open()
  assert.equal(await slow, { context: undefined, tier: 'database' })
})

test('memory: a reader overtaken by an eviction stores nothing, and later callers read again', async () => {
  const { cache, postgres, get } = cacheOf()
  const hash = newHash()
  cache.trust.prove(performance.now())
  postgres.holds.set(hash, answer('old'))
  const paused = gate()
  postgres.gate = paused.closed
  const before = get(hash)
  await until(() => postgres.asked.length === 1, 'the reader to have read')
  postgres.holds.set(hash, answer('new'))
  postgres.gate = Promise.resolve()
  cache.forget([`vk:${hash}`])
  const later = get(hash)
  await until(() => postgres.asked.length === 2, 'a later caller to read by itself', 5)
  assert.equal((await later).context, answer('new'))
  paused.open()
  await before
  assert.equal(await get(hash), { context: answer('new'), tier: 'memory' }, 'the reader stored nothing')
})

test('memory: a reader overtaken by a reset stores nothing', async () => {
  const { cache, postgres, get } = cacheOf()
  const hash = newHash()
  cache.trust.prove(performance.now())
  postgres.holds.set(hash, answer('old'))
  const paused = gate()
  postgres.gate = paused.closed
  const before = get(hash)
  await until(() => postgres.asked.length === 1, 'the reader to have read')
  postgres.holds.set(hash, answer('new'))
  cache.forgetAll()
  paused.open()
  await before
  assert.equal(await get(hash), { context: answer('new'), tier: 'database' })
})

test('memory: without trust a caller does not join a reader that started a second ago', async () => {
  const { postgres, get } = cacheOf()
  const hash = newHash()
  postgres.holds.set(hash, answer('old'))
  const paused = gate()
  postgres.gate = paused.closed
  const before = get(hash)
  const startedAt = performance.now()
  await until(() => performance.now() - startedAt > 1000, 'the reader to be a second old')
  postgres.holds.set(hash, answer('new'))
  postgres.gate = Promise.resolve()
  const later = get(hash)
  await until(() => postgres.asked.length === 2, 'the caller to read by itself', 5)
  assert.equal((await later).context, answer('new'))
  paused.open()
  await before
})

// What may happen while a reader is between its read and its store in Redis; Postgres has the new
// answer by then.
const overtaking = {
  'an eviction': async (key: string) => admin.del(key),
  'Redis being emptied': async () => admin.flushall(),
  'an eviction, and another reader that waits': async (key: string) => {
    await admin.del(key)
    await admin.set(key, 'lease:of another')
  },
}
for (const [what, happens] of Object.entries(overtaking))
  test(`redis: a reader overtaken by ${what} stores nothing`, async () => {
    const slow = await sharedCache('lease')
    const hash = newHash()
    slow.postgres.holds.set(hash, answer('old'))
    const paused = gate()
    slow.postgres.gate = paused.closed
    const before = slow.get(hash)
    await inRedis(hash, /^lease:/)
    await until(() => slow.postgres.asked.length === 1, 'the reader to have read')
    await happens(`vk:${hash}`)
    const held = await admin.get(`vk:${hash}`)
    paused.open()
    await before
    // its store was sent before this over the same connection
    await slow.redis.ping()
    assert.is(await admin.get(`vk:${hash}`), held)
  })

test('redis: an entry belongs to the generation from before its reader read', async () => {
  const slow = await sharedCache('generation 1')
  const hash = newHash()
  slow.postgres.holds.set(hash, answer('old'))
  const paused = gate()
  slow.postgres.gate = paused.closed
  const before = slow.get(hash)
  await until(() => slow.postgres.asked.length === 1, 'the reader to have read')
  slow.prove('generation 2')
  paused.open()
  await before
  await inRedis(hash, /"old"/)
  const other = await sharedCache('generation 2')
  other.postgres.holds.set(hash, answer('new'))
  assert.equal(await other.get(hash), { context: answer('new'), tier: 'database' })
  await inRedis(hash, /"new"/)
})

test('redis: a reader that finds the lease of another reads Postgres and stores nothing', async () => {
  const { postgres, get } = await sharedCache('other')
  const hash = newHash()
  await admin.set(`vk:${hash}`, 'lease:of another')
  postgres.holds.set(hash, answer('a'))
  assert.is((await get(hash)).tier, 'database')
  assert.is(await admin.get(`vk:${hash}`), 'lease:of another')
})

test('redis: of two readers that find nothing one gets the lease, and a lease ends by itself', async () => {
  const { tier } = await sharedCache('two')
  const key = `vk:${newHash()}`
  const leases = await Promise.all([tier.lease(key, ''), tier.lease(key, '')])
  assert.is(leases.filter(Boolean).length, 1)
  const ttl = await admin.pttl(key)
  assert.ok(ttl > 0 && ttl <= 30_000, `${ttl}`)
})

test('redis: a value that is no entry is replaced', async () => {
  const { postgres, get } = await sharedCache('garbage')
  for (const garbage of ['{', 'null', '"text"', '{"generation":"another","context":{"name":"old"}}']) {
    const hash = newHash()
    await admin.set(`vk:${hash}`, garbage)
    postgres.holds.set(hash, answer('a'))
    assert.equal(await get(hash), { context: answer('a'), tier: 'database' })
    await inRedis(hash, /"a"/)
  }
})

test('redis: a hit is one read and nothing else', async () => {
  const first = await sharedCache('one get')
  const second = await sharedCache('one get')
  const hash = newHash()
  first.postgres.holds.set(hash, answer('a'))
  await first.get(hash)
  await inRedis(hash, /"a"/)
  await admin.config('RESETSTAT')
  assert.equal(await second.get(hash), { context: answer('a'), tier: 'redis' })
  const commands = (await admin.info('commandstats')).match(/(?<=cmdstat_)(?!config|info)[^\r]*?calls=\d+/g)
  assert.equal(commands, ['mget:calls=1'])
})

test('redis: a reader that is done is nobody to join', async () => {
  const { postgres, get } = await sharedCache('done', { maxEntries: 1 })
  const [hash, other] = [newHash(), newHash()]
  for (const each of [hash, other]) {
    postgres.holds.set(each, answer('a'))
    await admin.set(`vk:${each}`, JSON.stringify({ generation: 'done', context: answer('old') }))
    assert.is((await get(each)).tier, 'redis')
  }
  await admin.del(`vk:${hash}`)
  assert.equal(await get(hash), { context: answer('a'), tier: 'database' })
})

test('redis: an answer that comes after the connection was lost is not trusted', async () => {
  const first = await sharedCache('resent')
  const second = await sharedCache('resent')
  const hash = newHash()
  first.postgres.holds.set(hash, answer('old'))
  second.postgres.holds.set(hash, answer('new'))
  await first.get(hash)
  await inRedis(hash, /"old"/)
  // held up by Redis, then cut off: ioredis sends the get again over its next connection
  await admin.client('PAUSE', 150, 'ALL')
  const asked = second.get(hash)
  second.redis.disconnect(true)
  assert.equal((await asked).context, answer('new'))
})

test('redis down: memory, then Postgres, at once and in one flight', async () => {
  const own = (await startRedis())!
  const redis = new Redis(own.url, { retryStrategy: () => 50 }).on('error', () => {})
  try {
    await until(() => redis.status === 'ready', 'redis')
    const { cache, postgres, get } = cacheOf({ redis })
    const [warm, cold] = [newHash(), newHash()]
    for (const hash of [warm, cold]) postgres.holds.set(hash, answer('a'))
    cache.trust.prove(performance.now())
    cache.redis!.prove(performance.now(), 'down')
    await get(warm)
    await own.kill9()
    await until(() => redis.status !== 'ready', 'the client to notice')
    assert.is((await get(warm)).tier, 'memory')
    assert.equal(
      (await Promise.all([get(cold), get(cold)])).map((a) => a.tier),
      ['database', 'database'],
    )
    assert.is(postgres.asked.length, 2)
    await own.restart()
    await until(() => redis.status === 'ready', 'redis')
    assert.not(cache.redis!.trust.live(), 'not trusted before the changes are read')
  } finally {
    redis.disconnect()
    await own.stop()
  }
})

test('redis hanging: an answer within a second, and the next callers do not wait for it', async () => {
  const own = (await startRedis())!
  const redis = new Redis(own.url).on('error', () => {})
  try {
    await until(() => redis.status === 'ready', 'redis')
    const { cache, postgres, get } = cacheOf({ redis })
    cache.trust.prove(performance.now())
    cache.redis!.prove(performance.now(), 'hanging')
    process.kill(own.pid, 'SIGSTOP')
    const startedAt = performance.now()
    const hash = newHash()
    postgres.holds.set(hash, answer('a'))
    let seen: unknown
    get(hash).then((each) => {
      seen = each
    })
    assert.equal(await until(() => seen, 'an answer', 5), { context: answer('a'), tier: 'database' })
    assert.ok(performance.now() - startedAt < 1000)
    assert.not(cache.redis!.trust.live())
  } finally {
    redis.disconnect()
    process.kill(own.pid, 'SIGCONT')
    await own.stop()
  }
})

test('redis: in a Cluster entries and cursor are deleted and moved at once', async () => {
  const probes = await Promise.all([startProxy(server.url), startProxy(server.url)])
  const [port, busPort] = probes.map(({ url }) => Number(new URL(url).port))
  await Promise.all(probes.map((probe) => probe.close()))
  const dir = temporaryDirectory('redis')
  const settings = `port ${port} bind 127.0.0.1 save '' dir ${dir}
    cluster-enabled yes cluster-port ${busPort} cluster-announce-ip 127.0.0.1`
  const argv = settings.split(/\s+/).map((word, i) => (i % 2 ? word.replace("''", '') : `--${word}`))
  const own = await supervise({ dir, argv: ['redis-server', ...argv] })
  const node = new Redis(port!, { retryStrategy: () => 50 }).on('error', () => {})
  const cluster = new Cluster([{ host: '127.0.0.1', port }], { lazyConnect: true }).on('error', () => {})
  try {
    await node.cluster('ADDSLOTSRANGE', 0, 16383)
    await until(async () => (await node.cluster('INFO')).includes('cluster_state:ok'), 'the cluster')
    const { cache, postgres, get } = cacheOf({ redis: cluster })
    const tier = cache.redis!
    await until(() => cluster.status === 'ready', 'the client that the cache connected')
    tier.prove(performance.now(), 'cluster')
    const hash = newHash()
    postgres.holds.set(hash, answer('a'))
    await get(hash)
    await until(async () => (await get(hash)).tier === 'redis', 'a hit')
    const found = await tier.covered()
    const cursor = { cluster: 'c', snapshot: 's' }
    const keys = [hash, newHash(), newHash()].map((each) => `vk:${each}`)
    assert.is((await tier.advance(found, { cursor, generation: 'cluster' }, keys))?.beat, 1)
    assert.is((await get(hash)).tier, 'database')
  } finally {
    cluster.disconnect()
    node.disconnect()
    await own.end()
  }
})

test.run()
