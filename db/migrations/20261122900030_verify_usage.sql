-- migrate:up
-- Verification of usage and statements: charges against their usage rows, statements against their
-- entries.

set local role keyledger_owner;

-- Compares an entry's list of usage rows with the list of the rows found, in id order.
-- A row below `first_kept` was dropped by retention: it is not missing.
create or replace function data.usage_faults(
  listed bytea,
  present bytea,
  first_kept uuid
)
returns table (
  problem text,
  usage_id uuid,
  expected text,
  actual text
)
language plpgsql
immutable parallel safe
as $$
begin
  return query
  select
    case when l.id is null then 'usage_inserted' when f.id is null then 'usage_missing' else 'usage_altered' end,
    coalesce(l.id, f.id), l.seal, f.seal
  from (
    select encode(substr(listed, n, 16), 'hex')::uuid as id, encode(substr(listed, n + 16, 16), 'hex') as seal
    from generate_series(1, octet_length(listed), 32) n
  ) l
  full join (
    select encode(substr(present, n, 16), 'hex')::uuid as id, encode(substr(present, n + 16, 16), 'hex') as seal
    from generate_series(1, octet_length(present), 32) n
  ) f on f.id = l.id
  where f.seal is distinct from l.seal and (f.id is not null or l.id >= first_kept)
  order by 2;
end
$$;

-- usage: each charge against the rows it lists; each parked event against its charge and its hold
create or replace function data.verify_usage(account_id uuid)
returns setof api.ledger_problem
language plpgsql
stable
as $$
declare
  v_first_kept uuid := data.uuid_floor((data.accepted_ids_now()).floor);
begin
  return query
  with used as (
    select s.account_id, s.seq, count(*) as events, sum(s.cost) as cost, string_agg(s.seal, '' order by s.id) as list
    from (
      select l.account_id, l.transaction_seq as seq, l.id, l.cost, data.usage_seal(row(l.*)::data.usage_log) as seal
      from data.usage_log l
      where verify_usage.account_id is null or l.account_id = verify_usage.account_id
    ) s
    group by s.account_id, s.seq
  )
  select coalesce(e.account_id, u.account_id), c.problem, coalesce(e.seq, u.seq), c.usage_id, c.expected, c.actual
  from (
    select t.account_id, t.seq, t.amount, t.usage_count, t.usage_list
    from data.billing_transaction t
    where t.usage_list is not null and (verify_usage.account_id is null or t.account_id = verify_usage.account_id)
  ) e
  full join used u on u.account_id = e.account_id and u.seq = e.seq
  cross join lateral (
    select f.problem, f.usage_id, f.expected, f.actual
    from data.usage_faults(e.usage_list, u.list, v_first_kept) f
    where u.list is distinct from e.usage_list
      -- all rows were dropped by retention if the last one was
      and (u.list is not null or substr(e.usage_list, octet_length(e.usage_list) - 31, 16) >= uuid_send(v_first_kept))
    union all
    select 'charge_is_not_the_cost_of_usage', null, u.cost::text, (-e.amount)::text
    where u.events = e.usage_count and u.cost <> -e.amount
  ) c

  union all
  select r.account_id, 'resolved_event_not_charged', null, r.usage_id, 'charged', null
  from data.parked_usage r
  where r.resolution in ('charged', 'duplicate') and r.usage_id >= v_first_kept
    and (verify_usage.account_id is null or r.account_id = verify_usage.account_id)
    and not exists (select from data.usage_log l where l.account_id = r.account_id and l.id = r.usage_id)

  union all
  select h.account_id, 'parked_hold_without_event', null, null, 'released or captured', h.id::text
  from data.hold h
  where h.status = 'parked' and (verify_usage.account_id is null or h.account_id = verify_usage.account_id)
    and not exists (
      select from data.parked_usage r where r.account_id = h.account_id and r.hold_id = h.id and r.resolved_at is null)

  union all
  select r.account_id, 'parked_event_without_hold', null, r.usage_id, 'parked', h.status
  from data.parked_usage r
  left join data.hold h on h.account_id = r.account_id and h.id = r.hold_id
  where r.hold_id is not null and r.resolved_at is null
    and (verify_usage.account_id is null or r.account_id = verify_usage.account_id)
    and h.status is distinct from 'parked';
end
$$;

-- statements: each against the one before, its last entry and its entries
create or replace function data.verify_statements(account_id uuid)
returns setof api.ledger_problem
language plpgsql
stable
as $$
#variable_conflict use_column
declare
  v_none constant data.money := 0;
