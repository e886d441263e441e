// Identity changes that overlap, step by step in named sessions: each evicts every key it must, and no deadlock.
import { createHash } from 'node:crypto'
import type pg from 'pg'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database, type Row } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { newId } from '../support/ids.ts'
import { event, hold, seed, type World } from '../support/seed.ts'

const test = suite('parent locks')
const db = await database(test)

let sessions: pg.Client[] = []
test.after.each(async () => {
  for (const session of sessions) await session.end()
  sessions = []
})

// Sessions of the operator, each in a transaction; a test names each session's next step.
async function operators(n: number): Promise<pg.Client[]> {
  for (let i = 0; i < n; i++) sessions.push(await db.session('keyledger_operator'))
  for (const session of sessions) await session.query('begin')
  return sessions
}

// A statement that must wait for a lock; `done` gives its result.
async function waits(session: pg.Client, text: string, values: unknown[] = []) {
  const result = session.query(text, values)
  result.catch(() => {})
  await db.blocked(session)
  return { done: result }
}

const cursor = async () => (await db.gateway('select api.cache_changes() as c'))[0]!.c.cursor
const evicted = async (since: Row): Promise<string[]> => {
  const [row] = await db.gateway('select api.cache_changes($1) as c', [since])
  assert.is(row!.c.reset, false)
  return row!.c.keys
}
const resolve = async (hash: string) => {
  const [{ valid_for_ms, ...context }] = (await db.gateway('select * from api.resolve_virtual_key($1)', [
    hash,
  ])) as [Row]
  return context
}
const hashOf = (key: string) => createHash('sha256').update(key).digest('hex')
const create = `select id, virtual_key from api.create_virtual_key($1)`
const suspend = `update api.tenants set status = 'suspended' where id = $1`

// The content of a cache after the changes: the answers read before them, less the evicted ones.
async function isFresh(world: World, hash: string, before: Row | undefined, since: Row, code: string | null) {
  const now = await resolve(hash)
  assert.is(now.code, code)
  const keys = await evicted(since)
  if (before && JSON.stringify(before) !== JSON.stringify(now))
    assert.ok(keys.includes(`vk:${hash}`), world.keyId)
  return keys
}

test('a key made while its tenant is being suspended, key first: the suspension waits and evicts it', async () => {
  const world = await seed(db.operator)
  const since = await cursor()
  const [maker, suspender] = (await operators(2)) as [pg.Client, pg.Client]
  const { rows } = await maker.query(create, [world.userId])
  const suspending = await waits(suspender, suspend, [world.tenantId])
  await maker.query('commit')
  await suspending.done

  // between the two commits a reader resolves the new key, and caches it
  const hash = hashOf(rows[0].virtual_key)
  const cached = await resolve(hash)
  assert.is(cached.code, null)
  const between = await cursor()
  await suspender.query('commit')
  await isFresh(world, hash, cached, between, 'tenant_suspended')
  const keys = await evicted(since)
  assert.ok(keys.includes(`vk:${world.keyHash}`) && keys.includes(`vk:${hash}`))
})

test('a key made while its tenant is being suspended, suspension first: the key waits and is made suspended', async () => {
  const world = await seed(db.operator)
  const [maker, suspender] = (await operators(2)) as [pg.Client, pg.Client]
  await suspender.query(suspend, [world.tenantId])
  const making = await waits(maker, create, [world.userId])
  const since = await cursor()
  await suspender.query('commit')
  const { rows } = await making.done
  const hash = hashOf(rows[0].virtual_key)
  const between = await cursor()
  await maker.query('commit')
  assert.ok((await evicted(since)).includes(`vk:${world.keyHash}`))
  assert.is((await resolve(hash)).code, 'tenant_suspended')
  // a reader that asked for its hash earlier may have cached it as unknown
  assert.equal(await evicted(between), [`vk:${hash}`])
})

for (const first of ['move', 'suspension'])
  test(`a user moves into a tenant that is being suspended, ${first} first: their keys are evicted`, async () => {
    const [world, target] = [await seed(db.operator), await seed(db.operator)]
    const move = [
      'update api.user_profiles set tenant_id = $1 where id = $2',
      [target.tenantId, world.userId],
    ] as const
    const stop = [suspend, [target.tenantId]] as const
    const [one, two] = (await operators(2)) as [pg.Client, pg.Client]
    const [a, b] = first === 'move' ? [move, stop] : [stop, move]
    await one.query(a[0], [...a[1]])
    const second = await waits(two, b[0], [...b[1]])
    await one.query('commit')
    await second.done
    const cached = await resolve(world.keyHash)
    const between = await cursor()
    await two.query('commit')
    const keys = await isFresh(world, world.keyHash, cached, between, 'tenant_suspended')
    assert.ok(keys.includes(`vk:${world.keyHash}`))
    assert.is((await resolve(world.keyHash)).account_id, target.accountId)
  })

