-- migrate:up
-- Money: account figures, the ledger, promotional grants, holds. Of identity only the owner's id.

set local role keyledger_owner;

create table data.account_balance (
  account_id uuid primary key,
  owner_user_id uuid references data.user_profile,
  owner_tenant_id uuid references data.tenant,
  currency data.currency not null,
  balance data.money not null default 0,
  free_credit data.amount not null default 0,
  credit_limit data.amount not null default 0,
  frozen_balance data.amount not null default 0,
  outstanding_amount data.amount not null default 0,
  low_balance_threshold data.amount,
  -- the time zone decides where a budget's day begins; has_budgets saves other accounts a look-up
  time_zone text not null default 'UTC',
  has_budgets boolean not null default false,
  available data.money not null
    generated always as (free_credit + balance + credit_limit - frozen_balance - outstanding_amount) stored,
  balance_version bigint not null default 0,
  -- the last entry's hash and time: the next entry follows it without a look-up
  head_hash bytea not null default '',
  head_at timestamptz not null default '-infinity',
  last_charged_at timestamptz,
  created_at timestamptz not null default now(),
  constraint account_id_is_its_one_owners_id
    check (num_nonnulls(owner_user_id, owner_tenant_id) = 1 and account_id = coalesce(owner_user_id, owner_tenant_id)),
  constraint debt_only_when_all_else_is_spent
    check (balance >= -credit_limit and (outstanding_amount = 0 or (free_credit = 0 and balance = -credit_limit)))
) with (
  -- with room on the page and no index on a changing column, every charge is a heap-only update
  fillfactor = 50,
  autovacuum_vacuum_scale_factor = 0.02,
  autovacuum_vacuum_cost_delay = 0
);

-- No foreign key to account_balance: one function inserts here, and it holds the account's lock.
-- A trigger forbids deleting accounts.
-- A trigger also checks rules that span columns, in 1 microsecond each instead of 10.
create table data.billing_transaction (
  account_id uuid not null,
  seq bigint not null,
  kind data.entry_kind not null,
  amount data.money not null,
  balance_delta data.money not null,
  free_credit_delta data.money not null,
  outstanding_delta data.money not null,
  balance_after data.money not null,
  free_credit_after data.amount not null,
  outstanding_after data.amount not null,
  credit_limit_after data.amount not null,
  reference text,
  actor text not null,
  reason text,
  usage_count integer not null,
  -- 32 bytes per usage row, in the order of ids: its id, then the first half of its line's sha-256
  usage_list bytea,
  refund_of_seq bigint,
  refund_of_usage_id uuid,
  metadata jsonb,
  prev_hash bytea not null,
  hash data.sha256 not null,
  created_at timestamptz not null,
  primary key (account_id, seq)
);
-- hashes don't compress, and Postgres can read a slice of an uncompressed value alone
alter table data.billing_transaction alter column usage_list set storage external;
-- the refunds of an entry
create index on data.billing_transaction (account_id, refund_of_seq) where refund_of_seq is not null;
-- payments of debt, few among many charges: overdue_amount reads these alone
create index on data.billing_transaction (account_id, seq) include (outstanding_delta) where outstanding_delta < 0;
-- a payment id is used once per account
create unique index reference_is_used_once on data.billing_transaction (account_id, reference)
  where reference is not null;

-- one row per credit_grant entry; the sum of `remaining` is the account's free_credit
create table data.credit_grant (
  account_id uuid not null,
  seq bigint not null,
  amount data.amount not null,
  remaining data.amount not null,
  priority integer not null,
  expires_at data.moment,
  primary key (account_id, seq),
  foreign key (account_id, seq) references data.billing_transaction,
  constraint remaining_is_part_of_amount check (remaining <= amount)
);
-- only grants with money left, and in no order
-- With an order, a plan made on a small table would read every grant there ever was.
create index on data.credit_grant (account_id) where remaining > 0;

-- the amount that each entry took from each grant, so that a refund can return it
create table data.grant_draw (
  account_id uuid not null,
  seq bigint not null,
  grant_seq bigint not null,
  amount data.amount not null,
  returned data.amount not null default 0,
  primary key (account_id, seq, grant_seq),
  foreign key (account_id, seq) references data.billing_transaction,
  foreign key (account_id, grant_seq) references data.credit_grant,
  constraint returned_is_part_of_amount check (returned <= amount)
);

