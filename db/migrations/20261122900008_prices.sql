-- migrate:up
-- Costs of meters: the price in force at the time of an id, and the rounding.

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

-- Prices meters at a node, in a currency, at a moment. `code` is null, or says why there is no
-- cost.
-- A quantity of 0 needs no price. At most 64 meters, which are counted by their size first; a cost
-- of a trillion or more is no cost.
create or replace function data.price_meters(
  config_node_id uuid,
  meters jsonb,
  currency text,
  at timestamptz
)
returns table (
  cost numeric,
  price_ids bigint[],
  quantities jsonb,
  code text
)
language sql
stable
as $$
  select
    case when c.code is null then c.cost end,
    c.price_ids,
    case when c.has_text
      then (select jsonb_object_agg(m.key, data.to_quantity(m.value)) from jsonb_each(meters) m)
      else meters
    end,
    c.code
  from (
    select
      s.*,
      case
        when s.meter_count not between 1 and 64 or s.has_bad_meter or s.cost >= 1e12 then 'invalid_meters'
        when s.unpriced is not null and exists (
          select from unnest(s.unpriced) u (meter)
          cross join lateral (
            select from data.price o
            where o.config_node_id = price_meters.config_node_id and o.meter = u.meter and o.effective_from <= at
            limit 1
          ) o
        ) then 'currency_mismatch'
        when s.unpriced is not null then 'price_not_found'
      end as code
    from (
      select
        count(*) as meter_count,
        coalesce(bool_or(jsonb_typeof(m.value) = 'string'), false) as has_text,
        -- a priced meter has a name already
        coalesce(bool_or(q.quantity is null or (p.id is null
          and m.key !~ '^[a-z][a-z0-9_.]{0,62}$')), false) as has_bad_meter,
        array_agg(m.key) filter (where q.quantity > 0 and p.id is null) as unpriced,
        coalesce(array_agg(p.id) filter (where p.id is not null), '{}') as price_ids,
        data.to_cost(coalesce(sum(data.cost_steps(q.quantity, p.unit_price, p.unit_size)), 0)) as cost
      from jsonb_each(
        case when jsonb_typeof(meters) = 'object' and pg_column_size(meters) <= 16384 then meters else '{}' end) as m
      cross join lateral (select data.to_quantity(m.value) as quantity offset 0) q
      left join lateral (
        select p.id, p.unit_price, p.unit_size
        from data.price p
        where p.config_node_id = price_meters.config_node_id
          and p.meter = m.key
          and p.currency = price_meters.currency
          and p.effective_from <= at
        order by p.effective_from desc
        limit 1
      ) p on true
    ) s
    offset 0
  ) c
$$;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
