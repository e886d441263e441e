// rotate_virtual_key: the row gets a new key; the old one is accepted until its grace ends and never after.
import { createHash } from 'node:crypto'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { until } from '../../scripts/supervise.ts'
import { type ForkedClient, forkClient } from '../support/client.ts'
import { movableClock } from '../support/clock.ts'
import { database, type Row } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { hold, seed, type World } from '../support/seed.ts'

const test = suite('key rotation')
const db = await database(test)
const { operator, gateway } = db

const hashOf = (key: string) => createHash('sha256').update(key).digest('hex')
const rotate = async (id: string, grace?: string): Promise<Row> =>
  (
    await operator(`select * from api.rotate_virtual_key($1${grace === undefined ? '' : ', $2'})`, [
      id,
      ...(grace === undefined ? [] : [grace]),
    ])
  )[0]!
const shown = async (id: string) => (await operator('select * from api.virtual_keys where id = $1', [id]))[0]!

/** The answer for the key; both functions must agree on it. */
async function resolve(key: string): Promise<Row> {
  const [{ valid_for_ms, ...byHash }] = (await gateway('select * from api.resolve_virtual_key($1)', [
    hashOf(key),
  ])) as [Row]
  const [byKey] = await gateway('select * from api.resolve_billing_account($1)', [key])
  const same = Object.keys(byHash)
  assert.equal(Object.fromEntries(same.map((name) => [name, byKey![name]])), byHash)
  return byHash
}
const code = async (key: string) => (await resolve(key)).code
const cursor = async () => (await gateway('select api.cache_changes() as c'))[0]!.c.cursor
const evicted = async (since: Row): Promise<string[]> =>
  (await gateway('select api.cache_changes($1) as c', [since]))[0]!.c.keys
const names = (...keys: string[]) => keys.map((key) => `vk:${hashOf(key)}`).sort()

/** A key rotated twice, with its three texts, oldest first. */
async function rotatedTwice(options?: Parameters<typeof seed>[1]): Promise<[World, string[]]> {
  const world = await seed(operator, options)
  const second = await rotate(world.keyId)
  const third = await rotate(world.keyId, '2 hours')
  return [world, [world.key, second.virtual_key, third.virtual_key]]
}

test('the new key is on the same row; the old one means the same until the grace ends', async () => {
  const world = await seed(operator)
  const [before, as] = [await resolve(world.key), await shown(world.keyId)]
  const since = Date.now()
  const made = await rotate(world.keyId)
  assert.match(made.virtual_key, /^vk_[0-9A-Za-z_-]{43}$/)
  const { virtual_key, ...rest } = made
  const day = new Date(made.previous_valid_until).getTime() - since - 86_400_000
  assert.ok(day >= 0 && day < 10_000, `${day} ms`)
  assert.equal(rest, {
    id: world.keyId,
    key_prefix: virtual_key.slice(0, 10),
    created_at: as.created_at,
    previous_valid_until: made.previous_valid_until,
  })
  const current = { ...before, key_prefix: made.key_prefix }
  assert.equal(await resolve(virtual_key), current)
  assert.equal(await resolve(world.key), { ...current, valid_until: made.previous_valid_until })
  assert.equal(await shown(world.keyId), {
    ...as,
    key_prefix: made.key_prefix,
    previous_valid_until: made.previous_valid_until,
  })
  assert.equal(await db.member(world.userId)('select id, key_prefix from api.virtual_keys'), [
    { id: world.keyId, key_prefix: made.key_prefix },
  ])
})

test('a grace of 0 ends the old key at once, and every older text of it', async () => {
  const [world, [first, second, third]] = await rotatedTwice()
  const made = await rotate(world.keyId, '0')
  for (const old of [first, second, third]) assert.is(await code(old!), 'virtual_key_expired')
  assert.is(await code(made.virtual_key), null)
  assert.equal((await shown(world.keyId)).previous_valid_until, made.previous_valid_until)
})

