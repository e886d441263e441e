// Key imports: keys of another system come in as they are, and keep working.
import { createHash, randomBytes, randomUUID } from 'node:crypto'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { until } from '../../scripts/supervise.ts'
import { createBillingModule, pgRpc } from '../../src/index.ts'
import { database, type Row } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { seed } from '../support/seed.ts'

const test = suite('key imports')
const db = await database(test)
const { operator, gateway } = db

const sha256 = (key: string) => createHash('sha256').update(key).digest('hex')
const foreignKey = () => `sk-proj-${randomBytes(30).toString('base64url')}`
const calling = (fn: string, sql = operator) => {
  return async (elements: unknown): Promise<Row[]> => {
    const [row] = await sql(`select api.${fn}($1) as answers`, [JSON.stringify(elements)])
    return row!.answers
  }
}
const importKeys = calling('import_virtual_keys')
const codes = (answers: Row[]) => answers.map(({ status, code }) => [status, code].filter(Boolean).join(' '))
const count = async (table: string) =>
  (await db.sql(`select count(*)::int as n from ${table}`))[0]!.n as number

async function user(external_id: string | null = null, tenant_id: string | null = null): Promise<string> {
  const [row] = await operator(
    'insert into api.user_profiles (external_id, tenant_id) values ($1, $2) returning id',
    [external_id, tenant_id],
  )
  return row!.id
}

test('a key in use keeps working: imported by its hash, or hashed on the way in', async () => {
  const { userId, nodeId } = await seed(operator)
  const external = `auth0|${randomUUID()}`
  const other = await user(external)
  const keys = [foreignKey(), foreignKey()] as const
  const expires_at = '2099-01-01T00:00:00Z'
  const elements = [
    { user_id: userId, key_hash: sha256(keys[0]), name: 'ci', config_node_ids: [nodeId, nodeId], expires_at },
    { user_external_id: external, virtual_key: keys[1], key_prefix: 'sk-proj-…' },
  ]
  const answers = await importKeys(elements)
  assert.equal(codes(answers), ['imported', 'imported'])
  assert.equal(
    answers.map(({ key_prefix }) => key_prefix),
    [`sha256:${sha256(keys[0]).slice(0, 5)}`, 'sk-proj-…'],
  )
  const [first] = await gateway('select * from api.resolve_virtual_key($1)', [sha256(keys[0])])
  assert.equal(
    [first!.virtual_key_id, first!.user_id, first!.name, first!.config_node_ids, first!.code],
    [answers[0]!.id, userId, 'ci', [nodeId], null],
  )
  assert.equal(first!.valid_until, new Date(expires_at))
  const [second] = await gateway('select * from api.resolve_billing_account($1)', [keys[1]])
  assert.equal([second!.virtual_key_id, second!.user_id], [answers[1]!.id, other])

  // a repeated import changes nothing, and says whether they differ
  const before = await count('data.virtual_key')
  assert.equal(await importKeys(elements), [
    { ...answers[0], status: 'duplicate' },
    { ...answers[1], status: 'duplicate' },
  ])
  assert.equal(await importKeys([{ ...elements[0], name: 'other' }]), [
    { ...answers[0], status: 'duplicate', mismatch: true },
  ])
  assert.equal(await importKeys([{ ...elements[0], config_node_ids: [] }]), [
    { ...answers[0], status: 'duplicate', mismatch: true },
  ])
  assert.is(await count('data.virtual_key'), before)
})

test('the client accepts an imported key of any format, at once, though it has just turned it away', async () => {
  const { userId } = await seed(operator)
  const rpc = pgRpc({ connectionString: db.loginUrl })
  const billing = createBillingModule({ rpc, changes: { listen: db.loginUrl } })
  await billing.start()
  try {
    for (const key of [
      foreignKey(),
      'my company key=1234'.replaceAll(' ', '.'),
      randomUUID(),
      'k'.repeat(512),
    ]) {
      assert.is((await failure(billing.validate(key))).code, 'virtual_key_unknown')
      const [answer] = await importKeys([{ user_id: userId, virtual_key: key }])
      assert.is(answer!.status, 'imported')
      // an unknown key is remembered for 60 s, unless the import evicts it
      await until(() => billing.validate(key).catch(() => false), 'the key to be known', 10)
      assert.is((await billing.validate(key)).user_id, userId)
      const req = { headers: { authorization: `Bearer ${key}` } } as Row
      await new Promise<void>((next) => billing.middleware()(req as never, {} as never, next))
      assert.is(req.userContext.user_id, userId)
    }
  } finally {
    await billing.stop()
    await rpc.close()
  }
})

