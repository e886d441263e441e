-- migrate:up
-- Our own costs beside the charges: margins, and the bills of providers.

set local role keyledger_owner;

create or replace view api.usage_costs as
select l.account_id, l.id as usage_id, (l.own_cost).amount as cost, (l.own_cost).currency as currency,
  (l.own_cost).is_upstream as is_upstream
from data.usage_log l
where (l.own_cost).amount is not null;
comment on view api.usage_costs is
'Our own cost of each charged event: by the cost book, or as the provider''s answer gave it (is_upstream).
It is no part of the customer''s ledger. An event without one may have its cost in margins, where a
cost book came later.';
grant select on api.usage_costs to keyledger_operator;

create or replace function api.margins(
  "by" text,
  since timestamptz,
  before timestamptz
)
returns table (
  key text,
  name text,
  currency text,
  events bigint,
  charged numeric,
  cost_currency text,
  cost numeric,
  margin numeric
)
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
-- planned for this period: only its months are read
set plan_cache_mode = force_custom_plan
as $$
#variable_conflict use_column
declare
  v_first uuid;
  v_beyond uuid;
  v_in_use data.terms_in_use := (select t from data.terms_in_use t);
begin
  if coalesce(margins."by" not in ('node', 'model', 'account', 'user', 'day'), true) then
    perform data.refuse(422, 'invalid_by', 'by must be node, model, account, user or day', 'choose one of them');
  end if;
  select p.first, p.beyond into v_first, v_beyond from data.usage_period(margins.since, margins.before) p;
  return query
  select g.key, case margins."by"
      when 'node' then (select n.name from data.config_node n where n.id = g.key::uuid)
      when 'account' then (
        select coalesce(t.name, u.display_name, u.external_id)
        from data.account_balance a
        left join data.tenant t on t.id = a.owner_tenant_id
        left join data.user_profile u on u.id = a.owner_user_id
        where a.account_id = g.key::uuid)
      when 'user' then (
        select coalesce(u.display_name, u.external_id) from data.user_profile u where u.id = g.key::uuid)
    end, g.currency, g.events, g.charged, g.cost_currency, g.cost,
    case when g.cost_currency = g.currency then g.charged - g.cost end
  from (
    select
      case margins."by"
        when 'node' then l.config_node_id::text
        when 'model' then n.model
        when 'account' then l.account_id::text
        when 'user' then l.user_id::text
        else (t.at at time zone 'UTC')::date::text
      end as key,
      a.currency::text as currency, count(*) as events, sum(l.cost) as charged,
      coalesce((l.own_cost).currency, c.cost_currency) as cost_currency,
      sum(coalesce((l.own_cost).amount, c.cost)) as cost
    from data.usage_log l
    join data.account_balance a on a.account_id = l.account_id
    left join data.config_node n on n.id = l.config_node_id
    cross join lateral (select data.uuid_time(l.id) as at offset 0) t
    -- a cost book may have come after the event
    left join lateral (
      select * from data.cost_of(
        l.config_node_id, l.meters, a.currency, t.at, coalesce((l.terms).variant, ''), v_in_use)
      offset 0
    ) c on (l.own_cost).amount is null
    where l.id >= v_first and l.id < v_beyond
    group by 1, 2, 5
  ) g
  order by g.charged desc, g.key, g.cost_currency;
end
$$;
comment on function api.margins(text, timestamptz, timestamptz) is
'Charges of a period beside our own costs: by node, model, account, user or day (UTC).
Events used from `since` on and before `before`. Answers [{key, name, currency, events, charged,
cost_currency, cost, margin}], a row per key, currency and currency of the cost: margin is charged -
cost, null across currencies and where no cost is known (no cost book prices the event, and no
upstream_cost came with it). Charges are before refunds. 410 usage_dropped; 422 invalid_by,
invalid_period.';
grant execute on function api.margins(text, timestamptz, timestamptz) to keyledger_operator;

