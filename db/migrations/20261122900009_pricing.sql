-- migrate:up
-- Pricing: the one rule of holds, events, replays and costs: rates, books, minimums, the rounding.

set local role keyledger_owner;

-- The meters of an event, each with its rate: of the book, else of the list times the book's
-- factor. `price_id` is null where no rate prices the meter. All tokens pay the rate that the
-- whole context chooses.
create or replace function data.rate_meters(
  config_node_id uuid,
  meters jsonb,
  currency text,
  at timestamptz,
  variant text,
  price_book_id uuid,
  in_use data.terms_in_use
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
  select m.key, m.value, q.quantity, coalesce(o.id, l.id), coalesce(o.unit_price, l.unit_price),
    coalesce(o.unit_size, l.unit_size), case when o.id is null then t.factor end
  from (
    select
      case when (in_use).contexts and exists (
        select from data.price c where c.config_node_id = rate_meters.config_node_id and c.context_over > 0
      ) then (
        select c.context from data.context_of(rate_meters.config_node_id, rate_meters.meters) c
      ) end as context,
      case when (in_use).hours then data.week_minute(at) end as minute,
      case when rate_meters.price_book_id is not null then (
        select b.factor
        from data.price_book_factor b
        where b.price_book_id = rate_meters.price_book_id and b.effective_from <= at
        order by b.effective_from desc
        limit 1
      ) end as factor
    offset 0
  ) t
  cross join jsonb_each(
    case when jsonb_typeof(meters) = 'object' and pg_column_size(meters) <= 16384 then meters else '{}' end) m
  cross join lateral (select data.to_quantity(m.value) as quantity offset 0) q
  left join lateral (
    select p.id, p.unit_price, p.unit_size
    from data.price p
    where rate_meters.price_book_id is not null
      and p.price_book_id = rate_meters.price_book_id and p.config_node_id = rate_meters.config_node_id
      and p.meter = m.key and p.currency = rate_meters.currency and p.variant = rate_meters.variant
      and p.effective_from <= at
      and (p.hours is null or p.hours @> t.minute)
      and (p.context_over = 0 or p.context_over < t.context)
    order by p.effective_from desc, (p.hours is null), p.context_over desc
    limit 1
  ) o on true
  left join lateral (
    select p.id, p.unit_price, p.unit_size
    from data.price p
    where o.id is null and (rate_meters.price_book_id is null or t.factor is not null)
      and p.price_book_id is null and p.config_node_id = rate_meters.config_node_id
      and p.meter = m.key and p.currency = rate_meters.currency and p.variant = rate_meters.variant
      and p.effective_from <= at
      and (p.hours is null or p.hours @> t.minute)
      and (p.context_over = 0 or p.context_over < t.context)
    order by p.effective_from desc, (p.hours is null), p.context_over desc
    limit 1
  ) l on true
$$;

-- The least that an event costs: by its book, else at its node. A node's minimum is the customer's,
-- and no cost of ours.
create or replace function data.minimum_of(
  price_book_id uuid,
  config_node_id uuid,
  currency text,
  at timestamptz
)
returns table (minimum numeric)
language sql
stable
as $$
  select coalesce((
    select m.minimum
    from data.minimum_charge m
    where m.price_book_id = minimum_of.price_book_id and m.currency = minimum_of.currency and m.effective_from <= at
    order by m.effective_from desc
    limit 1
  ), (
    select m.minimum
    from data.minimum_charge m
    where m.price_book_id is null and m.config_node_id = minimum_of.config_node_id
      and m.currency = minimum_of.currency and m.effective_from <= at
      and not exists (select from data.price_book b where b.id = minimum_of.price_book_id and b.kind = 'cost')
    order by m.effective_from desc
    limit 1
  ))
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
  price_book_id uuid,
  in_use data.terms_in_use
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
      case when s.has_quantity and (in_use).minimums then (
        select l.minimum
        from data.minimum_of(price_meters.price_book_id, price_meters.config_node_id, price_meters.currency, at) l
      ) end as minimum,
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
          and (r.meter !~ '^[a-z][a-z0-9_.]{0,62}$' or r.meter = 'minimum'))), false) as has_bad_meter,
        bool_or(r.quantity > 0) as has_quantity,
        array_agg(r.meter) filter (where r.quantity > 0 and r.price_id is null) as unpriced,
        coalesce(array_agg(r.price_id) filter (where r.price_id is not null), '{}') as price_ids,
        max(r.factor) as factor,
        data.to_cost(coalesce(sum(
          data.cost_steps(r.quantity, r.unit_price, r.unit_size) * coalesce(r.factor, 1)), 0)) as cost
      from data.rate_meters(
        price_meters.config_node_id, price_meters.meters, price_meters.currency, at, price_meters.variant,
        price_meters.price_book_id, in_use) r
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
  price_book_id uuid,
  in_use data.terms_in_use
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
      price_variants.price_book_id, in_use) offset 0
  ) p
  order by p.code, p.cost desc
  limit 1
$$;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
