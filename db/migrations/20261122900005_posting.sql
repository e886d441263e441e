-- migrate:up
-- The ledger's one writer. An account's row is locked first, dues are settled under that lock, then one entry is posted.

set local role keyledger_owner;

create or replace trigger append_only before update or delete on data.billing_transaction
  for each row execute function data.forbid_change();
create or replace trigger append_only_truncate before truncate on data.billing_transaction
  for each statement execute function data.forbid_change();
create or replace trigger append_only before update or delete on data.usage_log
  for each row execute function data.forbid_change();
create or replace trigger append_only_truncate before truncate on data.usage_log
  for each statement execute function data.forbid_change();

-- accounts stay, and stay whose they are
create or replace function data.keep_account()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if tg_op = 'UPDATE' and (new.account_id, new.owner_user_id, new.owner_tenant_id, new.currency)
    is not distinct from (old.account_id, old.owner_user_id, old.owner_tenant_id, old.currency)
  then
    return new;
  end if;
  perform data.refuse(409, 'account_is_fixed', lower(tg_op) || ' on ' || tg_table_name, 'close its owner instead');
  return null;
end
$$;
create or replace trigger keep_account before delete or update of account_id, owner_user_id, owner_tenant_id, currency
  on data.account_balance for each row execute function data.keep_account();
create or replace trigger keep_account_truncate before truncate on data.account_balance
  for each statement execute function data.keep_account();

-- The facts of an entry that span columns: the name of the first one it breaks, null when it keeps them all.
-- Plain columns, not the row: so it is inlined where it is called.
create or replace function data.broken_fact(
  seq bigint,
  kind text,
  amount numeric,
  balance_delta numeric,
  free_credit_delta numeric,
  outstanding_delta numeric,
  balance_after numeric,
  free_credit_after numeric,
  outstanding_after numeric,
  credit_limit_after numeric,
  usage_count integer,
  usage_bytes integer,
  refund_of_seq bigint,
  refund_of_usage_id uuid,
  is_first boolean
)
returns text
language sql
immutable parallel safe
as $$
  select case
    when seq < 1 or (seq = 1) <> is_first then 'only_the_first_entry_has_no_previous'
    when amount <> balance_delta + free_credit_delta - outstanding_delta then 'amount_is_the_net_of_the_deltas'
    when case
        when kind in ('usage') then amount > 0
        when kind in ('top_up', 'refund', 'credit_grant') then amount <= 0
        when kind in ('top_up_reversal', 'credit_expiry') then amount >= 0
        when kind = 'limit_change' then amount <> 0
        when kind = 'adjustment' then amount = 0
      end then 'amount_has_the_sign_of_its_kind'
    when balance_after < -credit_limit_after
      or (outstanding_after <> 0 and (free_credit_after <> 0 or balance_after <> -credit_limit_after))
      then 'buckets_after_are_in_normal_form'
    when (kind = 'usage') <> (usage_count > 0) or coalesce(usage_bytes, 0) <> 32 * usage_count then 'only_usage_counts_usage'
    when (kind in ('refund', 'top_up_reversal')) <> (coalesce(refund_of_seq, seq) < seq)
      or (refund_of_usage_id is not null and kind <> 'refund')
      then 'only_a_refund_refunds_what_came_before'
  end
$$;

create or replace function data.check_entry()
returns trigger
language plpgsql
as $$
declare
  v_broken text;
begin
  v_broken := data.broken_fact(
    new.seq, new.kind, new.amount, new.balance_delta, new.free_credit_delta, new.outstanding_delta,
    new.balance_after, new.free_credit_after, new.outstanding_after, new.credit_limit_after,
    new.usage_count, octet_length(new.usage_list), new.refund_of_seq, new.refund_of_usage_id, new.prev_hash = '');
  if v_broken is not null then
    raise check_violation using
      message = 'new row for relation "billing_transaction" violates check "' || v_broken || '"',
      table = 'billing_transaction', constraint = v_broken;
  end if;
  return new;
end
$$;
create or replace trigger check_entry before insert on data.billing_transaction
  for each row execute function data.check_entry();

-- The canonical text of a usage row and of an entry, as json_build_array writes it: what the hash chain covers.
create or replace function data.usage_line(usage data.usage_log)
returns text
language sql
stable parallel safe
as $$
  select json_build_array(
    usage.account_id, usage.id, usage.transaction_seq, usage.virtual_key_id, usage.user_id, usage.config_node_id,
    usage.hold_id, usage.final, usage.meters, usage.price_ids, usage.cost, usage.request_id, usage.metadata,
    (extract(epoch from usage.recorded_at) * 1000000)::bigint)::text
