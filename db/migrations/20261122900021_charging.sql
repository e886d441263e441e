-- migrate:up
-- Charging: the usage of one account is logged, draws its holds, and is posted as one entry.

set local role keyledger_owner;

-- Logs an account's usage, in id order, under the seq of the entry to come. A conflict is a retry:
-- its first try was charged. Answers the rows that are new.
create or replace function data.log_usage(
  account_id uuid,
  seq bigint,
  usage data.usage_log[]
)
returns data.usage_log[]
language plpgsql
as $$
declare
  v_now timestamptz := clock_timestamp();
  v_rows data.usage_log[];
  v_logged integer;
begin
  -- all at once: a loop took three times as long
  v_rows := array(
    select row(
      u.account_id, u.id, log_usage.seq, u.virtual_key_id, u.user_id, u.config_node_id, u.hold_id, u.final, u.meters,
      u.price_ids, u.cost, u.request_id, u.metadata, v_now, u.terms, u.own_cost)::data.usage_log
    from unnest(log_usage.usage) u);
  insert into data.usage_log select r.* from unnest(v_rows) r on conflict do nothing;
  get diagnostics v_logged = row_count;
  if v_logged < cardinality(v_rows) then
    v_rows := array(
      select l::data.usage_log
      from data.usage_log l
      where l.account_id = log_usage.account_id and l.id = any (array(select r.id from unnest(v_rows) r))
        and l.transaction_seq = log_usage.seq
      order by l.id);
  end if;
  return v_rows;
end
$$;

-- Draws new usage from its holds, and ends those whose event is final. Answers how much of the
-- account's frozen balance is free by that. A freeze has no expiry, and is not drawn.
create or replace function data.draw_holds(
  account_id uuid,
  usage data.usage_log[]
)
returns numeric
language plpgsql
as $$
declare
  v_now timestamptz := clock_timestamp();
  v_freed numeric;
begin
  with wanted as (
    select u.hold_id, sum(u.cost) as cost, bool_or(u.final) as final
    from unnest(draw_holds.usage) u
    where u.hold_id is not null
    group by u.hold_id
  ), drawn as (
    select h.account_id, h.id, h.amount - h.captured as unspent, least(w.cost, h.amount - h.captured) as draw,
      -- a parked hold ends with the last parked event that names it
      w.final and (h.status = 'open' or not exists (
        select from data.parked_usage r
        where r.account_id = h.account_id and r.hold_id = h.id and r.resolved_at is null)) as final
    from wanted w
    cross join lateral (
      select * from data.hold b where b.account_id = draw_holds.account_id and b.id = w.hold_id offset 0
    ) h
    where (h.status = 'open' and h.expires_at > v_now) or h.status = 'parked'
  ), captured as (
    update data.hold h
    set captured = h.captured + d.draw,
      status = case when d.final then 'captured' else h.status end,
      ended_at = case when d.final then v_now end
    from drawn d
    where h.account_id = d.account_id and h.id = d.id
  )
  select coalesce(sum(case when d.final then d.unspent else d.draw end), 0) into v_freed from drawn d;
  return v_freed;
end
$$;

-- Says when keys were last used: at most once a minute each. Skips a row that another call is at:
-- nobody waits here.
create or replace function data.mark_used(
  keys uuid[],
  usage data.usage_log[]
)
returns void
language plpgsql
as $$
begin
  update data.virtual_key_use k
  set last_used_at = d.at
  from (
    select v.virtual_key_id, e.at
    from (
      select u.virtual_key_id, least(max(data.uuid_time(u.id)), clock_timestamp()) as at
      from unnest(mark_used.usage) u
      where u.virtual_key_id = any (keys)
      group by u.virtual_key_id
    ) e
    join data.virtual_key_use v on v.virtual_key_id = e.virtual_key_id
    where v.last_used_at is null or v.last_used_at < e.at - interval '1 minute'
    for update of v skip locked
  ) d
  where k.virtual_key_id = d.virtual_key_id;
end
$$;

-- The answers to usage whose first try was charged before, by another entry than `new_seq`, or
-- twice in this call: its place in `usage`, and the charge of the first try. `mismatch` says that
-- its content differs.
create or replace function data.answer_duplicates(
  account data.account_balance,
  usage data.usage_log[],
  new_seq bigint
)
returns table (
  place bigint,
  answer jsonb
)
language plpgsql
stable
as $$
begin
  return query
  select u.ordinality, jsonb_strip_nulls(jsonb_build_object(
    'id', u.id, 'status', 'duplicate', 'cost', l.cost::text, 'available', account.available::text,
    'seq', l.transaction_seq,
    'mismatch', case when
      (l.virtual_key_id, l.config_node_id, l.hold_id, l.final, l.meters, l.request_id, l.metadata,
        (l.terms).variant, (l.terms).estimated)
        is distinct from
      (u.virtual_key_id, u.config_node_id, u.hold_id, u.final, u.meters, u.request_id, u.metadata,
        (u.terms).variant, (u.terms).estimated)
    then true end))
  from (
    select n.*, row_number() over (partition by n.id order by n.ordinality) as copy
    from unnest(answer_duplicates.usage) with ordinality n
  ) u
  -- by key, each: a join here read all that the account ever used
  cross join lateral (
    select * from data.usage_log b where b.account_id = u.account_id and b.id = u.id offset 0
  ) l
  where u.copy > 1 or l.transaction_seq is distinct from answer_duplicates.new_seq;
end
$$;

-- Charges usage of an account that settle has locked: one entry for all that is new. Answers each
-- event, in order.
create or replace function data.charge(
  account data.account_balance,
  usage data.usage_log[],
  actor text
)
returns jsonb[]
language plpgsql
as $$
declare
  v_parked_holds uuid[];
  v_new data.usage_log[];
  v_cost numeric;
  v_list bytea;
  v_freed numeric := 0;
  v_place bigint;
  v_answer jsonb;
  v_answers jsonb[];
begin
  if exists (select from data.parked_usage r where r.resolved_at is null) then
    v_parked_holds := data.resolve_parked(account.account_id, array(select u.id from unnest(charge.usage) u));
  end if;
  v_new := data.log_usage(account.account_id, account.balance_version + 1, charge.usage);
  if v_new <> '{}' then
    select sum(n.cost), string_agg(data.usage_seal(n), '') into v_cost, v_list from unnest(v_new) n;
    if exists (select from unnest(v_new) n where n.hold_id is not null) then
      v_freed := data.draw_holds(account.account_id, v_new);
    end if;
    account := data.post(account, 'usage', charge.actor, outstanding_delta => v_cost, frozen_delta => -v_freed,
      usage_count => cardinality(v_new), usage_list => v_list);
    if account.has_budgets then
      perform data.count_spend(array[account], v_new);
    end if;
  end if;
  if v_parked_holds <> '{}' then
    perform data.end_parked_holds(account.account_id, v_parked_holds);
    select a.* into account from data.account_balance a where a.account_id = account.account_id;
  end if;

  v_answers := array(
    select jsonb_build_object('id', u.id, 'status', 'charged', 'cost', u.cost::text,
      'available', account.available::text, 'seq', account.balance_version)
    from unnest(charge.usage) u);
  -- fewer new rows than events: the others met their first try
  if cardinality(v_new) < cardinality(charge.usage) then
    for v_place, v_answer in
      select d.place, d.answer
      from data.answer_duplicates(account, charge.usage, case when v_new <> '{}' then account.balance_version end) d
    loop
      v_answers[v_place] := v_answer;
    end loop;
  end if;
  return v_answers;
end
$$;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
