-- migrate:up
-- Accounts: figures and entries as they are now, and the limit of credit.

set local role keyledger_owner;

-- entries as api.billing_transactions shows them, for every reader
-- Functions answer from it; data.key_shown says why.

create or replace view data.entry_shown as
select
  t.account_id, t.seq, t.kind, t.amount, t.balance_delta, t.free_credit_delta, t.outstanding_delta,
  t.balance_after, t.free_credit_after, t.outstanding_after, t.credit_limit_after,
  t.reference, t.actor, t.reason, t.usage_count, sha256(t.usage_list) as usage_digest,
  t.refund_of_seq, t.refund_of_usage_id, t.metadata, t.prev_hash, t.hash, t.created_at,
  case
    when t.kind in ('top_up', 'top_up_reversal') then 'cash'
    when t.kind in ('usage', 'refund') then 'revenue'
    when t.kind in ('credit_grant', 'credit_expiry') then 'promotion'
    when t.kind in ('adjustment', 'opening') then t.kind
  end as counter_account
from data.billing_transaction t;
comment on view data.entry_shown is 'Ledger entries as api.billing_transactions shows them, of every account.';

create or replace view api.account_balances with (security_barrier) as
select
  u.id as user_id, u.external_id, u.tenant_id, a.account_id, a.owner, a.currency, a.balance, a.free_credit,
  a.credit_limit, a.frozen_balance, a.outstanding_amount, a.overdue_amount, a.available, a.balance_version,
  a.last_charged_at
from (
  select u.id, u.external_id, u.tenant_id, u.account_id
  from data.user_profile u
  where (select v.sees_all from data.viewer v)
  union all
  select u.id, u.external_id, u.tenant_id, u.account_id
  from data.visible_user u
  where u.account_id = any (array(select v.account_id from data.visible_account v where v.figures))
) u
cross join lateral (select * from data.account_now n where n.account_id = u.account_id) a;
comment on view api.account_balances is
'Each user''s payer and the payer''s figures: one row per user.
Filter by `user_id`, or by `external_id`, the user''s id in your own system. A tenant''s figures
repeat for each of its users: never sum this view. Select amounts as text: ?select=available::text.';
grant select on api.account_balances to keyledger_gateway, keyledger_operator, keyledger_member;

create or replace view api.billing_accounts with (security_barrier) as
select
  a.account_id, a.owner, a.owner_user_id, a.owner_tenant_id, a.currency, a.balance, a.free_credit, a.credit_limit,
  a.frozen_balance, a.outstanding_amount, a.overdue_amount, a.available, a.low_balance_threshold, a.time_zone,
  a.balance_version, a.last_charged_at, a.created_at, a.head
from data.account_now a
where (select v.sees_all from data.viewer v)
union all
select
  a.account_id, a.owner, a.owner_user_id, a.owner_tenant_id, a.currency, a.balance, a.free_credit, a.credit_limit,
  a.frozen_balance, a.outstanding_amount, a.overdue_amount, a.available, a.low_balance_threshold, a.time_zone,
  a.balance_version, a.last_charged_at, a.created_at, a.head
from data.account_now a
where a.account_id = any (array(select v.account_id from data.visible_account v where v.figures));
comment on view api.billing_accounts is
'An account''s figures: one row per payer.
available = free_credit + balance + credit_limit - frozen_balance - outstanding_amount. `head` is
the last entry''s hash, in hex. Keep it elsewhere: with it verify_ledger proves that nobody changed
an entry up to it since.';
grant select on api.billing_accounts to keyledger_gateway, keyledger_operator, keyledger_member;

create or replace view api.billing_transactions with (security_barrier) as
select
  t.account_id, t.seq, t.kind, t.amount, t.balance_delta, t.free_credit_delta, t.outstanding_delta,
  t.balance_after, t.free_credit_after, t.outstanding_after, t.credit_limit_after,
  t.reference, t.actor, t.reason, t.usage_count, sha256(t.usage_list) as usage_digest,
  t.refund_of_seq, t.refund_of_usage_id, t.metadata, t.prev_hash, t.hash, t.created_at,
  case
    when t.kind in ('top_up', 'top_up_reversal') then 'cash'
    when t.kind in ('usage', 'refund') then 'revenue'
    when t.kind in ('credit_grant', 'credit_expiry') then 'promotion'
    when t.kind in ('adjustment', 'opening') then t.kind
  end as counter_account
