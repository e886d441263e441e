-- migrate:up
-- Money in: top-ups, adjustments, grants, opening balances.

set local role keyledger_owner;

-- The entry a reference was used for, under the account's lock: null when it is new, refused when it was used for anything else.
-- Amount null: whatever the first try came to.
create or replace function data.first_try(
  entry data.billing_transaction,
  amount numeric
)
returns data.billing_transaction
language plpgsql
set enable_seqscan = off
as $$
declare
  v_first data.billing_transaction;
begin
  if length(entry.reference) not between 1 and 512 then
    perform data.refuse(422, 'invalid_reference', 'reference must have 1 to 512 characters', 'leave it out for no idempotency');
  end if;
  select * into v_first from data.billing_transaction t
  where t.account_id = entry.account_id and t.reference = entry.reference;
  if found
    and (v_first.kind, v_first.refund_of_seq, v_first.refund_of_usage_id, v_first.metadata, v_first.amount)
      is distinct from
      (entry.kind, entry.refund_of_seq, entry.refund_of_usage_id, entry.metadata, coalesce(first_try.amount, v_first.amount)::data.money)
  then
    perform data.refuse(409, 'reference_mismatch', 'reference is used by entry ' || v_first.seq || ' with other content',
      'use a new reference, or repeat the first call exactly');
  end if;
  return v_first;
end
$$;

-- Posts one rare entry, or answers its first try; checks the version the caller decided on. Answers the entry as shown.
create or replace function data.post_one(
  entry data.billing_transaction,
  expected_version bigint default null
)
returns api.billing_transactions
language plpgsql
as $$
declare
  v_account data.account_balance := data.lock_account(entry.account_id);
  v_first data.billing_transaction := data.first_try(entry, entry.balance_delta + entry.free_credit_delta);
begin
  if v_first.seq is not null then
    return data.shown(entry.account_id, v_first.seq);
  end if;
  if expected_version <> v_account.balance_version then
    perform data.refuse(409, 'version_conflict', 'balance_version is ' || v_account.balance_version, 'read the account again');
  end if;
  perform data.post(entries => array[entry]);
  return data.shown(entry.account_id, v_account.balance_version + 1);
end
$$;

create or replace function api.top_up(
  account_id uuid,
  amount numeric,
  reference text default null,
  reason text default null,
  metadata jsonb default null
)
returns api.billing_transactions
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '4s'
as $$
begin
  perform data.require_positive_amount(amount);
  return data.post_one(data.new_entry(
    account_id, 'top_up', balance_delta => amount, reference => reference, reason => reason, metadata => metadata));
end
$$;
comment on function api.top_up(uuid, numeric, text, text, jsonb) is
'Adds paid money to an account; debt is paid first.
Adds `amount` to `account_id`; `reason` and `metadata` are kept with the entry. `reference` is the payment''s id: repeated with the same
content it answers the first entry, with other content 409 reference_mismatch. Answers the ledger entry. 404 account_not_found; 422
invalid_amount.';
grant execute on function api.top_up(uuid, numeric, text, text, jsonb) to keyledger_operator;

create or replace function api.adjust_balance(
  account_id uuid,
  amount numeric,
  reason text,
  reference text default null,
  expected_version bigint default null,
  metadata jsonb default null
)
returns api.billing_transactions
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '4s'
as $$
begin
  if amount is null or not data.is_amount(amount) or amount = 0 then
    perform data.refuse(422, 'invalid_amount', 'amount must not be 0, within 1e12, with at most 10 decimals',
      'send a plain decimal as a string; negative takes money away');
  end if;
  perform data.require_reason('an adjustment', reason);
  return data.post_one(data.new_entry(
    account_id, 'adjustment', balance_delta => amount, reference => reference, reason => reason, metadata => metadata),
    expected_version);
end
$$;
comment on function api.adjust_balance(uuid, numeric, text, text, bigint, jsonb) is
'Corrects an account by a signed amount, with a reason.
Adds `amount`, which may be negative, to `account_id`; `reason` and `metadata` are kept with the entry, `reference` makes it repeatable.
What a negative amount takes beyond the credit limit becomes debt. `expected_version` is the balance_version the decision was made on: 409
version_conflict if the account has moved. Answers the ledger entry. 404 account_not_found; 409 reference_mismatch; 422 invalid_amount,
invalid_reason.';
grant execute on function api.adjust_balance(uuid, numeric, text, text, bigint, jsonb) to keyledger_operator;

