-- migrate:up
-- Usage: the usage log by month, the range of ids it accepts, and the events that could not be
-- charged.

set local role keyledger_owner;

-- the terms that priced an event, beside its rates: each null if there is none
create type data.usage_terms as (
  variant text, price_book_id uuid, factor numeric, minimum numeric, estimated boolean);

-- our own cost of an event: by the cost book, or as the provider gave it
create type data.own_cost as (amount numeric, currency text, is_upstream boolean);

create table data.usage_log (
  account_id uuid not null,
  id data.uuidv7 not null,
  transaction_seq bigint not null,
  virtual_key_id uuid not null,
  user_id uuid not null,
  config_node_id uuid not null,
  hold_id uuid,
  final boolean not null,
  meters jsonb not null,
  price_ids bigint[] not null,
  cost data.amount not null,
  request_id text,
  metadata jsonb,
  recorded_at timestamptz not null,
  -- null where there are none; the hash covers them
  terms data.usage_terms,
  -- no part of the customer's ledger or its hashes
  own_cost data.own_cost,
  primary key (account_id, id)
) partition by range (id);

-- an event that was read and priced: its place in the call, why it can't be charged, and the parts
-- that are left out
create type data.usage_event as (ord bigint, usage data.usage_log, code text, note jsonb, key_is_idle boolean);

-- the ids accepted: [floor, ceiling). Stored, never computed from the clock: a dropped month can't
-- be charged again
create table data.accepted_ids (
  is_the_only_row boolean primary key default true,
  floor timestamptz not null,
  ceiling timestamptz not null,
  -- the transaction that raised the floor: until it commits nobody else knows
  floor_xid xid8,
  -- months before it were dropped
  dropped_before timestamptz,
  -- holds and parked events that ended before it are purged; the account where purging up to the floor goes on
  purged_before timestamptz not null,
  purging_from uuid,
  constraint one_row check (is_the_only_row),
  constraint range_is_forward check (ceiling >= floor)
);
insert into data.accepted_ids (floor, ceiling, purged_before)
select m.first, m.first, m.first
from (select date_trunc('month', now(), 'UTC') - interval '1 month' as first) m;

-- events kept until they can be charged; id is a digest of the event, so that a retry meets its
-- first try
create table data.parked_usage (
  id uuid primary key,
  event jsonb not null,
  usage_id uuid,
  account_id uuid,
  -- the hold whose money stays set aside until the event is charged or dismissed
  hold_id uuid,
  code text not null,
  created_at timestamptz not null default now(),
  tried_at timestamptz not null default clock_timestamp(),
  resolved_at timestamptz,
  resolution text,
  reason text,
  actor text,
  constraint resolution_is_known check (resolution in ('charged', 'duplicate', 'dismissed')),
  constraint resolved_has_a_time check ((resolution is null) = (resolved_at is null)),
  constraint dismissed_by_somebody_for_a_reason check (
    (reason is not null) = (resolution is not distinct from 'dismissed') and (actor is null) = (reason is null))
);
create index parked_usage_unresolved on data.parked_usage (usage_id) where resolved_at is null;
create index parked_usage_sets_aside on data.parked_usage (account_id, hold_id) where hold_id is not null;

alter table data.usage_log enable row level security;
alter table data.accepted_ids enable row level security;
alter table data.parked_usage enable row level security;

comment on table data.usage_log is 'Each charged event, by month of its id; append-only.';
comment on table data.accepted_ids is 'The range of event and hold times accepted, and how far retention has come.';
comment on table data.parked_usage is 'Events that could not be charged yet, kept whole.';

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
