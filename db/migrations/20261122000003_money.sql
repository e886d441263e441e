-- migrate:up
-- How much: account figures, the ledger, promotional grants, holds. No identity here but the owner's id.

set local role keyledger_owner;

create table data.account_balance (
  account_id uuid primary key,
  owner_user_id uuid references data.user_profile,
  owner_tenant_id uuid references data.tenant,
  currency text not null,
  balance numeric(28, 10) not null default 0,
  free_credit numeric(28, 10) not null default 0,
  credit_limit numeric(28, 10) not null default 0,
  frozen_balance numeric(28, 10) not null default 0,
  outstanding_amount numeric(28, 10) not null default 0,
  overdue_amount numeric(28, 10) not null default 0,
  available numeric(28, 10) not null
    generated always as (free_credit + balance + credit_limit - frozen_balance - outstanding_amount) stored,
  balance_version bigint not null default 0,
  last_charged_at timestamptz,
  created_at timestamptz not null default now(),
  constraint exactly_one_owner check (num_nonnulls(owner_user_id, owner_tenant_id) = 1),
  constraint account_id_is_the_owners_id check (account_id = coalesce(owner_user_id, owner_tenant_id)),
  constraint currency_is_iso_4217 check (currency ~ '^[A-Z]{3}$'),
  constraint balance_is_within_credit_limit check (balance >= -credit_limit and balance <> 'NaN'),
  constraint free_credit_is_not_negative check (free_credit >= 0 and free_credit <> 'NaN'),
  constraint credit_limit_is_not_negative check (credit_limit >= 0 and credit_limit <> 'NaN'),
  constraint frozen_balance_is_not_negative check (frozen_balance >= 0 and frozen_balance <> 'NaN'),
  constraint outstanding_amount_is_not_negative check (outstanding_amount >= 0 and outstanding_amount <> 'NaN'),
  constraint overdue_amount_is_not_negative check (overdue_amount >= 0 and overdue_amount <> 'NaN'),
  constraint debt_only_when_all_else_is_spent
    check (outstanding_amount = 0 or (free_credit = 0 and balance = -credit_limit))
) with (
  -- room on the page, and no index on a changing column: every charge is a heap-only update
  fillfactor = 50,
  autovacuum_vacuum_scale_factor = 0.02,
  autovacuum_vacuum_cost_delay = 0
);

create table data.billing_transaction (
  account_id uuid not null references data.account_balance,
  seq bigint not null,
  kind text not null,
  amount numeric(28, 10) not null,
  balance_delta numeric(28, 10) not null,
  free_credit_delta numeric(28, 10) not null,
  outstanding_delta numeric(28, 10) not null,
  balance_after numeric(28, 10) not null,
  free_credit_after numeric(28, 10) not null,
  outstanding_after numeric(28, 10) not null,
  credit_limit_after numeric(28, 10) not null,
  counter_account text,
  reference text,
  actor text not null,
  reason text,
  usage_count integer not null default 0,
  usage_digest bytea,
  refund_of_seq bigint,
  metadata jsonb,
  prev_hash bytea not null,
  hash bytea not null,
  created_at timestamptz not null,
  primary key (account_id, seq),
  constraint seq_starts_at_one check (seq >= 1),
  constraint counter_account_follows_from_kind check (
    counter_account is not distinct from case kind
      when 'opening' then 'opening'
      when 'top_up' then 'cash'
      when 'top_up_reversal' then 'cash'
      when 'usage' then 'revenue'
      when 'refund' then 'revenue'
      when 'adjustment' then 'adjustment'
      when 'credit_grant' then 'promotion'
      when 'credit_expiry' then 'promotion'
    end),
  constraint amount_is_the_net_of_the_deltas
    check (amount = balance_delta + free_credit_delta - outstanding_delta and amount <> 'NaN'),
  constraint kind_is_known_and_amount_has_its_sign check (
    case kind
      when 'opening' then true
      when 'top_up' then amount > 0
      when 'top_up_reversal' then amount < 0
      when 'usage' then amount <= 0
      when 'refund' then amount > 0
      when 'adjustment' then amount <> 0
      when 'credit_grant' then amount > 0
      when 'credit_expiry' then amount < 0
      when 'limit_change' then amount = 0
      else false
    end),
  constraint buckets_after_are_in_normal_form check (
    free_credit_after >= 0 and outstanding_after >= 0 and balance_after >= -credit_limit_after
    and (outstanding_after = 0 or (free_credit_after = 0 and balance_after = -credit_limit_after))),
  constraint only_usage_counts_usage check (
    case when kind = 'usage' then usage_count > 0 and usage_digest is not null
         else usage_count = 0 and usage_digest is null end),
  constraint only_a_refund_refunds check ((kind = 'refund') = (refund_of_seq is not null)),
  constraint refund_follows_its_charge check (refund_of_seq < seq),
  constraint only_the_first_entry_has_no_previous check ((seq = 1) = (prev_hash = '')),
  constraint hash_is_sha256 check (octet_length(hash) = 32)
);
-- a payment id is used once per account
create unique index reference_is_used_once on data.billing_transaction (account_id, reference) where reference is not null;