create or replace function api.import_provider_bill(lines jsonb)
returns jsonb
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '5s'
as $$
declare
  v_line jsonb;
  v_new data.provider_bill_line;
  v_old data.provider_bill_line;
  v_code text;
  v_status text;
  v_answers jsonb := '[]';
begin
  perform data.require_array('lines', lines);
  -- two imports at once take the lines in one order
  for v_line in
    select l.line || jsonb_build_object('ord', l.ord)
    from jsonb_array_elements(lines) with ordinality as l (line, ord)
    where jsonb_typeof(l.line) = 'object'
    order by data.text_of(l.line, 'config_node_id'), l.line ->> 'day', l.line ->> 'meter', l.ord
  loop
    v_new.config_node_id := data.to_uuid(data.text_of(v_line, 'config_node_id'));
    v_new.day := data.to_moment(substring(data.text_of(v_line, 'day') from '^[12][0-9]{3}-[0-9]{2}-[0-9]{2}$')
      || 'T00:00:00Z') at time zone 'UTC';
    v_new.meter := data.text_of(v_line, 'meter');
    v_new.currency := substring(coalesce(v_line ->> 'currency', 'USD') from '^[A-Z]{3}$');
    v_new.quantity := data.to_quantity(v_line -> 'quantity');
    v_new.amount := data.to_amount(data.text_of(v_line, 'amount'));
    v_new.actor := data.actor();
    v_new.imported_at := clock_timestamp();
    v_code := case
      when v_new.config_node_id is null then 'invalid_config_node_id'
      when v_new.day is null or v_new.day < '1970-01-01' then 'invalid_day'
      when v_new.meter is null or v_new.meter !~ '^[a-z][a-z0-9_.]{0,62}$' then 'invalid_meter'
      when v_new.currency is null then 'invalid_currency'
      when v_new.quantity is null then 'invalid_quantity'
      when v_new.amount is null then 'invalid_amount'
      when not exists (select from data.config_node n where n.id = v_new.config_node_id) then 'config_node_not_found'
    end;
    v_status := 'refused';
    if v_code is null then
      v_old := null;
      insert into data.provider_bill_line select v_new.* on conflict do nothing;
      if found then
        v_status := 'imported';
      else
        select * into v_old
        from data.provider_bill_line b
        where b.config_node_id = v_new.config_node_id and b.day = v_new.day and b.meter = v_new.meter
          and b.currency = v_new.currency
        for update;
        v_status := case when (v_old.quantity, v_old.amount) = (v_new.quantity, v_new.amount)
          then 'unchanged' else 'replaced' end;
      end if;
      update data.provider_bill_line b
      set quantity = v_new.quantity, amount = v_new.amount, actor = v_new.actor, imported_at = v_new.imported_at
      where v_status = 'replaced' and b.config_node_id = v_new.config_node_id and b.day = v_new.day
        and b.meter = v_new.meter and b.currency = v_new.currency;
    end if;
    v_answers := v_answers || jsonb_strip_nulls(
      jsonb_build_object('status', v_status, 'code', v_code, 'ord', v_line -> 'ord'));
  end loop;
  return (
    select coalesce(jsonb_agg(coalesce(a.answer - 'ord', '{"status": "refused", "code": "invalid_line"}')
      order by l.ord), '[]')
    from generate_series(1, jsonb_array_length(lines)) as l (ord)
    left join jsonb_array_elements(v_answers) as a (answer) on (a.answer ->> 'ord')::integer = l.ord);
end
$$;
comment on function api.import_provider_bill(jsonb) is
'Keeps the lines of a provider''s bill, to compare them with the usage recorded (provider_differences).
Takes `lines`, [{config_node_id, day (UTC, 2026-11-30), meter, quantity, amount, currency? (USD)}],
at most 10,000, and answers in the same order [{status: imported | unchanged | replaced | refused,
code?}]. A line is kept once per node, day, meter and currency: the same again is unchanged, another
replaces it. 422 invalid_lines, too_many_elements.';
grant execute on function api.import_provider_bill(jsonb) to keyledger_operator;

