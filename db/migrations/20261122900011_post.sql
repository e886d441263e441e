-- migrate:up
-- The ledger's one writer.

set local role keyledger_owner;

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
          select from data.parked_usage r where r.account_id = h.account_id and r.hold_id = h.id and r.resolved_at is null)) as final
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

reset role;

-- migrate:down
do $$
begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. Nothing was changed; restore a backup to go back';
end
$$;