begin
  return query
  with statement as (
    select s as this, lag(s) over (partition by s.account_id order by s.period_start) as previous
    from data.accounting_snapshot s
    where verify_statements.account_id is null or s.account_id = verify_statements.account_id
  )
  select s.account_id, c.problem, s.last_seq, null::uuid, c.expected, c.actual
  from (select (n.this).*, n.this, n.previous from statement n) s
  join data.account_balance a on a.account_id = s.account_id
  left join data.billing_transaction l on l.account_id = s.account_id and l.seq = s.last_seq
  left join data.billing_transaction n on n.account_id = s.account_id and n.seq = s.last_seq + 1
  cross join lateral data.movements_of(s.this) m
  cross join lateral (
    select coalesce(sum(d.amount), 0) as due from data.expiries_due(s.account_id, s.last_seq, s.period_end) d
  ) e
  cross join lateral (
    select sum((v.value ->> 'balance')::numeric) as balance, sum((v.value ->> 'free_credit')::numeric) as free_credit,
      sum((v.value ->> 'outstanding_amount')::numeric) as outstanding
    from jsonb_each(s.movements) v
  ) v
  cross join lateral (
    select sum((o.node ->> 'events')::bigint) as events, sum((o.node ->> 'cost')::numeric) as cost,
      sum((o.node ->> 'rounding')::numeric + (
        select sum((q.value ->> 'cost')::numeric) from jsonb_each(o.node -> 'meters') q)) as metered
    from jsonb_array_elements(s.usage) as o (node)
  ) u
  cross join lateral (
    values
      ('statement_period_does_not_follow',
        coalesce((s.previous).period_end, a.created_at)::text, s.period_start::text),
      ('statement_seq_does_not_follow', (coalesce((s.previous).last_seq, 0) + 1)::text, s.first_seq::text),
      ('statement_figures_do_not_follow',
        concat_ws(', ', coalesce((s.previous).balance_closing, v_none), coalesce((s.previous).free_credit_closing,
          v_none),
          coalesce((s.previous).outstanding_closing, v_none)),
        concat_ws(', ', s.balance_opening, s.free_credit_opening, s.outstanding_opening)),
      ('statement_closing_differs_from_entry',
        concat_ws(', ', coalesce(l.balance_after, v_none), coalesce(l.free_credit_after, v_none),
          coalesce(l.outstanding_after, v_none)),
        concat_ws(', ', s.balance_closing, s.free_credit_closing + s.expiry_due, s.outstanding_closing)),
      ('statement_head_differs_from_entry', encode(coalesce(l.hash, ''), 'hex'), encode(s.head_hash, 'hex')),
      ('statement_not_cut_at_its_end', 'true', (
        (s.last_seq = 0 or coalesce(l.created_at < s.period_end, false))
          and coalesce(n.created_at >= s.period_end, true))::text),
      ('statement_expiries_differ_from_grants', e.due::data.money::text, s.expiry_due::text),
      ('statement_movements_differ_from_entries', m.movements::text, s.movements::text),
      ('statement_movements_do_not_lead_to_closing',
        concat_ws(', ', s.balance_closing - s.balance_opening, s.free_credit_closing - s.free_credit_opening,
          s.outstanding_closing - s.outstanding_opening),
        concat_ws(', ', coalesce(v.balance, v_none), coalesce(v.free_credit, v_none), coalesce(v.outstanding, v_none))),
      ('statement_usage_differs_from_charges',
        concat_ws(', ', m.events, coalesce(-(m.movements #>> '{usage,amount}')::numeric, v_none), coalesce(u.cost,
          v_none)),
        concat_ws(', ', coalesce(u.events, 0), coalesce(u.cost, v_none), coalesce(u.metered, v_none))),
      ('statement_overdue_differs_from_unpaid',
        greatest(s.outstanding_opening - m.paid, 0)::data.money::text, s.overdue_amount::text)
  ) as c (problem, expected, actual)
  where c.expected <> c.actual;
end
$$;

-- budgets: each counter against the usage of its window; has_budgets against the budgets
create or replace function data.verify_budgets(account_id uuid)
returns setof api.ledger_problem
language plpgsql
stable
as $$
declare
  v_floor timestamptz := (data.accepted_ids_now()).floor;
begin
  return query
  with used as (
    select b.account_id, b.id, w.starts, sum(l.cost) as cost
    from data.budget b
    join data.account_balance a on a.account_id = b.account_id
    join data.usage_log l on l.account_id = b.account_id
      and data.budget_applies(b.scope, b.scope_id, l.virtual_key_id, l.user_id)
      and case when isfinite(b.counted_from)
        then greatest(l.id, l.hold_id) >= data.uuid_floor(b.counted_from) else true end
      and l.id >= data.uuid_floor(b.counted_floor)
    cross join lateral (
      select data.window_start(b.period, a.time_zone, data.spend_time(l.id, l.hold_id)) as starts offset 0
    ) w
    where (verify_budgets.account_id is null or b.account_id = verify_budgets.account_id) and w.starts >= b.counted_from
    group by b.account_id, b.id, w.starts
  ), counted as (
    select s.account_id, s.budget_id as id, s.window_start as starts, s.spent
    from data.budget_spend s
    where verify_budgets.account_id is null or s.account_id = verify_budgets.account_id
  )
  select b.account_id, 'budget_differs_from_usage', null::bigint, null::uuid,
    concat_ws(' ', b.scope, b.scope_id, b.period, c.starts, coalesce(c.cost, 0)::data.amount),
    coalesce(c.spent, 0)::data.amount::text
  from (
    select * from used u full join counted n using (account_id, id, starts)
  ) c
  join data.budget b on b.account_id = c.account_id and b.id = c.id
  where case
      -- usage that retention dropped was counted, and stays counted
      when c.starts >= v_floor or (b.period = 'total' and b.counted_floor = v_floor)
        then coalesce(c.cost, 0) <> coalesce(c.spent, 0)
      else coalesce(c.cost, 0) > coalesce(c.spent, 0)
    end

  union all
  select a.account_id, 'has_budgets_differs_from_budgets', null, null, (b.account_id is not null)::text,
    a.has_budgets::text
  from data.account_balance a
  left join (select distinct x.account_id from data.budget x) b on b.account_id = a.account_id
  where (verify_budgets.account_id is null or a.account_id = verify_budgets.account_id)
    and a.has_budgets <> (b.account_id is not null);
end
$$;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
