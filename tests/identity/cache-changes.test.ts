// cache_changes: a reader gets each committed change, and none that rolled back; a doubtful cursor starts anew.
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import type pg from 'pg'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { root } from '../readme/document.ts'
import { database, type Row } from '../support/database.ts'
import { seed } from '../support/seed.ts'

const test = suite('cache changes')
const db = await database(test)

type Changes = { cursor: { cluster: string; snapshot: string }; keys: string[]; reset: boolean }
const changes = async (cursor?: unknown): Promise<Changes> =>
  (
    await db.gateway('select api.cache_changes($1) as c', [
      cursor === undefined ? null : JSON.stringify(cursor),
    ])
  )[0]!.c

let sessions: pg.Client[] = []
async function begun(): Promise<pg.Client> {
  const session = await db.session('keyledger_operator')
  sessions.push(session)
  await session.query('begin')
  return session
}
test.after.each(async () => {
  for (const session of sessions) await session.end()
  sessions = []
})
const toggle = `update api.user_profiles set status = case status when 'active' then 'suspended' else 'active' end where id = $1`
const change = (session: pg.Client, userId: string) => session.query(toggle, [userId])

test('a reader gets the transaction that began first and commits last, however often others commit meanwhile', async () => {
  const [slow, quick] = [await seed(db.operator), await seed(db.operator)]
  const first = await begun()
  await change(first, slow.userId)
  let { cursor } = await changes()
  for (let i = 0; i < 3; i++) {
    const other = await begun()
    await change(other, quick.userId)
    await other.query('commit')
    const next = await changes(cursor)
    assert.equal([next.keys, next.reset], [[`vk:${quick.keyHash}`], false])
    cursor = next.cursor
  }
  assert.equal((await changes(cursor)).keys, [])
  await first.query('commit')
  const last = await changes(cursor)
  assert.equal(last.keys, [`vk:${slow.keyHash}`])
  assert.equal((await changes(last.cursor)).keys, [])
})

test('a cursor taken amid many overlapping transactions sees each once, whatever their order of commit', async () => {
  const worlds = await Promise.all(Array.from({ length: 6 }, () => seed(db.operator)))
  const open = await Promise.all(worlds.map(begun))
  let { cursor } = await changes()
  const seen: string[] = []
  for (const i of [3, 0, 5, 1, 4, 2]) {
    await change(open[i]!, worlds[i]!.userId)
    await change(open[i]!, worlds[i]!.userId)
    const before = await changes(cursor) // taken while it is open
    await open[i]!.query('commit')
    const next = await changes(before.cursor)
    cursor = next.cursor
    seen.push(...before.keys, ...next.keys)
  }
  assert.equal(seen.sort(), worlds.map(({ keyHash }) => `vk:${keyHash}`).sort())
})

test('a change that a savepoint or transaction rolled back never appears; one that a subtransaction kept does', async () => {
  const [kept, gone, nested] = await Promise.all([seed(db.operator), seed(db.operator), seed(db.operator)])
  const { cursor } = await changes()
  const one = await begun()
  await one.query('savepoint a')
  await change(one, gone.userId)
  await one.query('rollback to a')
  await one.query('savepoint b')
  await change(one, kept.userId)
  await one.query('savepoint c')
  await change(one, nested.userId)
  await one.query('release c')
  assert.equal((await changes(cursor)).keys, [])
  const between = await changes(cursor) // while it is open
  await one.query('commit')
  const expected = [kept, nested].map(({ keyHash }) => `vk:${keyHash}`).sort()
  assert.equal((await changes(cursor)).keys.sort(), expected)
  assert.equal((await changes(between.cursor)).keys.sort(), expected)

  const { cursor: after } = await changes()
  const two = await begun()
  await change(two, gone.userId)
  await two.query('rollback')
  assert.equal((await changes(after)).keys, [])
})

test('a change made by a subtransaction only, older than its cursor, is not skipped', async () => {
  const world = await seed(db.operator)
  const session = await begun()
  await session.query('select pg_current_xact_id()')
  const { cursor: early } = await changes()
  // other transactions pass; the subtransaction's own xid is past the cursor's xmax, its parent's is not
  await seed(db.operator)
  await session.query('savepoint a')
  await change(session, world.userId)
  await session.query('release a')
  const { cursor: late } = await changes(early)
  await session.query('commit')
  for (const cursor of [early, late]) assert.ok((await changes(cursor)).keys.includes(`vk:${world.keyHash}`))
})

test('rows older than 48 h are purged, and only the cursors that may have missed them start anew', async () => {
  const [old, recent] = [await seed(db.operator), await seed(db.operator)]
  const { cursor: before } = await changes()
  const session = await begun()
  await change(session, old.userId)
  await session.query('commit')
  await db.sql(`update data.cache_invalidation set created_at = now() - interval '47 hours'`)
  await db.operator('select api.maintain()')
  assert.is((await changes(before)).reset, false)
  assert.equal((await changes(before)).keys, [`vk:${old.keyHash}`])

  await db.sql(`update data.cache_invalidation set created_at = now() - interval '49 hours'`)
  const { cursor: after } = await changes()
  await db.operator(toggle, [recent.userId])
  const [row] = await db.operator('select api.maintain() as m')
  assert.ok(row!.m.cache_invalidations_purged > 0)
  assert.is((await changes(before)).reset, true)
  assert.equal((await changes(before)).keys, [])
  const { reset, keys } = await changes(after)
  assert.equal([reset, keys], [false, [`vk:${recent.keyHash}`]])
})

