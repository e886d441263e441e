// What is overdue is read of the payments since the last statement, however many charges there were.
import type pg from 'pg'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database } from '../support/database.ts'
import { type Payer, payer } from '../support/payer.ts'

const test = suite('overdue')
const db = await database(test)

// the definition, read entry by entry
const definition = `
  select trim_scale(case when a.outstanding_amount > 0 and s.outstanding_closing > 0
    then greatest(s.outstanding_closing + p.paid, 0) else 0 end)::text as overdue
  from data.account_balance a
  left join lateral (
    select * from data.accounting_snapshot n where n.account_id = a.account_id order by n.period_start desc limit 1
  ) s on true
  left join lateral (
    select coalesce(sum(least(t.outstanding_delta, 0)), 0) as paid
    from (select * from data.billing_transaction b where b.account_id = a.account_id offset 0) t
    where t.seq > s.last_seq
  ) p on true
  where a.account_id = $1`
const shown =
  'select trim_scale(overdue_amount)::text as overdue from api.billing_accounts where account_id = $1'

const close = () => db.operator('select account_id from api.close_period(clock_timestamp(), null, 10000)')

test('on any history it follows from the entries, after each step', async () => {
  const accounts = await Promise.all(['0', '5', '50'].map((limit) => payer(db, { funds: '1', limit })))
  const amount = () => String(1 + Math.floor(Math.random() * 8))
  const steps: ((account: Payer) => Promise<unknown>)[] = [
    (account) => account.use(amount()),
    (account) => account.use(amount()),
    (account) => account.topUp(amount()),
    (account) => account.adjust(`-${amount()}`),
    (account) => account.grant(amount()),
    (account) => account.limit(amount()),
    async (account) => {
      const { id } = await account.use(amount())
      await db.operator('select api.refund_charge($1, usage_id => $2, reason => $3)', [
        account.accountId,
        id,
        'test',
      ])
    },
  ]
  const seen = new Set<string>()
  for (let i = 0; i < 120; i++) {
    if (i % 15 === 14) await close()
    for (const account of accounts) {
      await steps[Math.floor(Math.random() * steps.length)]!(account)
      const [[is], [should]] = [
        await db.operator(shown, [account.accountId]),
        await db.sql(definition, [account.accountId]),
      ]
      assert.equal(is, should, `step ${i}`)
      seen.add(is!.overdue)
    }
  }
  assert.ok(seen.size > 5, [...seen].join())
})

async function blocks(session: pg.Client, text: string, value: string): Promise<number> {
  const { rows } = await session.query(`explain (analyze, buffers, format json) ${text}`, [value])
  const { Plan: plan } = rows[0]['QUERY PLAN'][0]
  return plan['Shared Hit Blocks'] + plan['Shared Read Blocks'] + plan['Temp Read Blocks']
}

test('100,000 charges since the last statement cost no more to read than one', async () => {
  const account = await payer(db, { limit: '10' })
  await account.use('4')
  await account.limit('0')
  await account.use('6')
  await close()
  await account.topUp('1')
  await account.use('2')
  const reads: [string, string][] = [
    [shown, account.accountId],
    ['select * from api.account_balances where user_id = $1', account.userId],
    ['select * from api.resolve_billing_account($1)', account.key],
  ]
  // plans made while there was nothing, and anew; the function's own is kept by the session
  const sessions = [await db.session('keyledger_gateway')]
  const measured = async (session: pg.Client) => {
    const all: number[] = []
    for (const [text, value] of reads) all.push(await blocks(session, text, value))
    return all
  }
  try {
    for (let i = 0; i < 8; i++) await measured(sessions[0]!)
    const before = await measured(sessions[0]!)
    const overdue = (await db.operator(shown, [account.accountId]))[0]!.overdue
    assert.is(overdue, (await db.sql(definition, [account.accountId]))[0]!.overdue)
    assert.ok(Number(overdue) > 0)
    await db.sql(`
      begin;
      set local session_replication_role = replica;
      insert into data.billing_transaction
      select e.* from generate_series(1, 100000) n, data.billing_transaction t,
        jsonb_populate_record(t, jsonb_build_object('seq', 1000 + n)) e
      where t.account_id = '${account.accountId}' and t.kind = 'usage' and t.outstanding_delta > 0
        and t.seq = (select max(seq) from data.billing_transaction where account_id = t.account_id);
      commit`)
    for (const analyzed of [false, true]) {
      if (analyzed) await db.sql('vacuum analyze data.billing_transaction')
      const fresh = await db.session('keyledger_gateway')
      sessions.push(fresh)
      await measured(fresh) // reads the catalog
      for (const session of sessions)
        for (const [i, now] of (await measured(session)).entries())
          assert.ok(now < before[i]! + 150, `${reads[i]![0]}: ${before[i]} blocks before, ${now} now`)
    }
    assert.is((await db.operator(shown, [account.accountId]))[0]!.overdue, overdue)
  } finally {
    for (const session of sessions) await session.end()
  }
})

test.run()
