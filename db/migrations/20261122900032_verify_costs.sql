-- migrate:up
-- The cost of a charged event, computed again through the rates, book, factor and minimum it names.

set local role keyledger_owner;

-- The meters of a charged event, each with the rate that its row names, and its cost in steps. A
-- minimum that raised the cost is shown as a meter of its own, with the rest of the cost.
create or replace function data.usage_steps(
  meters jsonb,
  price_ids bigint[],
  factor numeric,
  minimum numeric
)
returns table (
  meter text,
  quantity numeric,
  price_id bigint,
  unit_price numeric,
  unit_size integer,
  effective_from timestamptz,
  steps numeric
)
language sql
stable
as $$
  with metered as (
    select e.key as meter, e.value::numeric as quantity, p.id, p.unit_price, p.unit_size, p.effective_from,
      coalesce(data.cost_steps(e.value::numeric, p.unit_price, p.unit_size), 0) as steps
    from jsonb_each(meters) e
    left join lateral (
      select r.id, r.unit_size, r.effective_from,
        case when r.price_book_id is null then r.unit_price * coalesce(usage_steps.factor, 1) else r.unit_price end
          as unit_price
      from data.price r
      where r.id = any (price_ids) and r.meter = e.key
    ) p on true
  )
  select * from metered
  union all
  select 'minimum', 1, null, minimum, 1, null, data.cost_steps(1, minimum, 1) - sum(m.steps)
  from metered m
  where minimum is not null
  having minimum is not null
$$;

-- Whether a rate can price an event at this moment, with this context.
create or replace function data.rate_fits(
  rate data.price,
  usage data.usage_log,
  currency text,
  at timestamptz
)
returns boolean
language plpgsql
stable
as $$
begin
  return rate.config_node_id = usage.config_node_id
    and (rate.price_book_id is null or rate.price_book_id is not distinct from (usage.terms).price_book_id)
    and rate.variant = coalesce((usage.terms).variant, '') and rate.currency = rate_fits.currency
    and rate.effective_from <= at
    and (rate.hours is null or rate.hours @> data.week_minute(at))
    and (rate.context_over = 0 or rate.context_over < (
      select c.context from data.context_of(usage.config_node_id, usage.meters) c));
end
$$;

-- costs: each charged event through the rates, the factor, the book and the minimum that its row
-- names
create or replace function data.verify_costs(account_id uuid)
returns setof api.ledger_problem
language plpgsql
stable
as $$
begin
  return query
  select l.account_id, c.problem, l.transaction_seq, l.id::uuid, c.expected, c.actual
  from data.usage_log l
  join data.account_balance a on a.account_id = l.account_id
  cross join lateral (select data.uuid_time(l.id) as at offset 0) t
  cross join lateral (select (l.terms).*) v
  cross join lateral (
    select data.to_cost(sum(s.steps)) as cost,
      data.to_cost(sum(s.steps) filter (where s.meter <> 'minimum')) as metered,
      min(s.meter) filter (where s.price_id is null and s.quantity > 0
      and s.meter <> 'minimum') as unpriced
    from data.usage_steps(l.meters, l.price_ids, v.factor, v.minimum) s
  ) s
  cross join lateral (
    select min(p.id) as id
    from data.price p
    where p.id = any (l.price_ids) and not data.rate_fits(p, l, a.currency, t.at)
  ) r
  cross join lateral (
    values
      ('cost_is_not_of_its_rates', s.cost::data.money::text, l.cost::text, s.cost <> l.cost),
      -- a minimum counts only where the meters cost less
      ('cost_is_not_of_its_rates', s.metered::data.money::text, l.cost::text, s.metered >= v.minimum),
      ('meter_without_rate', 'a rate', s.unpriced, s.unpriced is not null),
      ('rate_is_not_of_this_event', null, r.id::text, r.id is not null),
      ('factor_is_not_of_its_book', 'a factor of the book', v.factor::text,
        v.factor is not null and not exists (
        select from data.price_book_factor f
        where f.price_book_id = v.price_book_id and f.factor = v.factor and f.effective_from <= t.at)),
      ('book_is_not_assigned', 'an assignment', v.price_book_id::text,
        v.price_book_id is not null and not exists (
        select from data.price_book_assignment b
        where b.account_id = l.account_id and b.price_book_id = v.price_book_id and b.effective_from <= t.at)),
      ('minimum_is_of_no_book_or_node', 'a minimum', v.minimum::text,
        v.minimum is not null and not exists (
        select from data.minimum_charge m
        where (m.price_book_id = v.price_book_id or m.config_node_id = l.config_node_id)
          and m.minimum = v.minimum and m.currency = a.currency and m.effective_from <= t.at))
  ) as c (problem, expected, actual, is_broken)
  where (verify_costs.account_id is null or l.account_id = verify_costs.account_id) and c.is_broken;
end
$$;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
