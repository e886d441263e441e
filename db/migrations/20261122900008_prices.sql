-- migrate:up
-- The parts of a price: steps and their rounding, tiers, hours, contexts, and the book of an account.

set local role keyledger_owner;

-- quantity * price / size, in steps: a step is 1e-20 / 3600000000. A size divides 3600000000, so
-- the steps are whole.
create or replace function data.cost_steps(
  quantity numeric,
  unit_price numeric,
  unit_size integer
)
returns numeric
language sql
immutable parallel safe
as $$
  select quantity * unit_price * (3600000000 / unit_size)
$$;

-- A sum of steps (data.cost_steps) as money: rounded once, half up, at 10 decimals.
create or replace function data.to_cost(steps numeric)
returns numeric
language sql
immutable parallel safe
as $$
  select div(20000000000 * steps + 3600000000, 7200000000) * 0.0000000001
$$;

-- The minute of the UTC week, from Monday 00:00. 1970 began on a Thursday.
create or replace function data.week_minute(at timestamptz)
returns integer
language sql
stable parallel safe
as $$
  select mod(floor(date_part('epoch', at) / 60)::bigint + 4320, 10080)::integer
$$;

-- whether a meter's quantity is part of an event's context, at a node that doesn't name its own
create or replace function data.is_input_meter(meter text)
returns boolean
language sql
immutable parallel safe
as $$
  select meter like '%\_tokens' and (
    starts_with(meter, 'input_') or starts_with(meter, 'cached_input_') or starts_with(meter, 'cache_write_'))
$$;

-- a service tier that an event or a hold names: '' is the standard one, null is no name
create or replace function data.to_variant(value jsonb)
returns text
language sql
immutable parallel safe
as $$
  select case
    when value is null or value = 'null' then ''
    when jsonb_typeof(value) = 'string' and value #>> '{}' ~ '^([a-z][a-z0-9_.-]{0,62})?$' then value #>> '{}'
  end
$$;

-- Notes that a kind of terms is in use. The trigger's argument is the kind. Terms are never deleted.
create or replace function data.note_terms()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  update data.terms_in_use t
  set books = t.books or tg_argv[0] = 'books', contexts = t.contexts or tg_argv[0] = 'contexts',
    hours = t.hours or tg_argv[0] = 'hours', minimums = t.minimums or tg_argv[0] = 'minimums',
    costs = t.costs or tg_argv[0] = 'costs'
  where not (to_jsonb(t) ->> tg_argv[0])::boolean;
  return null;
end
$$;
create or replace trigger note_contexts after insert on data.price
  for each row when (new.context_over > 0) execute function data.note_terms('contexts');
create or replace trigger note_hours after insert on data.price
  for each row when (new.hours is not null) execute function data.note_terms('hours');
create or replace trigger note_books after insert on data.price_book_assignment
  for each row execute function data.note_terms('books');
create or replace trigger note_minimums after insert on data.minimum_charge
  for each row execute function data.note_terms('minimums');
create or replace trigger note_costs after insert on data.price_book
  for each row when (new.kind = 'cost') execute function data.note_terms('costs');

-- The book that prices an account's usage at a moment; null for list prices.
create or replace function data.book_of(
  account_id uuid,
  at timestamptz,
  in_use data.terms_in_use
)
returns table (price_book_id uuid)
language sql
stable
as $$
  select case when (in_use).books then (
    select a.price_book_id
    from data.price_book_assignment a
    where a.account_id = book_of.account_id and a.effective_from <= at
    order by a.effective_from desc
    limit 1
  ) end
$$;

-- The context of an event: the sum of its node's context meters, by default of all input meters.
create or replace function data.context_of(
  config_node_id uuid,
  meters jsonb
)
returns table (context numeric)
language sql
stable
as $$
  select coalesce(sum(data.to_quantity(m.value)), 0)
  from data.config_node n
  cross join jsonb_each(
    case when jsonb_typeof(context_of.meters) = 'object' and pg_column_size(context_of.meters) <= 16384
      then context_of.meters else '{}' end) m
  where n.id = context_of.config_node_id
    and case when n.context_meters is null then data.is_input_meter(m.key) else m.key = any (n.context_meters) end
$$;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
