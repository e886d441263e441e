-- migrate:up
-- The outbox of account news: an account's funds or a budget crossed a line.

set local role keyledger_owner;

-- id follows the order of the account's entries, since it is drawn under the account's lock
create table data.account_news (
  id bigint generated always as identity primary key,
  xid xid8 not null default pg_current_xact_id(),
  account_id uuid not null,
  seq bigint not null,
  kind text not null,
  funds data.money not null,
  threshold data.amount,
  budget jsonb,
  created_at timestamptz not null,
  constraint kind_is_known check (kind in ('low_balance', 'exhausted', 'back_in_funds', 'budget_exhausted')),
  constraint budget_is_of_its_kind check ((kind = 'budget_exhausted') = (budget is not null))
);
create index on data.account_news (xid);
create index on data.account_news (created_at);

insert into data.outbox_horizon (outbox, purged_xid) values ('account', '0');

alter table data.account_news enable row level security;

comment on table data.account_news is
'Crossings of each account''s funds and budgets, by the entry that caused them; the truth behind the wake-up.';

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
