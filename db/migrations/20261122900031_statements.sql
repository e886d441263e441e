-- migrate:up
-- Statements: a period's entries by seq, sealed.

set local role keyledger_owner;

create or replace view api.accounting_snapshots with (security_barrier) as
select s.* from data.accounting_snapshot s where (select v.sees_all from data.viewer v)
union all
select s.* from data.accounting_snapshot s
where s.account_id = any (array(select v.account_id from data.visible_account v where v.whole));
comment on view api.accounting_snapshots is 'Sealed statements.';
grant select on api.accounting_snapshots to keyledger_operator, keyledger_member;
create or replace trigger append_only before update or delete on data.accounting_snapshot
  for each row execute function data.forbid_change();
create or replace trigger append_only_truncate before truncate on data.accounting_snapshot
  for each statement execute function data.forbid_change();

-- The last entry posted before a moment, 0 if there is none, null if there is no account: entries are gapless and never older than
-- the one before, so it is found by halving.
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

-- What had expired by a moment and is not among the entries up to `seq`, the last one before it: not posted yet, or by the next
-- posting after the moment, which settles what is due before anything else. Counted from the last entry: the one that was being
-- posted as a grant expired, and at most one for each grant.
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

create or replace function api.balance_at(
  inout account_id uuid,
  inout at timestamptz,
  out seq bigint,
  out balance numeric,
  out free_credit numeric,
  out outstanding_amount numeric,
  out credit_limit numeric
)
returns record
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
begin
  if at is null or not isfinite(at) or at > clock_timestamp() then
    perform data.refuse(422, 'invalid_at', 'at must be a moment that has passed', 'send a timestamp with its time zone');
  end if;
  seq := data.seq_before(account_id, at);
  if seq is null then
    perform data.refuse(404, 'account_not_found', 'account ' || coalesce(account_id::text, 'null'),
      'account_id is the id of the tenant or user that pays');
  end if;
  select t.balance_after, t.free_credit_after - x.due, t.outstanding_after, t.credit_limit_after
  into balance, free_credit, outstanding_amount, credit_limit
  from data.billing_transaction t
  cross join (
    select coalesce(sum(d.amount), 0) as due from data.expiries_due(balance_at.account_id, balance_at.seq, balance_at.at) d
  ) x
  where t.account_id = balance_at.account_id and t.seq = balance_at.seq;
  if not found then
    select z, z, z, z into balance, free_credit, outstanding_amount, credit_limit from (select 0::data.money as z) z;
  end if;
end
$$;
comment on function api.balance_at(uuid, timestamptz) is
'An account''s figures as of a moment: after every entry posted before it, less the free credit that had expired by then.
Answers {account_id, at, seq, balance, free_credit, outstanding_amount, credit_limit}, all 0 before the first entry; at a
statement''s period_end it is that statement''s closing. 404 account_not_found; 422 invalid_at (in the future, for one).';
grant execute on function api.balance_at(uuid, timestamptz) to keyledger_operator;

-- Waits until whoever holds the account's lock is done, and keeps nothing: what is posted from then on is of a later moment.
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

