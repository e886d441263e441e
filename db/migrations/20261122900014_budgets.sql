-- migrate:up
-- Budgets: their windows, derived from the clock in the account's time zone, what was spent in each, and what is left.

set local role keyledger_owner;

-- The moment a local time begins: of one that the clock goes back to, the first; of one it skips, the moment it skips.
create or replace function data.local_moment(
  local timestamp,
  time_zone text
)
returns timestamptz
language plpgsql
immutable parallel safe
as $$
declare
  v_moment timestamptz := local at time zone time_zone;
begin
  if (v_moment - interval '1 hour') at time zone time_zone = local then
    return v_moment - interval '1 hour';
  end if;
  return v_moment;
end
$$;

-- When the window began that a moment is in; api.budgets says the same of now. Weeks begin on Monday.
create or replace function data.window_start(
  period text,
  time_zone text,
  at timestamptz
)
returns timestamptz
language plpgsql
immutable parallel safe
as $$
begin
  if period = 'total' then
    return '-infinity';
  end if;
  return data.local_moment(date_trunc(period, at at time zone time_zone), time_zone);
end
$$;

-- the code by which a budget of that scope refuses
create or replace function data.budget_code(scope text)
returns text
language sql
immutable parallel safe
as $$
  select case scope when 'virtual_key' then 'key' else scope end || '_budget_exceeded'
$$;

-- What these keys' and users' budgets on an account, and its tenant's, have left. The caller holds the account's lock, or wants advice.
-- Narrow scopes first: in the order in which they refuse.
create or replace function data.budgets_left(
  account_id uuid,
  virtual_key_ids uuid[],
  user_ids uuid[],
  at timestamptz
)
returns table (
  scope text,
  scope_id uuid,
  remaining numeric
)
language plpgsql
stable
as $$
#variable_conflict use_column
begin
  return query
  with open_hold as materialized (
    select h.virtual_key_id, k.user_id, h.unspent
    from (
      select s.virtual_key_id, sum(s.amount - s.captured) as unspent
      from (
        select o.virtual_key_id, o.amount, o.captured
        from data.hold o
        where o.account_id = budgets_left.account_id and o.status = 'open' and o.expires_at > at
        union all
        select p.virtual_key_id, p.amount, p.captured
        from data.hold p
        where p.account_id = budgets_left.account_id and p.status = 'parked'
      ) s
      group by s.virtual_key_id
    ) h
    cross join lateral (select v.user_id from data.virtual_key v where v.id = h.virtual_key_id offset 0) k
  )
  select b.scope, b.scope_id, b.amount - coalesce(s.spent, 0) - coalesce((
    select sum(h.unspent)
    from open_hold h
    where case b.scope when 'virtual_key' then h.virtual_key_id = b.scope_id when 'user' then h.user_id = b.scope_id else true end
  ), 0)
  from data.budget b
  cross join lateral (select x.time_zone from data.account_balance x where x.account_id = b.account_id offset 0) a
  left join lateral (
    select c.spent
    from data.budget_spend c
    where c.account_id = b.account_id and c.budget_id = b.id and c.window_start = data.window_start(b.period, a.time_zone, at)
    offset 0
  ) s on true
  where b.account_id = budgets_left.account_id
    and case b.scope when 'virtual_key' then b.scope_id = any (virtual_key_ids) when 'user' then b.scope_id = any (user_ids) else true end
  order by array_position(array['virtual_key', 'user', 'tenant'], b.scope), b.id;
end
$$;

-- When an event counts against budgets: at its own time or its hold's, whichever is later. A clock that is behind, or an id made long
-- ago, would else put today's use into a window that is over.
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

-- Counts usage that data.post has just logged for these accounts, each event in the window of its data.spend_time. A retry's rows have an
-- older entry's seq, and don't count again. A budget that is used up by this is news.
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
        and x.scope_id = case x.scope when 'virtual_key' then l.virtual_key_id when 'user' then l.user_id else x.scope_id end
      offset 0
    ) b
    cross join lateral (select data.window_start(b.period, e.time_zone, data.spend_time(l.id, l.hold_id)) as starts offset 0) w
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