create or replace function api.provider_differences(
  since date default null,
  before date default null
)
returns table (
  config_node_id uuid,
  node text,
  day date,
  meter text,
  currency text,
  billed_quantity numeric,
  recorded_quantity numeric,
  quantity_difference numeric,
  billed_amount numeric,
  recorded_cost numeric,
  amount_difference numeric
)
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_custom_plan
as $$
#variable_conflict use_column
declare
  v_first uuid;
  v_beyond uuid;
  v_in_use data.terms_in_use := (select t from data.terms_in_use t);
begin
  select data.uuid_floor(min(b.day)::timestamp at time zone 'UTC'),
    data.uuid_floor((max(b.day) + 1)::timestamp at time zone 'UTC')
  into v_first, v_beyond
  from data.provider_bill_line b
  where (since is null or b.day >= since) and (before is null or b.day < before);
  if v_first is not null then
    perform data.refuse_dropped_usage(v_first);
  end if;
  return query
  with line as (
    select * from data.provider_bill_line b
    where (since is null or b.day >= since) and (before is null or b.day < before)
  ), billed as (
    select distinct l.config_node_id, l.day, l.currency::text as currency, k.id as price_book_id
    from line l
    left join data.price_book k on k.kind = 'cost' and k.currency = l.currency
  ), recorded as (
    select u.config_node_id, b.day, r.meter, b.currency, sum(r.quantity) as quantity,
      -- null where a part of the quantity has no rate
      case when count(r.price_id) = count(*) then
        data.to_cost(sum(data.cost_steps(r.quantity, r.unit_price, r.unit_size) * coalesce(r.factor, 1)))
      end as cost
    from data.usage_log u
    cross join lateral (select data.uuid_time(u.id) as at offset 0) t
    join billed b on b.config_node_id = u.config_node_id and b.day = (t.at at time zone 'UTC')::date
    cross join lateral data.rate_meters(
      u.config_node_id, u.meters, b.currency, t.at, coalesce((u.terms).variant, ''), b.price_book_id, v_in_use) r
    where u.id >= v_first and u.id < v_beyond
    group by 1, 2, 3, 4
  )
  select n.id, n.name, d.day, d.meter, d.currency, d.billed, d.recorded, d.billed - d.recorded, d.amount, d.cost,
    d.amount - d.cost
  from (
    select coalesce(l.config_node_id, r.config_node_id) as config_node_id, coalesce(l.day, r.day) as day,
      coalesce(l.meter, r.meter) as meter, coalesce(l.currency::text, r.currency) as currency,
      coalesce(l.quantity, 0) as billed, coalesce(r.quantity, 0) as recorded,
      coalesce(l.amount, 0)::numeric as amount, r.cost
    from line l
    full join recorded r on r.config_node_id = l.config_node_id and r.day = l.day and r.meter = l.meter
      and r.currency = l.currency
  ) d
  join data.config_node n on n.id = d.config_node_id
  order by d.day, n.name, d.meter, d.currency;
end
$$;
comment on function api.provider_differences(date, date) is
'Compares the bills of providers with the usage recorded: per node, day (UTC) and meter, on days that have lines.
Days from `since` on and before `before`; all by default. Answers [{config_node_id, node, day,
meter, currency, billed_quantity, recorded_quantity, quantity_difference, billed_amount,
recorded_cost, amount_difference}]; differences are billed - recorded. A meter that was recorded and
not billed, or billed and not recorded, has 0 on the other side. recorded_cost is by the
cost book of the bill''s currency, or by list prices if there is no such book; it looks at no
upstream_cost, and is null where a part of the quantity has no rate. 410 usage_dropped.';
grant execute on function api.provider_differences(date, date) to keyledger_operator;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
