-- migrate:up
-- Verification: every figure against the rows it comes from, and the chain of hashes.

set local role keyledger_owner;

-- accounts: figures against the sums of their deltas, open holds, live grants and the last entry
create or replace function data.verify_figures(for_account_id uuid)
returns table (
  account_id uuid,
  problem text,
  seq bigint,
  expected text,
  actual text
)
language plpgsql
stable
as $$
declare
  v_now timestamptz := clock_timestamp();
begin
  return query
  with total as (
    select t.account_id, count(*) as entries, max(t.seq) as last_seq, sum(t.balance_delta) as balance,
      sum(t.free_credit_delta) as free_credit, sum(t.outstanding_delta) as outstanding,
      max(t.created_at) filter (where t.kind = 'usage') as charged_at
    from data.billing_transaction t
    where for_account_id is null or t.account_id = for_account_id
    group by t.account_id
  ), frozen as (
    select h.account_id, sum(h.amount - h.captured) as amount
    from data.hold h
    where h.status in ('open', 'parked') and (for_account_id is null or h.account_id = for_account_id)
    group by h.account_id
  ), granted as (
    select g.account_id, sum(g.remaining) as amount
    from data.credit_grant g
    where for_account_id is null or g.account_id = for_account_id
    group by g.account_id
  )
  select coalesce(a.account_id, t.account_id, f.account_id, g.account_id), c.problem, null::bigint, c.expected, c.actual
  from (
    select b.* from data.account_balance b where for_account_id is null or b.account_id = for_account_id
  ) a
  full join total t on t.account_id = a.account_id
  full join frozen f on f.account_id = coalesce(a.account_id, t.account_id)
  full join granted g on g.account_id = coalesce(a.account_id, t.account_id, f.account_id)
  left join data.billing_transaction l on l.account_id = a.account_id and l.seq = a.balance_version
  cross join lateral (
    values
      ('account is missing', null, null, a.account_id is null),
      ('balance is not the sum of its deltas', coalesce(t.balance, 0), a.balance, null),
      ('free_credit is not the sum of its deltas', coalesce(t.free_credit, 0), a.free_credit, null),
      ('outstanding_amount is not the sum of its deltas', coalesce(t.outstanding, 0), a.outstanding_amount, null),
      ('frozen_balance is not the sum of open holds', coalesce(f.amount, 0), a.frozen_balance, null),
      ('free_credit is not the sum of live grants', coalesce(g.amount, 0), a.free_credit, null),
      ('balance_version is not the last seq', coalesce(t.last_seq, 0), a.balance_version, null),
      ('seq has gaps', coalesce(t.last_seq, 0), coalesce(t.entries, 0), null),
      ('credit_limit is not the last entry''s', coalesce(l.credit_limit_after, 0), a.credit_limit, null)
  ) as v (problem, should_be, held, is_bad)
  cross join lateral (select v.problem, v.should_be::text as expected, v.held::text as actual where coalesce(v.is_bad, v.should_be <> v.held)) c

  union all
  select a.account_id, c.problem, null, c.expected, c.actual
  from data.account_balance a
  left join data.billing_transaction l on l.account_id = a.account_id and l.seq = a.balance_version
  left join total t on t.account_id = a.account_id
  cross join lateral (
    select 'head is not the last entry''s hash' as problem, encode(coalesce(l.hash, ''), 'hex') as expected, encode(a.head_hash, 'hex') as actual
    where a.head_hash <> coalesce(l.hash, '')
    union all
    select 'head_at is not the last entry''s time', coalesce(l.created_at, '-infinity')::text, a.head_at::text
    where a.head_at <> coalesce(l.created_at, '-infinity')
    union all
    select 'last_charged_at is not the last charge''s time', t.charged_at::text, a.last_charged_at::text
    where a.last_charged_at is distinct from t.charged_at
    union all
    select 'head_at is in the future', 'at most ' || v_now::text, a.head_at::text
    where a.head_at > v_now + interval '1 minute'
    union all
    select 'figures are not in normal form', 'debt only when free credit and balance are spent', null
    where a.balance < -a.credit_limit or (a.outstanding_amount > 0 and (a.free_credit <> 0 or a.balance <> -a.credit_limit))
  ) c
  where for_account_id is null or a.account_id = for_account_id;