create or replace function api.grant_credit(
  account_id uuid,
  amount numeric,
  expires_at timestamptz default null,
  priority integer default 100,
  reference text default null,
  reason text default null
)
returns api.billing_transactions
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '4s'
as $$
begin
  perform data.require_positive_amount(amount);
  if not isfinite(expires_at) or (expires_at <= clock_timestamp() and not exists (
    select from data.billing_transaction t
    where t.account_id = grant_credit.account_id and t.reference = grant_credit.reference))
  then
    perform data.refuse(422, 'invalid_expires_at', 'expires_at must be a moment in the future', 'leave it out for credit that does not expire');
  end if;
  if priority is null then
    perform data.refuse(422, 'invalid_priority', 'priority must be an integer', 'lower numbers are spent first; the default is 100');
  end if;
  return data.post_one(data.new_entry(
    account_id, 'credit_grant', free_credit_delta => amount, reference => reference, reason => reason,
    metadata => jsonb_build_object('priority', priority, 'expires_at', extract(epoch from expires_at))));
end
$$;
comment on function api.grant_credit(uuid, numeric, timestamptz, integer, text, text) is
'Gives promotional credit, spent before paid money; debt is paid first.
Grants `amount` to `account_id`; `reason` is kept with the entry, `reference` makes it repeatable. Spent lowest `priority` first, then
soonest `expires_at`, then oldest; what is left at `expires_at` expires by itself. Answers the ledger entry. 404 account_not_found; 409
reference_mismatch; 422 invalid_amount, invalid_expires_at, invalid_priority.';
grant execute on function api.grant_credit(uuid, numeric, timestamptz, integer, text, text) to keyledger_operator;

-- Reads openings: the account of each, its amounts in full, and the code of what can't be read.
create or replace function data.read_openings(openings jsonb)
returns jsonb
language sql
stable
as $$
  select coalesce(jsonb_agg(jsonb_build_object(
    'ord', r.ord,
    'account_id', a.account_id,
    'balance', r.balance,
    'free_credit', r.free_credit,
    'credit_limit', r.credit_limit,
    'reference', r.opening ->> 'reference',
    -- kept with the entry, so that a retry can be told from another opening
    'asked', jsonb_build_object(
      'balance', r.balance::text, 'free_credit', r.free_credit::text, 'credit_limit', r.credit_limit::text),
    'code', case
      when jsonb_typeof(r.opening) <> 'object' then 'invalid_opening'
      when num_nonnulls(r.opening ->> 'account_id', r.opening ->> 'tenant_external_id', r.opening ->> 'user_external_id') <> 1
        or (r.account_id is null and r.opening ->> 'account_id' is not null) then 'invalid_account_id'
      when a.account_id is null then 'account_not_found'
      when r.balance is null then 'invalid_balance'
      when r.free_credit is null or r.free_credit < 0 then 'invalid_free_credit'
      when r.credit_limit is null or r.credit_limit < 0 then 'invalid_credit_limit'
      when jsonb_typeof(r.opening -> 'reference') not in ('string', 'null')
        or length(r.opening ->> 'reference') not between 1 and 512 then 'invalid_reference'
    end
  ) order by r.ord), '[]')
  from (
    select
      e.ord,
      e.opening,
      data.to_uuid(e.opening ->> 'account_id') as account_id,
      data.to_amount(e.opening ->> 'balance')::data.money as balance,
      data.to_amount(coalesce(e.opening ->> 'free_credit', '0'))::data.money as free_credit,
      data.to_amount(coalesce(e.opening ->> 'credit_limit', '0'))::data.money as credit_limit
    from jsonb_array_elements(openings) with ordinality as e (opening, ord)
    offset 0 -- or each use would parse again
  ) r
  left join lateral (
    select b.account_id from data.account_balance b where b.account_id = r.account_id
    union all
    select t.id from data.tenant t where t.external_id = r.opening ->> 'tenant_external_id'
    union all
    select u.id from data.user_profile u where u.external_id = r.opening ->> 'user_external_id'
    limit 1
  ) a on true