-- What budgets, each from its `counted_from` on, count of an account's entries after `first_seq` up to `last_seq`, which is posted
-- already. From the first entry on it reads the usage log, however long that is: call it so before taking the account's lock. What
-- came since is few entries, whose rows are read by key.
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
          and case when isfinite(b.counted_from) then greatest(u.id, u.hold_id) >= data.uuid_floor(b.counted_from) else true end
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
      cross join lateral (select data.window_start(b.period, count_usage.time_zone, data.spend_time(l.id, l.hold_id)) as starts offset 0) w
      where b.scope_id = case b.scope when 'virtual_key' then l.virtual_key_id when 'user' then l.user_id else b.scope_id end
        and w.starts >= b.counted_from
      group by b.account_id, b.id, w.starts
    ) c
  );
end
$$;

-- Counts budgets of one account anew, each for its window of now and those to come, and answers the account, locked. What is counted
-- before the lock stays true under it, since entries are never changed; only if months were dropped meanwhile is it counted again.
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
  select w.floor into v_floor from data.usage_window w;
  for i in 1 .. cardinality(budgets) loop
    budgets[i].counted_from := data.window_start(budgets[i].period, time_zone, clock_timestamp());
    budgets[i].counted_floor := v_floor;
  end loop;
  -- all of it, then what came while that was read
  for i in 1 .. 2 loop
    v_next := (select a.balance_version from data.account_balance a where a.account_id = v_account_id);
    v_spent := v_spent || data.count_usage(budgets, time_zone, v_seq, v_next);
    v_seq := v_next;
  end loop;

  v_account := data.lock_account(v_account_id);
  if v_floor is distinct from (select w.floor from data.usage_window w) then
    select w.floor into v_floor from data.usage_window w;
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

create or replace function api.set_budget(
  account_id uuid,
  scope text,
  scope_id uuid,
  amount numeric,
  period text
)
returns api.budgets
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '4s'
set plan_cache_mode = force_custom_plan
set enable_seqscan = off
as $$
declare
  v_account data.account_balance;
  v_found boolean;
  v_belongs boolean;
  v_time_zone text;
  v_budget data.budget;
  v_shown api.budgets;
begin
  if scope is null or scope not in ('virtual_key', 'user', 'tenant') then
    perform data.refuse(422, 'invalid_scope', 'scope must be virtual_key, user or tenant', 'say whose budget it is');
  elsif period is null or period not in ('day', 'week', 'month', 'total') then
    perform data.refuse(422, 'invalid_period', 'period must be day, week, month or total', 'say how long a window is');
  elsif amount is null or not data.is_amount(amount) or amount < 0 then
    perform data.refuse(422, 'invalid_amount', 'amount must be 0 or more, below 1e12, with at most 10 decimals',
      'send a plain decimal as a string, for example "100"');
  end if;
  if not exists (select from data.account_balance a where a.account_id = set_budget.account_id) then
    perform data.lock_account(account_id);
  end if;
  select true, case scope when 'tenant' then o.id = set_budget.account_id else set_budget.account_id in (u.account_id, u.id) end
  into v_found, v_belongs
  from (
    select k.user_id as id from data.virtual_key k where scope = 'virtual_key' and k.id = scope_id
    union all
    select p.id from data.user_profile p where scope = 'user' and p.id = scope_id
    union all
    select t.id from data.tenant t where scope = 'tenant' and t.id = scope_id
  ) o
  left join data.user_profile u on scope <> 'tenant' and u.id = o.id;
  if v_found is null then
    perform data.refuse(404, case scope when 'virtual_key' then 'virtual_key_unknown' else scope || '_not_found' end,
      scope || ' ' || coalesce(scope_id::text, 'null'), 'scope_id is the id of the key, user or tenant');
  elsif not v_belongs then
    perform data.refuse(422, 'invalid_account', 'account ' || account_id || ' does not pay for this ' || scope,
      'account_id is the id of the tenant or user that pays');
  end if;

  -- another call may set the same one, or another time zone, while this one counts
  loop
    select * into v_budget from data.budget b
    where (b.account_id, b.scope, b.scope_id, b.period)
      = (set_budget.account_id, set_budget.scope, set_budget.scope_id, set_budget.period);
    if found then
      perform data.lock_account(account_id);
      update data.budget b set amount = set_budget.amount where b.account_id = v_budget.account_id and b.id = v_budget.id;
      continue when not found;
      exit;
    end if;
    select a.time_zone into v_time_zone from data.account_balance a where a.account_id = set_budget.account_id;
    v_budget := row(set_budget.account_id, gen_random_uuid(), set_budget.scope, set_budget.scope_id, set_budget.amount,
      set_budget.period, 'infinity', 'infinity', clock_timestamp());
    begin
      v_account := data.recount_budgets(array[v_budget], v_time_zone, are_new => true);
      if v_account.time_zone <> v_time_zone then
        raise sqlstate 'KL002';
      end if;
      update data.account_balance a set has_budgets = true where a.account_id = v_account.account_id and not a.has_budgets;
      exit;
    exception when unique_violation or sqlstate 'KL002' then
      -- the lock is let go with it; a frozen snapshot would never see what another call has set
      if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
        raise serialization_failure using message = 'another call has set this budget';
      end if;
    end;
  end loop;
  select * into v_shown from data.budget_shown b where b.account_id = v_budget.account_id and b.id = v_budget.id;
  return v_shown;
