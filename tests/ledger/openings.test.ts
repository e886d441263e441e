// Openings: accounts of another system open with their money, debt, credit and limit.
import { createHash, randomBytes, randomUUID } from 'node:crypto'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { until } from '../../scripts/supervise.ts'
import { createBillingModule, pgRpc } from '../../src/index.ts'
import { database, type Row } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { holdsTrue } from '../support/ledger.ts'
import { event, hold, seed } from '../support/seed.ts'

const test = suite('adopt')
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
const open = calling('record_openings')
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
  const billing = createBillingModule({ rpc, listen: db.loginUrl })
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
      await until(() => billing.validate(key).catch(() => false), 'the key to be known', 1)
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

test('accounts open with their money, debt, free credit and limit', async () => {
  const [rich, poor, within, promised, owing] = [
    await user(),
    await user(),
    await user(),
    await user(),
    await user(),
  ]
  const external = [`org_${randomUUID()}`, `usr_${randomUUID()}`] as const
  const [tenant] = await operator(
    'insert into api.tenants (name, external_id) values ($1, $1) returning id',
    [external[0]],
  )
  const member = await user(external[1], tenant!.id)
  const openings = [
    { account_id: rich, balance: '12.5', free_credit: '3', credit_limit: 100, reference: 'old:17' },
    { account_id: poor, balance: '-30', credit_limit: '10' },
    { account_id: within, balance: -4, credit_limit: '10', free_credit: '1' },
    { account_id: promised, balance: 0, free_credit: '0.0000000001' },
    { account_id: owing, balance: '-5', free_credit: '7' },
    { tenant_external_id: external[0], balance: '999999999999.9999999999' },
    { user_external_id: external[1], balance: '1' },
  ]
  const answers = await open(openings)
  const available = ['115.5', '-20', '7', '0.0000000001', '2', '999999999999.9999999999', '1']
  assert.equal(
    answers.map(({ status, seq, available }) => [status, seq, Number(available)]),
    available.map((amount) => ['opened', 1, Number(amount)]),
  )
  assert.equal(
    answers.map(({ account_id }) => account_id),
    [rich, poor, within, promised, owing, tenant!.id, member],
  )
  const figures = await operator(
    `select balance::float8 as b, free_credit::float8 as f, credit_limit::float8 as l, outstanding_amount::float8 as o
     from api.billing_accounts where account_id = any ($1) order by array_position($1, account_id)`,
    [[rich, poor, within, owing]],
  )
  assert.equal(figures.map(Object.values), [
    [12.5, 3, 100, 0],
    [-10, 0, 10, 20],
    [-4, 1, 10, 0],
    [0, 2, 0, 0], // 5 of 7 paid the debt
  ])
  const ledger = await operator(
    `select seq, kind, amount::float8 as amount, counter_account, reference from api.billing_transactions
     where account_id = $1 order by seq`,
    [rich],
  )
  assert.equal(ledger, [
    { seq: '1', kind: 'opening', amount: 12.5, counter_account: 'opening', reference: 'old:17' },
    { seq: '2', kind: 'credit_grant', amount: 3, counter_account: 'promotion', reference: null },
  ])
  // an account opens once; the answer tells a retry from another opening
  const entries = await count('data.billing_transaction')
  assert.equal(
    await open(openings),
    answers.map((answer) => ({ ...answer, status: 'duplicate' })),
  )
  const others = [{ balance: '12.6' }, { free_credit: '0' }, { credit_limit: '1' }, { reference: 'old:18' }]
  assert.equal(
    codes(await open(others.map((other) => ({ ...openings[0], ...other })))),
    others.map(() => 'refused opening_mismatch'),
  )
  assert.is(await count('data.billing_transaction'), entries)
  await holdsTrue(db.sql)
})

test('an opening is an account’s first entry, and each bad one is refused alone', async () => {
  const { accountId } = await seed(operator)
  const [fresh, twice] = [await user(), await user()]
  const bad: [element: unknown, code: string][] = [
    [{ account_id: accountId, balance: '1' }, 'account_in_use'],
    [1, 'invalid_opening'],
    [{ balance: '1' }, 'invalid_account_id'],
    [{ account_id: 'me', balance: '1' }, 'invalid_account_id'],
    [{ account_id: fresh, user_external_id: 'me', balance: '1' }, 'invalid_account_id'],
    [{ account_id: randomUUID(), balance: '1' }, 'account_not_found'],
    [{ tenant_external_id: 'nobody', balance: '1' }, 'account_not_found'],
    [{ account_id: fresh }, 'invalid_balance'],
    [{ account_id: fresh, balance: 'NaN' }, 'invalid_balance'],
    [{ account_id: fresh, balance: '0.00000000001' }, 'invalid_balance'],
    [{ account_id: fresh, balance: '1000000000000' }, 'invalid_balance'],
    [{ account_id: fresh, balance: '1', free_credit: '-1' }, 'invalid_free_credit'],
    [{ account_id: fresh, balance: '1', free_credit: true }, 'invalid_free_credit'],
    [{ account_id: fresh, balance: '1', credit_limit: '-1' }, 'invalid_credit_limit'],
    [{ account_id: fresh, balance: '1', reference: '' }, 'invalid_reference'],
    [{ account_id: fresh, balance: '1', reference: 'x'.repeat(513) }, 'invalid_reference'],
    [{ account_id: fresh, balance: '1', reference: 1 }, 'invalid_reference'],
  ]
  const answers = await open([
    { account_id: twice, balance: '2' },
    ...bad.map(([element]) => element),
    { account_id: twice, balance: '2.0' },
    { account_id: twice, balance: '3' },
  ])
  assert.equal(codes(answers), [
    'opened',
    ...bad.map(([, code]) => `refused ${code}`),
    'duplicate',
    'refused opening_mismatch',
  ])
  const [{ balance_version }] = (await operator(
    'select balance_version from api.billing_accounts where account_id = $1',
    [fresh],
  )) as [Row]
  assert.is(balance_version, '0')
  assert.equal(await open([]), [])
  assert.is((await failure(open('x'))).message, 'invalid_openings')
  // an opened account goes on like any other
  await operator('select api.top_up($1, 5)', [twice])
  await holdsTrue(db.sql)
})

