-- migrate:up
-- Spending: the windows of budgets in an account's time zone, and a counter of use for each.

set local role keyledger_owner;

-- The time at which an event counts against budgets: its own or its hold's, the later one.
-- A slow clock or an old id would else put today's use into a window that is over.
create or replace function data.spend_time(
  id uuid,
  hold_id uuid
)
returns timestamptz
language sql
immutable parallel safe
as $$
  select greatest(data.uuid_time(id), data.uuid_time(hold_id))
$$;

-- Counts usage that data.post has just logged for these accounts, each event in the window of its
-- data.spend_time.
-- The rows of a retry have an older entry's seq: they don't count again. A budget that is used up
-- by this is news.
create or replace function data.count_spend(
  accounts data.account_balance[],
  usage data.usage_log[]
)
returns void
language plpgsql
as $$
declare
  v_reached data.budget_spend[];
begin
  with used as (
    select b.account_id, b.id, b.amount, w.starts, sum(l.cost) as cost
    from (
      select distinct u.account_id, u.id, a.balance_version, a.time_zone
      from unnest(accounts) a
      join unnest(count_spend.usage) u on u.account_id = a.account_id
      where a.has_budgets
    ) e
    cross join lateral (select * from data.usage_log x where x.account_id = e.account_id and x.id = e.id offset 0) l
    cross join lateral (
      select * from data.budget x
      where x.account_id = l.account_id
        and data.budget_applies(x.scope, x.scope_id, l.virtual_key_id, l.user_id)
      offset 0
    ) b
    cross join lateral (
      select data.window_start(b.period, e.time_zone, data.spend_time(l.id, l.hold_id)) as starts offset 0
    ) w
    where l.transaction_seq = e.balance_version and w.starts >= b.counted_from
    group by b.account_id, b.id, b.amount, w.starts
  ), counted as (
    insert into data.budget_spend as s (account_id, budget_id, window_start, spent)
    select u.account_id, u.id, u.starts, u.cost from used u
    order by u.account_id, u.id, u.starts
    on conflict (account_id, budget_id, window_start) do update set spent = s.spent + excluded.spent
    returning s as spend
  )
  select array_agg(c.spend) into v_reached
  from counted c
  join used u on (u.account_id, u.id, u.starts) = ((c.spend).account_id, (c.spend).budget_id, (c.spend).window_start)
  where (c.spend).spent >= u.amount and (c.spend).spent - u.cost < u.amount;
  if v_reached is not null then
    perform data.tell_exhausted_budgets(v_reached);
  end if;
end
$$;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