end
$$;
comment on function api.set_budget(uuid, text, uuid, numeric, text) is
'Sets what a key, a user or a tenant may spend of an account in each day, week, month, or in total; set again it changes the amount.
`period` is day, week, month or total. `scope` is virtual_key, user or tenant, `scope_id` its id, `account_id` who pays for it. Windows
follow the account''s time zone; weeks begin on Monday. What was used in the current window counts already, in total all usage that is kept.
A hold over it is refused (key_budget_exceeded, user_budget_exceeded, tenant_budget_exceeded); what was used counts past it too, in the
window of the event''s own time or of its hold''s, whichever is later, on the account it was charged to. A refund gives back money, not budget. Answers the budget. 404
account_not_found, virtual_key_unknown, user_not_found, tenant_not_found; 422 invalid_scope, invalid_period, invalid_amount,
invalid_account.';
grant execute on function api.set_budget(uuid, text, uuid, numeric, text) to keyledger_operator;

create or replace function api.remove_budget(id uuid)
returns api.budgets
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '4s'
as $$
declare
  v_shown api.budgets;
begin
  perform data.lock_account(b.account_id) from data.budget b where b.id = remove_budget.id;
  -- under the lock: another call may have removed it meanwhile
  select * into v_shown from data.budget_shown b where b.id = remove_budget.id;
  if not found then
    perform data.refuse(404, 'budget_not_found', 'budget ' || coalesce(id::text, 'null'), 'send the id that set_budget answered');
  end if;
  delete from data.budget b where b.account_id = v_shown.account_id and b.id = v_shown.id;
  update data.account_balance a set has_budgets = false
  where a.account_id = v_shown.account_id and not exists (select from data.budget b where b.account_id = v_shown.account_id);
  return v_shown;
end
$$;
comment on function api.remove_budget(uuid) is
'Removes a budget; nothing it counted is kept.
`id` is the budget''s. Answers the budget as it was. 404 budget_not_found.';
grant execute on function api.remove_budget(uuid) to keyledger_operator;

create or replace function api.set_time_zone(
  account_id uuid,
  time_zone text
)
returns api.billing_accounts
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '4s'
as $$
declare
  v_budgets data.budget[];
  v_shown api.billing_accounts;