-- money set aside for one request, or frozen by an operator (expires_at null)
-- While a hold is open or parked, the account's frozen_balance includes its unspent part.
-- A parked hold waits for an event that could not be charged yet, and doesn't expire.
create table data.hold (
  account_id uuid not null,
  id data.uuidv7 not null,
  amount data.amount not null,
  captured data.amount not null default 0,
  status text not null default 'open',
  expires_at data.moment,
  virtual_key_id uuid,
  config_node_id uuid,
  meters jsonb,
  created_at timestamptz not null,
  ended_at timestamptz,
  -- for freezes only
  reference text,
  reason text,
  actor text,
  ended_by text,
  end_reason text,
  primary key (account_id, id),
  constraint captured_is_part_of_amount check (captured <= amount),
  constraint only_an_open_or_parked_hold_has_not_ended
    check (
      status in ('open', 'parked', 'captured', 'released', 'expired')
      and (status in ('open', 'parked')) = (ended_at is null))
) with (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05);
create index hold_open on data.hold (account_id, expires_at) where status = 'open';
create index hold_parked on data.hold (account_id) where status = 'parked';
create unique index freeze_reference_is_used_once on data.hold (account_id, reference) where reference is not null;

-- a requested hold: its place in the call, the hold it would become, and the code of its refusal
create type data.hold_request as (ord bigint, id text, hold data.hold, code text, user_id uuid);
-- a hold to end or extend: its place in the call, and a code if it can't be read
create type data.hold_id as (ord bigint, id_text text, account_id uuid, id uuid, expires_in integer, code text);
-- the money available past a moment when grants expire
-- `spare`: how much the holds until then draw from those grants only
create type data.backing as (at timestamptz, available numeric, spare numeric);

-- sealed statements: seq decides which entries belong to one
-- The clock decides about credit: `expiry_due` had expired by the cut, and its entry comes after.
-- No foreign key to account_balance: its check would lock the account until the page commits.
create table data.accounting_snapshot (
  account_id uuid not null,
  period_start timestamptz not null,
  period_end timestamptz not null,
  first_seq bigint not null,
  last_seq bigint not null,
  owner_name text,
  currency data.currency not null,
  balance_opening data.money not null,
  free_credit_opening data.amount not null,
  outstanding_opening data.amount not null,
  balance_closing data.money not null,
  free_credit_closing data.amount not null,
  outstanding_closing data.amount not null,
  expiry_due data.amount not null,
  overdue_amount data.amount not null,
  movements jsonb not null,
  usage jsonb not null,
  head_hash bytea not null,
  sealed_at timestamptz not null default now(),
  primary key (account_id, period_start),
  constraint period_is_forward check (period_end > period_start),
  constraint entries_are_a_range check (first_seq >= 1 and last_seq >= first_seq - 1),
  constraint overdue_is_part_of_outstanding check (overdue_amount <= outstanding_closing)
);

-- the answer of verify_balances and verify_ledger: a type, since an argument and a column share a
-- name
create type api.ledger_problem as (
  account_id uuid, problem text, seq bigint, usage_id uuid, expected text, actual text);
comment on type api.ledger_problem is 'A row that is not as it should be: `problem` is a code.';

alter table data.account_balance enable row level security;
alter table data.billing_transaction enable row level security;
alter table data.credit_grant enable row level security;
alter table data.grant_draw enable row level security;
alter table data.hold enable row level security;
alter table data.accounting_snapshot enable row level security;

comment on table data.account_balance is 'The figures of one payer; account_id is the owner''s id.';
comment on table data.billing_transaction is
'The ledger: append-only, gapless per account, each entry chained to the one before.';
comment on table data.credit_grant is 'Grants of free credit, with the rest of each.';
comment on table data.grant_draw is 'The amount that each entry took from each grant, and the part that came back.';
comment on table data.hold is
'Money set aside for a request until captured, released or expired; or frozen by an operator.';
comment on table data.accounting_snapshot is 'Sealed statements, one per account and period.';

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
