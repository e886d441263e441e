-- migrate:up
-- Our own costs of events: as the provider gave them, else by a cost book.

set local role keyledger_owner;

-- The cost that a provider's answer gave: {amount, currency}, or a decimal in the account's
-- currency; rounded to 10 decimals. Null if it is unfit.
create or replace function data.upstream_cost(
  value jsonb,
  account_currency text
)
returns data.own_cost
language plpgsql
stable parallel safe
as $$
declare
  v_given jsonb := case when jsonb_typeof(value) = 'object' then value -> 'amount' else value end;
  v_amount numeric;
  v_currency text := case when jsonb_typeof(value) = 'object'
    then substring(data.text_of(value, 'currency') from '^[A-Z]{3}$') else account_currency end;
begin
  -- computed by others in floating point: 0.30000000000000004
  if jsonb_typeof(v_given) = 'number' then
    -- never as text: that of 1e131071 has 131,072 digits
    if v_given::numeric >= 0 and v_given::numeric < 1e12 and scale(v_given::numeric) <= 60 then
      v_amount := round(v_given::numeric, 10);
    end if;
  elsif jsonb_typeof(v_given) = 'string' and v_given #>> '{}' ~ '^[0-9]{1,12}([.][0-9]{1,60})?$' then
    v_amount := round((v_given #>> '{}')::numeric, 10);
  end if;
  return case when v_amount < 1e12 and v_currency is not null
    then row(v_amount, v_currency, true)::data.own_cost end;
end
$$;

-- Our own cost of an event, by the cost book of the account's currency, else by another one that
-- prices it all. No row if no cost book does.
create or replace function data.cost_of(
  config_node_id uuid,
  meters jsonb,
  currency text,
  at timestamptz,
  variant text,
  in_use data.terms_in_use
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
      cost_of.config_node_id, cost_of.meters, b.currency, at, cost_of.variant, b.id, in_use) offset 0
  ) p
  where (in_use).costs and b.kind = 'cost' and p.code is null
  order by b.currency <> cost_of.currency, b.currency
  limit 1
$$;

-- Adds our own cost to events that came without one. A missing cost keeps no event from its charge.
create or replace function data.add_costs(
  events data.usage_event[],
  in_use data.terms_in_use
)
returns data.usage_event[]
language plpgsql
stable
as $$
begin
  return array(
    select row(
        e.ord,
        row(
          u.account_id, u.id, u.transaction_seq, u.virtual_key_id, u.user_id, u.config_node_id, u.hold_id, u.final,
          u.meters, u.price_ids, u.cost, u.request_id, u.metadata, u.recorded_at, u.terms,
          coalesce(u.own_cost, c.own_cost)
        )::data.usage_log,
        e.code, e.note, e.key_is_idle
      )::data.usage_event
    from unnest(events) with ordinality as e (ord, usage, code, note, key_is_idle, place)
    cross join lateral (select (e.usage).*) u
    left join lateral (
      select row(k.cost, k.cost_currency, false)::data.own_cost as own_cost
      from (
        select a.currency, data.uuid_time(u.id) as at
        from data.account_balance a
        where a.account_id = u.account_id and e.code is null and u.own_cost is null
        offset 0
      ) a
      cross join lateral data.cost_of(
        u.config_node_id, u.meters, a.currency, a.at, coalesce((u.terms).variant, ''), in_use) k
      offset 0
    ) c on true
    order by e.place);
end
$$;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