test('a row purged as soon as its long transaction committed resets cursors from while it was open', async () => {
  const world = await seed(db.operator)
  const session = await begun()
  await change(session, world.userId)
  await seed(db.operator)
  const { cursor } = await changes()
  await session.query('commit')
  await db.sql(`update data.cache_invalidation set created_at = now() - interval '3 days'`)
  await db.operator('select api.maintain()')
  assert.is((await changes(cursor)).reset, true)
})

test('rows from a dump, of transactions still to come here, hide nothing and never appear', async () => {
  const world = await seed(db.operator)
  const restore = () =>
    db.sql(
      `insert into data.cache_invalidation (xid, entity, keys) values ('9000000000000000001', 'vk', '{foreign}')`,
    )
  await db.sql(`update data.outbox_horizon set purged_xid = '9000000000000000000'`)
  await restore()
  const { cursor: before } = await changes()
  const first = await changes(before)
  assert.equal([first.keys, first.reset], [[], false])
  await db.operator(toggle, [world.userId])
  assert.equal((await changes(before)).keys, [`vk:${world.keyHash}`])

  // the next upkeep removes it, and keeps the row that the same transaction wrote
  const session = await begun()
  await change(session, world.userId)
  const { rows } = await session.query('select pg_current_xact_id()::text as xid, api.maintain()')
  await session.query('commit')
  const kept = await db.sql(`select keys from data.cache_invalidation where xid = $1 or keys = '{foreign}'`, [
    rows[0].xid,
  ])
  assert.equal(kept, [{ keys: [world.keyHash] }])
  // the horizon doesn't wait until this cluster reaches that transaction
  assert.equal(await db.sql('select from data.outbox_horizon where data.is_foreign(purged_xid)'), [])
  const { cursor: later, reset } = await changes(before)
  assert.not(reset)

  // the first purge here sets a horizon of its own
  await restore()
  await db.sql(`update data.cache_invalidation set created_at = now() - interval '49 hours'`)
  await db.operator('select api.maintain()')
  assert.is((await changes(before)).reset, true)
  assert.is((await changes(later)).reset, false)
})

