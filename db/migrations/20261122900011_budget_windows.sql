-- migrate:up
-- The windows of budgets, in an account's time zone, and how much each budget has left.

set local role keyledger_owner;

-- The moment a local time begins. A time that the clock repeats begins at the first; a skipped time
-- begins at the skip.
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

-- The start of the window that a moment is in; api.budgets says the same of now. Weeks begin on
-- Monday.
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

-- whether a budget of that scope counts the use of this key of this user
create or replace function data.budget_applies(
  scope text,
  scope_id uuid,
  virtual_key_id uuid,
  user_id uuid
)
returns boolean
language sql
immutable parallel safe
as $$
  select scope_id = case scope when 'virtual_key' then virtual_key_id when 'user' then user_id else scope_id end
$$;

-- The money left in an account's budgets for these keys, these users and its tenant. Narrow scopes
-- come first: they refuse first.
-- The caller holds the account's lock, or wants advice only.
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
    where data.budget_applies(b.scope, b.scope_id, h.virtual_key_id, h.user_id)
  ), 0)
  from data.budget b
  cross join lateral (select x.time_zone from data.account_balance x where x.account_id = b.account_id offset 0) a
  left join lateral (
    select c.spent
    from data.budget_spend c
    where c.account_id = b.account_id and c.budget_id = b.id
      and c.window_start = data.window_start(b.period, a.time_zone, at)
    offset 0
  ) s on true
  where b.account_id = budgets_left.account_id
    and case b.scope
      when 'virtual_key' then b.scope_id = any (virtual_key_ids)
      when 'user' then b.scope_id = any (user_ids)
      else true
    end
  order by array_position(array['virtual_key', 'user', 'tenant'], b.scope), b.id;
end
$$;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