from (
  select
    t.account_id, t.seq, t.kind, t.amount, t.balance_delta, t.free_credit_delta, t.outstanding_delta,
    t.balance_after, t.free_credit_after, t.outstanding_after, t.credit_limit_after,
    t.reference, t.actor, t.reason, t.usage_count, t.usage_list,
    t.refund_of_seq, t.refund_of_usage_id, t.metadata, t.prev_hash, t.hash, t.created_at
  from data.billing_transaction t
  where (select v.sees_all from data.viewer v)
  union all
  select
    t.account_id, t.seq, t.kind, t.amount, t.balance_delta, t.free_credit_delta, t.outstanding_delta,
    t.balance_after, t.free_credit_after, t.outstanding_after, t.credit_limit_after,
    t.reference, t.actor, t.reason, t.usage_count, t.usage_list,
    t.refund_of_seq, t.refund_of_usage_id, t.metadata, t.prev_hash, t.hash, t.created_at
  from data.billing_transaction t
  where t.account_id = any (array(select v.account_id from data.visible_account v where v.whole))
) t;
comment on view api.billing_transactions is
'The ledger: every entry of an account, in order of seq, chained by hash.
`amount` is the entry''s effect on the account: balance_delta + free_credit_delta -
outstanding_delta.';
grant select on api.billing_transactions to keyledger_operator, keyledger_member;

-- one entry, as the view shows it
create or replace function data.shown(
  account_id uuid,
  seq bigint
)
returns api.billing_transactions
language plpgsql
stable
set enable_seqscan = off
as $$
declare
  v_shown api.billing_transactions;
begin
  select * into v_shown from data.entry_shown t where t.account_id = shown.account_id and t.seq = shown.seq;
  return v_shown;
end
$$;

-- resolve a key to its payer, with the figures of now
create or replace function api.resolve_billing_account(
  vk text default null,
  key_hash text default null,
  out virtual_key_id uuid,
  out user_id uuid,
  out tenant_id uuid,
  out account_id uuid,
  out owner text,
  out name text,
  out key_prefix text,
  out virtual_key_status text,
  out user_status text,
  out tenant_status text,
  out code text,
  out valid_until timestamptz,
  out config_node_ids uuid[],
  out currency text,
  out balance numeric,
  out free_credit numeric,
  out credit_limit numeric,
  out frozen_balance numeric,
  out outstanding_amount numeric,
  out overdue_amount numeric,
  out available numeric,
  out balance_version bigint
)
returns record
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '500ms'
set enable_seqscan = off
as $$
begin
  select c.virtual_key_id, c.user_id, c.tenant_id, c.account_id, c.name, c.key_prefix, c.virtual_key_status,
    c.user_status, c.tenant_status, c.code, c.valid_until, c.config_node_ids
  into virtual_key_id, user_id, tenant_id, account_id, name, key_prefix, virtual_key_status,
    user_status, tenant_status, code, valid_until, config_node_ids
  from data.hash_context c
  where c.key_hash = coalesce(sha256(convert_to(vk, 'UTF8')),
    case
      when resolve_billing_account.key_hash ~ '^[0-9a-f]{64}$' then decode(resolve_billing_account.key_hash, 'hex')
    end);
  if virtual_key_id is null then
    perform data.refuse(404, 'virtual_key_unknown', 'no such virtual key',
      'send the key as vk, or its sha-256 as key_hash: 64 lower-case hex digits');
  end if;

  select a.owner, a.currency, a.balance, a.free_credit, a.credit_limit, a.frozen_balance, a.outstanding_amount,
    a.overdue_amount, a.available, a.balance_version
  into owner, currency, balance, free_credit, credit_limit, frozen_balance, outstanding_amount,
    overdue_amount, available, balance_version
  from data.account_now a
  where a.account_id = resolve_billing_account.account_id;
  if owner is null then
    perform data.refuse(404, 'account_not_found', 'account ' || account_id, 'accounts open with their tenant or user');
  end if;
