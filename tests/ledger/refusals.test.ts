// Refusals of bad input: each case through both transports, with the same code and no figure changed.
import { createHash, randomUUID } from 'node:crypto'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database, type Row } from '../support/database.ts'
import { newId } from '../support/ids.ts'
import { holdsTrue } from '../support/ledger.ts'
import { payer } from '../support/payer.ts'
import { type Case, code, refusals, short, transports } from '../support/transports.ts'

const test = suite('refusals')
const db = await database(test)
const through = await transports(db)
const each = refusals(test, db, through)

const hashOf = (key: string) => createHash('sha256').update(key).digest('hex')
const [tenant] = await db.operator(`insert into api.tenants (name) values ('t') returning id`)
const people = {
  good: await payer(db, { funds: '10' }),
  revoked: await payer(db, { funds: '10' }),
  expired: await payer(db, { funds: '10' }),
  suspended: await payer(db, { funds: '10' }),
  ofTenant: await payer(db, { funds: '10', tenantId: tenant!.id }),
  other: await payer(db, { funds: '10' }),
  gone: await payer(db),
}
const { good, other } = people
await db.operator('select status from api.revoke_virtual_key($1)', [people.revoked.keyId])
await db.sql(`update data.virtual_key set expires_at = now() - interval '1 s' where id = $1`, [
  people.expired.keyId,
])
await db.operator(`update api.user_profiles set status = 'suspended' where id = $1`, [
  people.suspended.userId,
])
await db.operator(`update api.tenants set status = 'suspended' where id = $1`, [tenant!.id])
const superuser = await db.session()
await superuser.query('set session_replication_role = replica')
await superuser.query('delete from data.account_balance where account_id = $1', [people.gone.accountId])
await superuser.end()
const codes = (answers: Row[]) => answers.map(({ status, code }) => `${status} ${code}`)

// Keys
const resolve =
  (vk: unknown): Case[1] =>
  ({ gateway }) =>
    code(gateway.call<unknown>('resolve_billing_account', { vk }))
const resolveHash =
  (key_hash: unknown): Case[1] =>
  ({ gateway }) =>
    code(gateway.call<unknown>('resolve_virtual_key', { key_hash }))
const hash = hashOf(good.key)
for (const vk of [
  'vk_unknown',
  '',
  ' ',
  null,
  `${good.key} `,
  good.key.toUpperCase(),
  hash,
  `\\x${hash}`,
  "' or true --",
  '🔑',
  'x'.repeat(100_000),
])
  each([`a key that is none: ${short(vk)}`, resolve(vk), '404 virtual_key_unknown'])
for (const key_hash of [
  hashOf('unknown'),
  '',
  null,
  good.key,
  hash.toUpperCase(),
  ` ${hash}`,
  `${hash}\n`,
  hash.slice(1),
  `${hash}00`,
  `\\x${hash}`,
  'g'.repeat(64),
  '🔑'.repeat(64),
])
  each([`a hash that is none: ${short(key_hash)}`, resolveHash(key_hash), '404 virtual_key_unknown'])

const unusable = {
  revoked: 'virtual_key_disabled',
  expired: 'virtual_key_expired',
  suspended: 'user_suspended',
  ofTenant: 'tenant_suspended',
} as const
for (const [who, expected] of Object.entries(unusable)) {
  const { key, keyId, userId, accountId, request } = people[who as keyof typeof unusable]
  each(
    [
      `${expected}: resolved, with the reason`,
      async ({ gateway }) => [
        (await gateway.call<Row>('resolve_billing_account', { vk: key })).code,
        (await gateway.call<Row>('resolve_virtual_key', { key_hash: hashOf(key) })).code,
      ],
      [expected, expected],
    ],
    [
      `${expected}: the budget says so`,
      async ({ gateway }) => {
        const args = { user_id: userId, amount: '1', virtual_key_id: keyId }
        const { allowed, code } = await gateway.call<Row>('check_budget', args)
        return [allowed, code]
      },
      [false, expected],
    ],
    [
      `${expected}: no hold`,
      async ({ gateway }) => codes(await gateway.call<Row[]>('place_holds', { requests: [request('1')] })),
      [`refused ${expected}`],
    ],
  )
  for (const [name, { gateway }] of Object.entries(through))
    test(`${expected}: the use is charged all the same, by ${name}`, async () => {
      const event = people[who as keyof typeof unusable].event('0.5')
      const [answer] = await gateway.call<Row[]>('record_usage', { events: [event] })
      assert.equal([answer!.status, answer!.cost], ['charged', '0.5000000000'])
      assert.is(
        (await db.sql('select from data.usage_log where account_id = $1 and id = $2', [accountId, event.id]))
          .length,
        1,
      )
    })
}

