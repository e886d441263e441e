-- migrate:up
-- Costs of meters: the rates in force at the time of an id, by tier, book and minimum; the rounding.

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
  select mod(floor(extract(epoch from at) / 60)::bigint + 4320, 10080)::integer
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

-- The least that an event costs by a book, else at a node. A node's minimum is the customer's, and
-- no cost of ours.
create or replace function data.minimum_of(
  price_book_id uuid,
  config_node_id uuid,
  currency text,
  at timestamptz
)
returns numeric
language plpgsql
stable
as $$
declare
  v_minimum numeric;
begin
  if minimum_of.price_book_id is not null then
    select m.minimum into v_minimum
    from data.minimum_charge m
    where m.price_book_id = minimum_of.price_book_id and m.currency = minimum_of.currency and m.effective_from <= at
    order by m.effective_from desc
    limit 1;
    if found or exists (select from data.price_book b where b.id = minimum_of.price_book_id and b.kind = 'cost') then
      return v_minimum;
    end if;
  end if;
  return (
    select m.minimum
    from data.minimum_charge m
    where m.price_book_id is null and m.config_node_id = minimum_of.config_node_id
      and m.currency = minimum_of.currency and m.effective_from <= at
    order by m.effective_from desc
    limit 1);
end
$$;

-- An event's context at a node that names its own context meters; null at any other.
create or replace function data.own_context(
  config_node_id uuid,
  meters jsonb
)
returns numeric
language plpgsql
stable
as $$
declare
  v_meters text[] := (select n.context_meters from data.config_node n where n.id = own_context.config_node_id);
begin
  if v_meters is null then
    return null;
  end if;
  return (
    select coalesce(sum(data.to_quantity(m.value)), 0)
    from jsonb_each(own_context.meters) m
    where m.key = any (v_meters));
end
$$;

-- The meters of an event, each with its rate: of the book, else of the list times the book's
-- factor. `price_id` is null where no rate prices the meter. All tokens pay the rate that the
-- whole context chooses.
create or replace function data.rate_meters(
  config_node_id uuid,
  meters jsonb,
  currency text,
  at timestamptz,
  variant text,
  price_book_id uuid
)
returns table (
  meter text,
  value jsonb,
  quantity numeric,
  price_id bigint,
  unit_price numeric,
  unit_size integer,
  factor numeric
)
language sql
stable
as $$
  select m.key, m.value, m.quantity, coalesce(o.id, l.id), coalesce(o.unit_price, l.unit_price),
    coalesce(o.unit_size, l.unit_size), case when o.id is null then f.factor end
  from (
    select e.key, e.value, q.quantity, sum(q.quantity) filter (where data.is_input_meter(e.key)) over () as context
    from jsonb_each(
      case when jsonb_typeof(meters) = 'object' and pg_column_size(meters) <= 16384 then meters else '{}' end) e
    cross join lateral (select data.to_quantity(e.value) as quantity offset 0) q
  ) m
  left join lateral (
    select b.factor
    from data.price_book_factor b
    where b.price_book_id = rate_meters.price_book_id and b.effective_from <= at
    order by b.effective_from desc
    limit 1
  ) f on true
  left join lateral (
    select p.id, p.unit_price, p.unit_size
    from data.price p
    where p.price_book_id = rate_meters.price_book_id and p.config_node_id = rate_meters.config_node_id
      and p.meter = m.key and p.currency = rate_meters.currency and p.variant = rate_meters.variant
      and p.effective_from <= at
      and (p.hours is null or p.hours @> data.week_minute(at))
      and (p.context_over = 0 or p.context_over < coalesce(
        data.own_context(rate_meters.config_node_id, meters), m.context, 0))
    order by p.effective_from desc, (p.hours is null), p.context_over desc
    limit 1
  ) o on rate_meters.price_book_id is not null
  left join lateral (
    select p.id, p.unit_price, p.unit_size
    from data.price p
    where p.price_book_id is null and p.config_node_id = rate_meters.config_node_id
      and p.meter = m.key and p.currency = rate_meters.currency and p.variant = rate_meters.variant
      and p.effective_from <= at
      and (p.hours is null or p.hours @> data.week_minute(at))
      and (p.context_over = 0 or p.context_over < coalesce(
        data.own_context(rate_meters.config_node_id, meters), m.context, 0))
    order by p.effective_from desc, (p.hours is null), p.context_over desc
    limit 1
  ) l on o.id is null and (rate_meters.price_book_id is null or f.factor is not null)