test('a second rotation neither shortens nor lengthens the first grace', async () => {
  const world = await seed(operator)
  const first = await rotate(world.keyId, '1 hour')
  const second = await rotate(world.keyId, '1 minute')
  const third = await rotate(world.keyId, '90 days')
  assert.equal((await resolve(world.key)).valid_until, first.previous_valid_until)
  assert.equal((await resolve(first.virtual_key)).valid_until, second.previous_valid_until)
  assert.equal((await resolve(second.virtual_key)).valid_until, third.previous_valid_until)
  assert.equal((await resolve(third.virtual_key)).valid_until, null)
  assert.equal((await shown(world.keyId)).previous_valid_until, third.previous_valid_until)
})

test('a grace counts months and days in seconds, not by a calendar', async () => {
  const { keyId } = await seed(operator)
  const session = await db.session('keyledger_operator')
  try {
    await session.query(`set timezone = 'Europe/Berlin'`)
    const { rows } = await session.query(
      `select extract(epoch from previous_valid_until - clock_timestamp())::int as seconds
      from api.rotate_virtual_key($1, '3 months')`,
      [keyId],
    )
    assert.ok(Math.abs(rows[0].seconds - 90 * 86_400) < 10, rows[0].seconds)
  } finally {
    await session.end()
  }
})

test('a refused rotation changes nothing', async () => {
  const world = await seed(operator)
  const since = await cursor()
  const as = await shown(world.keyId)
  for (const grace of ['-1 second', '90 days 1 second', '1 year', '-1 day 1 hour']) {
    const { code: sqlstate, message } = await failure(rotate(world.keyId, grace))
    assert.equal([sqlstate, message], ['PT422', 'invalid_grace'], grace)
  }
  for (const [sql, expected] of [
    ['select api.rotate_virtual_key($1, null)', 'invalid_grace'],
    ['select api.rotate_virtual_key(api.new_id()) from (select $1::uuid) x', 'virtual_key_unknown'],
    ['select api.rotate_virtual_key(null) from (select $1::uuid) x', 'virtual_key_unknown'],
  ] as const)
    assert.is((await failure(operator(sql, [world.keyId]))).message, expected)
  assert.equal(await evicted(since), [])
  assert.equal(await shown(world.keyId), as)
  assert.is((await resolve(world.key)).valid_until, null)
  // an interval without an end is one from PostgreSQL 17 on
  const [{ version }] = (await db.sql(`select current_setting('server_version_num')::int as version`)) as [
    Row,
  ]
  const endless = await failure(rotate(world.keyId, 'infinity'))
  if (version >= 170000) assert.is(endless.message, 'invalid_grace')
})

test('a revoked key can’t be rotated, and all its older texts end with it', async () => {
  const [world, keys] = await rotatedTwice()
  const since = await cursor()
  await operator('select api.revoke_virtual_key($1)', [world.keyId])
  for (const key of keys) assert.is(await code(key), 'virtual_key_disabled')
  assert.equal((await evicted(since)).sort(), names(...keys))
  const { code: sqlstate, message } = await failure(rotate(world.keyId))
  assert.equal([sqlstate, message], ['PT409', 'virtual_key_disabled'])
  // a text whose grace has ended says the same
  await db.sql('update data.previous_key_hash set valid_until = now() where virtual_key_id = $1', [
    world.keyId,
  ])
  for (const key of keys) assert.is(await code(key), 'virtual_key_disabled')
})

const changes: Record<string, (world: World) => Promise<unknown>> = {
  'the user is suspended': ({ userId }) =>
    operator(`update api.user_profiles set status = 'suspended' where id = $1`, [userId]),
  'the user moves': ({ userId }) =>
    operator('update api.user_profiles set tenant_id = null where id = $1', [userId]),
  'the tenant is suspended': ({ tenantId }) =>
    operator(`update api.tenants set status = 'suspended' where id = $1`, [tenantId]),
  'its node is unmounted': ({ keyId }) =>
    operator('delete from api.virtual_key_config_nodes where virtual_key_id = $1', [keyId]),
  'another node is mounted': async ({ keyId }) => {
    const other = await seed(operator)
    return operator(
      'insert into api.virtual_key_config_nodes (virtual_key_id, config_node_id) values ($1, $2)',
      [keyId, other.nodeId],
    )
  },
  'a mount is changed': ({ keyId, nodeId }) =>
    db.sql('update data.virtual_key_config_node set config_node_id = $2 where virtual_key_id = $1', [
      keyId,
      nodeId,
    ]),
  'the key is named': ({ keyId }) =>
    db.sql(`update data.virtual_key set name = 'named' where id = $1`, [keyId]),
  'the key is rotated again': ({ keyId }) => rotate(keyId, '0'),
  'the key is deleted': ({ keyId }) => db.sql('delete from data.virtual_key where id = $1', [keyId]),
}
for (const [what, change] of Object.entries(changes))
  test(`${what}: every hash of the key is evicted`, async () => {
    const [world, keys] = await rotatedTwice()
    const since = await cursor()
    await change(world)
    const gone = await evicted(since)
    for (const name of names(...keys)) assert.ok(gone.includes(name), name)
  })