-- What was used in a range of entries, by node and meter. A meter's cost is exact but for its own rounding; `rounding` is what the
-- rounding of each event adds, so that `cost` is the sum of what the entries charged.
create or replace function data.usage_of(
  account_id uuid,
  first_seq bigint,
  last_seq bigint,
  out usage jsonb,
  out events bigint
)
returns record
language plpgsql
stable
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
as $$
begin
  with event as materialized (
    select l.config_node_id, l.price_ids, l.meters, l.cost
    from data.billing_transaction t
    cross join lateral generate_series(1, octet_length(t.usage_list), 32) n
    -- by key, each: there is no other way to an entry's rows
    cross join lateral (
      select * from data.usage_log b
      where b.account_id = t.account_id and b.id = encode(substr(t.usage_list, n, 16), 'hex')::uuid offset 0
    ) l
    where t.account_id = usage_of.account_id and t.seq between first_seq and last_seq
  ), quantity as (
    select e.config_node_id, e.price_ids, m.key as meter, sum(m.value::numeric) as quantity
    from event e
    cross join lateral jsonb_each(e.meters) m
    group by 1, 2, 3
  ), metered as (
    select q.config_node_id, q.meter, trim_scale(sum(q.quantity)) as quantity,
      data.to_cost(coalesce(sum(data.cost_steps(q.quantity, p.unit_price, p.unit_size)), 0)) as cost
    from quantity q
    left join lateral (
      select p.unit_price, p.unit_size from data.price p where p.id = any (q.price_ids) and p.meter = q.meter
    ) p on true
    group by 1, 2
  ), node as (
    select e.config_node_id, count(*) as events, sum(e.cost) as cost from event e group by 1
  )
  select jsonb_agg(jsonb_build_object(
      'config_node_id', n.config_node_id,
      'name', c.name,
      'provider', c.provider,
      'model', c.model,
      'events', n.events,
      'cost', n.cost::data.money::text,
      'rounding', (n.cost - m.cost)::data.money::text,
      'meters', m.meters
    ) order by c.name, n.config_node_id),
    sum(n.events)
  into usage, events
  from node n
  join (
    select m.config_node_id, sum(m.cost) as cost,
      jsonb_object_agg(m.meter, jsonb_build_object('quantity', m.quantity::text, 'cost', m.cost::data.money::text)) as meters
    from metered m
    group by 1
  ) m using (config_node_id)
  left join lateral (select * from data.config_node b where b.id = n.config_node_id offset 0) c on true;
end
$$;

-- Seals what one account did until a moment, from where its last statement ends; does nothing if that is where it ends.
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
  v_last data.billing_transaction;
  v_paid numeric;
  v_events bigint;
  v_found bigint;
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
        perform data.refuse(409, 'period_is_sealed', 'account ' || account_id || ' is sealed until ' || v_previous.period_end,
          'close a later period, or one that was closed before');
      end if;
      return;
    end if;
    perform data.await_postings(account_id);
    if (select a.head_at from data.account_balance a where a.account_id = seal.account_id) > clock_timestamp() + interval '1 minute' then
      perform data.refuse(409, 'account_is_ahead', 'account ' || account_id || ' has entries of a time to come: the server''s clock was ahead',
        'close the other accounts by `after`; close this one when that time has come');
    end if;

    -- names as they are now: a statement is not to change with them
    select a.account_id, coalesce(v_previous.period_end, a.created_at), a.currency, coalesce(t.name, u.display_name)
    into v_sealed.account_id, v_sealed.period_start, v_sealed.currency, v_sealed.owner_name
    from data.account_balance a
    left join data.tenant t on t.id = a.owner_tenant_id
    left join data.user_profile u on u.id = a.owner_user_id
    where a.account_id = seal.account_id;
    v_sealed.period_end := seal.period_end;
    v_sealed.first_seq := coalesce(v_previous.last_seq, 0) + 1;
    v_sealed.last_seq := greatest(data.seq_before(account_id, seal.period_end), v_sealed.first_seq - 1);
    select * into v_last from data.billing_transaction t where t.account_id = seal.account_id and t.seq = v_sealed.last_seq;
    v_sealed.head_hash := coalesce(v_last.hash, '');

    v_sealed.expiry_due := (
      select coalesce(sum(d.amount), 0) from data.expiries_due(seal.account_id, v_sealed.last_seq, seal.period_end) d);
    v_sealed.balance_opening := coalesce(v_previous.balance_closing, 0);
    v_sealed.free_credit_opening := coalesce(v_previous.free_credit_closing, 0);
    v_sealed.outstanding_opening := coalesce(v_previous.outstanding_closing, 0);
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
      perform data.refuse(409, 'usage_is_incomplete', 'account ' || account_id || ': ' || v_events || ' events were charged, '
        || coalesce(v_found, 0) || ' are logged', 'verify_balances says which; close the other accounts by `after`');
    end if;
    v_sealed.usage := coalesce(v_sealed.usage, '[]');
    v_sealed.sealed_at := clock_timestamp();

    insert into data.accounting_snapshot select v_sealed.* on conflict do nothing;
    exit when found;
    -- another call sealed it meanwhile
  end loop;
