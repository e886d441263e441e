-- migrate:up
-- News of accounts: funds that cross a line, and a budget used up, are told once, by an outbox and a wake-up. A charge that crosses
-- none says nothing.
-- Funds are balance + free_credit + credit_limit - outstanding_amount: holds come and go, and don't count.

set local role keyledger_owner;

-- only a wake-up: a full queue must never abort a charge
create or replace function data.wake_for_news()
returns void
language plpgsql
as $$
begin
  if pg_notification_queue_usage() < 0.5 then
    perform pg_notify('keyledger_account', '');
  end if;
end
$$;

-- Writes what these accounts have crossed since they had `before`, and wakes the readers. The caller holds the accounts' locks, so that
-- each crossing is met once. Notifying takes a lock of the whole database until the commit: never do it for what is no crossing.
create or replace function data.tell_crossings(
  account_ids uuid[],
  before numeric[]
)
returns void
language plpgsql
as $$
begin
  insert into data.account_event (account_id, seq, kind, funds, threshold, created_at)
  select a.account_id, a.balance_version, k.kind, a.funds, a.low_balance_threshold, a.head_at
  from unnest(account_ids, before) as c (account_id, funds)
  cross join lateral (
    select b.*, b.available + b.frozen_balance as funds from data.account_balance b where b.account_id = c.account_id offset 0
  ) a
  cross join lateral (values
    (1, 'low_balance', c.funds > a.low_balance_threshold and a.funds <= a.low_balance_threshold),
    (2, 'exhausted', c.funds > 0 and a.funds <= 0),
    (3, 'back_in_funds', c.funds <= 0 and a.funds > 0)
  ) as k (n, kind, crossed)
  where k.crossed
  order by a.account_id, k.n;
  perform data.wake_for_news();
end
$$;

-- Writes which budgets have just been used up, of those whose window is the present one, and wakes the readers.
create or replace function data.tell_exhausted_budgets(spends data.budget_spend[])
returns void
language plpgsql
as $$
begin
  insert into data.account_event (account_id, seq, kind, funds, budget, created_at)
  select a.account_id, a.balance_version, 'budget_exhausted', a.available + a.frozen_balance,
    jsonb_build_object('id', b.id, 'scope', b.scope, 'scope_id', b.scope_id, 'period', b.period,
      'amount', b.amount::text, 'spent', s.spent::text),
    a.head_at
  from unnest(spends) s
  cross join lateral (select * from data.account_balance x where x.account_id = s.account_id offset 0) a
  cross join lateral (select * from data.budget x where x.account_id = s.account_id and x.id = s.budget_id offset 0) b
  where s.window_start = data.window_start(b.period, a.time_zone, a.head_at)
  order by a.account_id, b.id;
  if found then
    perform data.wake_for_news();
  end if;
end
$$;

create or replace function api.set_low_balance_threshold(
  account_id uuid,
  amount numeric
)
returns api.billing_accounts
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '4s'
set enable_seqscan = off
as $$
declare
  v_shown api.billing_accounts;
begin
  if amount is not null then
    perform data.require_positive_amount(amount);
  end if;
  perform data.lock_account(account_id);
  update data.account_balance a set low_balance_threshold = amount where a.account_id = set_low_balance_threshold.account_id;
  select * into v_shown from data.account_now b where b.account_id = set_low_balance_threshold.account_id;
  return v_shown;
end
$$;
comment on function api.set_low_balance_threshold(uuid, numeric) is
'Sets the funds at which an account''s balance is low; null for none.
`amount` is the threshold of `account_id`, above 0, or null. account_news tells `low_balance` when a posting takes the funds (balance +
free_credit + credit_limit - outstanding_amount) from above the threshold to it or below. Setting it tells nothing, whatever the funds are.
Answers the account. 404 account_not_found; 422 invalid_amount.';
grant execute on function api.set_low_balance_threshold(uuid, numeric) to keyledger_operator;

create or replace function api.account_news(cursor jsonb default null)
returns jsonb
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
  v_since pg_snapshot;
  v_next jsonb;
begin
  select c.since, c.next into v_since, v_next from data.read_cursor('account', cursor) c;
  return jsonb_build_object(
    'cursor', v_next,
    'reset', nullif(cursor, 'null') is not null and v_since is null,
    'events', coalesce((
      select jsonb_agg(jsonb_strip_nulls(jsonb_build_object(
        'id', e.id,
        'kind', e.kind,
        'account_id', e.account_id,
        'seq', e.seq,
        'funds', e.funds::text,
        'threshold', e.threshold::text,
        'budget', e.budget,
        'created_at', e.created_at
      )) order by e.id)
      from (
        select * from data.account_event n
        where n.xid >= pg_snapshot_xmin(v_since)
          and not pg_visible_in_snapshot(n.xid, v_since)
          and not data.is_foreign(n.xid)
        offset 0 -- by xid, not in the order of id
      ) e
    ), '[]'::jsonb)
  );
end
$$;
comment on function api.account_news(jsonb) is
'What has happened to accounts since a cursor, and the next cursor.
Without a cursor it starts from now, without events. Answers {cursor, reset, events: [{id, kind, account_id, seq, funds, threshold?, budget?,
created_at}]}, oldest first. `low_balance`: funds fell to the account''s threshold or below; `exhausted`: to 0 or below; `back_in_funds`: they
rose above 0; `budget_exhausted`: what counts against a budget in its present window has reached its amount, with `budget` {id, scope,
scope_id, period, amount, spent}. Funds are balance + free_credit + credit_limit - outstanding_amount, holds not counted, and `seq` is
the entry that changed them. `reset` true: the cursor is of another cluster or database, ahead of this one or older than what is kept (48 h);
events may be missing, so read the accounts. Keep the cursor after handling the events: whoever repeats a cursor gets the same ids again.';
grant execute on function api.account_news(jsonb) to keyledger_gateway, keyledger_operator;

reset role;

-- migrate:down
do $$
begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. Nothing was changed; restore a backup to go back';
end
$$;
