-- migrate:up
-- Settling: an account's lock, and under it all that is due by the clock: holds and grants past
-- their time.

set local role keyledger_owner;

-- Ends holds past their expiry, of a locked account. At most 10,000 a call, soonest first: after an
-- outage there may be more than a call has time for. The others set nothing aside either:
-- data.account_now subtracts them.
create or replace function data.end_due_holds(account data.account_balance)
returns data.account_balance
language plpgsql
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
declare
  v_now timestamptz := clock_timestamp();
  v_freed numeric;
begin
  with ended as (
    update data.hold h
    set status = 'expired', ended_at = v_now
    from (
      select o.id
      from data.hold o
      where o.account_id = account.account_id and o.status = 'open' and o.expires_at <= v_now
      order by o.expires_at
      limit 10000
    ) d
    where h.account_id = account.account_id and h.id = d.id
    returning h.amount - h.captured as unspent
  )
  select coalesce(sum(e.unspent), 0) into v_freed from ended e;
  update data.account_balance a
  set frozen_balance = a.frozen_balance - v_freed
  where a.account_id = account.account_id
  returning a.* into account;
  return account;
end
$$;

-- Shrinks parked holds, newest first, by the money that is missing: they don't expire, so credit
-- may expire under one.
create or replace function data.shrink_parked(
  account data.account_balance,
  missing numeric
)
returns data.account_balance
language plpgsql
as $$
declare
  v_left numeric := shrink_parked.missing;
  v_hold data.hold;
  v_part numeric;
begin
  for v_hold in
    select h.* from data.hold h
    where h.account_id = account.account_id and h.status = 'parked'
    order by h.id desc
  loop
    v_part := least(v_left, v_hold.amount - v_hold.captured);
    continue when v_part = 0;
    update data.hold h
    set amount = h.amount - v_part
    where h.account_id = account.account_id and h.id = v_hold.id;
    v_left := v_left - v_part;
    exit when v_left = 0;
  end loop;
  update data.account_balance a
  set frozen_balance = a.frozen_balance - (shrink_parked.missing - v_left)
  where a.account_id = account.account_id
  returning a.* into account;
  return account;
end
$$;

-- Posts the expiry of grants past theirs, of a locked account: one entry, which draws the rest of
-- each grant.
create or replace function data.end_due_grants(
  account data.account_balance,
  actor text
)
returns data.account_balance
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
  v_expired numeric;
  v_seqs jsonb;
begin
  -- at most 10,000 a call, as with holds; the cast keeps the grants from becoming text in the
  -- session's DateStyle
  v_grants := array(
    select g::data.credit_grant
    from (
      select c.* from data.credit_grant c
      where c.account_id = account.account_id and c.remaining > 0 and c.expires_at <= v_now
      order by c.expires_at
      limit 10000
    ) g);
  select sum(d.remaining), jsonb_agg(d.seq order by d.seq) into v_expired, v_seqs from unnest(v_grants) d;
  update data.credit_grant g
  set remaining = 0
  where g.account_id = account.account_id and g.seq = any (array(select d.seq from unnest(v_grants) d));
  account := data.post(account, 'credit_expiry', actor, free_credit_delta => -v_expired,
    metadata => jsonb_build_object('grant_seq', v_seqs));
  insert into data.grant_draw (account_id, seq, grant_seq, amount)
  select account.account_id, account.balance_version, d.seq, d.remaining from unnest(v_grants) d;
  if account.available < 0 and account.frozen_balance > 0 then
    account := data.shrink_parked(account, least(-account.available, v_expired));
  end if;
  return account;
end
$$;

-- Locks an account and posts all that is due. Answers its row, whose `available` counts nothing
-- that is due; a row of nulls where there is no such account. A call for one account waits for the
-- lock, as long as lock_timeout says. A call for several doesn't (`wait` false): it would make all
-- others wait who need the accounts it has. A row of nulls then also means that another call has
-- the account.
create or replace function data.settle(
  account_id uuid,
  wait boolean default true,
  actor text default data.actor()
)
returns data.account_balance
language plpgsql
as $$
declare
  v_account data.account_balance;
  v_had_dues boolean := false;
begin
  select a.* into v_account from data.account_balance a where a.account_id = settle.account_id for update skip locked;
  if not found and settle.wait then
    select a.* into v_account from data.account_balance a where a.account_id = settle.account_id for update;
  end if;
  -- in the order of the index of open holds: a plan made on a small table might take the other
  -- index, of all holds
  if v_account.frozen_balance > 0 and exists (
    select from data.hold h
    where h.account_id = v_account.account_id and h.status = 'open' and h.expires_at <= clock_timestamp()
    order by h.expires_at
    limit 1
  ) then
    v_account := data.end_due_holds(v_account);
    v_had_dues := true;
  end if;
  if v_account.free_credit > 0 and exists (
    select from data.credit_grant g
    where g.account_id = v_account.account_id and g.remaining > 0 and g.expires_at <= clock_timestamp()
  ) then
    v_account := data.end_due_grants(v_account, actor);
    v_had_dues := true;
  end if;
  if v_had_dues then
    -- more may be due than one call ends
    v_account.available := (select n.available from data.account_now n where n.account_id = v_account.account_id);
  end if;
  return v_account;
end
$$;

-- Says whether there is such an account: one that settle did not answer is then another call's.
create or replace function data.is_account(account_id uuid)
returns boolean
language plpgsql
stable
as $$
begin
  return exists (select from data.account_balance a where a.account_id = is_account.account_id);
end
$$;

-- Settles several accounts, in one order. Answers those that another call has.
create or replace function data.settle_all(account_ids uuid[])
returns uuid[]
language plpgsql
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
as $$
declare
  v_ids uuid[] := array(
    select a.account_id from data.account_balance a where a.account_id = any (account_ids) order by a.account_id);
  v_id uuid;
  v_account data.account_balance;
  v_busy uuid[] := '{}';
begin
  foreach v_id in array v_ids loop
    v_account := data.settle(v_id, wait => cardinality(v_ids) = 1);
    if v_account.account_id is null then
      v_busy := v_busy || v_id;
    end if;
  end loop;
  return v_busy;
end
$$;

-- Settles an account for a rare posting; refuses an unknown one. The callers wait 4 s at most, and
-- as long again for a call that waited behind another: below the 10 s that a client gives a call.
create or replace function data.lock_account(account_id uuid)
returns data.account_balance
language plpgsql
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
as $$
declare
  v_account data.account_balance := data.settle(lock_account.account_id);
begin
  if v_account.account_id is null then
    perform data.refuse(404, 'account_not_found', 'account ' || coalesce(account_id::text, 'null'),
      'account_id is the id of the tenant or user that pays');
  end if;
  return v_account;
end
$$;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