end
$$;

-- What each kind of entry did in a statement's range, by the clock: an expiry counts where its moment was, not where its entry is, and
-- once for each grant, since one entry may be of several.
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
begin
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
      select t.kind::text, case when t.kind = 'credit_expiry' then jsonb_array_length(t.metadata -> 'grant_seq') else 1 end,
        t.amount, t.balance_delta, t.free_credit_delta, t.outstanding_delta, t.usage_count
      from data.billing_transaction t
      where t.account_id = statement.account_id and t.seq between statement.first_seq and statement.last_seq
      union all
      select 'credit_expiry', -1, d.amount, 0, d.amount, 0, 0
      from data.expiries_due(statement.account_id, statement.first_seq - 1, statement.period_start) d
      union all
      select 'credit_expiry', 1, -d.amount, 0, -d.amount, 0, 0
      from data.expiries_due(statement.account_id, statement.last_seq, statement.period_end) d
    ) as e (kind, entries, amount, balance, free_credit, outstanding, events)
    group by e.kind
  ) m;
end
$$;

create or replace function api.close_period(
  period_end timestamptz,
  after uuid default null,
  "limit" integer default 100
)
returns setof api.accounting_snapshots
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '4s'
as $$
#variable_conflict use_column
declare
  v_ids uuid[];
begin
  if close_period.period_end is null or not isfinite(close_period.period_end) or close_period.period_end > clock_timestamp() then
    perform data.refuse(422, 'invalid_period_end', 'period_end must be a moment that has passed',
      'send the moment the period ended, with its time zone');
  end if;
  if "limit" is null or "limit" not between 1 and 10000 then
    perform data.refuse(422, 'invalid_limit', 'limit must be 1 to 10000', 'an account takes milliseconds, a busy one seconds');
  end if;
  v_ids := array(
    select a.account_id
    from data.account_balance a
    where (a.account_id > after or after is null) and a.created_at < close_period.period_end
    order by a.account_id
    limit close_period."limit");
  for i in 1 .. cardinality(v_ids) loop
    perform data.seal(v_ids[i], close_period.period_end);
  end loop;
  return query
  select s.* from data.accounting_snapshot s
  where s.account_id = any (v_ids) and s.period_end = close_period.period_end
  order by s.account_id;
end
$$;
comment on function api.close_period(timestamptz, uuid, integer) is
'Seals a statement for each account: what it did until period_end, from where its last statement ended, or from its opening.
A page of accounts, in account_id order: `after` is the last account_id of the page before, `limit` how many (100); an empty page is the
end. Repeated, it answers the same rows and changes nothing. Entries belong to the period they were posted in; charges go on meanwhile.
409 period_is_sealed (before the last one sealed), usage_is_incomplete, account_is_ahead (dated by a clock that was ahead); 422 invalid_period_end (in the future, for one), invalid_limit.';
grant execute on function api.close_period(timestamptz, uuid, integer) to keyledger_operator;

create or replace function api.statement(
  account_id uuid,
  period_start timestamptz
)
returns jsonb
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_sealed api.accounting_snapshots;
  v_statement jsonb;