$$;

-- a usage row in its entry's list: its id, and 128 bits that only this content gives
create or replace function data.usage_seal(usage data.usage_log)
returns bytea
language sql
stable parallel safe
as $$
  select uuid_send(usage.id) || substr(sha256(convert_to(data.usage_line(usage), 'UTF8')), 1, 16)
$$;

create or replace function data.entry_hash(entry data.billing_transaction)
returns bytea
language sql
stable parallel safe
as $$
  select sha256(entry.prev_hash || convert_to(json_build_array(
    entry.account_id, entry.seq, entry.kind, entry.amount, entry.balance_delta, entry.free_credit_delta,
    entry.outstanding_delta, entry.balance_after, entry.free_credit_after, entry.outstanding_after,
    entry.credit_limit_after, entry.reference, entry.actor, entry.reason, entry.usage_count,
    entry.refund_of_seq, entry.refund_of_usage_id, entry.metadata, (extract(epoch from entry.created_at) * 1000000)::bigint)::text, 'UTF8')
    || coalesce(sha256(entry.usage_list), ''))
$$;

-- The hot functions below and in the next files fix their plans: by index for any number of rows, made once. Else a plan made on an
-- empty table scans it until the next analyze, and planning anew is a fifth of a call (measured). Those whose updates join do so by
-- nested loops only: a hash join reads all holds there are, which is cheap as long as there are few. Rarer functions that look things up
-- by key go without sequential scans for the same reason; tests/plans.test.ts counts what each reads.

-- The moment of so many seconds since 1970, to the microsecond: as one double, a moment of year 9999 drifts by 8 microseconds.
create or replace function data.epoch_time(seconds numeric)
returns timestamptz
language sql
immutable parallel safe
as $$
  select to_timestamp(trunc(seconds)::double precision)
    + make_interval(secs => (seconds - trunc(seconds))::double precision)
$$;

-- an entry to be posted: what it asks for; data.post fills in the rest. credit_limit null: unchanged
create or replace function data.new_entry(
  account_id uuid,
  kind text,
  balance_delta numeric default 0,
  free_credit_delta numeric default 0,
  credit_limit numeric default null,
  reference text default null,
  reason text default null,
  metadata jsonb default null
)
returns data.billing_transaction
language plpgsql
immutable
as $$
declare
  v_entry data.billing_transaction;
begin
  v_entry.account_id := new_entry.account_id;
  v_entry.kind := new_entry.kind;
  v_entry.balance_delta := new_entry.balance_delta;
  v_entry.free_credit_delta := new_entry.free_credit_delta;
  v_entry.outstanding_delta := 0;
  v_entry.credit_limit_after := new_entry.credit_limit;
  v_entry.reference := new_entry.reference;
  v_entry.reason := new_entry.reason;
  v_entry.usage_count := 0;
  v_entry.metadata := new_entry.metadata;
  return v_entry;
end
$$;