end
$$;
comment on function api.resolve_billing_account(text, text) is
'Resolves a virtual key to its payer, with the payer''s figures.
`vk` is the key itself; `key_hash` is its sha-256, which no log of the server can betray. Answers
every known key, whatever its status: `code` says why the key may not be used. 404
virtual_key_unknown, account_not_found.';
grant execute on function api.resolve_billing_account(text, text) to keyledger_gateway;

-- change the limit of credit, as an entry of the ledger
create or replace function api.set_credit_limit(
  account_id uuid,
  credit_limit numeric,
  reason text default null
)
returns api.billing_accounts
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '4s'
set enable_seqscan = off
as $$
declare
  v_account data.account_balance;
  v_shown api.billing_accounts;
begin
  if credit_limit is null or not data.is_amount(credit_limit) or credit_limit < 0 then
    perform data.refuse(422, 'invalid_amount', 'credit_limit must be 0 or more, below 1e12, with at most 10 decimals',
      'send a plain decimal as a string, for example "100"');
  end if;
  v_account := data.lock_account(account_id);
  if v_account.credit_limit is distinct from set_credit_limit.credit_limit then
    perform data.post_one(account_id, 'limit_change', credit_limit => credit_limit, reason => reason);
  end if;
  select * into v_shown from data.account_now b where b.account_id = set_credit_limit.account_id;
  return v_shown;
end
$$;
comment on function api.set_credit_limit(uuid, numeric, text) is
'Sets how far below zero the balance may go.
`credit_limit` is the new limit of `account_id`, 0 or more; the entry keeps `reason`. A raised limit
pays debt first. A lowered limit turns the part of the balance beyond it into debt. Posts a
limit_change entry, unless the limit stays the same. Answers the account. 404 account_not_found; 422
invalid_amount.';
grant execute on function api.set_credit_limit(uuid, numeric, text) to keyledger_operator;

create or replace function api.set_time_zone(
  account_id uuid,
  time_zone text
)
returns api.billing_accounts
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '4s'
as $$
declare
  v_budgets data.budget[];
  v_shown api.billing_accounts;
begin
  if not exists (select from pg_timezone_names z where z.name = set_time_zone.time_zone) then
    perform data.refuse(422, 'invalid_time_zone', 'time_zone must be a name of pg_timezone_names',
      'for example "Europe/Berlin" or "UTC"');
  end if;
  -- budgets may be set or removed while they are counted
  loop
    v_budgets := array(
      select b from data.budget b where b.account_id = set_time_zone.account_id and b.period <> 'total' order by b.id);
    begin
      if v_budgets = '{}' then
        perform data.lock_account(account_id);
      else
        perform data.recount_budgets(v_budgets, time_zone, are_new => false);
      end if;
      if array(select b.id from data.budget b where b.account_id = set_time_zone.account_id
        and b.period <> 'total' order by b.id)
        is distinct from array(select b.id from unnest(v_budgets) b order by b.id)
      then
        raise sqlstate 'KL002';
      end if;
      exit;
    exception when sqlstate 'KL002' then
      if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
        raise serialization_failure using message = 'another call has changed the budgets of this account';
      end if;
    end;
  end loop;
  update data.account_balance a set time_zone = set_time_zone.time_zone where a.account_id = set_time_zone.account_id;
  select * into v_shown from data.account_now b where b.account_id = set_time_zone.account_id;
  return v_shown;
end
$$;
comment on function api.set_time_zone(uuid, text) is
'Sets the time zone in which an account''s days, weeks and months begin (UTC at first).
`time_zone` is a name that Postgres knows, as Europe/Berlin; it becomes that of `account_id`. Its
budgets'' current windows are counted anew from the usage log. Answers the account. 404
account_not_found; 422 invalid_time_zone.';
grant execute on function api.set_time_zone(uuid, text) to keyledger_operator;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