-- one row per credit_grant entry, with what remains of it; the sum of what remains is the account's free_credit
create table data.credit_grant (
  account_id uuid not null,
  seq bigint not null,
  amount numeric(28, 10) not null,
  remaining numeric(28, 10) not null,
  priority integer not null,
  expires_at timestamptz,
  primary key (account_id, seq),
  foreign key (account_id, seq) references data.billing_transaction,
  constraint amount_is_positive check (amount > 0 and amount <> 'NaN'),
  constraint remaining_is_part_of_amount check (remaining >= 0 and remaining <= amount),
  constraint expiry_is_a_moment check (isfinite(expires_at))
);
create index on data.credit_grant (account_id) where remaining > 0;

-- money set aside for one request; its unspent part is in the account's frozen_balance while it is open
create table data.hold (
  account_id uuid not null references data.account_balance,
  id uuid not null,
  amount numeric(28, 10) not null,
  captured numeric(28, 10) not null default 0,
  status text not null default 'open',
  expires_at timestamptz,
  virtual_key_id uuid,
  config_node_id uuid,
  meters jsonb,
  created_at timestamptz not null,
  ended_at timestamptz,
  primary key (account_id, id),
  constraint amount_is_not_negative check (amount >= 0 and amount <> 'NaN'),
  constraint captured_is_part_of_amount check (captured >= 0 and captured <= amount),
  constraint status_is_known check (status in ('open', 'captured', 'released', 'expired')),
  constraint only_an_open_hold_has_not_ended check ((status = 'open') = (ended_at is null)),
  constraint expiry_is_a_moment check (isfinite(expires_at))
) with (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05);
create index hold_open on data.hold (account_id, expires_at) where status = 'open';

-- sealed statements
create table data.accounting_snapshot (
  account_id uuid not null references data.account_balance,
  period_start timestamptz not null,
  period_end timestamptz not null,
  first_seq bigint not null,
  last_seq bigint not null,
  currency text not null,
  balance_opening numeric(28, 10) not null,
  free_credit_opening numeric(28, 10) not null,
  outstanding_opening numeric(28, 10) not null,
  balance_closing numeric(28, 10) not null,
  free_credit_closing numeric(28, 10) not null,
  outstanding_closing numeric(28, 10) not null,
  overdue_amount numeric(28, 10) not null,
  movements jsonb not null,
  usage jsonb not null,
  head_hash bytea not null,
  sealed_at timestamptz not null default now(),
  primary key (account_id, period_start),
  constraint period_is_forward check (period_end > period_start),
  constraint entries_are_a_range check (first_seq >= 1 and last_seq >= first_seq - 1)
);

alter table data.account_balance enable row level security;
alter table data.billing_transaction enable row level security;
alter table data.credit_grant enable row level security;
alter table data.hold enable row level security;
alter table data.accounting_snapshot enable row level security;

comment on table data.account_balance is 'The figures of one payer; account_id is the owner''s id.';
comment on table data.billing_transaction is 'The ledger: append-only, gapless per account, each entry chained to the one before.';
comment on table data.credit_grant is 'Free credit as granted, with what remains of each grant.';
comment on table data.hold is 'Money set aside for a request until it is captured, released or expires.';
comment on table data.accounting_snapshot is 'Sealed statements, one per account and period.';

reset role;

-- migrate:down
-- none: a ledger is not rolled back
