-- migrate:up
-- Reports: the reasons of one charge, and sums of spending.

set local role keyledger_owner;

-- steps (data.to_cost) as a decimal: exact if it ends within 36 places, else cut off there
create or replace function data.exact_cost(steps numeric)
returns jsonb
language sql
immutable parallel safe
as $$
  select jsonb_build_object(
    'amount', trim_scale(
      div(steps * 1e36, 3600000000) * 1e-36)::text,
    'is_exact', mod(steps * 1e36, 3600000000) = 0)
$$;

-- the meters of an event with the prices it was charged at, and the sum of their steps
create or replace function data.charge_meters(
  inout meters jsonb,
  price_ids bigint[],
  factor numeric,
  minimum numeric,
  with_ids boolean,
  out steps numeric
)
returns record
language plpgsql
stable
as $$
begin
  select sum(m.steps), jsonb_agg(jsonb_build_object(
      'meter', m.meter,
      'quantity', m.quantity::text,
      'price', case when m.unit_price is not null then jsonb_build_object(
        'unit_price', m.unit_price::text, 'unit_size', m.unit_size, 'effective_from', m.effective_from)
        || case when with_ids then jsonb_build_object('id', m.price_id) else '{}' end end
    ) || data.exact_cost(m.steps) order by m.meter)
  into steps, meters
  from data.usage_steps(charge_meters.meters, charge_meters.price_ids, charge_meters.factor, charge_meters.minimum) m;
end
$$;

create or replace function api.explain_charge(
  account_id uuid,
  usage_id uuid
)
returns jsonb
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
  v_usage data.visible_usage;
  v_entry api.billing_transactions;
  v_meters jsonb;
  v_steps numeric;
  v_refunds jsonb;
begin
  -- through the views: a member may see the event but not the whole entry
  select * into v_usage from data.visible_usage l where l.account_id = explain_charge.account_id and l.id = usage_id;
  if not found then
    perform data.refuse_dropped_usage(usage_id);
    perform data.refuse(404, 'usage_not_found', 'usage ' || coalesce(usage_id::text, 'null'),
      'send the id of an event charged to this account; one not charged yet is in parked_usage');
  end if;
  select * into v_entry from api.billing_transactions t
  where t.account_id = explain_charge.account_id and t.seq = v_usage.transaction_seq;

  -- a member sees the rate that each meter was charged at, and no list price, book or factor
  select c.meters, c.steps into v_meters, v_steps
  from data.charge_meters(v_usage.meters, v_usage.price_ids, (v_usage.terms).factor, (v_usage.terms).minimum,
    v_usage.with_rates) c;
  select jsonb_agg(jsonb_build_object('seq', t.seq, 'amount', t.amount::text, 'usage_id', t.refund_of_usage_id,
    'reference', t.reference, 'reason', t.reason, 'created_at', t.created_at) order by t.seq)
  into v_refunds
  from data.billing_transaction t
  where t.account_id = v_usage.account_id and t.refund_of_seq = v_usage.transaction_seq
    and (t.refund_of_usage_id = v_usage.id or (t.refund_of_usage_id is null and v_entry.seq is not null));

  return jsonb_build_object(
    'event', jsonb_build_object(
      'id', v_usage.id, 'account_id', v_usage.account_id, 'used_at', data.uuid_time(v_usage.id),
      'recorded_at', v_usage.recorded_at, 'meters', v_usage.meters, 'hold_id', v_usage.hold_id, 'final', v_usage.final,
      'request_id', v_usage.request_id, 'metadata', v_usage.metadata, 'variant', (v_usage.terms).variant,
      'estimated', (v_usage.terms).estimated),
    'virtual_key', (select jsonb_build_object('id', k.id, 'name', k.name, 'key_prefix', k.key_prefix)
      from data.virtual_key k where k.id = v_usage.virtual_key_id),
    'user', (select jsonb_build_object('id', u.id, 'display_name', u.display_name, 'external_id', u.external_id)
      from data.user_profile u where u.id = v_usage.user_id),
    'config_node', (select jsonb_build_object('id', n.id, 'name', n.name)
      from data.config_node n where n.id = v_usage.config_node_id),
    'price_book', (select jsonb_build_object('id', b.id, 'name', b.name, 'factor', (v_usage.terms).factor::text)
      from data.price_book b where b.id = (v_usage.terms).price_book_id and v_usage.with_rates),
    'meters', v_meters,
    'sum', data.exact_cost(v_steps),
    'rounded', data.to_cost(v_steps)::text,
    'cost', v_usage.cost::text,
    'currency', (select a.currency from data.account_balance a where a.account_id = v_usage.account_id),
    'agrees', data.to_cost(v_steps) = v_usage.cost,
    'hold', (
      select jsonb_build_object('id', h.id, 'amount', h.amount::text, 'captured', h.captured::text, 'status', h.status)
      from data.hold h where h.account_id = v_usage.account_id and h.id = v_usage.hold_id),
    'entry', case when v_entry.seq is null
      then jsonb_build_object('seq', v_usage.transaction_seq) else jsonb_build_object(
      'seq', v_entry.seq, 'kind', v_entry.kind, 'created_at', v_entry.created_at, 'usage_count', v_entry.usage_count,
      'amount', v_entry.amount::text, 'balance_delta', v_entry.balance_delta::text,
      'free_credit_delta', v_entry.free_credit_delta::text,
      'outstanding_delta', v_entry.outstanding_delta::text,
      'grants', (select coalesce(jsonb_agg(
          jsonb_build_object('seq', d.grant_seq, 'amount', d.amount::text) order by d.grant_seq), '[]')
        from data.grant_draw d where d.account_id = v_entry.account_id and d.seq = v_entry.seq),
      'hash', encode(v_entry.hash, 'hex')) end,
    'refunds', coalesce(v_refunds, '[]')
  );