test('no imported key is stored, answered or told in an error', async () => {
  const userId = await user()
  const keys = [foreignKey(), `vk_${randomBytes(32).toString('base64url')}`, randomBytes(8).toString('hex')]
  const given = keys.map((virtual_key) => ({ user_id: userId, virtual_key }))
  const answers = [
    await importKeys(given),
    await importKeys(given),
    await importKeys(keys.map((virtual_key) => ({ user_id: randomUUID(), virtual_key }))),
    await importKeys(
      keys.map((virtual_key) => ({ user_id: userId, virtual_key, name: `was ${virtual_key}` })),
    ),
    await importKeys(
      keys.map((key) => ({ user_id: userId, key_hash: sha256(`${key}x`), key_prefix: key.slice(0, 8) })),
    ),
  ]
  assert.equal(codes(answers[3]!), ['refused invalid_name', 'refused invalid_name', 'refused invalid_name'])
  const error = await failure(operator('select api.import_virtual_keys($1)', [JSON.stringify(given[0])]))
  const tables = await db.sql(
    `select table_name as name from information_schema.tables where table_schema = 'data'`,
  )
  const rows = await Promise.all(tables.map(({ name }) => db.sql(`select t::text from data.${name} t`)))
  const text = JSON.stringify([answers, rows, { ...error, message: error.message }])
  for (const key of keys) {
    assert.not(text.includes(key.slice(0, -4)), 'all but the end of it')
    assert.not(text.includes(key.slice(12)))
  }
  // the key has 16 letters, so a quarter of them is shown
  assert.is(answers[0]![2]!.key_prefix, keys[2]!.slice(0, 4))
  const short = keys[0]!.slice(0, 12)
  assert.equal(codes(await importKeys([{ user_id: userId, key_hash: sha256(short), key_prefix: short }])), [
    'refused invalid_key_prefix',
  ])
})

test('one bad key among many stops none of the others', async () => {
  const { userId, nodeId } = await seed(operator)
  const good = () => ({ user_id: userId, key_hash: sha256(foreignKey()) })
  const bad: [element: unknown, code: string][] = [
    [null, 'invalid_key'],
    ['sk-a-bare-string-of-a-key', 'invalid_key'],
    [{ ...good(), virtual_key: foreignKey() }, 'invalid_key'],
    [{ user_id: userId }, 'invalid_key_hash'],
    [{ user_id: userId, key_hash: foreignKey() }, 'invalid_key_hash'],
    [{ user_id: userId, virtual_key: 'sk-short' }, 'invalid_virtual_key'],
    [{ user_id: userId, virtual_key: ` ${foreignKey()}` }, 'invalid_virtual_key'],
    [{ user_id: userId, virtual_key: `${foreignKey()}ü` }, 'invalid_virtual_key'],
    [{ user_id: userId, virtual_key: 'k'.repeat(513) }, 'invalid_virtual_key'],
    [{ user_id: userId, virtual_key: 1234567890123456 }, 'invalid_virtual_key'],
    [{ key_hash: sha256(foreignKey()) }, 'invalid_user_id'],
    [{ ...good(), user_id: 'me' }, 'invalid_user_id'],
    [{ ...good(), user_external_id: 'me' }, 'invalid_user_id'],
    [{ ...good(), user_id: randomUUID() }, 'user_not_found'],
    [{ key_hash: sha256(foreignKey()), user_external_id: 'nobody' }, 'user_not_found'],
    [{ ...good(), name: 1 }, 'invalid_name'],
    [{ ...good(), key_prefix: 'sk-proj-abcde' }, 'invalid_key_prefix'],
    [{ ...good(), expires_at: '2020-01-01' }, 'invalid_expires_at'],
    [{ ...good(), expires_at: 'infinity' }, 'invalid_expires_at'],
    [{ ...good(), expires_at: '2030-02-30' }, 'invalid_expires_at'],
    [{ ...good(), config_node_ids: nodeId }, 'invalid_config_node_ids'],
    [{ ...good(), config_node_ids: [nodeId, randomUUID()] }, 'config_node_not_found'],
    [{ ...good(), config_node_ids: [null] }, 'config_node_not_found'],
  ]
  const before = await count('data.virtual_key')
  const answers = await importKeys([good(), ...bad.map(([element]) => element), good()])
  assert.equal(codes(answers), ['imported', ...bad.map(([, code]) => `refused ${code}`), 'imported'])
  assert.is(await count('data.virtual_key'), before + 2)
  assert.equal(await importKeys([]), [])
  const { message } = await failure(importKeys({}))
  assert.is(message, 'invalid_keys')

  const many = Array.from({ length: 1000 }, (_, n) =>
    n === 500 ? { ...good(), user_id: randomUUID() } : good(),
  )
  const of = await importKeys(many)
  assert.is(of.filter(({ status }) => status === 'imported').length, 999)
  assert.is(of[500]!.code, 'user_not_found')
})

