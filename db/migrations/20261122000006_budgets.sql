-- migrate:up
-- Budgets: how much a key, a user or a tenant may spend of one account in a period. Guarded by that
-- account's lock.

set local role keyledger_owner;

create table data.budget (
  account_id uuid not null references data.account_balance,
  id uuid not null default gen_random_uuid(),
  scope text not null,
  scope_id uuid not null,
  amount data.amount not null,
  period text not null,
  -- counters are kept from this window on, out of a usage log that was complete down to this floor
  counted_from timestamptz not null,
  counted_floor timestamptz not null,
  created_at timestamptz not null default now(),
  primary key (account_id, id),
  unique (account_id, scope, scope_id, period),
  constraint scope_is_known check (scope in ('virtual_key', 'user', 'tenant')),
  constraint period_is_known check (period in ('day', 'week', 'month', 'total'))
);
create index on data.budget (id);

-- the use in each window; a total has the one window from -infinity. The clock picks the row:
-- nothing is ever reset
create table data.budget_spend (
  account_id uuid not null,
  budget_id uuid not null,
  window_start timestamptz not null,
  spent data.amount not null,
  primary key (account_id, budget_id, window_start),
  foreign key (account_id, budget_id) references data.budget on delete cascade
) with (fillfactor = 50);

create type data.budget_left as (scope text, scope_id uuid, remaining numeric);

alter table data.budget enable row level security;
alter table data.budget_spend enable row level security;

comment on table data.budget is 'How much a key, user or tenant may spend of an account in each period.';
comment on table data.budget_spend is 'The use that counts against each budget, by window.';

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
