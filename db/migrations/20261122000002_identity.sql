-- migrate:up
-- Identity: tenants, users, virtual keys, upstream nodes. No money here.
-- PostgREST casts to a column's type, and its roles have no right on the domains of schema data.
-- So a column that is written through a view has a plain type and a check.

set local role keyledger_owner;

create table data.tenant (
  id uuid primary key default gen_random_uuid(),
  name text not null,
  external_id text unique,
  currency text not null default 'USD',
  status text not null default 'active',
  created_at timestamptz not null default now(),
  constraint currency_is_iso_4217 check (currency ~ '^[A-Z]{3}$'),
  constraint status_is_known check (status in ('active', 'suspended', 'closed'))
);

create table data.user_profile (
  id uuid primary key default gen_random_uuid(),
  tenant_id uuid references data.tenant,
  tenant_role text not null default 'member',
  external_id text unique,
  display_name text,
  currency text not null default 'USD',
  status text not null default 'active',
  -- this column alone decides the payer: the tenant if there is one, else the user
  account_id uuid not null generated always as (coalesce(tenant_id, id)) stored,
  created_at timestamptz not null default now(),
  constraint currency_is_iso_4217 check (currency ~ '^[A-Z]{3}$'),
  constraint status_is_known check (status in ('active', 'suspended', 'closed')),
  constraint tenant_role_is_known check (tenant_role in ('member', 'admin'))
);
create index on data.user_profile (tenant_id);

create table data.virtual_key (
  id uuid primary key default gen_random_uuid(),
  key_hash data.sha256 not null unique,
  key_prefix text not null,
  user_id uuid not null references data.user_profile,
  name text,
  status text not null default 'active',
  expires_at data.moment,
  created_at timestamptz not null default now(),
  revoked_at timestamptz,
  constraint key_prefix_is_short check (length(key_prefix) <= 12),
  constraint status_is_known check (status in ('active', 'revoked')),
  constraint revoked_has_a_time check ((status = 'revoked') = (revoked_at is not null))
);
create index on data.virtual_key (user_id);

-- the hashes a key had before rotations, each valid until its grace ends
-- A trigger refuses another key with such a hash.
create table data.previous_key_hash (
  key_hash data.sha256 primary key,
  virtual_key_id uuid not null references data.virtual_key on delete cascade,
  valid_until data.moment not null
);
create index on data.previous_key_hash (virtual_key_id);

-- when a key was last used, to the minute
-- The row stands apart from the key, whose changes evict caches.
-- It is made with the key, so that using the key only updates.
create table data.virtual_key_use (
  virtual_key_id uuid primary key references data.virtual_key on delete cascade,
  last_used_at timestamptz
) with (fillfactor = 50);

create table data.config_node (
  id uuid primary key default gen_random_uuid(),
  name text not null unique,
  provider text,
  model text,
  endpoint text,
  status text not null default 'active',
  -- meters whose sum is an event's context; null: all input meters
  context_meters text[],
  created_at timestamptz not null default now(),
  constraint status_is_known check (status in ('active', 'disabled'))
);

create table data.virtual_key_config_node (
  virtual_key_id uuid not null references data.virtual_key on delete cascade,
  config_node_id uuid not null references data.config_node,
  created_at timestamptz not null default now(),
  primary key (virtual_key_id, config_node_id)
);
create index on data.virtual_key_config_node (config_node_id);

-- each change of a status, whatever made it: of a tenant, user, key or node
-- An entity without a row has been active from its beginning.
create table data.status_change (
  id bigint generated always as identity primary key,
  entity text not null,
  entity_id uuid not null,
  old_status text,
  new_status text not null,
  actor text not null,
  reason text,
  -- the clock's time, not the transaction's: a change that waited for another gets the later time
  created_at timestamptz not null default clock_timestamp(),
  constraint entity_is_known check (entity in ('tenant', 'user_profile', 'virtual_key', 'config_node')),
  constraint status_changes check (new_status is distinct from old_status)
);
create index on data.status_change (entity_id);

alter table data.tenant enable row level security;
alter table data.user_profile enable row level security;
alter table data.virtual_key enable row level security;
alter table data.previous_key_hash enable row level security;
alter table data.virtual_key_use enable row level security;
alter table data.config_node enable row level security;
alter table data.virtual_key_config_node enable row level security;
alter table data.status_change enable row level security;

comment on table data.tenant is 'A paying organisation.';
comment on table data.user_profile is 'A user; the tenant pays if there is one, else the user''s own account.';
comment on table data.virtual_key is 'A caller''s key: its sha-256 and a display prefix, never the key.';
comment on table data.previous_key_hash is 'Hashes of keys from before a rotation, and the end of each one''s grace.';
comment on table data.virtual_key_use is 'When each key was last used.';
comment on table data.config_node is 'An upstream instance (a deployment, a channel); each has prices.';
comment on table data.virtual_key_config_node is 'Mounts: the nodes a key may hold funds for.';
comment on table data.status_change is 'Changes of statuses: actor, time and reason; append-only.';

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
