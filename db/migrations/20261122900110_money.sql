-- migrate:up
-- Money in: top-ups, adjustments, grants.

set local role keyledger_owner;

-- The seq of the entry that used a reference, under the account's lock: null when it is new,
-- refused when its content differs. `amount` null: any.
create or replace function data.first_try(
  account_id uuid,
  kind text,
  amount numeric,
  reference text,
  metadata jsonb default null,
  refund_of_seq bigint default null,
  refund_of_usage_id uuid default null
)
returns bigint
language plpgsql
set enable_seqscan = off
as $$
declare
  v_first data.billing_transaction;
begin
  perform data.require_reference(reference);
  select t.* into v_first from data.billing_transaction t
  where t.account_id = first_try.account_id and t.reference = first_try.reference;
  if found
    and (v_first.kind, v_first.refund_of_seq, v_first.refund_of_usage_id, v_first.metadata, v_first.amount)
      is distinct from (first_try.kind, first_try.refund_of_seq, first_try.refund_of_usage_id, first_try.metadata,
        coalesce(first_try.amount, v_first.amount)::data.money)
  then
    perform data.refuse(409, 'reference_mismatch',
      'reference is used by entry ' || v_first.seq || ' with other content',
      'use a new reference, or repeat the first call exactly');
  end if;
  return v_first.seq;
end
$$;

-- Posts one rare entry, or finds its first try; checks the version the caller decided on. Answers
-- the entry as shown.
create or replace function data.post_one(
  account_id uuid,
  kind text,
  balance_delta numeric default 0,
  free_credit_delta numeric default 0,
  credit_limit numeric default null,
  reference text default null,
  reason text default null,
  metadata jsonb default null,
  expected_version bigint default null
)
returns api.billing_transactions
language plpgsql
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
as $$
declare
  v_account data.account_balance := data.lock_account(post_one.account_id);
  v_seq bigint := data.first_try(post_one.account_id, post_one.kind, balance_delta + free_credit_delta,
    post_one.reference, post_one.metadata);
begin
  if v_seq is null and expected_version <> v_account.balance_version then
    perform data.refuse(409, 'version_conflict', 'balance_version is ' || v_account.balance_version,
      'read the account again');
  end if;
  if v_seq is null then
    v_account := data.post(v_account, post_one.kind, balance_delta => post_one.balance_delta,
      free_credit_delta => post_one.free_credit_delta, credit_limit => post_one.credit_limit,
      reference => post_one.reference, reason => post_one.reason, metadata => post_one.metadata);
    v_seq := v_account.balance_version;
  end if;
  return data.shown(post_one.account_id, v_seq);
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
  return data.post_one(
    account_id, 'top_up', balance_delta => amount, reference => reference, reason => reason, metadata => metadata);
end
$$;
comment on function api.top_up(uuid, numeric, text, text, jsonb) is
'Adds paid money to an account; debt is paid first.
Adds `amount` to `account_id`; `reason` and `metadata` are kept with the entry. `reference` is the
payment''s id: repeated with the same content it answers the first entry, with other content 409
reference_mismatch. Answers the ledger entry. 404 account_not_found; 422 invalid_amount.';
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
  return data.post_one(
    account_id, 'adjustment', balance_delta => amount, reference => reference, reason => reason, metadata => metadata,
    expected_version => expected_version);
end
$$;
comment on function api.adjust_balance(uuid, numeric, text, text, bigint, jsonb) is
'Corrects an account by a signed amount, with a reason.
Adds `amount`, which may be negative, to `account_id`; `reason` and `metadata` are kept with the
entry, `reference` makes it repeatable. An amount below 0 that goes beyond the credit limit becomes
debt. `expected_version` is the balance_version the decision was made on: 409 version_conflict if
the account has moved. Answers the ledger entry. 404 account_not_found; 409 reference_mismatch; 422
invalid_amount, invalid_reason.';
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
    perform data.refuse(422, 'invalid_expires_at', 'expires_at must be a moment in the future',
      'leave it out for credit that does not expire');
  end if;
  if priority is null then
    perform data.refuse(422, 'invalid_priority', 'priority must be an integer',
      'lower numbers are spent first; the default is 100');
  end if;
  return data.post_one(
    account_id, 'credit_grant', free_credit_delta => amount, reference => reference, reason => reason,
    metadata => jsonb_build_object('priority', priority, 'expires_at', extract(epoch from expires_at)));
end
$$;
comment on function api.grant_credit(uuid, numeric, timestamptz, integer, text, text) is
'Gives promotional credit, spent before paid money; debt is paid first.
Grants `amount` to `account_id`; `reason` is kept with the entry, `reference` makes it repeatable.
Spent lowest `priority` first, then soonest `expires_at`, then oldest; the rest at `expires_at`
expires by itself. Answers the ledger entry. 404 account_not_found; 409 reference_mismatch; 422
invalid_amount, invalid_expires_at, invalid_priority.';
grant execute on function api.grant_credit(uuid, numeric, timestamptz, integer, text, text) to keyledger_operator;


reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