-- Posts one entry to each account named: money into or out of a bucket, a new credit limit, or what was used (its rows, priced).
-- The caller holds the accounts' locks (lock_accounts); one who doesn't fails on the next seq's primary key.
-- Restores the normal form (debt only when free credit and balance are spent to the limit), draws holds and grants, extends each
-- chain; a crossing of an account's funds is news. At most one entry per account and call. Answers the accounts posted to, as they
-- are then, in account_id order, and how many usage rows were new. Rare steps are statements of their own: to start one costs more
-- than to run it.
create or replace function data.post(
  entries data.billing_transaction[] default '{}',
  usage data.usage_log[] default '{}',
  out accounts data.account_balance[],
  out charged bigint
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
  v_now timestamptz := clock_timestamp();
  v_actor text := data.actor();
  v_seqs jsonb;
  v_used data.billing_transaction[];
  v_drawing data.usage_log[];
  v_ids uuid[];
  v_spent uuid[];
  v_crossed uuid[];
  v_funds numeric[];
  v_has_budgets boolean;
begin
  accounts := '{}';
  charged := 0;
  if cardinality(usage) > 0 then
    -- once per account: of a busy one's row there may be many versions to look through
    select jsonb_object_agg(a.account_id, a.balance_version + 1) into v_seqs
    from data.account_balance a
    where a.account_id = any (array(select distinct u.account_id from unnest(post.usage) u));
    -- a conflict is a retry: its first try was charged
    with new_row as (
      insert into data.usage_log (
        account_id, id, transaction_seq, virtual_key_id, user_id, config_node_id, hold_id, final, meters, price_ids,
        cost, request_id, metadata, recorded_at)
      select u.account_id, u.id, (v_seqs ->> u.account_id::text)::bigint, u.virtual_key_id, u.user_id, u.config_node_id, u.hold_id,
        u.final, u.meters, u.price_ids, u.cost, u.request_id, u.metadata, v_now
      from unnest(post.usage) with ordinality u
      order by u.ordinality
      on conflict do nothing
      returning *
    ), used as (
      select n.account_id, count(*) as events, sum(n.cost) as cost,
        string_agg(data.usage_seal(n), '' order by n.id) as list
      from new_row n
      group by n.account_id
    )
    select
      array_agg(row(u.account_id, null, 'usage', null, 0, 0, u.cost, null, null, null, null, null, null, null, u.events, u.list,
        null, null, null, null, null, null)::data.billing_transaction),
      coalesce(sum(u.events), 0),
      (select array_agg(n::data.usage_log) from new_row n where n.hold_id is not null)
    into v_used, charged, v_drawing
    from used u;
    entries := entries || v_used;
  end if;
  if entries = '{}' then
    return;
  end if;

  if v_drawing is not null then
    with wanted as (
      select u.account_id, u.hold_id, sum(u.cost) as cost, bool_or(u.final) as final
      from unnest(v_drawing) u
      group by u.account_id, u.hold_id
    ), drawn as (
      select h.account_id, h.id, least(w.cost, h.amount - h.captured) as draw, h.amount - h.captured as unspent,
        -- a parked hold ends with the last parked event that names it
        w.final and (h.status = 'open' or not exists (
          select from data.rejected_usage r where r.account_id = h.account_id and r.hold_id = h.id and r.resolved_at is null)) as final
      from wanted w
      cross join lateral (select * from data.hold b where b.account_id = w.account_id and b.id = w.hold_id offset 0) h
      -- a freeze has no expiry, and is not to be drawn
      where (h.status = 'open' and h.expires_at > v_now) or h.status = 'parked'
    ), captured as (
      update data.hold h
      set captured = h.captured + d.draw,
        status = case when d.final then 'captured' else h.status end,
        ended_at = case when d.final then v_now end
      from drawn d
      where h.account_id = d.account_id and h.id = d.id
    )
    update data.account_balance a
    set frozen_balance = a.frozen_balance - x.amount
    from (
      select d.account_id, sum(case when d.final then d.unspent else d.draw end) as amount from drawn d group by d.account_id
    ) x
    where a.account_id = any (array(select u.account_id from unnest(v_drawing) u)) and a.account_id = x.account_id;
  end if;

  v_ids := array(select e.account_id from unnest(entries) e);
  with filled as (
    select
      -- what exceeds the limit is debt, and so is what was used, until it is paid: by free credit, then by balance down to the limit
      row(e.account_id, a.balance_version + 1, e.kind,
        d.balance + d.free_credit - d.outstanding, d.balance, d.free_credit, d.outstanding,
        a.balance + d.balance, a.free_credit + d.free_credit, a.outstanding_amount + d.outstanding,
        q.credit_limit, e.reference, v_actor, e.reason, e.usage_count, e.usage_list,
        e.refund_of_seq, e.refund_of_usage_id, e.metadata, a.head_hash, null, greatest(v_now, a.head_at))::data.billing_transaction as entry,
      f.paid as free_credit_paid,
      a.available + a.frozen_balance as funds
    from unnest(entries) e
    cross join lateral (select * from data.account_balance b where b.account_id = e.account_id offset 0) a
    cross join lateral (select coalesce(e.credit_limit_after, a.credit_limit) as credit_limit offset 0) q
    cross join lateral (
      select
        greatest(a.balance + e.balance_delta, -q.credit_limit) as balance,
        a.outstanding_amount + e.outstanding_delta + greatest(-q.credit_limit - a.balance - e.balance_delta, 0) as outstanding
      offset 0
    ) o
    cross join lateral (select least(o.outstanding, a.free_credit + e.free_credit_delta) as paid offset 0) f
    cross join lateral (select least(o.outstanding - f.paid, o.balance + q.credit_limit) as paid offset 0) b
    cross join lateral (
      select
        o.balance - b.paid - a.balance as balance,
        e.free_credit_delta - f.paid as free_credit,
        o.outstanding - f.paid - b.paid - a.outstanding_amount as outstanding
      offset 0
    ) d
    offset 0 -- or each use of a field would build the entry again
  ), hashed as materialized (
    select f.entry, f.free_credit_paid, f.funds, data.entry_hash(f.entry) as hash from filled f
  ), posted as (
    insert into data.billing_transaction
    select (h.entry).account_id, (h.entry).seq, (h.entry).kind, (h.entry).amount, (h.entry).balance_delta,
      (h.entry).free_credit_delta, (h.entry).outstanding_delta, (h.entry).balance_after, (h.entry).free_credit_after,
      (h.entry).outstanding_after, (h.entry).credit_limit_after, (h.entry).reference, (h.entry).actor, (h.entry).reason,
      (h.entry).usage_count, (h.entry).usage_list, (h.entry).refund_of_seq, (h.entry).refund_of_usage_id, (h.entry).metadata,
      (h.entry).prev_hash, h.hash, (h.entry).created_at
    from hashed h
  ), updated as (
    update data.account_balance a
    set balance = (h.entry).balance_after,
      free_credit = (h.entry).free_credit_after,
      outstanding_amount = (h.entry).outstanding_after,
      credit_limit = (h.entry).credit_limit_after,
      balance_version = (h.entry).seq,
      head_hash = h.hash,
      head_at = (h.entry).created_at,
      last_charged_at = case when (h.entry).kind = 'usage' then (h.entry).created_at else a.last_charged_at end
    from hashed h
    where a.account_id = any (v_ids) and a.account_id = (h.entry).account_id
    returning a as account, h.free_credit_paid, h.funds,
      (h.funds > 0) <> (a.available + a.frozen_balance > 0)
        or (h.funds > a.low_balance_threshold and a.available + a.frozen_balance <= a.low_balance_threshold) as crossed
  )
  select array_agg(u.account order by (u.account).account_id),
    array_agg((u.account).account_id) filter (where u.free_credit_paid > 0),
    array_agg((u.account).account_id) filter (where u.crossed),
    array_agg(u.funds) filter (where u.crossed),
    bool_or((u.account).has_budgets)
  into accounts, v_spent, v_crossed, v_funds, v_has_budgets
  from updated u;

  if (entries[1]).kind = 'credit_grant' then
    insert into data.credit_grant (account_id, seq, amount, remaining, priority, expires_at)
    select e.account_id, a.balance_version, e.free_credit_delta, e.free_credit_delta,
      (e.metadata ->> 'priority')::integer, data.epoch_time((e.metadata ->> 'expires_at')::numeric)
    from unnest(entries) e
    join unnest(accounts) a on a.account_id = e.account_id;
  end if;
  if v_spent is not null then
    -- lowest priority number first, then soonest expiry, then oldest; what is left in all is the account's free credit
    with drawn as (
      update data.credit_grant g
      set remaining = r.keeps
      from (
        select c.account_id, c.seq, c.remaining, a.balance_version as version,
          least(c.remaining, greatest(a.free_credit - coalesce(
            sum(c.remaining) over (partition by c.account_id order by c.priority desc, c.expires_at desc nulls first, c.seq desc
              rows between unbounded preceding and 1 preceding), 0), 0)) as keeps
        from data.credit_grant c
        cross join lateral (select * from data.account_balance b where b.account_id = c.account_id offset 0) a
        where c.account_id = any (v_spent) and c.remaining > 0
      ) r
      where g.account_id = any (v_spent) and g.remaining > 0 and g.account_id = r.account_id and g.seq = r.seq and r.keeps < r.remaining
      returning r.account_id, r.version, r.seq, r.remaining - r.keeps as amount
    )
    insert into data.grant_draw (account_id, seq, grant_seq, amount)
    select d.account_id, d.version, d.seq, d.amount from drawn d;
  end if;
  if v_has_budgets and charged > 0 then
    perform data.count_spend(accounts, post.usage);
  end if;
  if v_crossed is not null then
    perform data.tell_crossings(v_crossed, v_funds);
  end if;
end
$$;

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

reset role;

-- migrate:down
do $$
begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. Nothing was changed; restore a backup to go back';
end
$$;
