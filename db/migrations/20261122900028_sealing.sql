-- migrate:up
-- Sealing: a statement computed from an account's entries and usage.

set local role keyledger_owner;

-- The seq of the last entry before a moment: 0 if there is none, null if there is no account.
-- It is found by halving: entries are gapless, and none is older than the one before.
create or replace function data.seq_before(
  account_id uuid,
  at timestamptz
)
returns bigint
language plpgsql
stable
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
as $$
declare
  v_low bigint := 0;
  v_high bigint := (select a.balance_version from data.account_balance a where a.account_id = seq_before.account_id);
  v_middle bigint;
begin
  while v_low < v_high loop
    v_middle := (v_low + v_high + 1) / 2;
    if exists (
      select from data.billing_transaction t
      where t.account_id = seq_before.account_id and t.seq = v_middle and t.created_at < at)
    then
      v_low := v_middle;
    else
      v_high := v_middle - 1;
    end if;
  end loop;
  return case when v_high is not null then v_low end;
end
$$;

-- The expiries that were due at a moment and are not among the entries up to `seq`, the last one
-- before the moment.
-- They are not posted yet, or the first posting after the moment wrote them: it settles due
-- expiries first.
-- Their entries come right after `seq`: at most one entry in between, and at most one for each
-- grant.
create or replace function data.expiries_due(
  account_id uuid,
  seq bigint,
  at timestamptz
)
returns table (
  grant_seq bigint,
  expired_at timestamptz,
  amount numeric
)
language plpgsql
stable
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
as $$
#variable_conflict use_column
begin
  return query
  with expired as (
    select g.seq, g.expires_at, g.remaining
    from data.credit_grant g
    where g.account_id = expiries_due.account_id and g.seq <= expiries_due.seq and g.expires_at <= expiries_due.at
  )
  select e.seq, e.expires_at::timestamptz, e.remaining::numeric
  from expired e
  where e.remaining > 0
  union all
  select e.seq, e.expires_at, d.amount
  from data.billing_transaction t
  join data.grant_draw d on d.account_id = t.account_id and d.seq = t.seq
  join expired e on e.seq = d.grant_seq
  where t.account_id = expiries_due.account_id and t.kind = 'credit_expiry'
    and t.seq > expiries_due.seq and t.seq <= expiries_due.seq + 1 + (select count(*) from expired);
end
$$;

-- Waits until the holder of the account's lock is done, and keeps no lock. Later entries are then
-- of a later moment.
create or replace function data.await_postings(account_id uuid)
returns void
language plpgsql
as $$
begin
  perform from data.account_balance a where a.account_id = await_postings.account_id for update;
  -- undone at once, and the lock with it
  raise sqlstate 'KL001';
exception when sqlstate 'KL001' then
  null;
end
$$;

-- The sums of each kind of entry in a statement's range. An expiry counts at its moment, not at its
-- entry.
-- It counts once for each grant: one entry may be of several.
create or replace function data.movements_of(
  statement data.accounting_snapshot,
  out movements jsonb,
  out paid numeric,
  out events bigint
)
returns record
language plpgsql
stable
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
as $$
#variable_conflict use_column
declare
  v_before numeric[];
  v_due numeric[];
begin
  v_before := array(
    select d.amount from data.expiries_due(statement.account_id, statement.first_seq - 1, statement.period_start) d);
  v_due := array(select d.amount from data.expiries_due(statement.account_id, statement.last_seq,
    statement.period_end) d);
  select
    coalesce(jsonb_object_agg(m.kind, jsonb_build_object(
      'entries', m.entries,
      'amount', m.amount::data.money::text,
      'balance', m.balance::data.money::text,
      'free_credit', m.free_credit::data.money::text,
      'outstanding_amount', m.outstanding::data.money::text
    )) filter (where m.entries > 0), '{}'),
    coalesce(sum(m.paid), 0),
    coalesce(sum(m.events), 0)
  into movements, paid, events
  from (
    select e.kind, sum(e.entries) as entries, sum(e.amount) as amount, sum(e.balance) as balance,
      sum(e.free_credit) as free_credit, sum(e.outstanding) as outstanding,
      -sum(least(e.outstanding, 0)) as paid, sum(e.events) as events
    from (
      select t.kind::text, case when t.kind = 'credit_expiry'
        then jsonb_array_length(t.metadata -> 'grant_seq') else 1 end,
        t.amount, t.balance_delta, t.free_credit_delta, t.outstanding_delta, t.usage_count
      from data.billing_transaction t
      where t.account_id = statement.account_id and t.seq between statement.first_seq and statement.last_seq
      union all
      select 'credit_expiry', -1, d.amount, 0, d.amount, 0, 0 from unnest(v_before) as d (amount)
      union all
      select 'credit_expiry', 1, -d.amount, 0, -d.amount, 0, 0 from unnest(v_due) as d (amount)
    ) as e (kind, entries, amount, balance, free_credit, outstanding, events)
    group by e.kind
  ) m;
