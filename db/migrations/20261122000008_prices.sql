-- migrate:up
-- Prices: rates of nodes, price books of customers, minimum charges, and the bills of providers.

-- Exclusion constraints on ids and texts need it. It stands apart from data, whose names are ours.
create schema if not exists keyledger;
create extension if not exists btree_gist schema keyledger;

set local role keyledger_owner;

-- a customer's own prices, or (kind cost) our own costs
create table data.price_book (
  id uuid primary key default gen_random_uuid(),
  name text not null unique,
  currency text not null default 'USD',
  kind text not null default 'price',
  created_at timestamptz not null default now(),
  constraint currency_is_iso_4217 check (currency ~ '^[A-Z]{3}$'),
  constraint kind_is_known check (kind in ('price', 'cost'))
);
create unique index one_cost_book_per_currency on data.price_book (currency) where kind = 'cost';

-- a rate of a meter, never updated: a new list is new rows
-- Rates of one node, book, meter, variant, currency and effective_from are a list, in force
-- together.
create table data.price (
  id bigint generated always as identity primary key,
  config_node_id uuid not null references data.config_node,
  -- null: the list price of all customers
  price_book_id uuid references data.price_book,
  meter text not null,
  -- the service tier; '' is the standard one
  variant text not null default '',
  -- the rate counts for events with a context above it
  context_over bigint not null default 0,
  -- windows in the UTC week, in minutes from Monday 00:00; null is always
  hours int4multirange,
  unit_price numeric not null,
  unit_size integer not null default 1,
  currency text not null default 'USD',
  effective_from timestamptz not null default now(),
  created_at timestamptz not null default now(),
  -- a list is written by one transaction, and closed then
  written_by xid8 not null default pg_current_xact_id(),
  -- `minimum` is how a minimum charge is shown
  constraint meter_is_a_name check (meter ~ '^[a-z][a-z0-9_.]{0,62}$' and meter <> 'minimum'),
  constraint variant_is_a_name check (variant ~ '^([a-z][a-z0-9_.-]{0,62})?$'),
  constraint context_over_is_a_quantity check (context_over between 0 and 1000000000000),
  constraint hours_are_minutes_of_a_week check (hours <@ '{[0,10080)}' and not isempty(hours)),
  constraint unit_price_is_an_amount
    check (unit_price >= 0 and unit_price < 1e12 and scale(trim_scale(unit_price)) <= 10),
  constraint currency_is_iso_4217 check (currency ~ '^[A-Z]{3}$'),
  constraint effective_from_is_a_moment check (isfinite(effective_from)),
  -- with these sizes a sum of quantity * price / size is exact until its one rounding
  constraint unit_size_divides_3600000000 check (unit_size > 0 and mod(3600000000, unit_size::bigint) = 0),
  constraint windows_are_disjoint exclude using gist (
    config_node_id with =, coalesce(price_book_id, '00000000-0000-0000-0000-000000000000') with =, meter with =,
    variant with =, currency with =, effective_from with =, context_over with =, hours with &&
  ) where (hours is not null)
);
-- The first of these rows that fits an event is its rate: the newest list, then a window, then the
-- highest context.
create unique index price_of_list on data.price (
  config_node_id, meter, currency, variant, effective_from desc, (hours is null), context_over desc, hours
) nulls not distinct where price_book_id is null;
create unique index price_of_book on data.price (
  price_book_id, config_node_id, meter, currency, variant, effective_from desc, (hours is null), context_over desc,
  hours
) nulls not distinct where price_book_id is not null;

-- whether a node has any: most have none
create index price_with_contexts on data.price (config_node_id) where context_over > 0;

-- a book's rates are the list's, times this
create table data.price_book_factor (
  id bigint generated always as identity primary key,
  price_book_id uuid not null references data.price_book,
  factor numeric not null,
  effective_from timestamptz not null default now(),
  created_at timestamptz not null default now(),
  unique (price_book_id, effective_from),
  constraint factor_is_at_most_1000
    check (factor >= 0 and factor <= 1000 and scale(trim_scale(factor)) <= 6),
  constraint effective_from_is_a_moment check (isfinite(effective_from))
);

-- the book of an account, from a moment on; null ends an assignment: the account pays list prices
create table data.price_book_assignment (
  account_id uuid not null,
  effective_from timestamptz not null,
  price_book_id uuid references data.price_book,
  actor text not null,
  created_at timestamptz not null default now(),
  primary key (account_id, effective_from),
  constraint effective_from_is_a_moment check (isfinite(effective_from))
);

-- the least that an event costs: of a book, or of a node
create table data.minimum_charge (
  id bigint generated always as identity primary key,
  price_book_id uuid references data.price_book,
  config_node_id uuid references data.config_node,
  minimum numeric not null,
  currency text not null default 'USD',
  effective_from timestamptz not null default now(),
  created_at timestamptz not null default now(),
  constraint currency_is_iso_4217 check (currency ~ '^[A-Z]{3}$'),
  constraint minimum_is_an_amount check (minimum >= 0 and minimum < 1e12 and scale(trim_scale(minimum)) <= 10),
  constraint minimum_is_of_a_book_or_a_node check (num_nonnulls(price_book_id, config_node_id) = 1),
  constraint effective_from_is_a_moment check (isfinite(effective_from))
);
create unique index minimum_of_node on data.minimum_charge (config_node_id, currency, effective_from)
  where price_book_id is null;
create unique index minimum_of_book on data.minimum_charge (price_book_id, currency, effective_from)
  where price_book_id is not null;

-- which kinds of terms were ever written: a call reads it once, and looks for no others
create table data.terms_in_use (
  is_the_only_row boolean primary key default true,
  books boolean not null default false,
  contexts boolean not null default false,
  hours boolean not null default false,
  minimums boolean not null default false,
  costs boolean not null default false,
  constraint one_row check (is_the_only_row)
);
insert into data.terms_in_use default values;

-- what a provider has billed, per node, day (in UTC) and meter; a later import replaces it
create table data.provider_bill_line (
  config_node_id uuid not null references data.config_node,
  day date not null,
  meter text not null,
  currency data.currency not null,
  quantity numeric not null,
  amount data.money not null,
  actor text not null,
  imported_at timestamptz not null default clock_timestamp(),
  primary key (config_node_id, day, meter, currency),
  constraint day_is_finite check (isfinite(day)),
  constraint meter_is_a_name check (meter ~ '^[a-z][a-z0-9_.]{0,62}$'),
  constraint quantity_is_a_number check (quantity >= 0 and quantity < 1e18 and scale(trim_scale(quantity)) <= 10)
);

alter table data.price_book enable row level security;
alter table data.price enable row level security;
alter table data.price_book_factor enable row level security;
alter table data.price_book_assignment enable row level security;
alter table data.minimum_charge enable row level security;
alter table data.terms_in_use enable row level security;
alter table data.provider_bill_line enable row level security;

comment on table data.price_book is 'Customers'' own prices, and our own costs.';
comment on table data.price is 'Dated rates per node, book, meter, variant and currency; append-only.';
comment on table data.price_book_factor is 'Dated factors of price books on list prices; append-only.';
comment on table data.price_book_assignment is 'Which book prices an account''s usage, from when on; append-only.';
comment on table data.minimum_charge is 'Dated minimum charges of an event, per node or book; append-only.';
comment on table data.terms_in_use is 'Which kinds of terms of prices were ever written.';
comment on table data.provider_bill_line is 'Quantities and amounts that providers billed, per node, day and meter.';

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
