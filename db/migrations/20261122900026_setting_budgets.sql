-- migrate:up
-- Setting budgets: checks of the scope, and counts of earlier use.

set local role keyledger_owner;

-- Refuses a budget whose key, user or tenant is unknown, or whose account is not the payer.
create or replace function data.require_budget_scope(
  account_id uuid,
  scope text,
  scope_id uuid
)
returns void
language plpgsql
as $$
declare
  v_found boolean;
  v_belongs boolean;
begin
  if not exists (select from data.account_balance a where a.account_id = require_budget_scope.account_id) then
    perform data.lock_account(account_id);
  end if;
  select true, case
      when scope = 'tenant' then o.id = require_budget_scope.account_id
      else require_budget_scope.account_id in (u.account_id, u.id)
    end
  into v_found, v_belongs
  from (
    select k.user_id as id from data.virtual_key k where scope = 'virtual_key' and k.id = require_budget_scope.scope_id
    union all
    select p.id from data.user_profile p where scope = 'user' and p.id = require_budget_scope.scope_id
    union all
    select t.id from data.tenant t where scope = 'tenant' and t.id = require_budget_scope.scope_id
  ) o
  left join data.user_profile u on scope <> 'tenant' and u.id = o.id;
  if v_found is null then
    perform data.refuse(404, case when scope = 'virtual_key' then 'virtual_key_unknown' else scope || '_not_found' end,
      scope || ' ' || coalesce(scope_id::text, 'null'), 'scope_id is the id of the key, user or tenant');
  elsif not v_belongs then
    perform data.refuse(422, 'invalid_account', 'account ' || account_id || ' does not pay for this ' || scope,
      'account_id is the id of the tenant or user that pays');
  end if;
end
$$;

-- Counts an account's entries after `first_seq` up to `last_seq` for budgets, each from its
-- `counted_from` on.
-- The entry `last_seq` is posted already. From the first entry on it reads the usage log, however
-- long that takes:
-- call it so before the account is locked. Later entries are few, and their rows are read by key.
create or replace function data.count_usage(
  budgets data.budget[],
  time_zone text,
  first_seq bigint,
  last_seq bigint
)
returns data.budget_spend[]
language plpgsql
set plan_cache_mode = force_custom_plan
set enable_seqscan = off
as $$
begin
  return (
    select array_agg(row(c.account_id, c.id, c.starts, c.spent)::data.budget_spend)
    from (
      select b.account_id, b.id, w.starts, sum(l.cost) as spent
      from unnest(budgets) b
      cross join lateral (
        select u.*
        from data.usage_log u
        where count_usage.first_seq = 0 and u.account_id = b.account_id and u.transaction_seq <= count_usage.last_seq
          -- a month that is closed may be dropped any time
          and u.id >= data.uuid_floor(b.counted_floor)
          and case when isfinite(b.counted_from)
            then greatest(u.id, u.hold_id) >= data.uuid_floor(b.counted_from) else true end
        union all
        select u.*
        from data.billing_transaction t
        cross join lateral generate_series(1, octet_length(t.usage_list), 32) n
        cross join lateral (
          select * from data.usage_log x
          where x.account_id = t.account_id and x.id = encode(substr(t.usage_list, n, 16), 'hex')::uuid offset 0
        ) u
        where count_usage.first_seq > 0 and t.account_id = b.account_id and t.kind = 'usage'
          and t.seq > count_usage.first_seq and t.seq <= count_usage.last_seq
      ) l
      cross join lateral (
        select data.window_start(b.period, count_usage.time_zone, data.spend_time(l.id, l.hold_id)) as starts offset 0
      ) w
      where data.budget_applies(b.scope, b.scope_id, l.virtual_key_id, l.user_id)
        and w.starts >= b.counted_from
      group by b.account_id, b.id, w.starts
    ) c
  );
end
$$;

-- Counts budgets of one account anew, each for its present window and later ones. Answers the
-- account, locked.
-- A count from before the lock stays true under it, since entries never change. It is repeated if
-- months were dropped.
-- KL002: one of them was removed meanwhile.
create or replace function data.recount_budgets(
  budgets data.budget[],
  time_zone text,
  are_new boolean
)
returns data.account_balance
language plpgsql
set enable_seqscan = off
as $$
declare
  v_account_id uuid := budgets[1].account_id;
  v_account data.account_balance;
  v_budget data.budget;
  v_floor timestamptz;
  v_seq bigint := 0;
  v_next bigint;
  v_spent data.budget_spend[];
begin
  select w.floor into v_floor from data.accepted_ids w;
  for i in 1 .. cardinality(budgets) loop
    budgets[i].counted_from := data.window_start(budgets[i].period, time_zone, clock_timestamp());
    budgets[i].counted_floor := v_floor;
  end loop;
  -- all entries, then those that came meanwhile
  for i in 1 .. 2 loop
    v_next := (select a.balance_version from data.account_balance a where a.account_id = v_account_id);
    v_spent := v_spent || data.count_usage(budgets, time_zone, v_seq, v_next);
    v_seq := v_next;
  end loop;

  v_account := data.lock_account(v_account_id);
  if v_floor is distinct from (select w.floor from data.accepted_ids w) then
    select w.floor into v_floor from data.accepted_ids w;
    for i in 1 .. cardinality(budgets) loop
      budgets[i].counted_floor := v_floor;
    end loop;
    v_seq := 0;
    v_spent := null;
  end if;
  v_spent := v_spent || data.count_usage(budgets, time_zone, v_seq, v_account.balance_version);
  foreach v_budget in array budgets loop
    update data.budget b
    set counted_from = v_budget.counted_from, counted_floor = v_floor
    where b.account_id = v_budget.account_id and b.id = v_budget.id;
    if not found and are_new then
      v_budget.counted_floor := v_floor;
      insert into data.budget select v_budget.*;
    elsif not found then
      raise sqlstate 'KL002';
    end if;
    delete from data.budget_spend s where s.account_id = v_budget.account_id and s.budget_id = v_budget.id;
  end loop;
  insert into data.budget_spend (account_id, budget_id, window_start, spent)
  select s.account_id, s.budget_id, s.window_start, sum(s.spent)
  from unnest(v_spent) s
  group by s.account_id, s.budget_id, s.window_start;
  return v_account;
end
$$;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