test('a top-up and an opening at once: whichever is second finds the other', async () => {
  for (const openingFirst of [true, false]) {
    const id = await user()
    const opening = {
      text: 'select api.record_openings($1) as it',
      values: [JSON.stringify([{ account_id: id, balance: '1' }])],
    }
    const topUp = { text: 'select api.top_up($1, 1)', values: [id] }
    const [a, b] = [await db.session('keyledger_operator'), await db.session('keyledger_operator')]
    try {
      await a.query('begin')
      const first = await a.query(openingFirst ? opening : topUp)
      const second = b.query(openingFirst ? topUp : opening)
      await db.blocked(b)
      await a.query('commit')
      const [answer] = (openingFirst ? first : await second).rows[0].it
      assert.is(answer.code ?? answer.status, openingFirst ? 'opened' : 'account_in_use')
      await second
    } finally {
      await a.end()
      await b.end()
    }
  }
  await holdsTrue(db.sql)
})

test('5,000 accounts open in one call, and verify', async () => {
  const ids = (
    await operator(
      `insert into api.user_profiles (display_name) select 'n' from generate_series(1, 5000) returning id`,
    )
  ).map(({ id }) => id as string)
  const openings = ids.map((account_id, n) => ({
    account_id,
    balance: String(n - 100),
    free_credit: String(n % 3),
  }))
  const answers = await open(openings)
  assert.ok(answers.every(({ status }, n) => status === 'opened' && answers[n]!.account_id === ids[n]))
  await holdsTrue(db.sql)
  assert.ok((await open(openings)).every(({ status }) => status === 'duplicate'))
  const [sum] = await db.sql(
    'select sum(amount)::int as it from data.billing_transaction where account_id = any ($1)',
    [ids],
  )
  assert.is(
    sum!.it,
    openings.reduce((all, { balance, free_credit }) => all + Number(balance) + Number(free_credit), 0),
  )
})

test('an account in euros: held, charged and refused in its own currency', async () => {
  const [tenant] = await operator(
    `insert into api.tenants (name, currency) values ('Kaffee', 'EUR') returning id`,
  )
  const userId = await user(null, tenant!.id)
  const { nodeId } = await seed(operator) // priced in USD alone
  const [node] = await operator(`insert into api.config_nodes (name) values ($1) returning id`, [
    `node ${randomUUID()}`,
  ])
  await operator(
    `insert into api.prices (config_node_id, meter, unit_price, unit_size, currency, effective_from)
     values ($1, 'input_tokens', 2, 1000000, 'EUR', '2020-01-01')`,
    [node!.id],
  )
  const [key] = await operator(
    'select id, virtual_key from api.create_virtual_key($1, config_node_ids => $2)',
    [userId, [node!.id, nodeId]],
  )
  assert.equal(codes(await open([{ account_id: tenant!.id, balance: '10' }])), ['opened'])
  const world = {
    tenantId: tenant!.id,
    accountId: tenant!.id,
    userId,
    keyId: key!.id,
    nodeId: node!.id,
    key: '',
    keyHash: '',
  }

  const [resolved] = await gateway('select * from api.resolve_billing_account($1)', [key!.virtual_key])
  assert.is(resolved!.currency, 'EUR')
  const place = calling('place_holds', gateway)
  const record = calling('record_usage', gateway)
  const { amount: _, ...request } = hold(world, '1')
  const meters = { input_tokens: 1_000_000 }
  const [held] = await place([{ ...request, config_node_id: node!.id, meters }])
  assert.equal([held!.status, Number(held!.amount), Number(held!.available)], ['held', 2, 8])
  const [charged] = await record([{ ...event(world, 1_000_000), hold_id: held!.id }])
  assert.equal([charged!.status, Number(charged!.cost), Number(charged!.available)], ['charged', 2, 8])

  // a price in dollars is no price for it: nothing is converted
  const { amount: __, ...dollars } = hold(world, '1')
  assert.equal(codes(await place([{ ...dollars, config_node_id: nodeId, meters }])), [
    'refused currency_mismatch',
  ])
  const unpriced = event({ ...world, nodeId }, 1_000_000)
  assert.equal(codes(await record([unpriced])), ['parked currency_mismatch'])
  await operator(
    `insert into api.prices (config_node_id, meter, unit_price, unit_size, currency, effective_from)
     values ($1, 'input_tokens', 3, 1000000, 'EUR', '2020-01-01')`,
    [nodeId],
  )
  const [replayed] = (await operator('select api.replay_parked_usage() as it'))[0]!.it
  assert.equal([replayed.status, Number(replayed.cost), Number(replayed.available)], ['charged', 3, 5])
  const [balance] = await gateway(
    'select currency, available::float8 from api.account_balances where user_id = $1',
    [userId],
  )
  assert.equal(balance, { currency: 'EUR', available: 5 })
  const { message } = await failure(
    operator(`update api.tenants set currency = 'USD' where id = $1`, [tenant!.id]),
  )
  assert.match(message, /currency_is_fixed|permission denied/)
  await holdsTrue(db.sql)
})

test.run()
