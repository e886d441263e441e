-- migrate:up
-- Verification of accounts, entries, refunds and grants: figures against rows.

set local role keyledger_owner;

-- accounts: the figures against the sums of their deltas, the open holds and the live grants
create or replace function data.verify_figures(account_id uuid)
returns setof api.ledger_problem
language plpgsql
stable
as $$
begin
  return query
  with total as (
    select t.account_id, count(*) as entries, max(t.seq) as last_seq, sum(t.balance_delta) as balance,
      sum(t.free_credit_delta) as free_credit, sum(t.outstanding_delta) as outstanding
    from data.billing_transaction t
    where verify_figures.account_id is null or t.account_id = verify_figures.account_id
    group by t.account_id
  ), frozen as (
    select h.account_id, sum(h.amount - h.captured) as amount
    from data.hold h
    where h.status in ('open', 'parked')
      and (verify_figures.account_id is null or h.account_id = verify_figures.account_id)
    group by h.account_id
  ), granted as (
    select g.account_id, sum(g.remaining) as amount
    from data.credit_grant g
    where verify_figures.account_id is null or g.account_id = verify_figures.account_id
    group by g.account_id
  )
  select coalesce(a.account_id, t.account_id, f.account_id, g.account_id), c.problem,
    null::bigint, null::uuid, c.expected, c.actual
  from (
    select b.* from data.account_balance b
    where verify_figures.account_id is null or b.account_id = verify_figures.account_id
  ) a
  full join total t on t.account_id = a.account_id
  full join frozen f on f.account_id = coalesce(a.account_id, t.account_id)
  full join granted g on g.account_id = coalesce(a.account_id, t.account_id, f.account_id)
  left join data.billing_transaction l on l.account_id = a.account_id and l.seq = a.balance_version
  cross join lateral (
    values
      ('account_missing', null, null, a.account_id is null),
      ('balance_is_not_the_sum_of_deltas', coalesce(t.balance, 0), a.balance, null),
      ('free_credit_is_not_the_sum_of_deltas', coalesce(t.free_credit, 0), a.free_credit, null),
      ('outstanding_is_not_the_sum_of_deltas', coalesce(t.outstanding, 0), a.outstanding_amount, null),
      ('frozen_is_not_the_sum_of_holds', coalesce(f.amount, 0), a.frozen_balance, null),
      ('free_credit_is_not_the_sum_of_grants', coalesce(g.amount, 0), a.free_credit, null),
      ('balance_version_is_not_the_last_seq', coalesce(t.last_seq, 0), a.balance_version, null),
      ('seq_has_gaps', coalesce(t.last_seq, 0), coalesce(t.entries, 0), null),
      ('credit_limit_differs_from_last_entry', coalesce(l.credit_limit_after, 0), a.credit_limit, null)
  ) as v (problem, should_be, held, is_bad)
  cross join lateral (
    select v.problem, v.should_be::text as expected, v.held::text as actual
    where coalesce(v.is_bad, v.should_be <> v.held)
  ) c;
end
$$;

-- accounts: head, times and normal form against the last entry and the last charge
create or replace function data.verify_heads(account_id uuid)
returns setof api.ledger_problem
language plpgsql
stable
as $$
declare
  v_now timestamptz := clock_timestamp();
