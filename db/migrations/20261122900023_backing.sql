-- migrate:up
-- Backing: a hold stands only on money that is there for its whole life. Free credit that expires
-- before the hold doesn't count.

set local role keyledger_owner;

-- The moments at which grants of an account expire, and the money available past each: less those
-- grants, plus the money that holds gave back by then or drew from those grants. A hold that
-- outlives such a moment must find its money there. `spare` is how much of those holds can draw
-- from those grants only: less the credit that lasts longer, and by its priority is spent before. A
-- grant lasts in this sense from the expiry of the first grant of a higher priority number, until
-- its own. Running sums in order of time: an account may have thousands of grants.
create or replace function data.backing_past_grants(account_id uuid)
returns data.backing[]
language plpgsql
stable
as $$
begin
  return array(
    with live as materialized (
      select g.expires_at, g.remaining,
        min(g.expires_at) over (
          order by g.priority desc groups between unbounded preceding and 1 preceding) as lasts_from
      from data.credit_grant g
      where g.account_id = backing_past_grants.account_id and g.remaining > 0
    ), change as (
      select l.expires_at as at, true as is_grant, l.remaining as expired, 0 as ended, 0 as lasting
      from live l
      where l.expires_at < 'infinity'
      union all
      select h.expires_at, false, 0, h.amount - h.captured, 0
      from data.hold h
      where h.account_id = backing_past_grants.account_id and h.status = 'open'
        and h.expires_at <= (select max(l.expires_at) from live l)
      union all
      select l.lasts_from, false, 0, 0, l.remaining
      from live l
      where (l.expires_at > l.lasts_from) is not false and l.lasts_from is not null
      union all
      select l.expires_at, false, 0, 0, -l.remaining
      from live l
      where l.expires_at > l.lasts_from
    ), past as (
      select c.at, c.is_grant, a.available - sum(c.expired) over w as available,
        sum(c.ended) over w - sum(c.lasting) over w as spare
      from data.account_balance a
      cross join change c
      where a.account_id = backing_past_grants.account_id
      window w as (order by c.at)
    )
    select row(p.at, p.available + greatest(p.spare, 0), p.spare)::data.backing
    from (select distinct q.at, q.available, q.spare from past q where q.is_grant) p
    order by p.at);
end
$$;

-- The part of an account's backing that holds between these two ends can meet: null when no grant
-- expires on them. Of the moments before all these ends only the least counts, and after them only
-- moments that some hold still draws on: the list that each request reads is short.
create or replace function data.backing_between(
  account data.account_balance,
  soonest timestamptz,
  latest timestamptz
)
returns data.backing[]
language plpgsql
stable
as $$
declare
  v_backing data.backing[];
begin
  if account.free_credit = 0 or not coalesce((
    select min(g.expires_at) < latest
      -- credit that lasts longer may be spent before, so that a hold that ends sooner counts too
      or (min(g.priority) < max(g.priority) and min(g.expires_at) is not null)
    from data.credit_grant g
    where g.account_id = account.account_id and g.remaining > 0), false)
  then
    return null;
  end if;
  v_backing := data.backing_past_grants(account.account_id);
  v_backing := array(
    select row('-infinity'::timestamptz, min(b.available), 0)::data.backing
    from unnest(v_backing) b
    where b.at < soonest
    having count(*) > 0
    union all
    select b::data.backing
    from (select * from unnest(v_backing) b where b.at >= soonest and (b.at < latest or b.spare < 0)) b);
  return nullif(v_backing, '{}');
end
$$;

-- The money that a hold until this end stands on.
create or replace function data.backed(
  backing data.backing[],
  ends_at timestamptz
)
returns numeric
language plpgsql
immutable parallel safe
as $$
begin
  return (
    select min(b.available) from unnest(backing) b where b.at < ends_at or -b.spare > greatest(b.available, 0));
end
$$;

-- The backing that is left by a new hold until this end.
create or replace function data.backing_after(
  backing data.backing[],
  ends_at timestamptz,
  amount numeric
)
returns data.backing[]
language plpgsql
immutable parallel safe
as $$
begin
  return (
    select array_agg(row(
      b.at,
      b.available - case when b.at < ends_at then amount else least(amount, greatest(-b.spare, 0)) end,
      b.spare + case when b.at < ends_at then 0 else amount end
    )::data.backing order by b.place)
    from unnest(backing) with ordinality as b (at, available, spare, place));
end
$$;

-- The backing after a hold's unspent money goes on from one end to a later one.
create or replace function data.backing_extended(
  backing data.backing[],
  from_end timestamptz,
  to_end timestamptz,
  unspent numeric
)
returns data.backing[]
language plpgsql
immutable parallel safe
as $$
begin
  return (
    select array_agg(case
      when b.at >= from_end and b.at < to_end
        then row(b.at, b.available - least(unspent, greatest(b.spare, 0)), b.spare - unspent)::data.backing
      else row(b.at, b.available, b.spare)::data.backing
    end order by b.place)
    from unnest(backing) with ordinality as b (at, available, spare, place));
end
$$;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
