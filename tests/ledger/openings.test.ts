// Openings: accounts of another system open with their money, debt, credit and limit.
import { randomUUID } from 'node:crypto'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database, type Row } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { holdsTrue } from '../support/ledger.ts'
import { event, hold, seed } from '../support/seed.ts'

const test = suite('openings')
const db = await database(test)
const { operator, gateway } = db

const calling = (fn: string, sql = operator) => {
  return async (elements: unknown): Promise<Row[]> => {
    const [row] = await sql(`select api.${fn}($1) as answers`, [JSON.stringify(elements)])
    return row!.answers
  }
}
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