begin
  return query
  select a.account_id, c.problem, null::bigint, null::uuid, c.expected, c.actual
  from data.account_balance a
  left join data.billing_transaction l on l.account_id = a.account_id and l.seq = a.balance_version
  left join (
    select u.account_id, max(u.created_at) as charged_at
    from data.billing_transaction u
    where u.kind = 'usage' and (verify_heads.account_id is null or u.account_id = verify_heads.account_id)
    group by u.account_id
  ) t on t.account_id = a.account_id
  cross join lateral (
    select 'head_differs_from_last_entry' as problem, encode(coalesce(l.hash, ''), 'hex') as expected,
      encode(a.head_hash, 'hex') as actual
    where a.head_hash <> coalesce(l.hash, '')
    union all
    select 'head_at_differs_from_last_entry', coalesce(l.created_at, '-infinity')::text, a.head_at::text
    where a.head_at <> coalesce(l.created_at, '-infinity')
    union all
    select 'last_charged_at_differs_from_last_charge', t.charged_at::text, a.last_charged_at::text
    where a.last_charged_at is distinct from t.charged_at
    union all
    select 'head_at_is_in_the_future', v_now::text, a.head_at::text
    where a.head_at > v_now + interval '1 minute'
    union all
    select 'figures_not_in_normal_form', null, null
    where a.balance < -a.credit_limit
      or (a.outstanding_amount > 0 and (a.free_credit <> 0 or a.balance <> -a.credit_limit))
  ) c
  where verify_heads.account_id is null or a.account_id = verify_heads.account_id;
end
$$;

-- entries: each by itself, and against the one before
create or replace function data.verify_entries(account_id uuid)
returns setof api.ledger_problem
language plpgsql
stable
as $$
begin
  return query
  select e.account_id, c.problem, e.seq, null::uuid, c.expected, c.actual
  from (
    select t.*,
      lag(t.hash) over w as previous_hash, lag(t.created_at) over w as previous_at,
      lag(t.balance_after) over w as previous_balance,
      lag(t.free_credit_after) over w as previous_free_credit, lag(t.outstanding_after) over w as previous_outstanding
    from (
      select t.account_id, t.seq, t.prev_hash, t.hash, t.created_at, t.balance_after, t.balance_delta,
        t.free_credit_after,
        t.free_credit_delta, t.outstanding_after, t.outstanding_delta,
        data.entry_hash(row(t.*)::data.billing_transaction) as content_hash,
        data.broken_fact(t.seq, t.kind, t.amount, t.balance_delta, t.free_credit_delta, t.outstanding_delta,
          t.balance_after,
          t.free_credit_after, t.outstanding_after, t.credit_limit_after, t.usage_count, octet_length(t.usage_list),
          t.refund_of_seq, t.refund_of_usage_id, t.prev_hash = '') as broken_fact
      from data.billing_transaction t
      where verify_entries.account_id is null or t.account_id = verify_entries.account_id
    ) t
    window w as (partition by t.account_id order by t.seq)
  ) e
  cross join lateral (
    select 'entry_altered' as problem, encode(e.hash, 'hex') as expected, encode(e.content_hash, 'hex') as actual
    where e.content_hash <> e.hash
    union all
    select 'chain_broken', encode(coalesce(e.previous_hash, ''), 'hex'), encode(e.prev_hash, 'hex')
    where e.prev_hash <> coalesce(e.previous_hash, '')
    union all
    select 'entry_breaks_a_rule', e.broken_fact, null
    where e.broken_fact is not null
    union all
    select 'entry_older_than_the_one_before', e.previous_at::text, e.created_at::text
    where e.created_at < e.previous_at
    union all
    select f.figure || '_does_not_follow', f.should_be::text, f.held::text
    from (
      values
        ('balance', coalesce(e.previous_balance, 0) + e.balance_delta, e.balance_after),
        ('free_credit', coalesce(e.previous_free_credit, 0) + e.free_credit_delta, e.free_credit_after::numeric),
        ('outstanding', coalesce(e.previous_outstanding, 0) + e.outstanding_delta, e.outstanding_after::numeric)
    ) as f (figure, should_be, held)
    where f.should_be <> f.held
  ) c;
end
$$;