$$;

-- Prices meters at a node, in a currency, at a moment, for a service tier and a book. `code` is
-- null, or says why there is no cost.
-- A quantity of 0 needs no price, and an event of zeros pays no minimum. At most 64 meters, which
-- are counted by their size first; a cost of a trillion or more is no cost.
create or replace function data.price_meters(
  config_node_id uuid,
  meters jsonb,
  currency text,
  at timestamptz,
  variant text,
  price_book_id uuid
)
returns table (
  cost numeric,
  price_ids bigint[],
  quantities jsonb,
  factor numeric,
  minimum numeric,
  code text
)
language sql
stable
as $$
  select
    case when c.code is null then greatest(c.cost, c.minimum) end,
    c.price_ids,
    case when c.has_text
      then (select jsonb_object_agg(m.key, data.to_quantity(m.value)) from jsonb_each(meters) m)
      else meters
    end,
    c.factor,
    case when c.minimum > c.cost then c.minimum end,
    c.code
  from (
    select
      s.*,
      case when s.has_quantity then
        data.minimum_of(price_meters.price_book_id, price_meters.config_node_id, price_meters.currency, at)
      end as minimum,
      case
        when s.meter_count not between 1 and 64 or s.has_bad_meter or s.cost >= 1e12 then 'invalid_meters'
        when s.unpriced is not null and exists (
          select from unnest(s.unpriced) u (meter)
          cross join lateral (
            select from data.price o
            where o.config_node_id = price_meters.config_node_id and o.meter = u.meter
              and o.currency <> price_meters.currency and o.variant = price_meters.variant
              and o.price_book_id is null and o.effective_from <= at
            limit 1
          ) o
        ) then 'currency_mismatch'
        when s.unpriced is not null then 'price_not_found'
      end as code
    from (
      select
        count(*) as meter_count,
        coalesce(bool_or(jsonb_typeof(r.value) = 'string'), false) as has_text,
        -- a priced meter has a name already
        coalesce(bool_or(r.quantity is null or (r.price_id is null
          and r.meter !~ '^[a-z][a-z0-9_.]{0,62}$')), false) as has_bad_meter,
        bool_or(r.quantity > 0) as has_quantity,
        array_agg(r.meter) filter (where r.quantity > 0 and r.price_id is null) as unpriced,
        coalesce(array_agg(r.price_id) filter (where r.price_id is not null), '{}') as price_ids,
        max(r.factor) as factor,
        data.to_cost(coalesce(sum(
          data.cost_steps(r.quantity, r.unit_price, r.unit_size) * coalesce(r.factor, 1)), 0)) as cost
      from data.rate_meters(
        price_meters.config_node_id, price_meters.meters, price_meters.currency, at, price_meters.variant,
        price_meters.price_book_id) r
    ) s
    offset 0
  ) c
$$;

-- Prices meters at the dearest of several service tiers; the first tier that has no price says why.
create or replace function data.price_variants(
  config_node_id uuid,
  meters jsonb,
  currency text,
  at timestamptz,
  variants text[],
  price_book_id uuid
)
returns table (
  cost numeric,
  quantities jsonb,
  code text
)
language sql
stable
as $$
  select p.cost, p.quantities, p.code
  from unnest(variants) v
  cross join lateral (
    select * from data.price_meters(
      price_variants.config_node_id, price_variants.meters, price_variants.currency, at, v,
      price_variants.price_book_id) offset 0
  ) p
  order by p.code, p.cost desc
  limit 1
$$;

-- Our own cost of an event, by the cost book of the account's currency, else by another one that
-- prices it all. No row if no cost book does.
create or replace function data.cost_of(
  config_node_id uuid,
  meters jsonb,
  currency text,
  at timestamptz,
  variant text
)
returns table (
  cost numeric,
  cost_currency text
)
language sql
stable
as $$
  select p.cost, b.currency
  from data.price_book b
  cross join lateral (
    select * from data.price_meters(
      cost_of.config_node_id, cost_of.meters, b.currency, at, cost_of.variant, b.id) offset 0
  ) p
  where b.kind = 'cost' and p.code is null
  order by b.currency <> cost_of.currency, b.currency
  limit 1
$$;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
