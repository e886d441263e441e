-- migrate:up
-- Usage of a statement: the charges of its entries, by node and meter.

set local role keyledger_owner;

-- The charged events of a range of entries.
create or replace function data.usage_of_entries(
  account_id uuid,
  first_seq bigint,
  last_seq bigint
)
returns table (
  config_node_id uuid,
  price_ids bigint[],
  factor numeric,
  meters jsonb,
  minimum numeric,
  cost numeric
)
language sql
stable
as $$
  select l.config_node_id, l.price_ids, (l.terms).factor, l.meters, (l.terms).minimum, l.cost
  from data.billing_transaction t
  cross join lateral generate_series(1, octet_length(t.usage_list), 32) n
  -- one by one, by key: there is no other way to an entry's rows
  cross join lateral (
    select * from data.usage_log b
    where b.account_id = t.account_id and b.id = encode(substr(t.usage_list, n, 16), 'hex')::uuid offset 0
  ) l
  where t.account_id = usage_of_entries.account_id and t.seq between first_seq and last_seq
$$;

-- The usage of a range of entries, by node and meter. A meter's cost is rounded once.
-- `rounding` is the sum of the events' roundings: with it, `cost` is the sum of the entries'
-- charges.
create or replace function data.usage_of(
  account_id uuid,
  first_seq bigint,
  last_seq bigint,
  out usage jsonb,
  out events bigint
)
returns record
language plpgsql
stable
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
as $$
begin
  with event as materialized (
    select * from data.usage_of_entries(usage_of.account_id, first_seq, last_seq)
  ), quantity as (
    select e.config_node_id, e.price_ids, e.factor, e.minimum is not null as at_minimum, m.key as meter,
      sum(m.value::numeric) as quantity
    from event e
    cross join lateral jsonb_each(e.meters) m
    group by 1, 2, 3, 4, 5
  ), charged as (
    select q.config_node_id, q.meter, q.at_minimum, q.quantity,
      coalesce(data.cost_steps(q.quantity, p.unit_price, p.unit_size), 0)
        * case when p.price_book_id is null then coalesce(q.factor, 1) else 1 end as steps
    from quantity q
    left join lateral (
      select p.unit_price, p.unit_size, p.price_book_id
      from data.price p where p.id = any (q.price_ids) and p.meter = q.meter
    ) p on true
  ), minimum as (
    -- the part of the minimums that meters don't cover
    select e.config_node_id, count(*) as events, data.cost_steps(sum(e.minimum), 1, 1) - (
      select sum(c.steps) from charged c where c.config_node_id = e.config_node_id and c.at_minimum) as steps
    from event e
    where e.minimum is not null
    group by 1
  ), metered as (
    select c.config_node_id, c.meter, trim_scale(sum(c.quantity)) as quantity, data.to_cost(sum(c.steps)) as cost
    from charged c
    group by 1, 2
    union all
    select m.config_node_id, 'minimum', m.events, data.to_cost(m.steps) from minimum m
  ), node as (
    select e.config_node_id, count(*) as events, sum(e.cost) as cost from event e group by 1
  )
  select jsonb_agg(jsonb_build_object(
      'config_node_id', n.config_node_id,
      'name', c.name,
      'provider', c.provider,
      'model', c.model,
      'events', n.events,
      'cost', n.cost::data.money::text,
      'rounding', (n.cost - m.cost)::data.money::text,
      'meters', m.meters
    ) order by c.name, n.config_node_id),
    sum(n.events)
  into usage, events
  from node n
  join (
    select m.config_node_id, sum(m.cost) as cost,
      jsonb_object_agg(m.meter, jsonb_build_object('quantity', m.quantity::text, 'cost',
        m.cost::data.money::text)) as meters
    from metered m
    group by 1
  ) m using (config_node_id)
  left join lateral (select * from data.config_node b where b.id = n.config_node_id offset 0) c on true;
end
$$;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