begin
  -- the view decides who may see it
  select * into v_sealed
  from api.accounting_snapshots s
  where s.account_id = statement.account_id and s.period_start = statement.period_start;
  if not found then
    perform data.refuse(404, 'statement_not_found',
      'account ' || coalesce(account_id::text, 'null') || ' from ' || coalesce(period_start::text, 'null'),
      'accounting_snapshots lists the statements; period_start must be exact');
  end if;

  select jsonb_build_object(
    'account_id', v_sealed.account_id,
    'owner', case when a.owner_tenant_id is null then 'user' else 'tenant' end,
    'owner_name', v_sealed.owner_name,
    'currency', v_sealed.currency,
    'period_start', v_sealed.period_start,
    'period_end', v_sealed.period_end,
    'opening', jsonb_build_object(
      'balance', v_sealed.balance_opening::text,
      'free_credit', v_sealed.free_credit_opening::text,
      'outstanding_amount', v_sealed.outstanding_opening::text),
    'closing', jsonb_build_object(
      'balance', v_sealed.balance_closing::text,
      'free_credit', v_sealed.free_credit_closing::text,
      'outstanding_amount', v_sealed.outstanding_closing::text,
      'overdue_amount', v_sealed.overdue_amount::text,
      'credit_limit', coalesce(l.credit_limit_after, 0)::data.money::text),
    'movements', v_sealed.movements,
    'entries', coalesce((
      select jsonb_agg(e.entry order by e.at, e.seq)
      from (
        select e.created_at as at, e.seq, jsonb_build_object(
          'seq', e.seq, 'at', e.created_at, 'kind', e.kind, 'amount', coalesce(-g.amount, e.amount)::text, 'reference', e.reference,
          'reason', e.reason, 'refund_of_seq', e.refund_of_seq, 'refund_of_usage_id', e.refund_of_usage_id, 'grant_seq', g.grant_seq,
          'credit_limit', case when e.kind = 'limit_change' then e.credit_limit_after::text end) as entry
        from data.billing_transaction e
        left join lateral (
          select d.grant_seq, d.amount, c.expires_at
          from data.grant_draw d
          join data.credit_grant c on c.account_id = d.account_id and c.seq = d.grant_seq
          where e.kind = 'credit_expiry' and d.account_id = e.account_id and d.seq = e.seq
        ) g on true
        where e.account_id = v_sealed.account_id and e.seq between v_sealed.first_seq and v_sealed.last_seq and e.kind <> 'usage'
          -- the statement before has it
          and (g.expires_at > v_sealed.period_start) is not false
        union all
        select d.expired_at, v_sealed.last_seq + 1, jsonb_build_object(
          'seq', null, 'at', d.expired_at, 'kind', 'credit_expiry', 'amount', (-d.amount)::data.money::text, 'reference', null,
          'reason', null, 'refund_of_seq', null, 'refund_of_usage_id', null, 'grant_seq', d.grant_seq, 'credit_limit', null)
        from data.expiries_due(v_sealed.account_id, v_sealed.last_seq, v_sealed.period_end) d
        where d.expired_at > v_sealed.period_start
      ) e
    ), '[]'),
    'usage', v_sealed.usage,
    'first_seq', v_sealed.first_seq,
    'last_seq', v_sealed.last_seq,
    'head', encode(v_sealed.head_hash, 'hex'),
    'previous_head', encode(coalesce(p.hash, ''), 'hex'),
    'sealed_at', v_sealed.sealed_at)
  into v_statement
  from data.account_balance a
  left join data.billing_transaction l on l.account_id = a.account_id and l.seq = v_sealed.last_seq
  left join data.billing_transaction p on p.account_id = a.account_id and p.seq = v_sealed.first_seq - 1
  where a.account_id = v_sealed.account_id;
  return v_statement;
end
$$;
comment on function api.statement(uuid, timestamptz) is
'One sealed statement as a document.
Answers {account_id, owner, owner_name, currency, period_start, period_end, opening, closing, movements, entries, usage, first_seq, last_seq,
head, previous_head, sealed_at}; amounts are decimal strings. opening plus the movements of each kind is closing, bucket by bucket.
`entries` are those that are not usage; an expiry stands where its moment was, with seq null if its entry came after the period. In
`usage`, per node, the cost of the meters plus `rounding` (events are rounded one by one) is `cost`. `head` is the chain''s hash at
last_seq. Names are those of when it was sealed. 404 statement_not_found.';
grant execute on function api.statement(uuid, timestamptz) to keyledger_operator, keyledger_member;

reset role;

-- migrate:down
do $$
begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. Nothing was changed; restore a backup to go back';
end
$$;