end
$$;

-- the ledger: each entry by itself, against the one before, and against what it gives back
create or replace function data.verify_entries(for_account_id uuid)
returns table (
  account_id uuid,
  problem text,
  seq bigint,
  expected text,
  actual text
)
language plpgsql
stable
as $$
begin
  return query
  select e.account_id, c.problem, e.seq, c.expected, c.actual
  from (
    select t.*,
      lag(t.hash) over w as previous_hash, lag(t.created_at) over w as previous_at, lag(t.balance_after) over w as previous_balance,
      lag(t.free_credit_after) over w as previous_free_credit, lag(t.outstanding_after) over w as previous_outstanding
    from (
      select t.account_id, t.seq, t.prev_hash, t.hash, t.created_at, t.balance_after, t.balance_delta, t.free_credit_after,
        t.free_credit_delta, t.outstanding_after, t.outstanding_delta, data.entry_hash(t) as content_hash,
        data.broken_fact(t.seq, t.kind, t.amount, t.balance_delta, t.free_credit_delta, t.outstanding_delta, t.balance_after,
          t.free_credit_after, t.outstanding_after, t.credit_limit_after, t.usage_count, octet_length(t.usage_list),
          t.refund_of_seq, t.refund_of_usage_id, t.prev_hash = '') as broken_fact
      from data.billing_transaction t
      where for_account_id is null or t.account_id = for_account_id
    ) t
    window w as (partition by t.account_id order by t.seq)
  ) e
  cross join lateral (
    select 'entry was altered' as problem, encode(e.hash, 'hex') as expected, encode(e.content_hash, 'hex') as actual
    where e.content_hash <> e.hash
    union all
    select 'chain is broken', encode(coalesce(e.previous_hash, ''), 'hex'), encode(e.prev_hash, 'hex')
    where e.prev_hash <> coalesce(e.previous_hash, '')
    union all
    select 'entry is not as entries are', e.broken_fact, null
    where e.broken_fact is not null
    union all
    select 'entry is older than the one before', 'at least ' || e.previous_at::text, e.created_at::text
    where e.created_at < e.previous_at
    union all
    select 'entry does not follow from the one before: ' || f.figure, f.should_be::text, f.held::text
    from (
      values
        ('balance', coalesce(e.previous_balance, 0) + e.balance_delta, e.balance_after),
        ('free_credit', coalesce(e.previous_free_credit, 0) + e.free_credit_delta, e.free_credit_after::numeric),
        ('outstanding', coalesce(e.previous_outstanding, 0) + e.outstanding_delta, e.outstanding_after::numeric)
    ) as f (figure, should_be, held)
    where f.should_be <> f.held
  ) c;

  return query
  select r.account_id, 'more came back than was charged or topped up', r.refund_of_seq, 'at most ' || abs(o.amount)::text, r.amount::text
  from (
    select t.account_id, t.refund_of_seq, sum(abs(t.amount)) as amount
    from data.billing_transaction t
    where t.refund_of_seq is not null and (for_account_id is null or t.account_id = for_account_id)
    group by t.account_id, t.refund_of_seq
  ) r
  left join data.billing_transaction o on o.account_id = r.account_id and o.seq = r.refund_of_seq
  where coalesce(r.amount > abs(o.amount), true)

  union all
  select l.account_id, 'more came back than the event cost', l.transaction_seq, 'at most ' || l.cost::text, r.amount::text
  from (
    select t.account_id, t.refund_of_usage_id as usage_id, sum(t.amount) as amount
    from data.billing_transaction t
    where t.refund_of_usage_id is not null and (for_account_id is null or t.account_id = for_account_id)
    group by t.account_id, t.refund_of_usage_id
  ) r
  join data.usage_log l on l.account_id = r.account_id and l.id = r.usage_id
  where r.amount > l.cost;
end
$$;

