-- migrate:up
-- Statements: a period's entries by seq, sealed.

set local role keyledger_owner;

create or replace view api.accounting_snapshots with (security_barrier) as
select s.account_id, s.period_start, s.period_end, s.first_seq, s.last_seq, s.owner_name, s.currency,
  s.balance_opening, s.free_credit_opening, s.outstanding_opening, s.balance_closing, s.free_credit_closing,
  s.outstanding_closing, s.expiry_due, s.overdue_amount, s.movements, s.usage, s.head_hash, s.sealed_at
from data.accounting_snapshot s
where (select v.sees_all from data.viewer v)
union all
select s.account_id, s.period_start, s.period_end, s.first_seq, s.last_seq, s.owner_name, s.currency,
  s.balance_opening, s.free_credit_opening, s.outstanding_opening, s.balance_closing, s.free_credit_closing,
  s.outstanding_closing, s.expiry_due, s.overdue_amount, s.movements, s.usage, s.head_hash, s.sealed_at
from data.accounting_snapshot s
where s.account_id = any (array(select v.account_id from data.visible_account v where v.whole));
comment on view api.accounting_snapshots is 'Sealed statements.';
grant select on api.accounting_snapshots to keyledger_operator, keyledger_member;
create or replace trigger append_only before update or delete on data.accounting_snapshot
  for each row execute function data.forbid_change();
create or replace trigger append_only_truncate before truncate on data.accounting_snapshot
  for each statement execute function data.forbid_change();

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
declare
  v_due numeric;
begin
  if at is null or not isfinite(at) or at > clock_timestamp() then
    perform data.refuse(422, 'invalid_at', 'at must be a moment that has passed',
      'send a timestamp with its time zone');
  end if;
  seq := data.seq_before(account_id, at);
  if seq is null then
    perform data.refuse(404, 'account_not_found', 'account ' || coalesce(account_id::text, 'null'),
      'account_id is the id of the tenant or user that pays');
  end if;
  v_due := (select coalesce(sum(d.amount), 0) from data.expiries_due(account_id, seq, at) d);
  select t.balance_after, t.free_credit_after - v_due, t.outstanding_after, t.credit_limit_after
  into balance, free_credit, outstanding_amount, credit_limit
  from data.billing_transaction t
  where t.account_id = balance_at.account_id and t.seq = balance_at.seq;
  if not found then
    select z, z, z, z into balance, free_credit, outstanding_amount, credit_limit from (select 0::data.money as z) z;
  end if;
end
$$;
comment on function api.balance_at(uuid, timestamptz) is
'An account''s figures as of a moment: all entries before it, less the free credit that had expired.
Answers {account_id, at, seq, balance, free_credit, outstanding_amount, credit_limit}, all 0 before
the first entry; at a statement''s period_end it is that statement''s closing. 404
account_not_found; 422 invalid_at (in the future, for one).';
grant execute on function api.balance_at(uuid, timestamptz) to keyledger_operator;

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
  if close_period.period_end is null or not isfinite(close_period.period_end)
    or close_period.period_end > clock_timestamp()
  then
    perform data.refuse(422, 'invalid_period_end', 'period_end must be a moment that has passed',
      'send the moment the period ended, with its time zone');
  end if;
  if "limit" is null or "limit" not between 1 and 10000 then
    perform data.refuse(422, 'invalid_limit', 'limit must be 1 to 10000',
      'an account takes milliseconds, a busy one seconds');
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
'Seals a statement for each account: its entries since its last statement, until period_end.
A page of accounts, in account_id order: `after` is the last account_id of the page before, `limit`
how many (100); an empty page is the end. Repeated, it answers the same rows and changes nothing.
Entries belong to the period they were posted in; charges go on meanwhile. 409 period_is_sealed
(before the last one sealed), usage_is_incomplete, account_is_ahead (dated by a clock that was
ahead); 422 invalid_period_end (in the future, for one), invalid_limit.';
grant execute on function api.close_period(timestamptz, uuid, integer) to keyledger_operator;

-- The entries of a statement that are not usage, in the order of their moments: an expiry counts
-- where its moment was.
create or replace function data.statement_entries(statement data.accounting_snapshot)
returns jsonb
language plpgsql
stable
as $$
begin
  return coalesce((
    select jsonb_agg(e.entry order by e.at, e.seq)
    from (
      select e.created_at as at, e.seq, jsonb_build_object(
        'seq', e.seq, 'at', e.created_at, 'kind', e.kind, 'amount', coalesce(-g.amount, e.amount)::text,
        'reference', e.reference, 'reason', e.reason, 'refund_of_seq', e.refund_of_seq, 'refund_of_usage_id',
          e.refund_of_usage_id,
        'grant_seq', g.grant_seq, 'credit_limit', case when e.kind = 'limit_change'
          then e.credit_limit_after::text end) as entry
      from data.billing_transaction e
      left join lateral (
        select d.grant_seq, d.amount, c.expires_at
        from data.grant_draw d
        join data.credit_grant c on c.account_id = d.account_id and c.seq = d.grant_seq
        where e.kind = 'credit_expiry' and d.account_id = e.account_id and d.seq = e.seq
      ) g on true
      where e.account_id = statement.account_id and e.seq between statement.first_seq and statement.last_seq
        and e.kind <> 'usage'
        -- the statement before has the others
        and (g.expires_at > statement.period_start) is not false
      union all
      select d.expired_at, statement.last_seq + 1, jsonb_build_object(
        'seq', null, 'at', d.expired_at, 'kind', 'credit_expiry', 'amount', (-d.amount)::data.money::text,
          'reference', null,
        'reason', null, 'refund_of_seq', null, 'refund_of_usage_id', null, 'grant_seq', d.grant_seq, 'credit_limit',
          null)
      from data.expiries_due(statement.account_id, statement.last_seq, statement.period_end) d
      where d.expired_at > statement.period_start
    ) e
  ), '[]');
end
$$;

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
  v_sealed data.accounting_snapshot;
  v_entries jsonb;
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

  v_entries := data.statement_entries(v_sealed);
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
    'entries', v_entries,
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
Answers {account_id, owner, owner_name, currency, period_start, period_end, opening, closing,
movements, entries, usage, first_seq, last_seq, head, previous_head, sealed_at}; amounts are decimal
strings. opening plus the movements of each kind is closing, bucket by bucket. `entries` are those
that are not usage; an expiry stands where its moment was, with seq null if its entry came after the
period. In `usage`, per node, the cost of the meters plus `rounding` (events are rounded one by one)
is `cost`. `head` is the chain''s hash at last_seq. Names are as they were at `sealed_at`. 404
statement_not_found.';
grant execute on function api.statement(uuid, timestamptz) to keyledger_operator, keyledger_member;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