test('an import refuses another user’s key, leaves a revoked key revoked, and calls a copy a duplicate', async () => {
  const [mine, theirs] = [await user(), await user()]
  const key_hash = sha256(foreignKey())
  assert.equal(
    codes(
      await importKeys([
        { user_id: mine, key_hash },
        { user_id: mine, key_hash: key_hash.toUpperCase() },
        { user_id: theirs, key_hash },
      ]),
    ),
    ['imported', 'duplicate', 'refused key_taken'],
  )
  const [taken] = await importKeys([{ user_id: theirs, key_hash }])
  assert.equal(taken, { status: 'refused', code: 'key_taken' })
  const [{ id }] = (await importKeys([{ user_id: mine, key_hash }])) as [Row]
  await operator('select api.revoke_virtual_key($1)', [id])
  assert.equal(codes(await importKeys([{ user_id: mine, key_hash }])), ['refused virtual_key_disabled'])
  const [resolved] = await gateway('select code from api.resolve_virtual_key($1)', [key_hash])
  assert.is(resolved!.code, 'virtual_key_disabled')
})

test('an import of a rotated key’s old text is a duplicate within its grace, then expired; no other user gets it', async () => {
  const [mine, theirs] = [await user(), await user()]
  const key_hash = sha256(foreignKey())
  const [{ id }] = (await importKeys([{ user_id: mine, key_hash }])) as [Row]
  const both = [
    { user_id: mine, key_hash },
    { user_id: theirs, key_hash },
  ]
  for (const [grace, code] of [
    ['1 day', 'duplicate'],
    ['0', 'refused virtual_key_expired'],
  ]) {
    await operator('select api.rotate_virtual_key($1, $2)', [id, grace])
    assert.equal(codes(await importKeys(both)), [code, 'refused key_taken'])
  }
})

test('two imports of the same keys at once, in opposite orders: each key comes in once', async () => {
  const users = [await user(), await user()]
  const keys = Array.from({ length: 200 }, (_, n) => ({
    user_id: users[n % 2],
    key_hash: sha256(foreignKey()),
  }))
  const [a, b] = [await db.session('keyledger_operator'), await db.session('keyledger_operator')]
  try {
    const run = async (session: typeof a, elements: unknown[]) =>
      (await session.query('select api.import_virtual_keys($1) as it', [JSON.stringify(elements)])).rows[0]
        .it as Row[]
    await a.query('begin')
    const first = await run(a, keys)
    const second = run(b, keys.toReversed())
    await db.blocked(b)
    await a.query('commit')
    assert.ok(first.every(({ status }) => status === 'imported'))
    assert.ok((await second).every(({ status }) => status === 'duplicate'))
    assert.equal(
      (await second).toReversed().map(({ id }) => id),
      first.map(({ id }) => id),
    )
  } finally {
    await a.end()
    await b.end()
  }
})

test.run()