end
$$;
comment on function api.explain_charge(uuid, uuid) is
'Explains the cost of an event: its meters, prices, rounding, ledger entry and refunds.
Answers {event, virtual_key, user, config_node, price_book, meters, sum, rounded, cost, currency,
agrees, hold, entry, refunds}. `usage_id` is the event''s id, on `account_id`. `meters` is [{meter,
quantity, price: {id, unit_price, unit_size, effective_from}, amount, is_exact}], one each: quantity
* unit_price / unit_size before rounding, by the rates that were in force at the event''s time;
unit_price is the list''s times the book''s factor, or the book''s own. A minimum that raised the cost
is a meter `minimum`, with the rest. `sum` of them {amount, is_exact}, `rounded` half up to 10
decimals. `agrees` says that this is the `cost` charged. `price_book` {id, name, factor} and the ids
of rates are an operator''s alone.
`is_exact` is false where an amount never ends (it is cut off at 36 decimals; the rounding
is exact all the same). `entry` is the ledger entry, for all its `usage_count` events: the parts
that each bucket and each grant paid; a member who may not see the whole account is shown its seq. Amounts
are strings. 404 usage_not_found; 410 usage_dropped.';
grant execute on function api.explain_charge(uuid, uuid) to keyledger_operator, keyledger_member;

-- The ids of a period: refuses a period that is none, or that retention dropped.
create or replace function data.usage_period(
  since timestamptz,
  before timestamptz,
  out first uuid,
  out beyond uuid
)
returns record
language plpgsql
stable
as $$
begin
  if not coalesce(since < before and isfinite(since) and isfinite(before), false) then
    perform data.refuse(422, 'invalid_period', 'since must be earlier than before',
      'send two moments: since is part of the period, before is not');
  end if;
  -- ids carry whole milliseconds: the first one not before the moment
  first := data.uuid_floor(
    date_trunc('milliseconds', greatest(since, '1970-01-01Z') + interval '999 microseconds'));
  beyond := data.uuid_floor(
    date_trunc('milliseconds', least(before, '9999-01-01Z') + interval '999 microseconds'));
  perform data.refuse_dropped_usage(first);
end
$$;

