// Rare calls that lock an account: no long read under the lock, later charges count, every wait has a bound.
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database, type Row } from '../support/database.ts'
import { payer } from '../support/payer.ts'
import { code, transports } from '../support/transports.ts'

const test = suite('rare waits')
const db = await database(test)

const budget = async (account: Row): Promise<string[]> =>
  (
    await db.operator(
      `select trim_scale(spent) || ' of ' || trim_scale(amount) || ' a ' || period as it from api.budgets
      where account_id = $1 order by period`,
      [account.accountId],
    )
  ).map(({ it }) => it)
const proved = async (account: Row) =>
  assert.equal(await db.sql('select * from api.verify_balances($1)', [account.accountId]), [])

const ready = async () => {
  const account = await payer(db, { funds: '100' })
  await account.use('1')
  await account.post('set_budget', { scope: 'user', scope_id: account.userId, amount: '50', period: 'day' })
  return account
}
const counting: Record<string, [sql: string, after: string[]]> = {
  set_budget: [`select api.set_budget($1, 'user', $1, 60, 'month')`, ['4 of 50 a day', '4 of 60 a month']],
  set_time_zone: [`select api.set_time_zone($1, 'Asia/Tokyo')`, ['4 of 50 a day']],
}

for (const [name, [sql, after]] of Object.entries(counting)) {
  test(`${name} reads the usage log while the account is free`, async () => {
    const account = await ready()
    const owner = await db.session()
    const setter = await db.session('keyledger_operator')
    try {
      await owner.query('begin; lock table data.usage_log in access exclusive mode')
      const setting = setter.query(sql, [account.userId])
      await db.blocked(setter)
      assert.ok(await account.hold('1')) // at once
      await owner.query('rollback')
      await setting
    } finally {
      await owner.end()
      await setter.end()
    }
    await proved(account)
  })

  test(`${name} counts charges made while it read and waited, once`, async () => {
    const account = await ready()
    const charging = await db.session('keyledger_gateway')
    const setter = await db.session('keyledger_operator')
    try {
      await charging.query('begin')
      await charging.query('select api.record_usage($1)', [
        JSON.stringify([account.event('1'), account.event('2')]),
      ])
      const setting = setter.query(sql, [account.userId])
      await db.blocked(setter)
      await charging.query('commit')
      await setting
    } finally {
      await charging.end()
      await setter.end()
    }
    assert.equal(await budget(account), after)
    await proved(account)
  })
}

test('of two calls that set one budget the later changes its amount; a budget removed meanwhile stays removed', async () => {
  const account = await ready()
  const holder = await db.session()
  const sessions = await Promise.all([1, 2, 3, 4].map(() => db.session('keyledger_operator')))
  const [day] = await db.operator('select id from api.budgets where account_id = $1', [account.accountId])
  try {
    await holder.query('begin')
    await holder.query('select from data.account_balance where account_id = $1 for update', [account.userId])
    const calls: [string, unknown[]][] = [
      [`select api.set_budget($1, 'user', $1, 60, 'month')`, [account.userId]],
      [`select api.set_budget($1, 'user', $1, 70, 'month')`, [account.userId]],
      ['select api.remove_budget($1)', [day!.id]],
      [`select api.set_time_zone($1, 'Asia/Tokyo')`, [account.userId]],
    ]
    const done: Promise<unknown>[] = []
    for (const [i, [text, values]] of calls.entries()) {
      done.push(sessions[i]!.query(text, values))
      await db.blocked(sessions[i]!)
    }
    await holder.query('commit')
    await Promise.all(done)
  } finally {
    for (const session of [holder, ...sessions]) await session.end()
  }
  assert.equal(await budget(account), ['1 of 70 a month'])
  await proved(account)
})

// 4 s, and as long again for one that waited behind another waiter: below the 10 s of a client's call
test('a call that waits for an account gives up before its caller does, and says so', async () => {
  const account = await ready()
  const holder = await db.session()
  try {
    await holder.query('begin')
    await holder.query('select from data.account_balance where account_id = $1 for update', [account.userId])
    const calls: [string, Row][] = [
      ['top_up', { amount: '1' }],
      ['set_time_zone', { time_zone: 'UTC' }],
      ['freeze_funds', { amount: '1', reason: 'test' }],
    ]
    const { postgrest, pg } = await transports(db)
    await Promise.all(
      [postgrest, pg].flatMap(({ operator: rpc }) =>
        calls.map(async ([fn, args]) =>
          assert.is(
            await code(rpc.call(fn, { account_id: account.accountId, ...args })),
            '503 lock_timeout',
            fn,
          ),
        ),
      ),
    )
  } finally {
    await holder.end()
  }
  assert.is((await account.topUp('1')).kind, 'top_up')
})

test('a call with a frozen snapshot is refused when another has set the budget, and doesn’t retry for ever', async () => {
  const account = await payer(db, { funds: '10' })
  const set = `select from api.set_budget('${account.accountId}', 'user', '${account.userId}', 60, 'week')`
  await db.operator(set.replace('week', 'day'))
  const frozen = await db.session('keyledger_operator')
  try {
    await frozen.query('begin isolation level repeatable read; select from api.tenants')
    await db.operator(set)
    assert.is((await frozen.query(set).catch((error) => error)).code, '40001')
    await frozen.query('rollback')
  } finally {
    await frozen.end()
  }
})

test.run()