-- free credit: each grant against its entry, its draws and its expiry; each entry's draws against the free credit it spent
create or replace function data.verify_grants(for_account_id uuid)
returns table (
  account_id uuid,
  problem text,
  seq bigint,
  expected text,
  actual text
)
language plpgsql
stable
as $$
begin
  return query
  select coalesce(g.account_id, e.account_id), 'grant is not as its entry says', coalesce(g.seq, e.seq),
    concat_ws(', ', e.amount, e.metadata ->> 'priority', e.metadata ->> 'expires_at'),
    concat_ws(', ', g.amount, g.priority, extract(epoch from g.expires_at))
  from (
    select * from data.billing_transaction t
    where t.kind = 'credit_grant' and (for_account_id is null or t.account_id = for_account_id)
  ) e
  full join (
    select * from data.credit_grant c where for_account_id is null or c.account_id = for_account_id
  ) g on g.account_id = e.account_id and g.seq = e.seq
  where (g.amount, g.priority, extract(epoch from g.expires_at)) is distinct from
    (e.amount, (e.metadata ->> 'priority')::integer, (e.metadata ->> 'expires_at')::numeric)

  union all
  select g.account_id, 'grant is not what is left of its draws', g.seq,
    (g.amount - coalesce(d.amount, 0))::text, g.remaining::text
  from data.credit_grant g
  left join (
    select w.account_id, w.grant_seq, sum(w.amount - w.returned) as amount
    from data.grant_draw w
    where for_account_id is null or w.account_id = for_account_id
    group by w.account_id, w.grant_seq
  ) d on d.account_id = g.account_id and d.grant_seq = g.seq
  where (for_account_id is null or g.account_id = for_account_id)
    and g.remaining <> g.amount - coalesce(d.amount, 0)

  union all
  -- a refund gives back; all else that takes free credit draws it
  select coalesce(e.account_id, d.account_id), 'free credit spent is not what was drawn from grants', coalesce(e.seq, d.seq),
    e.amount::text, d.amount::text
  from (
    select t.account_id, t.seq, case when t.kind = 'credit_grant' then t.amount else 0 end - t.free_credit_delta as amount
    from data.billing_transaction t
    where t.kind <> 'refund' and (for_account_id is null or t.account_id = for_account_id)
  ) e
  full join (
    select w.account_id, w.seq, sum(w.amount) as amount
    from data.grant_draw w
    where for_account_id is null or w.account_id = for_account_id
    group by w.account_id, w.seq
  ) d on d.account_id = e.account_id and d.seq = e.seq
  where coalesce(e.amount, 0) <> coalesce(d.amount, 0);
end
$$;

-- What differs between an entry's list of usage rows and the list of the rows found, in id order. A row that retention dropped
-- (its id is below `first_kept`) is not missing.
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
    case when l.id is null then 'usage row was inserted' when f.id is null then 'usage row is missing' else 'usage row was altered' end,
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

-- usage: each charge against the rows it lists, and no event called charged that isn't
create or replace function data.verify_usage(for_account_id uuid)
returns table (
  account_id uuid,
  problem text,
  seq bigint,
  expected text,
  actual text
)
language plpgsql
stable
as $$
declare
  v_first_kept uuid := data.uuid_floor((data.usage_window_now()).floor);