-- refunds: no more comes back than an entry took, or than an event cost
create or replace function data.verify_refunds(account_id uuid)
returns setof api.ledger_problem
language plpgsql
stable
as $$
begin
  return query
  select r.account_id, 'refunds_exceed_entry', r.refund_of_seq, null::uuid, abs(o.amount)::text, r.amount::text
  from (
    select t.account_id, t.refund_of_seq, sum(abs(t.amount)) as amount
    from data.billing_transaction t
    where t.refund_of_seq is not null
      and (verify_refunds.account_id is null or t.account_id = verify_refunds.account_id)
    group by t.account_id, t.refund_of_seq
  ) r
  left join data.billing_transaction o on o.account_id = r.account_id and o.seq = r.refund_of_seq
  where coalesce(r.amount > abs(o.amount), true)

  union all
  select l.account_id, 'refunds_exceed_event', l.transaction_seq, l.id::uuid, l.cost::text, r.amount::text
  from (
    select t.account_id, t.refund_of_usage_id as usage_id, sum(t.amount) as amount
    from data.billing_transaction t
    where t.refund_of_usage_id is not null
      and (verify_refunds.account_id is null or t.account_id = verify_refunds.account_id)
    group by t.account_id, t.refund_of_usage_id
  ) r
  join data.usage_log l on l.account_id = r.account_id and l.id = r.usage_id
  where r.amount > l.cost;
end
$$;

-- grants: each against its entry and its draws; the draws of each entry against the free credit it
-- spent
create or replace function data.verify_grants(account_id uuid)
returns setof api.ledger_problem
language plpgsql
stable
as $$
begin
  return query
  select coalesce(g.account_id, e.account_id), 'grant_differs_from_entry', coalesce(g.seq, e.seq), null::uuid,
    concat_ws(', ', e.amount, e.metadata ->> 'priority', e.metadata ->> 'expires_at'),
    concat_ws(', ', g.amount, g.priority, extract(epoch from g.expires_at))
  from (
    select t.account_id, t.seq, t.amount, t.metadata from data.billing_transaction t
    where t.kind = 'credit_grant' and (verify_grants.account_id is null or t.account_id = verify_grants.account_id)
  ) e
  full join (
    select c.account_id, c.seq, c.amount, c.priority, c.expires_at from data.credit_grant c
    where verify_grants.account_id is null or c.account_id = verify_grants.account_id
  ) g on g.account_id = e.account_id and g.seq = e.seq
  where (g.amount, g.priority, extract(epoch from g.expires_at)) is distinct from
    (e.amount, (e.metadata ->> 'priority')::integer, (e.metadata ->> 'expires_at')::numeric)

  union all
  select g.account_id, 'grant_differs_from_draws', g.seq, null,
    (g.amount - coalesce(d.amount, 0))::text, g.remaining::text
  from data.credit_grant g
  left join (
    select w.account_id, w.grant_seq, sum(w.amount - w.returned) as amount
    from data.grant_draw w
    where verify_grants.account_id is null or w.account_id = verify_grants.account_id
    group by w.account_id, w.grant_seq
  ) d on d.account_id = g.account_id and d.grant_seq = g.seq
  where (verify_grants.account_id is null or g.account_id = verify_grants.account_id)
    and g.remaining <> g.amount - coalesce(d.amount, 0)

  union all
  -- a refund gives free credit back; each other kind draws it
  select coalesce(e.account_id, d.account_id), 'free_credit_spent_differs_from_draws', coalesce(e.seq, d.seq), null,
    e.amount::text, d.amount::text
  from (
    select t.account_id, t.seq, case when t.kind = 'credit_grant'
      then t.amount else 0 end - t.free_credit_delta as amount
    from data.billing_transaction t
    where t.kind <> 'refund' and (verify_grants.account_id is null or t.account_id = verify_grants.account_id)
  ) e
  full join (
    select w.account_id, w.seq, sum(w.amount) as amount
    from data.grant_draw w
    where verify_grants.account_id is null or w.account_id = verify_grants.account_id
    group by w.account_id, w.seq
  ) d on d.account_id = e.account_id and d.seq = e.seq
  where coalesce(e.amount, 0) <> coalesce(d.amount, 0);
end
$$;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