-- The charges of each meter in each currency. The view decides which usage the reader may see.
create or replace function data.spend_by_meter(
  first uuid,
  beyond uuid,
  account_id uuid
)
returns table (
  key text,
  name text,
  currency text,
  events bigint,
  quantity numeric,
  cost numeric
)
language plpgsql
stable
as $$
begin
  return query
  select m.meter, null::text, a.currency::text, count(*), sum(m.quantity), sum(m.cost)
  from data.visible_usage l
  join data.account_balance a on a.account_id = l.account_id
  cross join lateral (
    -- In order of name, each meter costs its part of the rounded sum so far; the last one costs the
    -- rest.
    -- So the meters of an event add up to its cost.
    select s.meter, s.quantity,
      case when s.place = s.meters then l.cost else data.to_cost(s.steps) end
        - case when s.place = 1 then 0 else data.to_cost(s.steps - s.own_steps) end as cost
    from (
      select p.meter, p.quantity, p.steps as own_steps, sum(p.steps) over w as steps, row_number() over w as place,
        count(*) over () as meters
      from data.usage_steps(l.meters, l.price_ids, (l.terms).factor, (l.terms).minimum) p
      window w as (order by p.meter)
    ) s
  ) m
  where l.id >= first and l.id < beyond
    and (spend_by_meter.account_id is null or l.account_id = spend_by_meter.account_id)
  group by m.meter, a.currency
  order by 6 desc, 1;
end
$$;

create or replace function api.spend(
  "by" text,
  since timestamptz,
  before timestamptz,
  account_id uuid default null
)
returns table (
  key text,
  name text,
  currency text,
  events bigint,
  quantity numeric,
  cost numeric
)
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
-- planned for this period: only its months are read
set plan_cache_mode = force_custom_plan
as $$
declare
  v_tag text := substr(spend."by", 10);
  v_first uuid;
  v_beyond uuid;
begin
  if coalesce(spend."by" not in ('virtual_key', 'user', 'config_node', 'meter')
    and spend."by" !~ '^metadata\..', true) then
    perform data.refuse(422, 'invalid_by', 'by must be virtual_key, user, config_node, meter or metadata.<tag>',
      'choose one of them');
  end if;
  select p.first, p.beyond into v_first, v_beyond from data.usage_period(spend.since, spend.before) p;

  if spend."by" = 'meter' then
    return query select m.* from data.spend_by_meter(v_first, v_beyond, account_id) m;
    return;
  end if;

  return query
  select g.key, coalesce(k.name, u.display_name, n.name), g.currency, g.events, null::numeric, g.cost
  from (
    select
      case spend."by"
        when 'virtual_key' then l.virtual_key_id::text
        when 'user' then l.user_id::text
        when 'config_node' then l.config_node_id::text
        else l.metadata ->> v_tag
      end as key,
      a.currency::text as currency, count(*) as events, sum(l.cost) as cost
    from data.visible_usage l
    join data.account_balance a on a.account_id = l.account_id
    where l.id >= v_first and l.id < v_beyond and (spend.account_id is null or l.account_id = spend.account_id)
    group by 1, 2
  ) g
  left join data.virtual_key k on k.id = case when spend."by" = 'virtual_key' then g.key::uuid end
  left join data.user_profile u on u.id = case when spend."by" = 'user' then g.key::uuid end
  left join data.config_node n on n.id = case when spend."by" = 'config_node' then g.key::uuid end
  order by g.cost desc, g.key;
end
$$;
comment on function api.spend(text, timestamptz, timestamptz, uuid) is
'Sums up the charges of a period: by virtual_key, user, config_node, meter or metadata.<tag>, most expensive first.
Sums events used from `since` on and before `before`, on one account (`account_id`) or on all that
the reader may see. Answers [{key, name, currency, events, quantity, cost}], a row per key and
currency; `key` is an id, a meter, or the tag''s value (null: events without the tag), and `name`
its name. Costs are before refunds, and in any of these ways add up to the same sum: by meter, an
event''s rounding falls to its meters in order of name, so that each is within 1e-10 of quantity *
price. `quantity` is the meter''s. 410 usage_dropped from before the months kept (statements have
its sums); 422 invalid_by, invalid_period.';
grant execute on function api.spend(text, timestamptz, timestamptz, uuid) to keyledger_operator, keyledger_member;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