for (const first of ['mount', 'disabling'])
  test(`a node is mounted while it is being disabled, ${first} first: no cache misses the mount`, async () => {
    const [world, other] = [await seed(db.operator), await seed(db.operator)]
    const mount = [
      'insert into api.virtual_key_config_nodes (virtual_key_id, config_node_id) values ($1, $2)',
      [world.keyId, other.nodeId],
    ] as const
    const disable = [`update api.config_nodes set status = 'disabled' where id = $1`, [other.nodeId]] as const
    const [one, two] = (await operators(2)) as [pg.Client, pg.Client]
    const [a, b] = first === 'mount' ? [mount, disable] : [disable, mount]
    await one.query(a[0], [...a[1]])
    const second = await waits(two, b[0], [...b[1]])
    await one.query('commit')
    await second.done
    const cached = await resolve(world.keyHash)
    const between = await cursor()
    await two.query('commit')
    await isFresh(world, world.keyHash, cached, between, null)
    assert.equal((await resolve(world.keyHash)).config_node_ids, [world.nodeId, other.nodeId].sort())
  })

for (const first of ['key', 'suspension'])
  test(`a key made while its user is being suspended, ${first} first: no cache keeps it active`, async () => {
    const world = await seed(db.operator, { alone: true })
    const stop = `update api.user_profiles set status = 'suspended' where id = $1`
    const [maker, suspender] = (await operators(2)) as [pg.Client, pg.Client]
    const [one, a, two, b] =
      first === 'key' ? [maker, create, suspender, stop] : [suspender, stop, maker, create]
    const done = await one.query(a, [world.userId])
    const second = await waits(two, b, [world.userId])
    await one.query('commit')
    const made = [...done.rows, ...(await second.done).rows].find((row) => row.virtual_key)
    const hash = hashOf(made.virtual_key)
    const cached = await resolve(hash).catch(() => undefined)
    const between = await cursor()
    await two.query('commit')
    await isFresh(world, hash, cached, between, 'user_suspended')
  })

// a change of a key's parents or mounts must see the hash that a rotation makes, and the other way round
const rotate = 'select id, virtual_key from api.rotate_virtual_key($1)'
const besideRotation: Record<string, (world: World) => [text: string, values: unknown[]]> = {
  'its tenant is suspended': ({ tenantId }) => [suspend, [tenantId]],
  'its user is suspended': ({ userId }) => [
    `update api.user_profiles set status = 'suspended' where id = $1`,
    [userId],
  ],
  'its user moves': ({ userId }) => ['update api.user_profiles set tenant_id = null where id = $1', [userId]],
  'its node is unmounted': ({ keyId }) => [
    'delete from api.virtual_key_config_nodes where virtual_key_id = $1',
    [keyId],
  ],
  'it is revoked': ({ keyId }) => ['select null from api.revoke_virtual_key($1)', [keyId]],
}
for (const [name, change] of Object.entries(besideRotation))
  for (const first of ['rotation', 'change'])
    test(`a key is rotated while ${name}, ${first} first: no cache keeps the old answer for either hash`, async () => {
      const world = await seed(db.operator)
      const [rotator, changer] = (await operators(2)) as [pg.Client, pg.Client]
      const both: [pg.Client, string, unknown[]][] = [
        [rotator, rotate, [world.keyId]],
        [changer, ...change(world)],
      ]
      const [one, two] = (first === 'rotation' ? both : both.toReversed()) as [
        (typeof both)[0],
        (typeof both)[0],
      ]
      const done = await one[0].query(one[1], one[2])
      const second = await waits(...two)
      await one[0].query('commit')
      const refused = first === 'change' && name === 'it is revoked'
      if (refused) {
        assert.is((await failure(second.done)).message, 'virtual_key_disabled')
        return
      }
      const rows = [...done.rows, ...(await second.done).rows]
      const hashes = [world.keyHash, hashOf(rows.find((row) => row.virtual_key).virtual_key)]
      // the answers that readers cache between the two commits
      const cached = await Promise.all(hashes.map((hash) => resolve(hash).catch(() => undefined)))
      const between = await cursor()
      await two[0].query('commit')
      const gone = await evicted(between)
      for (const [i, hash] of hashes.entries())
        if (JSON.stringify(await resolve(hash)) !== JSON.stringify(cached[i]))
          assert.ok(gone.includes(`vk:${hash}`), `hash ${i}`)
      assert.ok(gone.length)
    })

// each of the three waits for the one before it; locks go from the child up, so the circle never closes
const threeWay: Record<string, (world: World) => [text: string, values: unknown[]]> = {
  'user update': ({ userId, tenantId }) => [
    'update api.user_profiles set tenant_id = $2 where id = $1',
    [userId, tenantId],
  ],
  'key insert': ({ userId }) => [create, [userId]],
  'tenant suspension': ({ tenantId }) => [suspend, [tenantId]],
}
for (const a of Object.keys(threeWay))
  for (const b of Object.keys(threeWay).filter((name) => name !== a)) {
    const c = Object.keys(threeWay).find((name) => name !== a && name !== b)!
    test(`${a}, ${b}, ${c} at once: no deadlock`, async () => {
      const world = await seed(db.operator)
      const all = await operators(3)
      await all[0]!.query(...threeWay[a]!(world))
      const rest = [b, c].map(async (name, i) => {
        const session = all[i + 1]!
        await session.query(...threeWay[name]!(world))
        await session.query('commit')
      })
      // each has ended or waits, for the first session or for the other waiter
      await Promise.all(rest.map((done, i) => db.blocked(all[i + 1]!, done)))
      await all[0]!.query('commit')
      await Promise.all(rest)
      assert.is((await resolve(world.keyHash)).code, 'tenant_suspended')
    })
  }

