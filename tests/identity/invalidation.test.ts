// The promise of the cache, in several processes at once: each obeys a committed change within a second.
import { createHash, randomUUID } from 'node:crypto'
import { Redis } from 'ioredis'
import pg from 'pg'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import type { Server } from '../../scripts/servers.ts'
import { until } from '../../scripts/supervise.ts'
import { type Between, type ForkedClient, forkClient, startClient } from '../support/client.ts'
import { database } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { ownPostgres } from '../support/postgres.ts'
import { startProxy, type TcpProxy } from '../support/proxy.ts'
import { seed, type World } from '../support/seed.ts'

const test = suite('invalidation')
const db = await database(test)
let redis: Server
let admin: Redis
let toPostgres: TcpProxy
let toRedis: TcpProxy
/** One client of each kind, each in its own process; the last two reach their servers through the proxies. */
let processes: ForkedClient[] = []

test.before(async () => {
  redis = await db.redis()
  admin = new Redis(redis.url).on('error', () => {})
  toPostgres = await startProxy(db.loginUrl)
  toRedis = await startProxy(redis.url)
  const { loginUrl: url } = db
  const redisUrl = redis.url
  processes = await Promise.all([
    forkClient({ url, redisUrl, by: 'listen' }),
    forkClient({ url, redisUrl, by: 'poll' }),
    forkClient({ url, redisUrl, by: 'follow' }),
    forkClient({ url, redisUrl, by: 'nothing' }),
    forkClient({ url, by: 'listen' }),
    forkClient({ url, by: 'poll' }),
    forkClient({ url: toPostgres.url, redisUrl, by: 'listen' }),
    forkClient({ url, redisUrl: toRedis.url, by: 'listen' }),
  ])
  db.onClose(async () => {
    await Promise.all(processes.map((each) => each.stop()))
    await toPostgres.close()
    await toRedis.close()
    admin.disconnect()
  })
})

const revoke = (world: World) => db.operator('select api.revoke_virtual_key($1)', [world.keyId])

/** A key that every process has accepted, from its own tier where it has one. */
async function warm(): Promise<World> {
  const world = await seed(db.operator)
  for (const each of processes)
    await until(
      async () => {
        const { accepted, tier } = await each.validate(world.keyHash)
        assert.ok(accepted)
        return tier !== 'database' || each.name === 'nothing'
      },
      `a hit in ${each.name}`,
      60,
    )
  return world
}

/**
 * Every validate that starts a second or more after `committed` must give `code` (null: accepts).
 * All processes ask without a pause until each has answered ten times past that moment.
 */
async function obeyed(
  { keyHash }: Pick<World, 'keyHash'>,
  committed: number,
  code: string | null = 'virtual_key_disabled',
  among = processes,
) {
  await Promise.all(
    among.map(async (each) => {
      for (let answers = 0; answers < 10; ) {
        const late = performance.now() - committed
        const seen = await each.validate(keyHash)
        if (late < 1000) continue
        assert.is(
          seen.code,
          code,
          `${each.name} gave ${seen.code} from ${seen.tier} ${Math.round(late)} ms after`,
        )
        answers++
      }
    }),
  )
}

/** Waits until all have read the earlier changes: each accepts a key that it knew as unknown. */
async function caughtUp({ userId }: World, all: Pick<ForkedClient, 'validate'>[]) {
  const keyHash = createHash('sha256').update(`marker ${randomUUID()}`).digest('hex')
  const sees = async (each: (typeof all)[number]) => (await each.validate(keyHash)).accepted
  for (const each of all) assert.not(await sees(each))
  await db.sql(
    `insert into data.virtual_key (user_id, key_hash, key_prefix) values ($1, decode($2, 'hex'), 'marker')`,
    [userId, keyHash],
  )
  for (const each of all) await until(() => sees(each), 'the marker to be seen', 60)
}

test('after a revoke no process accepts the key', async () => {
  for (let i = 0; i < 3; i++) {
    const world = await warm()
    await revoke(world)
    await obeyed(world, performance.now())
  }
})

test('after a user is suspended, and active again', async () => {
  const world = await warm()
  const set = (status: string) =>
    db.operator('update api.user_profiles set status = $1 where id = $2', [status, world.userId])
  await set('suspended')
  await obeyed(world, performance.now(), 'user_suspended')
  await set('active')
  await obeyed(world, performance.now(), null)
})

test('after the creation of a key that all knew as unknown', async () => {
  const { userId } = await seed(db.operator)
  const keyHash = createHash('sha256').update(`later ${userId}`).digest('hex')
  await obeyed({ keyHash }, -Infinity, 'virtual_key_unknown')
  await db.sql(
    `insert into data.virtual_key (user_id, key_hash, key_prefix) values ($1, decode($2, 'hex'), 'later')`,
    [userId, keyHash],
  )
  await obeyed({ keyHash }, performance.now(), null)
})

test('after all listeners were killed and came back', async () => {
  const world = await warm()
  const listening = async () =>
    (
      await db.sql(
        `select pid from pg_stat_activity where application_name = 'keyledger listener' and datname = $1`,
        [db.name],
      )
    ).map(({ pid }) => pid as number)
  const killed = await listening()
  assert.is(killed.length, 4)
  await db.sql('select pg_terminate_backend(pid) from unnest($1::integer[]) as pid', [killed])
  await revoke(world)
  await obeyed(world, performance.now())
  await until(async () => (await listening()).filter((pid) => !killed.includes(pid)).length === 4, 'LISTEN')
  const next = await warm()
  await revoke(next)
  await obeyed(next, performance.now())
})