$$;

create or replace function api.record_openings(openings jsonb)
returns jsonb
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '4s'
as $$
declare
  v_read jsonb;
  v_new uuid[];
  v_busy uuid[];
begin
  perform data.require_array('openings', openings);
  v_read := data.read_openings(openings);
  select l.busy into v_busy
  from data.lock_accounts(array(
    select distinct r.account_id from jsonb_to_recordset(v_read) as r (account_id uuid, code text) where r.code is null)) l;
  v_new := array(
    select a.account_id
    from data.account_balance a
    where a.balance_version = 0 and (a.account_id = any (v_busy)) is not true and a.account_id = any (array(
      select r.account_id from jsonb_to_recordset(v_read) as r (account_id uuid, code text) where r.code is null)));

  perform data.post(entries => array(
    select distinct on (r.account_id) data.new_entry(
      r.account_id, 'opening', balance_delta => r.balance, credit_limit => r.credit_limit, reference => r.reference,
      metadata => r.asked)
    from jsonb_to_recordset(v_read) as r (
      ord bigint, account_id uuid, balance data.money, credit_limit data.money, reference text, asked jsonb, code text)
    where r.code is null and r.account_id = any (v_new)
    order by r.account_id, r.ord));
  -- free credit is a grant, as any other; where there is debt, it pays that first
  perform data.post(entries => array(
    select data.new_entry(f.account_id, 'credit_grant', free_credit_delta => f.free_credit, reason => 'opening',
      metadata => '{"priority": 100, "expires_at": null}')
    from (
      select distinct on (r.account_id) r.account_id, r.free_credit
      from jsonb_to_recordset(v_read) as r (ord bigint, account_id uuid, free_credit data.money, code text)
      where r.code is null and r.account_id = any (v_new)
      order by r.account_id, r.ord
    ) f
    where f.free_credit > 0));

  return (
    select coalesce(jsonb_agg(jsonb_strip_nulls(jsonb_build_object(
      'account_id', o.account_id,
      'status', case when o.code = 'account_busy' then 'busy' when o.code is not null then 'refused' when o.is_new then 'opened' else 'duplicate' end,
      'code', o.code,
      'seq', case when o.code is null then 1 end,
      'available', o.available::text)) order by o.ord), '[]')
    from (
      select
        r.ord,
        r.account_id,
        r.account_id = any (v_new) and row_number() over (partition by r.account_id, r.code order by r.ord) = 1 as is_new,
        a.available,
        case
          when r.code is not null then r.code
          when r.account_id = any (v_busy) then 'account_busy'
          when t.kind <> 'opening' then 'account_in_use'
          when (t.reference, t.metadata) is distinct from (r.reference, r.asked) then 'opening_mismatch'
        end as code
      from jsonb_to_recordset(v_read) as r (ord bigint, account_id uuid, reference text, asked jsonb, code text)
      left join lateral (select * from data.account_balance b where b.account_id = r.account_id offset 0) a on true
      left join lateral (
        select * from data.billing_transaction b where b.account_id = r.account_id and b.seq = 1 and r.code is null offset 0
      ) t on true
    ) o
  );
end
$$;
comment on function api.record_openings(jsonb) is
'Opens accounts with what they had elsewhere: each account''s first entry.
Takes `openings`, [{account_id | tenant_external_id | user_external_id, balance, free_credit?, credit_limit?, reference?}] and answers in
the same order [{account_id, status: opened | duplicate | refused | busy, code?, seq, available}], at most 10,000. A negative balance is owed: what exceeds the
credit limit becomes debt. Free credit is granted without an end, and pays debt first. An account opens once: repeated with the same content
it is a duplicate, with other content opening_mismatch; account_in_use: it has other entries already. Others: account_not_found, invalid_….';
grant execute on function api.record_openings(jsonb) to keyledger_operator;

reset role;

-- migrate:down
do $$
begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. Nothing was changed; restore a backup to go back';
end
$$;
