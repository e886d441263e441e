-- migrate:up
-- An account's lock, and what is due under it: holds and grants past their time.

set local role keyledger_owner;

-- Ends holds past their expiry, of accounts that are locked.
create or replace function data.end_due_holds(accounts uuid[])
returns void
language plpgsql
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
declare
  v_now timestamptz := clock_timestamp();
begin
  -- some at a time, soonest first: after an outage there may be more than one call has time for; the others hold nothing either
  with due as (
    select h.account_id, h.id
    from unnest(accounts) i (account_id)
    cross join lateral (
      select * from data.hold o
      where o.account_id = i.account_id and o.status = 'open' and o.expires_at <= v_now
      order by o.expires_at
      limit 10000
    ) h
    order by h.expires_at
    limit 10000
  ), ended as (
    update data.hold h
    set status = 'expired', ended_at = v_now
    from due d
    where h.account_id = d.account_id and h.id = d.id
    returning h.account_id, h.amount - h.captured as unspent
  )
  update data.account_balance a
  set frozen_balance = a.frozen_balance - e.unspent
  from (select ended.account_id, sum(ended.unspent) as unspent from ended group by ended.account_id) e
  where a.account_id = any (accounts) and a.account_id = e.account_id;
end
$$;

-- Parked holds don't expire, so credit may expire under one. It shrinks by what is missing, the newest first.
create or replace function data.shrink_parked(
  account_id uuid,
  missing numeric
)
returns void
language plpgsql
as $$
declare
  v_shrunk numeric;
begin
  with parked as (
    select h.id, least(h.amount - h.captured, shrink_parked.missing - coalesce(sum(h.amount - h.captured) over (
      order by h.id desc rows between unbounded preceding and 1 preceding), 0)) as part
    from data.hold h
    where h.account_id = shrink_parked.account_id and h.status = 'parked'
  ), shrunk as (
    update data.hold h
    set amount = h.amount - p.part
    from parked p
    where h.account_id = shrink_parked.account_id and h.id = p.id and p.part > 0
    returning p.part
  )
  select sum(s.part) into v_shrunk from shrunk s;
  update data.account_balance a
  set frozen_balance = a.frozen_balance - v_shrunk
  where a.account_id = shrink_parked.account_id and v_shrunk > 0;
end
$$;

-- Posts the expiry of grants past theirs, of accounts that are locked: one entry an account, which draws what each grant had left.
create or replace function data.end_due_grants(accounts uuid[])
returns void
language plpgsql
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
declare
  v_now timestamptz := clock_timestamp();
  v_grants data.credit_grant[];
  v_posted data.account_balance[];
begin
  -- Some at a time, soonest first, as with holds. Cast each: an array of plain records would become one of grants by its text, in the
  -- DateStyle of the session.
  select array_agg(g::data.credit_grant) into v_grants
  from unnest(accounts) i (account_id)
  cross join lateral (
    select * from data.credit_grant c
    where c.account_id = i.account_id and c.remaining > 0 and c.expires_at <= v_now
    order by c.expires_at
    limit 10000
  ) g;
  if v_grants is null then
    return;
  end if;
  update data.credit_grant g
  set remaining = 0
  from unnest(v_grants) d
  where g.account_id = d.account_id and g.seq = d.seq;
  select p.accounts into v_posted
  from data.post(entries => array(
    select data.new_entry(d.account_id, 'credit_expiry', free_credit_delta => -sum(d.remaining),
      metadata => jsonb_build_object('grant_seq', jsonb_agg(d.seq order by d.seq)))
    from unnest(v_grants) d
    group by d.account_id)) p;
  insert into data.grant_draw (account_id, seq, grant_seq, amount)
  select d.account_id, a.balance_version, d.seq, d.remaining
  from unnest(v_grants) d
  join unnest(v_posted) a on a.account_id = d.account_id;
  perform data.shrink_parked(a.account_id, least(-a.available, d.expired))
  from unnest(v_posted) a
  join (select g.account_id, sum(g.remaining) as expired from unnest(v_grants) g group by g.account_id) d on d.account_id = a.account_id
  where a.available < 0 and a.frozen_balance > 0;
end
$$;

-- Takes accounts' locks, in account_id order. A call for one account waits for it, as long as lock_timeout says. A call for several
-- takes those that are free: one that waited would make everybody wait who needs the others. `busy` are those it could not have.
-- `waited` says that identities and prices may have changed since the caller read them.
create or replace function data.lock_accounts(
  ids uuid[],
  out locked uuid[],
  out busy uuid[],
  out waited boolean
)
returns record
language plpgsql
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
declare
  v_has_holds boolean;
  v_has_grants boolean;
begin
  waited := false;
  select array_agg(a.account_id), bool_or(a.frozen_balance > 0), bool_or(a.free_credit > 0)
  into locked, v_has_holds, v_has_grants
  from (
    select b.account_id, b.frozen_balance, b.free_credit
    from data.account_balance b
    where b.account_id = any (ids)
    order by b.account_id
    for update skip locked
  ) a;
  if locked is null and cardinality(ids) = 1 then
    waited := true;
    select array[b.account_id], b.frozen_balance > 0, b.free_credit > 0
    into locked, v_has_holds, v_has_grants
    from data.account_balance b
    where b.account_id = ids[1]
    for update;
  end if;
  if cardinality(locked) is distinct from cardinality(ids) then
    busy := array(
      select a.account_id from data.account_balance a where a.account_id = any (ids) and a.account_id = any (locked) is not true);
  end if;
  -- in the order of the index of open holds, each account's: a plan made on a small table might take the other index, of all holds
  if v_has_holds and exists (
    select from unnest(locked) i (account_id)
    cross join lateral (
      select from data.hold h
      where h.account_id = i.account_id and h.status = 'open' and h.expires_at <= clock_timestamp()
      order by h.expires_at
      limit 1
    ) h
  ) then
    perform data.end_due_holds(locked);
  end if;
  if v_has_grants then
    perform data.end_due_grants(locked);
  end if;
end
$$;

-- Locks an account for a rare posting; an unknown one is refused. Those who call it wait 4 s at most, and as long again for one that
-- waited behind another waiter: below the 10 s that a client gives a call.
create or replace function data.lock_account(account_id uuid)
returns data.account_balance
language plpgsql
set enable_seqscan = off
as $$
declare
  v_account data.account_balance;
begin
  perform data.lock_accounts(array[lock_account.account_id]);
  select * into v_account from data.account_balance a where a.account_id = lock_account.account_id;
  if not found then
    perform data.refuse(404, 'account_not_found', 'account ' || coalesce(account_id::text, 'null'),
      'account_id is the id of the tenant or user that pays');
  end if;
  return v_account;
end
$$;

reset role;

-- migrate:down
do $$
begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. Nothing was changed; restore a backup to go back';
end
$$;