test('a rotation evicts the new hash, which a cache may hold as unknown, and every older one', async () => {
  const [world, keys] = await rotatedTwice()
  const since = await cursor()
  const { virtual_key } = await rotate(world.keyId)
  assert.equal((await evicted(since)).sort(), names(...keys, virtual_key))
})

const insert = `insert into data.virtual_key (user_id, key_hash, key_prefix) values ($1, decode($2, 'hex'), 'again')`

test('no key can take a hash that a key had before, not even the same key', async () => {
  const world = await seed(operator)
  const { keyHash, userId, keyId } = world
  await rotate(keyId, '0')
  const again = `update data.virtual_key set key_hash = decode($2, 'hex') where id = $1`
  for (const [text, id] of [
    [insert, userId],
    [again, keyId],
  ] as const) {
    const { code: sqlstate, constraint } = await failure(db.sql(text, [id, keyHash]))
    assert.equal([sqlstate, constraint], ['23505', 'hash_was_never_used'])
  }
  assert.is(await code(world.key), 'virtual_key_expired')
  const truncated = await failure(db.sql('truncate data.previous_key_hash'))
  assert.is(truncated.message, 'truncate_forbidden')
})

test('an import of a key’s older hash is refused, and of another key’s new hash too', async () => {
  const [world, other] = [await seed(operator), await seed(operator)]
  const { virtual_key } = await rotate(world.keyId, '0')
  const element = (user_id: string, key: string) => ({ user_id, virtual_key: key })
  const fresh = `fresh_${world.keyId}`
  const [row] = await operator('select api.import_virtual_keys($1) as answers', [
    JSON.stringify([
      element(world.userId, world.key),
      element(other.userId, world.key),
      element(other.userId, virtual_key),
      element(other.userId, fresh),
    ]),
  ])
  assert.equal(
    row!.answers.map(({ status, code, id }: Row) => [status, code, id === world.keyId]),
    [
      ['refused', 'virtual_key_expired', true],
      ['refused', 'key_taken', false],
      ['refused', 'key_taken', false],
      ['imported', undefined, false],
    ],
  )
  assert.equal(
    [await code(world.key), await code(virtual_key), await code(fresh)],
    ['virtual_key_expired', null, null],
  )
})

test('an insert that waited for the rotation’s commit can’t take the older hash either', async () => {
  const world = await seed(operator)
  const [rotating, inserting] = [await db.session('keyledger_operator'), await db.session()]
  try {
    await rotating.query('begin')
    await rotating.query('select api.rotate_virtual_key($1)', [world.keyId])
    const inserted = failure(inserting.query(insert, [world.userId, world.keyHash]))
    await db.blocked(inserting)
    await rotating.query('commit')
    assert.is((await inserted).constraint, 'hash_was_never_used')
  } finally {
    await rotating.end()
    await inserting.end()
  }
})

test('two rotations at once come one after the other: no key is lost', async () => {
  const world = await seed(operator)
  const [one, two] = [await db.session('keyledger_operator'), await db.session('keyledger_operator')]
  const call = 'select virtual_key from api.rotate_virtual_key($1)'
  try {
    await one.query('begin')
    const first = await one.query(call, [world.keyId])
    const waiting = two.query(call, [world.keyId])
    await db.blocked(two)
    await one.query('commit')
    const second = await waiting
    const keys = [world.key, first.rows[0].virtual_key, second.rows[0].virtual_key]
    assert.is(new Set(keys).size, 3)
    for (const key of keys) assert.is(await code(key), null)
    assert.is((await resolve(keys[2])).valid_until, null)
  } finally {
    await one.end()
    await two.end()
  }
})

