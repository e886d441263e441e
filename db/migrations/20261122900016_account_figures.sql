-- migrate:up
-- The figures of accounts, now: dues that are not posted yet are subtracted.

set local role keyledger_owner;

-- an account's figures now
-- The view subtracts grants and holds that the clock has ended and no posting has settled yet.
create or replace view data.account_now as
select
  a.account_id,
  case when a.owner_tenant_id is null then 'user' else 'tenant' end as owner,
  a.owner_user_id,
  a.owner_tenant_id,
  a.currency,
  a.balance,
  a.free_credit - g.due as free_credit,
  a.credit_limit,
  a.frozen_balance - h.due - p.shrunk as frozen_balance,
  a.outstanding_amount,
  -- the last statement's unpaid debt, less payments since: a payment pays the oldest debt first
  case when a.outstanding_amount > 0 then coalesce((
    select case when s.outstanding_closing > 0 then greatest(s.outstanding_closing + coalesce((
      select sum(t.outstanding_delta)
      from data.billing_transaction t
      where t.account_id = s.account_id and t.seq > s.last_seq and t.outstanding_delta < 0
    ), 0), 0) end
    from data.accounting_snapshot s
    where s.account_id = a.account_id
    order by s.period_start desc
    limit 1
  ), 0) else 0 end::numeric(28, 10) as overdue_amount,
  a.available + h.due - g.due + p.shrunk as available,
  a.low_balance_threshold,
  a.time_zone,
  a.balance_version,
  a.last_charged_at,
  a.created_at,
  encode(a.head_hash, 'hex') as head
from data.account_balance a
cross join lateral (
  select coalesce(sum(d.amount - d.captured), 0) as due
  from (
    select * from data.hold h
    where h.account_id = a.account_id and h.status = 'open' and h.expires_at <= statement_timestamp()
    order by h.expires_at -- so each plan uses the index of open holds, whenever it was made
  ) d
) h
cross join lateral (
  select coalesce(sum(g.remaining), 0) as due
  from data.credit_grant g
  where g.account_id = a.account_id and g.remaining > 0 and g.expires_at <= statement_timestamp()
) g
-- as data.shrink_parked computes it
cross join lateral (
  select case
    when g.due > 0 and a.available + h.due - g.due < 0 then least(g.due - h.due - a.available, g.due, coalesce((
      select sum(k.amount - k.captured)
      from data.hold k
      where k.account_id = a.account_id and k.status = 'parked'
    ), 0))
    else 0
  end as shrunk
) p;
comment on view data.account_now is 'Account figures of now: ended grants and holds are subtracted.';

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
