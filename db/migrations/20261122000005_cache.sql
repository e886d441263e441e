-- migrate:up
-- The outbox of cache changes, and the horizon of every outbox.

set local role keyledger_owner;

create table data.cache_invalidation (
  id bigint generated always as identity primary key,
  xid xid8 not null default pg_current_xact_id(),
  entity text not null,
  -- null means every key of the entity
  keys text[],
  -- stored, so that a reader counts changes without reading their keys
  key_count integer generated always as (cardinality(keys)) stored,
  created_at timestamptz not null default now(),
  constraint entity_is_known check (entity in ('vk', 'price')),
  constraint keys_are_named check (cardinality(keys) > 0)
);
create index on data.cache_invalidation (xid);
create index on data.cache_invalidation (created_at);

-- per outbox the newest transaction with purged rows: a cursor that may miss it starts anew
create table data.outbox_horizon (
  outbox text primary key,
  purged_xid xid8 not null
);
insert into data.outbox_horizon (outbox, purged_xid) values ('cache', '0');

alter table data.cache_invalidation enable row level security;
alter table data.outbox_horizon enable row level security;

comment on table data.cache_invalidation is
'Cache keys that each transaction changed, null for all; the truth behind the wake-up.';
comment on table data.outbox_horizon is 'How far each outbox has been purged.';

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