test('under traffic every process accepts each text until its grace ends, and never after', async () => {
  const redisUrl = (await db.redis()).url
  const { loginUrl: url } = db
  const clients = await Promise.all([
    forkClient({ url, redisUrl, by: 'listen' }),
    forkClient({ url, redisUrl, by: 'poll' }),
    forkClient({ url, redisUrl, by: 'nothing' }),
    forkClient({ url, by: 'listen' }),
  ])
  let running = true
  let working: Promise<unknown>[] = []
  try {
    const world = await seed(operator)
    // `ends` is in ms, rounded up; the end of a grace is unknown before the rotation
    const key = (hash: string) => ({ hash, ends: Number.POSITIVE_INFINITY })
    const keys = [key(world.keyHash)]
    const seen = { within: 0, after: 0, held: 0 }
    const ask = async (client: ForkedClient) => {
      while (running)
        for (const key of keys) {
          const started = Date.now()
          const { code: answered, tier } = await client.validate(key.hash)
          const ended = Date.now()
          const where = `${client.name}, from ${tier}, ${started - key.ends} ms after the end`
          // the answer of the rotation may come after its grace
          if (answered) await until(() => key.ends < Number.POSITIVE_INFINITY, 'the rotation to be answered')
          if (started >= key.ends) {
            assert.is(answered, 'virtual_key_expired', where)
            seen.after++
          } else if (ended < key.ends - 1) {
            assert.is(answered, null, where)
            seen.within++
          }
        }
    }
    const place = async () => {
      for (; running; seen.held++) {
        const placed = JSON.stringify([hold(world, '0.0001')])
        const [row] = await gateway(`select api.place_holds($1) -> 0 ->> 'status' as status`, [placed])
        assert.is(row!.status, 'held')
      }
    }
    const rotateOften = async () => {
      for (let i = 0; i < 8; i++) {
        const made = await rotate(world.keyId, '1.5 seconds')
        keys.at(-1)!.ends = new Date(made.previous_valid_until).getTime() + 1
        keys.push(key(hashOf(made.virtual_key)))
        const { within, held } = seen
        await until(() => seen.within > within + 62 && seen.held > held + 2, 'traffic')
      }
      await until(() => Date.now() > keys.at(-2)!.ends, 'the last grace to end')
      const sofar = seen.after
      await until(() => seen.after > sofar + 200, 'the end to be seen')
      running = false
    }
    working = [...clients.map(ask), place(), rotateOften()]
    await Promise.all(working)
    assert.ok(seen.within > 500 && seen.held > 20, JSON.stringify(seen))
  } finally {
    running = false
    await Promise.allSettled(working)
    await Promise.all(clients.map((each) => each.stop()))
  }
})

// from here on the clock is the test's own, of which the clients above know nothing
let forward: (seconds: number) => Promise<void>

test('after the grace the clock alone makes the old key expired, not unknown', async () => {
  forward = await movableClock(db.sql)
  const world = await seed(operator)
  const { virtual_key } = await rotate(world.keyId, '1 minute')
  assert.is(await code(world.key), null)
  await forward(60)
  const { code: expired, valid_until } = await resolve(world.key)
  assert.equal([expired, valid_until], ['virtual_key_expired', null])
  assert.is(await code(virtual_key), null)
})

test("a grace does not outlive the key's own expiry", async () => {
  const { userId } = await seed(operator)
  const [made] = await operator(
    `select * from api.create_virtual_key($1, expires_at => clock.clock_timestamp() + interval '1 minute')`,
    [userId],
  )
  const { expires_at } = await shown(made!.id)
  const next = await rotate(made!.id)
  assert.equal(next.previous_valid_until, expires_at)
  for (const key of [made!.virtual_key, next.virtual_key])
    assert.equal((await resolve(key)).valid_until, expires_at)
  await forward(60)
  for (const key of [made!.virtual_key, next.virtual_key]) assert.is(await code(key), 'virtual_key_expired')
  const { code: sqlstate, message } = await failure(rotate(made!.id))
  assert.equal([sqlstate, message], ['PT409', 'virtual_key_expired'])
})

test.run()