end
$$;

-- the statement of an account from where the previous one ends
create or replace function data.statement_of(
  account_id uuid,
  previous data.accounting_snapshot,
  period_end timestamptz
)
returns data.accounting_snapshot
language plpgsql
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
as $$
#variable_conflict use_column
declare
  v_sealed data.accounting_snapshot;
  v_last data.billing_transaction;
  v_paid numeric;
  v_events bigint;
  v_found bigint;
begin
  -- names as they are now: a statement is not to change with them
  select a.account_id, coalesce(previous.period_end, a.created_at), a.currency, coalesce(t.name, u.display_name)
  into v_sealed.account_id, v_sealed.period_start, v_sealed.currency, v_sealed.owner_name
  from data.account_balance a
  left join data.tenant t on t.id = a.owner_tenant_id
  left join data.user_profile u on u.id = a.owner_user_id
  where a.account_id = statement_of.account_id;
  v_sealed.period_end := statement_of.period_end;
  v_sealed.first_seq := coalesce(previous.last_seq, 0) + 1;
  v_sealed.last_seq := greatest(data.seq_before(account_id, statement_of.period_end), v_sealed.first_seq - 1);
  select * into v_last
  from data.billing_transaction t where t.account_id = statement_of.account_id and t.seq = v_sealed.last_seq;
  v_sealed.head_hash := coalesce(v_last.hash, '');

  v_sealed.expiry_due := (
    select coalesce(sum(d.amount), 0)
    from data.expiries_due(statement_of.account_id, v_sealed.last_seq, statement_of.period_end) d);
  v_sealed.balance_opening := coalesce(previous.balance_closing, 0);
  v_sealed.free_credit_opening := coalesce(previous.free_credit_closing, 0);
  v_sealed.outstanding_opening := coalesce(previous.outstanding_closing, 0);
  v_sealed.balance_closing := coalesce(v_last.balance_after, 0);
  v_sealed.free_credit_closing := coalesce(v_last.free_credit_after, 0) - v_sealed.expiry_due;
  v_sealed.outstanding_closing := coalesce(v_last.outstanding_after, 0);

  select m.movements, m.paid, m.events into v_sealed.movements, v_paid, v_events
  from data.movements_of(v_sealed) m;
  v_sealed.overdue_amount := greatest(v_sealed.outstanding_opening - v_paid, 0);

  select u.usage, u.events into v_sealed.usage, v_found
  from data.usage_of(account_id, v_sealed.first_seq, v_sealed.last_seq) u
  where v_events > 0;
  if v_events > 0 and v_found is distinct from v_events then
    perform data.refuse(409, 'usage_is_incomplete',
      'account ' || account_id || ': ' || v_events || ' events were charged, '
      || coalesce(v_found, 0) || ' are logged', 'verify_balances says which; close the other accounts by `after`');
  end if;
  v_sealed.usage := coalesce(v_sealed.usage, '[]');
  v_sealed.sealed_at := clock_timestamp();
  return v_sealed;
end
$$;

-- Seals one account's statement up to a moment, from the end of its last statement. Does nothing if
-- that one ends there.
create or replace function data.seal(
  account_id uuid,
  period_end timestamptz
)
returns void
language plpgsql
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
as $$
#variable_conflict use_column
declare
  v_previous data.accounting_snapshot;
  v_sealed data.accounting_snapshot;
begin
  loop
    select * into v_previous
    from data.accounting_snapshot s
    where s.account_id = seal.account_id
    order by s.period_start desc
    limit 1;
    if v_previous.period_end >= seal.period_end then
      if not exists (
        select from data.accounting_snapshot s where s.account_id = seal.account_id and s.period_end = seal.period_end)
      then
        perform data.refuse(409, 'period_is_sealed',
          'account ' || account_id || ' is sealed until ' || v_previous.period_end,
          'close a later period, or one that was closed before');
      end if;
      return;
    end if;
    perform data.await_postings(account_id);
    if (select a.head_at from data.account_balance a where a.account_id = seal.account_id)
      > clock_timestamp() + interval '1 minute'
    then
      perform data.refuse(409, 'account_is_ahead',
        'account ' || account_id || ' has entries of a time to come: the server''s clock was ahead',
        'close the other accounts by `after`; close this one when that time has come');
    end if;

    v_sealed := data.statement_of(account_id, v_previous, seal.period_end);
    insert into data.accounting_snapshot select v_sealed.* on conflict do nothing;
    exit when found;
    -- another call sealed it meanwhile
  end loop;
end
$$;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