test('after a process was cut off from Postgres while the key was revoked', async () => {
  const world = await warm()
  const cutOff = processes[6]!
  toPostgres.mode = 'refuse'
  toPostgres.cut()
  await until(async () => (await cutOff.validate(world.keyHash)).tier === 'stale', 'it to notice')
  await revoke(world)
  await obeyed(
    world,
    performance.now(),
    undefined,
    processes.filter((each) => each !== cutOff),
  )
  // until it is back, it says that its answers may be out of date
  assert.equal(await cutOff.validate(world.keyHash), { accepted: true, code: null, tier: 'stale' })
  toPostgres.mode = 'pass'
  await until(async () => (await cutOff.validate(world.keyHash)).tier !== 'stale', 'it to be back')
  await obeyed(world, -Infinity, undefined, [cutOff])
})

test('after a process was cut off from Redis while the key was revoked', async () => {
  const world = await warm()
  toRedis.mode = 'refuse'
  toRedis.cut()
  await revoke(world)
  await obeyed(world, performance.now())
  toRedis.mode = 'pass'
  await obeyed(world, -Infinity)
})

test('after Redis was emptied meanwhile', async () => {
  const world = await warm()
  await admin.flushall()
  await revoke(world)
  await admin.flushall()
  await obeyed(world, performance.now())
})

test('after Redis was away meanwhile', async () => {
  const world = await warm()
  await redis.kill9()
  await revoke(world)
  const committed = performance.now()
  await redis.restart()
  await obeyed(world, committed)
})

// A reader in this process reads the old answer, and stores it after all others obey the new one.
for (const emptied of [false, true])
  test(`after a reader paused between read and store${emptied ? ', and Redis was emptied' : ''}`, async () => {
    let pauses = false
    let read = () => {}
    let goOn = () => {}
    const reads = new Promise<void>((resolve) => {
      read = resolve
    })
    const mayGoOn = new Promise<void>((resolve) => {
      goOn = resolve
    })
    const between: Between = async (fn) => {
      if (!pauses || fn !== 'resolve_virtual_key') return
      read()
      await mayGoOn
    }
    const reader = await startClient({ url: db.loginUrl, redisUrl: redis.url, by: 'listen' }, between)
    try {
      await until(() => reader.cache.redis!.trust.live(), 'trust')
      const world = await seed(db.operator)
      // its own creation must not end the flight
      await caughtUp(world, [reader, ...processes])
      pauses = true
      await admin.del(`vk:${world.keyHash}`)
      const before = reader.validate(world.keyHash)
      await reads
      assert.match((await admin.get(`vk:${world.keyHash}`)) ?? '', /^lease:/)
      if (emptied) await admin.flushall()
      await revoke(world)
      const committed = performance.now()
      await obeyed(world, committed)
      goOn()
      assert.ok((await before).accepted, 'it had read the old answer')
      await reader.redis.ping() // sent after its store
      await obeyed(world, committed)
      assert.not((await reader.validate(world.keyHash)).accepted)
      // a process that knows the key from Redis alone must not accept it either
      const fresh = await forkClient({ url: db.loginUrl, redisUrl: redis.url, by: 'poll' })
      await obeyed(world, committed, undefined, [fresh]).finally(fresh.stop)
    } finally {
      goOn()
      await reader.stop()
    }
  })

// Postgres 17 lets the queue be small; before, it takes 8 GB to fill it.
const small = Number(process.env.PG_VERSION || 17) >= 17 ? test : test.skip
small('a revoke goes through though nobody can be notified', async () => {
  const server = await ownPostgres(['max_notify_queue_pages=64'])
  const [admin, busy] = [new pg.Client(server.url), new pg.Client(server.url)]
  try {
    await Promise.all([admin.connect(), busy.connect()])
    const sql = async (text: string, values?: unknown[]) => (await admin.query(text, values)).rows
    const world = await seed(sql)
    // it listens but is too busy to read, so Postgres keeps every notification for it
    await busy.query('listen others')
    await busy.query('begin')
    const full = (async () => {
      for (;;) await sql(`select pg_notify('others', repeat('x', 7999))`)
    })()
    assert.match((await failure(full)).message, 'too many notifications')
    await sql('select api.revoke_virtual_key($1)', [world.keyId])
    const [last] = await sql('select keys from data.cache_invalidation order by id desc limit 1')
    assert.equal(last!.keys, [world.keyHash])
  } finally {
    await Promise.all([admin.end(), busy.end()])
    await server.stop()
  }
})

test('after a key was created while its tenant was being suspended', async () => {
  const { userId, tenantId } = await seed(db.operator)
  for (const first of ['create', 'suspend'] as const) {
    await db.operator(`update api.tenants set status = 'active' where id = $1`, [tenantId])
    const [creating, suspending] = [
      await db.session('keyledger_operator'),
      await db.session('keyledger_operator'),
    ]
    const create = async () =>
      (
        await creating.query(
          `select k.id, encode(sha256(convert_to(k.virtual_key, 'UTF8')), 'hex') as hash from api.create_virtual_key($1) k`,
          [userId],
        )
      ).rows[0].hash as string
    const suspend = () =>
      suspending.query(`update api.tenants set status = 'suspended' where id = $1`, [tenantId])
    try {
      await creating.query('begin')
      await suspending.query('begin')
      let hash = ''
      if (first === 'create') {
        hash = await create()
        const waiting = suspend()
        await db.blocked(suspending)
        await creating.query('commit')
        // readers accept the key before they learn that its tenant closes
        await Promise.all(processes.map((each) => each.validate(hash)))
        await waiting
        await suspending.query('commit')
      } else {
        await suspend()
        const waiting = create()
        await db.blocked(creating)
        await suspending.query('commit')
        hash = await waiting
        await creating.query('commit')
      }
      await obeyed({ keyHash: hash }, performance.now(), 'tenant_suspended')
    } finally {
      await creating.end()
      await suspending.end()
    }
  }
})

test.run()