begin
  if not exists (select from pg_timezone_names z where z.name = set_time_zone.time_zone) then
    perform data.refuse(422, 'invalid_time_zone', 'time_zone must be a name of pg_timezone_names', 'for example "Europe/Berlin" or "UTC"');
  end if;
  -- budgets may be set or removed while they are counted
  loop
    v_budgets := array(
      select b from data.budget b where b.account_id = set_time_zone.account_id and b.period <> 'total' order by b.id);
    begin
      if v_budgets = '{}' then
        perform data.lock_account(account_id);
      else
        perform data.recount_budgets(v_budgets, time_zone, are_new => false);
      end if;
      if array(select b.id from data.budget b where b.account_id = set_time_zone.account_id and b.period <> 'total' order by b.id)
        is distinct from array(select b.id from unnest(v_budgets) b order by b.id)
      then
        raise sqlstate 'KL002';
      end if;
      exit;
    exception when sqlstate 'KL002' then
      if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
        raise serialization_failure using message = 'another call has changed the budgets of this account';
      end if;
      null; -- and the lock is let go with it
    end;
  end loop;
  update data.account_balance a set time_zone = set_time_zone.time_zone where a.account_id = set_time_zone.account_id;
  select * into v_shown from data.account_now b where b.account_id = set_time_zone.account_id;
  return v_shown;
end
$$;
comment on function api.set_time_zone(uuid, text) is
'Sets the time zone in which an account''s days, weeks and months begin (UTC at first).
`time_zone` is a name that Postgres knows, as Europe/Berlin; it becomes that of `account_id`. Its budgets'' current windows are counted anew
from the usage log. Answers the account. 404 account_not_found; 422 invalid_time_zone.';
grant execute on function api.set_time_zone(uuid, text) to keyledger_operator;

-- budgets: each counter against the usage log over its window, and whether the account knows that it has any
create or replace function data.verify_budgets(for_account_id uuid)
returns table (
  account_id uuid,
  problem text,
  seq bigint,
  expected text,
  actual text
)
language plpgsql
stable
as $$
declare
  v_floor timestamptz := (data.usage_window_now()).floor;
begin
  return query
  with used as (
    select b.account_id, b.id, w.starts, sum(l.cost) as cost
    from data.budget b
    join data.account_balance a on a.account_id = b.account_id
    join data.usage_log l on l.account_id = b.account_id
      and b.scope_id = case b.scope when 'virtual_key' then l.virtual_key_id when 'user' then l.user_id else b.scope_id end
      and case when isfinite(b.counted_from) then greatest(l.id, l.hold_id) >= data.uuid_floor(b.counted_from) else true end
      and l.id >= data.uuid_floor(b.counted_floor)
    cross join lateral (select data.window_start(b.period, a.time_zone, data.spend_time(l.id, l.hold_id)) as starts offset 0) w
    where (for_account_id is null or b.account_id = for_account_id) and w.starts >= b.counted_from
    group by b.account_id, b.id, w.starts
  ), counted as (
    select s.account_id, s.budget_id as id, s.window_start as starts, s.spent
    from data.budget_spend s
    where for_account_id is null or s.account_id = for_account_id
  )
  select b.account_id, 'budget has not counted the usage of its window', null::bigint,
    concat_ws(' ', b.scope, b.scope_id, b.period, c.starts, coalesce(c.cost, 0)::data.amount), coalesce(c.spent, 0)::data.amount::text
  from (
    select * from used u full join counted n using (account_id, id, starts)
  ) c
  join data.budget b on b.account_id = c.account_id and b.id = c.id
  where case
      -- what retention has dropped was counted, and stays counted
      when c.starts >= v_floor or (b.period = 'total' and b.counted_floor = v_floor) then coalesce(c.cost, 0) <> coalesce(c.spent, 0)
      else coalesce(c.cost, 0) > coalesce(c.spent, 0)
    end

  union all
  select a.account_id, 'has_budgets is not whether there are budgets', null, (b.account_id is not null)::text, a.has_budgets::text
  from data.account_balance a
  left join (select distinct x.account_id from data.budget x) b on b.account_id = a.account_id
  where (for_account_id is null or a.account_id = for_account_id) and a.has_budgets <> (b.account_id is not null);
end
$$;

reset role;

-- migrate:down
do $$
begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. Nothing was changed; restore a backup to go back';
end
$$;