// A user without an account: deleted past every guard
const { gone } = people
each(
  ['without an account: resolving', resolve(gone.key), '404 account_not_found'],
  [
    'without an account: the budget',
    ({ gateway }) => code(gateway.call('check_budget', { user_id: gone.userId, amount: '1' })),
    '404 account_not_found',
  ],
  [
    'without an account: a hold',
    async ({ gateway }) => codes(await gateway.call<Row[]>('place_holds', { requests: [gone.request('1')] })),
    ['refused account_not_found'],
  ],
  [
    'without an account: an event',
    async ({ gateway }) => codes(await gateway.call<Row[]>('record_usage', { events: [gone.event('1')] })),
    ['parked account_not_found'],
  ],
  [
    'without an account: a release',
    async ({ gateway }) =>
      codes(await gateway.call('release_holds', { requests: [{ id: newId(), account_id: gone.accountId }] })),
    ['closed account_not_found'],
  ],
  ...(['top_up', 'grant_credit', 'adjust_balance'] as const).map(
    (fn): Case => [
      `without an account: ${fn}`,
      ({ operator }) =>
        code(
          operator.call(fn, {
            account_id: gone.accountId,
            amount: '1',
            ...(fn === 'adjust_balance' && { reason: 'r' }),
          }),
        ),
      '404 account_not_found',
    ],
  ),
  [
    'without an account: set_credit_limit',
    ({ operator }) =>
      code(operator.call('set_credit_limit', { account_id: gone.accountId, credit_limit: '1' })),
    '404 account_not_found',
  ],
  [
    'no account id: top_up',
    ({ operator }) => code(operator.call<unknown>('top_up', { account_id: null, amount: '1' })),
    '404 account_not_found',
  ],
)

// Amounts, on every function that takes one
const amounts: [amount: unknown, ...except: string[]][] = [
  ['-1', 'adjust_balance'],
  ['-0.0000000001', 'adjust_balance'],
  ['0', 'set_credit_limit'],
  ['-0', 'set_credit_limit'],
  ['NaN'],
  ['Infinity'],
  ['-Infinity'],
  ['1000000000000'],
  ['1e12'],
  ['-1e12'],
  ['1e300'],
  ['0.00000000001'],
  [`0.${'1'.repeat(30)}`],
  [`1.${'0'.repeat(29)}1`],
  [null],
  [1e21],
  [1e-11],
]
const taking: [fn: string, who: 'gateway' | 'operator', args: Row, param: string][] = [
  ['top_up', 'operator', { account_id: good.accountId }, 'amount'],
  ['grant_credit', 'operator', { account_id: good.accountId }, 'amount'],
  ['adjust_balance', 'operator', { account_id: good.accountId, reason: 'r' }, 'amount'],
  ['set_credit_limit', 'operator', { account_id: good.accountId }, 'credit_limit'],
  ['check_budget', 'gateway', { user_id: good.userId }, 'amount'],
]
for (const [amount, ...except] of amounts) {
  for (const [fn, who, args, param] of taking)
    if (!except.includes(fn))
      each([
        `${fn} of ${short(amount)}`,
        (rpc) => code(rpc[who].call(fn, { ...args, [param]: amount })),
        '422 invalid_amount',
      ])
  each([
    `a hold of ${short(amount)}`,
    async ({ gateway }) =>
      codes(await gateway.call<Row[]>('place_holds', { requests: [good.request(amount as string)] })),
    ['refused invalid_amount'],
  ])
}
for (const amount of ['abc', '', '1,5', '0x10', '1_0', '１２', {}, [], true]) {
  // Postgres 16 reads 0x10 and 1_0 as numbers
  for (const [fn, who, args, param] of taking)
    if (!['0x10', '1_0'].includes(amount as string))
      each([
        `${fn} of ${short(amount)}`,
        (rpc) => code(rpc[who].call(fn, { ...args, [param]: amount })),
        '400 invalid_input',
      ])
  each([
    `a hold of ${short(amount)}`,
    async ({ gateway }) =>
      codes(await gateway.call<Row[]>('place_holds', { requests: [good.request(amount as string)] })),
    ['refused invalid_amount'],
  ])
}