test('data restored into existing tables: the horizon, set as docs/operate.md says, resets every cursor', async () => {
  const [told] = /update data\.outbox_horizon [^`]*/.exec(
    readFileSync(join(root, 'docs/operate.md'), 'utf8'),
  )!
  const { cursor } = await changes()
  assert.not((await changes(cursor)).reset)
  await db.sql(told)
  const { reset, cursor: next } = await changes(cursor)
  assert.ok(reset)
  assert.not((await changes(next)).reset)
})

test('a cursor of another cluster, timeline or database, from the future, or none at all: drop everything', async () => {
  const { cursor } = await changes()
  assert.is((await changes(cursor)).reset, false)
  const [system, timeline, database, table] = cursor.cluster.split(':') as [string, string, string, string]
  const [xmin, xmax] = cursor.snapshot.split(':').map(BigInt) as [bigint, bigint]
  const doubtful: unknown[] = [
    undefined,
    ...[
      [BigInt(system) + 1n, timeline, database, table],
      [system, '00000002', database, table],
      [system, timeline, Number(database) + 1, table],
      [system, timeline, database, Number(table) + 1],
    ].map((parts) => ({ ...cursor, cluster: parts.join(':') })),
    { ...cursor, snapshot: `${xmax + 1_000_000n}:${xmax + 1_000_000n}:` },
    { ...cursor, snapshot: `${xmin}:${xmax + 1_000_000n}:` },
  ]
  for (const each of doubtful) {
    const { reset, keys } = await changes(each)
    assert.equal([reset, keys], [true, []], JSON.stringify(each))
  }
})

test('a malformed cursor starts anew instead of failing', async () => {
  const { cursor } = await changes()
  const { cluster, snapshot } = cursor
  const malformed: unknown[] = [
    {},
    [],
    [cursor],
    'cursor',
    7,
    true,
    null,
    { cluster },
    { snapshot },
    { cluster, snapshot: null },
    { cluster, snapshot: '' },
    { cluster, snapshot: 'x' },
    { cluster, snapshot: '1:2' },
    { cluster, snapshot: '2:1:' },
    { cluster, snapshot: '1:9:8,3' },
    { cluster, snapshot: '-1:-1:' },
    { cluster, snapshot: '99999999999999999999999:99999999999999999999999:' },
    { cluster, snapshot: { xmin: 1 } },
    { cluster: null, snapshot },
    { cluster: [cluster], snapshot },
    { cluster: '', snapshot },
  ]
  for (const each of malformed) {
    const answer = await changes(each)
    assert.is(answer.reset, true, JSON.stringify(each))
    assert.equal(answer.keys, [])
    assert.equal((await changes(answer.cursor)).reset, false)
  }
})

test('a change tells the server time, in ms', async () => {
  const before = Date.now()
  const { now } = (await changes()) as unknown as { now: number }
  assert.ok(now >= before - 1000 && now <= Date.now() + 1000, `${now}`)
})

// keys of one tenant, made in statements of 1,000
async function keysOf(userId: string, count: number) {
  for (let made = 0; made < count; made += 1000)
    await db.sql(
      `insert into data.virtual_key (user_id, key_hash, key_prefix)
       select $1, sha256(gen_random_uuid()::text::bytea), 'many' from generate_series(1, $2)`,
      [userId, Math.min(1000, count - made)],
    )
}
const written = (since: string) =>
  db.sql(
    'select keys is null as everything, key_count from data.cache_invalidation where id > $1 order by id',
    [since],
  )
const lastRow = async () =>
  (await db.sql('select coalesce(max(id), 0)::text as id from data.cache_invalidation'))[0]!.id as string

test('a change of more than 5,000 keys is one row for all keys, and its readers drop everything', async () => {
  const { userId, tenantId, nodeId } = await seed(db.operator)
  await keysOf(userId, 4999)
  const suspend = (status: string) =>
    db.operator('update api.tenants set status = $1 where id = $2', [status, tenantId])
  let [last, { cursor }] = [await lastRow(), await changes()]
  await suspend('suspended')
  assert.equal(
    (await written(last)).map(({ everything, key_count }) => [everything, key_count]),
    Array(5).fill([false, 1000]),
  )
  const listed = await changes(cursor)
  assert.equal([listed.reset, listed.keys.length], [false, 5000])

  // one more key, and one for the existing mount
  await keysOf(userId, 2)
  // each way that a statement can touch many keys
  const wholesale: Record<string, () => Promise<unknown>> = {
    'a tenant': () => suspend('active'),
    'a user': () => db.operator(toggle, [userId]),
    'keys updated': () => db.sql(`update data.virtual_key set name = 'new' where user_id = $1`, [userId]),
    mounts: () =>
      db.sql(
        `insert into data.virtual_key_config_node (virtual_key_id, config_node_id)
         select id, $2 from data.virtual_key where user_id = $1 on conflict do nothing`,
        [userId, nodeId],
      ),
    'mounts updated': () =>
      db.sql('update data.virtual_key_config_node set config_node_id = $1 where config_node_id = $1', [
        nodeId,
      ]),
    'mounts deleted': () =>
      db.sql('delete from data.virtual_key_config_node where config_node_id = $1', [nodeId]),
    'keys inserted': () =>
      db.sql(
        `insert into data.virtual_key (user_id, key_hash, key_prefix)
         select $1, sha256(gen_random_uuid()::text::bytea), 'many' from generate_series(1, 5001)`,
        [userId],
      ),
    'keys deleted': () => db.sql('delete from data.virtual_key where user_id = $1', [userId]),
  }
  for (const [what, change] of Object.entries(wholesale)) {
    ;[last, { cursor }] = [await lastRow(), await changes()]
    await change()
    assert.equal(await written(last), [{ everything: true, key_count: null }], what)
    const { reset, keys, cursor: next } = await changes(cursor)
    assert.equal([reset, keys], [true, []], what)
    assert.not((await changes(next)).reset, what)
  }
})

test('changes of more than 10,000 keys in all make readers drop everything too', async () => {
  const { userId } = await seed(db.operator)
  const { cursor } = await changes()
  await keysOf(userId, 10_000)
  const listed = await changes(cursor)
  assert.equal([listed.reset, listed.keys.length], [false, 10_000])
  await keysOf(userId, 1)
  const { reset, keys, cursor: next } = await changes(cursor)
  assert.equal([reset, keys], [true, []])
  assert.not((await changes(next)).reset)
  // so do as many statements of one key each
  await db.sql(`insert into data.cache_invalidation (entity, keys)
    select 'vk', array[n::text] from generate_series(1, 10001) n`)
  assert.ok((await changes(next)).reset)
})

test('a change of a node, in any column, evicts no key', async () => {
  const { nodeId, keyHash } = await seed(db.operator)
  const { cursor } = await changes()
  for (const set of [`name = name || '!'`, `endpoint = 'http://new'`, `model = 'new'`, `status = 'disabled'`])
    await db.operator(`update api.config_nodes set ${set} where id = $1`, [nodeId])
  const { keys, reset } = await changes(cursor)
  assert.equal([keys, reset], [[], false])
  const [key] = await db.gateway('select config_node_ids from api.resolve_virtual_key($1)', [keyHash])
  assert.equal(key!.config_node_ids, [nodeId], 'the cached answer has not changed')
})

test('only the gateway reads the outbox, and no role can write it', async () => {
  const denied = async (promise: Promise<Row[]>) =>
    (await promise.then(
      () => 'done',
      ({ code }) => code,
    )) === '42501'
  assert.ok(await denied(db.operator('select api.cache_changes()')))
  assert.ok(
    await denied(db.gateway(`insert into data.cache_invalidation (entity, keys) values ('vk', '{x}')`)),
  )
})

test.run()