begin
  return query
  with used as (
    select s.account_id, s.seq, count(*) as events, sum(s.cost) as cost, string_agg(s.seal, '' order by s.id) as list
    from (
      select l.account_id, l.transaction_seq as seq, l.id, l.cost, data.usage_seal(l) as seal
      from data.usage_log l
      where for_account_id is null or l.account_id = for_account_id
    ) s
    group by s.account_id, s.seq
  )
  select coalesce(e.account_id, u.account_id), c.problem, coalesce(e.seq, u.seq), c.expected, c.actual
  from (
    select t.account_id, t.seq, t.amount, t.usage_count, t.usage_list
    from data.billing_transaction t
    where t.usage_list is not null and (for_account_id is null or t.account_id = for_account_id)
  ) e
  full join used u on u.account_id = e.account_id and u.seq = e.seq
  cross join lateral (
    select f.problem, concat_ws(' ', f.usage_id, coalesce(f.expected, 'no row')) as expected,
      concat_ws(' ', f.usage_id, coalesce(f.actual, 'no row')) as actual
    from data.usage_faults(e.usage_list, u.list, v_first_kept) f
    where u.list is distinct from e.usage_list
      -- all dropped by retention: its last row was
      and (u.list is not null or substr(e.usage_list, octet_length(e.usage_list) - 31, 16) >= uuid_send(v_first_kept))
    union all
    select 'charge is not the cost of its usage', u.cost::text, (-e.amount)::text
    where u.events = e.usage_count and u.cost <> -e.amount
  ) c

  union all
  select r.account_id, 'resolved event is not charged', null, r.usage_id::text, null
  from data.parked_usage r
  where r.resolution in ('charged', 'duplicate') and r.usage_id >= v_first_kept and (for_account_id is null or r.account_id = for_account_id)
    and not exists (select from data.usage_log l where l.account_id = r.account_id and l.id = r.usage_id)

  union all
  select h.account_id, 'parked hold waits for no event', null, 'released or captured', h.id::text
  from data.hold h
  where h.status = 'parked' and (for_account_id is null or h.account_id = for_account_id)
    and not exists (
      select from data.parked_usage r where r.account_id = h.account_id and r.hold_id = h.id and r.resolved_at is null)

  union all
  select r.account_id, 'money of a parked event is not set aside', null, r.usage_id::text, h.status
  from data.parked_usage r
  left join data.hold h on h.account_id = r.account_id and h.id = r.hold_id
  where r.hold_id is not null and r.resolved_at is null and (for_account_id is null or r.account_id = for_account_id)
    and h.status is distinct from 'parked';
end
$$;