test('locks from the tenant down, unlike the triggers’ locks, would deadlock with a plain update of the user', async () => {
  const world = await seed(db.operator)
  const mover = await db.session()
  const downward = await db.session()
  sessions.push(mover, downward)
  await mover.query('begin')
  await downward.query('begin')
  // a plain update locks the user before its trigger can lock anything
  await mover.query('select from data.user_profile where id = $1 for no key update', [world.userId])
  await downward.query('select from data.tenant where id = $1 for update', [world.tenantId])
  const moving = await waits(mover, 'update data.user_profile set tenant_id = tenant_id where id = $1', [
    world.userId,
  ])
  const lower = downward.query('select from data.user_profile where id = $1 for share', [world.userId])
  const codes = await Promise.all(
    [moving.done, lower].map((each) =>
      each.then(
        () => 'done',
        ({ code }) => code,
      ),
    ),
  )
  assert.equal(codes.sort(), ['40P01', 'done'])
})

const identityChanges: Record<string, (world: World) => [text: string, values: unknown[]]> = {
  create_virtual_key: ({ userId }) => [create, [userId]],
  rotate_virtual_key: ({ keyId }) => [rotate, [keyId]],
  revoke_virtual_key: ({ keyId }) => ['select api.revoke_virtual_key($1)', [keyId]],
  'a suspended tenant': ({ tenantId }) => [suspend, [tenantId]],
  'a moved user': ({ userId }) => ['update api.user_profiles set tenant_id = null where id = $1', [userId]],
  'an unmounted node': ({ nodeId }) => [
    'delete from api.virtual_key_config_nodes where config_node_id = $1',
    [nodeId],
  ],
  'a price': ({ nodeId }) => [
    `insert into api.prices (config_node_id, meter, unit_price) values ($1, 'requests', 1)`,
    [nodeId],
  ],
}
for (const [name, change] of Object.entries(identityChanges))
  test(`${name} under repeatable read is refused: its snapshot would miss keys`, async () => {
    const world = await seed(db.operator)
    const session = await db.session('keyledger_operator')
    sessions.push(session)
    for (const isolation of ['repeatable read', 'serializable']) {
      await session.query(`begin isolation level ${isolation}`)
      const { code, message } = await failure(session.query(...change(world)))
      assert.equal([code, message], ['PT409', 'isolation_too_strict'])
      await session.query('rollback')
    }
    await session.query('begin')
    await session.query(...change(world))
    await session.query('rollback')
  })

const moneyCalls: Record<
  string,
  (world: World, holdId: string) => [role: 'gateway' | 'operator', text: string]
> = {
  place_holds: (world) => ['gateway', `select api.place_holds('${JSON.stringify([hold(world, '1')])}')`],
  record_usage: (world) => ['gateway', `select api.record_usage('${JSON.stringify([event(world, 1)])}')`],
  release_holds: (world, id) => [
    'gateway',
    `select api.release_holds('[{"id":"${id}","account_id":"${world.accountId}"}]')`,
  ],
  top_up: ({ accountId }) => ['operator', `select api.top_up('${accountId}', 1)`],
  adjust_balance: ({ accountId }) => ['operator', `select api.adjust_balance('${accountId}', -1, 'test')`],
  set_credit_limit: ({ accountId }) => ['operator', `select api.set_credit_limit('${accountId}', 1)`],
  grant_credit: ({ accountId }) => ['operator', `select api.grant_credit('${accountId}', 1)`],
  freeze_funds: ({ accountId }) => ['operator', `select api.freeze_funds('${accountId}', 1, 'test')`],
}
for (const [name, call] of Object.entries(moneyCalls))
  test(`${name} on a snapshot older than the account's last change is refused, and succeeds when repeated`, async () => {
    const world = await seed(db.operator)
    const id = newId()
    await db.gateway('select api.place_holds($1)', [JSON.stringify([hold(world, '1', id)])])
    const [role, text] = call(world, id)
    const session = await db.session(`keyledger_${role}`)
    sessions.push(session)
    await session.query('begin isolation level repeatable read')
    await session.query('select count(*) from api.billing_accounts') // takes the snapshot
    await db.operator('select api.top_up($1, 1)', [world.accountId])
    assert.is((await failure(session.query(text))).code, '40001')
    await session.query('rollback')
    await session.query('begin isolation level repeatable read')
    await session.query(text)
    await session.query('commit')
    assert.equal(await db.sql('select * from api.verify_balances($1)', [world.accountId]), [])
  })

test.run()
