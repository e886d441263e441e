// Exact money in tests, seeded chance, and the invariants that hold for every account at any time.
import * as assert from 'uvu/assert'
import type { Row, Sql } from './database.ts'

/** A decimal string in units of 1e-10. */
export function units(decimal: string): bigint {
  const [, sign, whole, fraction = ''] = decimal.match(/^(-?)(\d+)(?:\.(\d{1,10}))?$/)!
  return BigInt(`${sign}${whole}${fraction.padEnd(10, '0')}`)
}

/** A seeded generator: `chance(n)` is one of 0 … n-1. The same seed gives the same run. */
export function chances(seed: number): (n: number) => number {
  let state = seed
  return (n) => {
    state = (state * 1103515245 + 12345) % 2147483648
    return Math.floor((state / 2147483648) * n)
  }
}

/** The elements in a random order. */
export function shuffled<T>(elements: T[], chance: (n: number) => number): T[] {
  const copy = [...elements]
  for (let i = copy.length - 1; i > 0; i--) {
    const j = chance(i + 1)
    ;[copy[i], copy[j]] = [copy[j]!, copy[i]!]
  }
  return copy
}

/**
 * The six invariants and the chain, computed here without `verify_balances`, and `verify_balances` beside them.
 * The sixth, that a refusal changes nothing, is up to the test with the refusal. `sql` is the owner of the database.
 */
export async function holdsTrue(sql: Sql): Promise<void> {
  assert.equal(await sql('select * from api.verify_balances()'), [])
  const [bad] = await sql(`
    select
      -- nothing is created or lost: what accounts have is what the entries say came in or went out
      (select coalesce(sum(balance + free_credit - outstanding_amount), 0) from data.account_balance)
        - (select coalesce(sum(amount), 0) from data.billing_transaction) as created_or_lost,
      (select coalesce(sum(cost), 0) from data.usage_log)
        + (select coalesce(sum(amount), 0) from data.billing_transaction where kind = 'usage') as revenue_off,
      (select count(*) from data.account_balance where least(free_credit, credit_limit, frozen_balance,
        outstanding_amount) < 0)::int as negative,
      (select count(*) from data.account_balance
        where available <> free_credit + balance + credit_limit - frozen_balance - outstanding_amount)::int as not_derived,
      (select count(*) from data.account_balance
        where balance < -credit_limit or outstanding_amount > 0 and (free_credit <> 0 or balance <> -credit_limit))::int
        as past_limit,
      (select count(*) from data.account_balance a where frozen_balance <>
        (select coalesce(sum(amount - captured), 0) from data.hold h where h.account_id = a.account_id and status in ('open', 'parked')))::int
        as frozen_off,
      (select count(*) from (
        select t.*, lag(hash) over w as last_hash, lag(balance_after) over w as last_balance,
          lag(free_credit_after) over w as last_free_credit, lag(outstanding_after) over w as last_outstanding,
          row_number() over w as n
        from data.billing_transaction t window w as (partition by account_id order by seq)) t
        where seq <> n or prev_hash <> coalesce(last_hash, '') or balance_after <> coalesce(last_balance, 0) + balance_delta
          or free_credit_after <> coalesce(last_free_credit, 0) + free_credit_delta
          or outstanding_after <> coalesce(last_outstanding, 0) + outstanding_delta)::int as chain_broken,
      -- a grant is spent and expired once
      (select count(*) from (
        select t.account_id, s from data.billing_transaction t, jsonb_array_elements(t.metadata -> 'grant_seq') s
        where t.kind = 'credit_expiry' group by 1, 2 having count(*) > 1) t)::int as expired_twice,
      -- what is gone from a grant was drawn and not returned, or has expired
      (select count(*) from data.credit_grant g where g.amount - g.remaining <>
        (select coalesce(sum(d.amount - d.returned), 0) from data.grant_draw d
          where d.account_id = g.account_id and d.grant_seq = g.seq))::int
        as grant_off,
      -- an event's refunds are part of its cost, an entry's of the entry
      (select count(*) from data.usage_log l where l.cost < (select sum(t.amount) from data.billing_transaction t
        where t.account_id = l.account_id and t.refund_of_seq = l.transaction_seq and t.refund_of_usage_id = l.id))::int
        + (select count(*) from data.billing_transaction o where abs(o.amount) < (select abs(sum(t.amount))
          from data.billing_transaction t where t.account_id = o.account_id and t.refund_of_seq = o.seq))::int
        as came_back_twice`)
  const expected: Row = { created_or_lost: 0, revenue_off: 0 }
  for (const [what, value] of Object.entries(bad!)) assert.is(Number(value), expected[what] ?? 0, what)
}