-- What is wrong with statements, as verify_balances answers it.
create or replace function data.verify_statements(for_account_id uuid default null)
returns table (
  account_id uuid,
  problem text,
  seq bigint,
  expected text,
  actual text
)
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
    where for_account_id is null or s.account_id = for_account_id
  )
  select s.account_id, c.problem, s.last_seq, c.expected, c.actual
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
      ('statement does not follow from the one before: period',
        coalesce((s.previous).period_end, a.created_at)::text, s.period_start::text),
      ('statement does not follow from the one before: seq', (coalesce((s.previous).last_seq, 0) + 1)::text, s.first_seq::text),
      ('statement does not follow from the one before: figures',
        concat_ws(', ', coalesce((s.previous).balance_closing, v_none), coalesce((s.previous).free_credit_closing, v_none),
          coalesce((s.previous).outstanding_closing, v_none)),
        concat_ws(', ', s.balance_opening, s.free_credit_opening, s.outstanding_opening)),
      ('statement does not close with its last entry',
        concat_ws(', ', coalesce(l.balance_after, v_none), coalesce(l.free_credit_after, v_none), coalesce(l.outstanding_after, v_none)),
        concat_ws(', ', s.balance_closing, s.free_credit_closing + s.expiry_due, s.outstanding_closing)),
      ('head of a statement is not its last entry''s hash', encode(coalesce(l.hash, ''), 'hex'), encode(s.head_hash, 'hex')),
      ('statement is not cut at its end', 'true', (
        (s.last_seq = 0 or coalesce(l.created_at < s.period_end, false)) and coalesce(n.created_at >= s.period_end, true))::text),
      ('expiries of a statement are not the grants''', e.due::data.money::text, s.expiry_due::text),
      ('movements of a statement are not its entries''', m.movements::text, s.movements::text),
      ('movements of a statement do not lead to its closing',
        concat_ws(', ', s.balance_closing - s.balance_opening, s.free_credit_closing - s.free_credit_opening,
          s.outstanding_closing - s.outstanding_opening),
        concat_ws(', ', coalesce(v.balance, v_none), coalesce(v.free_credit, v_none), coalesce(v.outstanding, v_none))),
      ('usage of a statement is not its charges',
        concat_ws(', ', m.events, coalesce(-(m.movements #>> '{usage,amount}')::numeric, v_none), coalesce(u.cost, v_none)),
        concat_ws(', ', coalesce(u.events, 0), coalesce(u.cost, v_none), coalesce(u.metered, v_none))),
      ('overdue_amount of a statement is not what was left unpaid',
        greatest(s.outstanding_opening - m.paid, 0)::data.money::text, s.overdue_amount::text)
  ) as c (problem, expected, actual)
  where c.expected <> c.actual;
end
$$;

-- budgets: each counter against the usage log over its window, and whether the account knows that it has any
create or replace function data.verify_budgets(for_account_id uuid)
returns table (
  account_id uuid,
  problem text,
  seq bigint,
  expected text,
  actual text
)
language plpgsql
stable
as $$
declare
  v_floor timestamptz := (data.usage_window_now()).floor;
begin
  return query
  with used as (
    select b.account_id, b.id, w.starts, sum(l.cost) as cost
    from data.budget b
    join data.account_balance a on a.account_id = b.account_id
    join data.usage_log l on l.account_id = b.account_id
      and b.scope_id = case b.scope when 'virtual_key' then l.virtual_key_id when 'user' then l.user_id else b.scope_id end
      and case when isfinite(b.counted_from) then greatest(l.id, l.hold_id) >= data.uuid_floor(b.counted_from) else true end
      and l.id >= data.uuid_floor(b.counted_floor)
    cross join lateral (select data.window_start(b.period, a.time_zone, data.spend_time(l.id, l.hold_id)) as starts offset 0) w
    where (for_account_id is null or b.account_id = for_account_id) and w.starts >= b.counted_from
    group by b.account_id, b.id, w.starts
  ), counted as (
    select s.account_id, s.budget_id as id, s.window_start as starts, s.spent
    from data.budget_spend s
    where for_account_id is null or s.account_id = for_account_id
  )
  select b.account_id, 'budget has not counted the usage of its window', null::bigint,
    concat_ws(' ', b.scope, b.scope_id, b.period, c.starts, coalesce(c.cost, 0)::data.amount), coalesce(c.spent, 0)::data.amount::text
  from (
    select * from used u full join counted n using (account_id, id, starts)
  ) c
  join data.budget b on b.account_id = c.account_id and b.id = c.id
  where case
      -- what retention has dropped was counted, and stays counted
      when c.starts >= v_floor or (b.period = 'total' and b.counted_floor = v_floor) then coalesce(c.cost, 0) <> coalesce(c.spent, 0)
      else coalesce(c.cost, 0) > coalesce(c.spent, 0)
    end

  union all
  select a.account_id, 'has_budgets is not whether there are budgets', null, (b.account_id is not null)::text, a.has_budgets::text
  from data.account_balance a
  left join (select distinct x.account_id from data.budget x) b on b.account_id = a.account_id
  where (for_account_id is null or a.account_id = for_account_id) and a.has_budgets <> (b.account_id is not null);
end
$$;

create or replace function api.verify_balances(
  for_account_id uuid default null
)
returns table (
  account_id uuid,
  problem text,
  seq bigint,
  expected text,
  actual text
)
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
-- planned for the account given, or for all
set plan_cache_mode = force_custom_plan
as $$
begin
  -- stable: all of it reads the snapshot of the one statement that calls it, so that it is true under traffic too
  return query
  select p.account_id, p.problem, p.seq, p.expected, p.actual
  from (
    select * from data.verify_figures(for_account_id)
    union all select * from data.verify_entries(for_account_id)
    union all select * from data.verify_grants(for_account_id)
    union all select * from data.verify_usage(for_account_id)
    union all select * from data.verify_statements(for_account_id)
    union all select * from data.verify_budgets(for_account_id)
  ) p
  order by p.account_id, p.seq nulls first, p.problem, p.expected;
end
$$;
comment on function api.verify_balances(uuid) is
'Proves the ledger: answers one row per problem, none when every figure is proved.
Of one account (`for_account_id`), or of all: figures against the sums of their deltas, frozen against open holds, free credit against
grants, grants against draws and expiries, seq gapless, normal form, the sign of each amount, refunds against what they refund, each entry
against the one before, its hash, charges against their usage rows, statements against the entries they seal, and budgets against the usage
of their windows. Usage that retention dropped is no problem.';
grant execute on function api.verify_balances(uuid) to keyledger_operator;

create or replace function api.verify_ledger(
  account_id uuid,
  expected_head text default null
)
returns setof api.ledger_problem
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_custom_plan
as $$
declare
  v_head text := lower(regexp_replace(expected_head, '^\\x', ''));
  v_account data.account_balance;
  v_first_kept uuid := data.uuid_floor((data.usage_window_now()).floor);
  v_last data.billing_transaction;
  v_head_seq bigint;
  v_contains boolean;
  v_found record;
  v_entry data.billing_transaction;
  v_next data.billing_transaction;
  v_moved boolean;
begin
  if v_head !~ '^([0-9a-f]{64})?$' then
    perform data.refuse(422, 'invalid_expected_head', 'expected_head must be a sha-256 in hex',
      'send the head of an account or of a statement as it was shown');
  end if;
  select * into v_account from data.account_balance a where a.account_id = verify_ledger.account_id;
  select * into v_last from data.billing_transaction t where t.account_id = verify_ledger.account_id order by t.seq desc limit 1;
  if v_account.account_id is null and v_last.account_id is null then
    perform data.refuse(404, 'account_not_found', 'account ' || coalesce(account_id::text, 'null'),
      'account_id is the id of the tenant or user that pays');
  end if;
  if v_head = '' and v_last.account_id is not null then
    perform data.refuse(422, 'invalid_expected_head', 'an empty head is in every ledger, and proves nothing',
      'send the head as it was shown; leave it out if the account had no entries then');
  end if;
  select coalesce(max(t.seq) filter (where t.hash = v_account.head_hash), 0), v_head = '' or coalesce(bool_or(t.hash = decode(v_head, 'hex')), false)
  into v_head_seq, v_contains
  from data.billing_transaction t
  where t.account_id = verify_ledger.account_id;

  -- One pass over the entries in their order, and over the usage rows by their entry; sorts beyond work_mem go to disk.
  -- An entry is whole if its hash is that of its content; it vouches for the hash of the one before.
  select w.seq, w.problem, w.listed, w.present, w.expected, w.actual
  into v_found
  from (
    select
      case
        when e.place <> e.seq and e.seq > 0 then e.place
        when e.seq is null and u.seq <= v_account.balance_version then least(u.seq, coalesce(v_last.seq, 0) + 1)
        else coalesce(e.seq, u.seq)
      end as seq,
      case
        when e.seq is null and u.seq between 1 and v_account.balance_version then 'entry is missing'
        when e.seq is null then 'usage row was inserted'
        when e.seq < 1 then 'entry was inserted'
        when e.seq <> e.place then 'entry is missing'
        when v_head_seq > 0 and e.seq > v_head_seq then 'entry was inserted'
        when not e.is_whole then 'entry was altered'
        when e.next_seq = e.seq + 1 and e.next_prev_hash = e.previous_hash then 'entry was inserted'
        when e.prev_hash <> e.previous_hash then 'entry was altered'
        when e.next_seq = e.seq + 1 and e.next_is_whole and e.next_prev_hash <> e.hash then 'entry was altered'
        else 'usage rows differ'
      end as problem,
      -- the hash that the next entry, or the account, kept of this one
      case
        when e.seq <> e.place then case when e.seq = e.place + 1 then e.prev_hash end
        when e.next_seq = e.seq + 1 then e.next_prev_hash
        else e.hash
      end as expected,
      case when e.seq = e.place then e.content_hash end as actual,
      e.usage_list as listed,
      u.list as present
    from (
      select c.*,
        c.content_hash = c.hash as is_whole,
        row_number() over w as place,
        lag(c.hash, 1, '') over w as previous_hash,
        lead(c.seq) over w as next_seq,
        lead(c.prev_hash) over w as next_prev_hash,
        lead(c.content_hash = c.hash) over w as next_is_whole
      from (
        select t.seq, t.prev_hash, t.hash::bytea as hash, t.usage_list, data.entry_hash(t) as content_hash
        from data.billing_transaction t
        where t.account_id = verify_ledger.account_id
        offset 0 -- or each use would hash again
      ) c
      window w as (order by c.seq)
    ) e
    full join (
      select s.seq, string_agg(s.seal, '' order by s.id) as list
      from (
        select l.transaction_seq as seq, l.id, data.usage_seal(l) as seal
        from data.usage_log l
        where l.account_id = verify_ledger.account_id
      ) s
      group by s.seq
    ) u on u.seq = e.seq
    where e.seq is null
      or e.seq <> e.place
      or (v_head_seq > 0 and e.seq > v_head_seq)
      or not e.is_whole
      or e.prev_hash <> e.previous_hash
      or (e.next_seq = e.seq + 1 and e.next_is_whole and e.next_prev_hash <> e.hash)
      or (u.list is distinct from e.usage_list
        -- not if all were dropped by retention: its last row was
        and (u.list is not null or substr(e.usage_list, octet_length(e.usage_list) - 31, 16) >= uuid_send(v_first_kept))
        and exists (select from data.usage_faults(e.usage_list, u.list, v_first_kept)))
  ) w
  order by w.seq, w.problem like 'usage%', w.expected nulls last
  limit 1;

  if v_found.problem like 'usage%' then
    -- the entry is right, so its list of usage rows is
    return query
    select verify_ledger.account_id, f.problem, v_found.seq, f.usage_id, f.expected, f.actual
    from data.usage_faults(v_found.listed, v_found.present, v_first_kept) f
    limit 1;
  elsif v_found.problem is not null then
    if v_found.problem = 'entry was altered' then
      -- an entry whose hash is right at the next or the last seq was moved there
      select * into v_entry from data.billing_transaction t where t.account_id = verify_ledger.account_id and t.seq = v_found.seq;
      select * into v_next from data.billing_transaction t where t.account_id = verify_ledger.account_id and t.seq = v_found.seq + 1;
      v_entry.seq := v_entry.seq + 1;
      v_next.seq := v_next.seq - 1;
      v_moved := data.entry_hash(v_entry) = v_entry.hash;
      if coalesce(data.entry_hash(v_next) = v_next.hash, false) <> v_moved then
        v_found.problem := case when v_moved then 'entry is missing' else 'entry was inserted' end;
        v_found.expected := v_entry.prev_hash;
      end if;
    end if;
    return query
    select verify_ledger.account_id, v_found.problem, v_found.seq, null::uuid,
      case when v_found.problem <> 'entry was inserted' then encode(v_found.expected, 'hex') end,
      case when v_found.problem <> 'entry is missing' then encode(v_found.actual, 'hex') end;
  elsif v_account.account_id is null then
    return query select verify_ledger.account_id, 'account is missing', null::bigint, null::uuid, null, encode(v_last.hash, 'hex');
  elsif v_account.head_hash <> coalesce(v_last.hash, '') then
    -- the chain ends elsewhere than the account says
    v_moved := v_account.balance_version > coalesce(v_last.seq, 0);
    return query
    select verify_ledger.account_id, case when v_moved then 'entry is missing' else 'entry was altered' end,
      coalesce(v_last.seq, 0) + v_moved::integer, null::uuid, encode(v_account.head_hash, 'hex'),
      case when not v_moved then encode(v_last.hash, 'hex') end;
  end if;
  if not v_contains then
    return query select verify_ledger.account_id, 'head_not_found', null::bigint, null::uuid, v_head, encode(v_account.head_hash, 'hex');
  end if;
end
$$;
comment on function api.verify_ledger(uuid, text) is
'Proves that an account''s history is the one that was recorded: no row when it is.
Walks the chain of `account_id`. Computes each entry''s hash again from the entry before, its content and its list of usage rows, and each
usage row''s place in that list; answers the first thing that differs: `problem` (entry or usage row: was altered, is missing, was
inserted), `seq`, `usage_id` if it is a usage row, and the hashes expected and found. What comes after it is not proven. Usage that
retention dropped is not missing: the entries keep its list. `expected_head` is a head kept elsewhere (of billing_accounts, of a statement;
hex): who rewrites entries and all hashes after them can''t hide it from one who kept a head, `head_not_found`. Which entry they began at is
between the last head that is found and the first that isn''t; the seq of a head is billing_transactions where hash is it. Reads one
snapshot. 404 account_not_found; 422 invalid_expected_head.';
grant execute on function api.verify_ledger(uuid, text) to keyledger_operator;

reset role;

-- migrate:down
do $$
begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. Nothing was changed; restore a backup to go back';
end
$$;
