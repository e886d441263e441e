-- migrate:up
-- News of an account: the line that an entry took its funds or a budget across.

set local role keyledger_owner;

-- Writes the lines these accounts have crossed since their funds were `before`, and wakes the
-- readers.
-- The caller holds the accounts' locks, so that each crossing is met once.
-- A notification locks the whole database until the commit: send none without a crossing.
create or replace function data.tell_crossings(
  account_ids uuid[],
  before numeric[]
)
returns void
language plpgsql
as $$
begin
  insert into data.account_news (account_id, seq, kind, funds, threshold, created_at)
  select a.account_id, a.balance_version, k.kind, a.funds, a.low_balance_threshold, a.head_at
  from unnest(account_ids, before) as c (account_id, funds)
  cross join lateral (
    select b.account_id, b.balance_version, b.head_at, b.low_balance_threshold, b.available + b.frozen_balance as funds
    from data.account_balance b where b.account_id = c.account_id offset 0
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

-- Writes the budgets that were just used up in their present window, and wakes the readers.
create or replace function data.tell_exhausted_budgets(spends data.budget_spend[])
returns void
language plpgsql
as $$
begin
  insert into data.account_news (account_id, seq, kind, funds, budget, created_at)
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

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