// Other arguments of single functions
each(
  ...[null, 'infinity', '-infinity', '1969-12-31T23:59:59Z', '9999-01-01T00:00Z'].map(
    (moment): Case => [
      `the id of moment ${moment}`,
      ({ gateway }) => code(gateway.call<string, string>('id_at', { moment })),
      '422 invalid_moment',
    ],
  ),
  [
    'an id that is no uuid',
    ({ operator }) => code(operator.call('top_up', { account_id: 'x', amount: '1' })),
    '400 invalid_input',
  ],
  [
    'an unknown user',
    ({ gateway }) => code(gateway.call('check_budget', { user_id: randomUUID(), amount: '1' })),
    '404 user_not_found',
  ],
  [
    'a key of another user',
    ({ gateway }) =>
      code(gateway.call('check_budget', { user_id: good.userId, amount: '1', virtual_key_id: other.keyId })),
    '404 virtual_key_unknown',
  ],
  [
    'an empty reference',
    ({ operator }) =>
      code(operator.call('top_up', { account_id: good.accountId, amount: '1', reference: '' })),
    '422 invalid_reference',
  ],
  [
    'a long reference',
    ({ operator }) =>
      code(operator.call('top_up', { account_id: good.accountId, amount: '1', reference: 'x'.repeat(513) })),
    '422 invalid_reference',
  ],
  [
    'an adjustment without a reason',
    ({ operator }) =>
      code(operator.call('adjust_balance', { account_id: good.accountId, amount: '1', reason: ' \n' })),
    '422 invalid_reason',
  ],
  [
    'a grant for ever and a day',
    ({ operator }) =>
      code(
        operator.call('grant_credit', { account_id: good.accountId, amount: '1', expires_at: 'infinity' }),
      ),
    '422 invalid_expires_at',
  ],
  [
    'a grant without a priority',
    ({ operator }) =>
      code(operator.call('grant_credit', { account_id: good.accountId, amount: '1', priority: null })),
    '422 invalid_priority',
  ],
  [
    'a priority too large',
    ({ operator }) =>
      code(operator.call('grant_credit', { account_id: good.accountId, amount: '1', priority: 1e10 })),
    '400 number_out_of_range',
  ],
  [
    'a key for nobody',
    ({ operator }) => code(operator.call('create_virtual_key', { user_id: randomUUID() })),
    '404 user_not_found',
  ],
  [
    'a key for an unknown node',
    ({ operator }) =>
      code(operator.call('create_virtual_key', { user_id: good.userId, config_node_ids: [randomUUID()] })),
    '404 config_node_not_found',
  ],
  [
    'a key that has expired',
    ({ operator }) =>
      code(operator.call('create_virtual_key', { user_id: good.userId, expires_at: '2020-01-01' })),
    '422 invalid_expires_at',
  ],
  [
    'an unknown key to revoke',
    ({ operator }) => code(operator.call('revoke_virtual_key', { id: randomUUID() })),
    '404 virtual_key_unknown',
  ],
  [
    'an unknown argument',
    ({ operator }) =>
      code(operator.call<unknown>('top_up', { account_id: good.accountId, amount: '1', currency: 'USD' })),
    '404 function_not_found',
  ],
  ['nothing to replay', ({ operator }) => operator.call('replay_parked_usage', { ids: [randomUUID()] }), []],
)

test('the ledger is whole after all these tests', async () => {
  const found = await db.sql('select * from api.verify_balances()')
  assert.equal(found, [])
  await db.sql(
    `insert into data.account_balance (account_id, owner_user_id, currency) values ($1, $1, 'USD')`,
    [gone.accountId],
  )
  await holdsTrue(db.sql)
})

test.run()
