-- migrate:up
-- Reading hold requests: ids, key, price and amount of each, before any account is locked.

set local role keyledger_owner;

-- The service tiers that may serve a request: its `variants`, else its `variant`, else the standard
-- one. Null if one is no name, or there are more than 16.
create or replace function data.to_variants(request jsonb)
returns text[]
language plpgsql
immutable parallel safe
as $$
declare
  v_variants text[];
begin
  if coalesce(request -> 'variants', 'null') = 'null' then
    v_variants := array[data.to_variant(request -> 'variant')];
  elsif jsonb_typeof(request -> 'variants') = 'array' and jsonb_array_length(request -> 'variants') between 1 and 16
    and coalesce(request -> 'variant', 'null') = 'null'
  then
    v_variants := array(select data.to_variant(v) from jsonb_array_elements(request -> 'variants') v);
  end if;
  return case when array_position(v_variants, null) is null then v_variants end;
end
$$;

-- Reads hold requests in the order of their accounts: the hold each would be, by identity and
-- prices, before any account is locked. `code` says why one is refused.
create or replace function data.read_hold_requests(requests jsonb)
returns data.hold_request[]
language plpgsql
stable
as $$
declare
  v_oldest uuid := data.uuid_floor(clock_timestamp() - interval '1 hour');
  v_newest uuid := data.uuid_floor(clock_timestamp() + interval '2 minutes');
  v_in_use data.terms_in_use := (select t from data.terms_in_use t);
begin
  return array(select row(
    r.ord,
    data.text_of(r.request, 'id'),
    row(
      r.account_id, r.id, coalesce(p.cost, greatest(r.amount, 0)), 0, 'open',
      statement_timestamp() + make_interval(secs => r.expires_in),
      r.virtual_key_id, r.config_node_id, p.quantities, statement_timestamp(), null, null, null, null, null, null
    )::data.hold,
    case
      when jsonb_typeof(r.request) <> 'object' then 'invalid_request'
      when r.id is null then 'invalid_id'
      when r.id < w.first or r.id >= w.beyond then 'id_outside_window'
      -- its time decides its price and its budgets' window
      when r.id < v_oldest or r.id >= v_newest then 'id_not_of_now'
      when r.account_id is null then 'invalid_account_id'
      when r.virtual_key_id is null then 'invalid_virtual_key_id'
      when r.config_node_id is null and coalesce(r.request -> 'config_node_id', 'null') <> 'null'
        then 'invalid_config_node_id'
      when r.expires_in is null then 'invalid_expires_in'
      when r.is_priced and r.config_node_id is null then 'invalid_config_node_id'
      when r.variants is null then 'invalid_variant'
      when r.is_priced = (coalesce(r.request -> 'amount', 'null') <> 'null') then 'invalid_amount'
      when not r.is_priced and coalesce(r.amount, 0) <= 0 then 'invalid_amount'
      when k.virtual_key_id is null then 'virtual_key_unknown'
      when k.code is not null then k.code
      when k.account_id <> r.account_id then 'invalid_account'
      when r.config_node_id is not null and r.config_node_id <> all (k.config_node_ids) then 'node_not_mounted'
      when r.is_priced then p.code
    end,
    k.user_id
  )::data.hold_request
  from (
    select
      e.ord,
      e.request,
      data.to_uuidv7(data.text_of(e.request, 'id')) as id,
      data.to_uuid(data.text_of(e.request, 'account_id')) as account_id,
      data.to_uuid(data.text_of(e.request, 'virtual_key_id')) as virtual_key_id,
      data.to_uuid(data.text_of(e.request, 'config_node_id')) as config_node_id,
      e.request -> 'meters' as meters,
      coalesce(e.request -> 'meters', 'null') <> 'null' as is_priced,
      data.to_quantity(e.request -> 'amount') as amount,
      data.to_expires_in(e.request -> 'expires_in') as expires_in,
      data.to_variants(e.request) as variants
    from jsonb_array_elements(requests) with ordinality as e (request, ord)
    offset 0 -- or each use would parse again
  ) r
  cross join (
    select data.uuid_floor(u.floor) as first, data.uuid_floor(u.ceiling) as beyond from data.accepted_ids u offset 0
  ) w
  left join lateral (select * from data.key_context c where c.virtual_key_id = r.virtual_key_id offset 0) k on true
  -- once, not with each price that is looked at
  cross join lateral (select data.uuid_time(r.id) as at offset 0) t
  cross join lateral (select * from data.book_of(r.account_id, t.at, v_in_use) offset 0) b
  left join lateral (
    select * from data.price_variants(
      r.config_node_id, r.meters, k.currency, t.at, r.variants, b.price_book_id, v_in_use)
    where r.is_priced
    offset 0
  ) p on true
  order by r.account_id, r.ord);
end
$$;

-- Reads requests again whose call has waited for its account: their keys may have been revoked or
-- moved meanwhile.
create or replace function data.read_keys_again(requests data.hold_request[])
returns data.hold_request[]
language plpgsql
as $$
begin
  return array(
    select row(
      r.ord, r.id, r.hold,
      case
        when r.code is not null then r.code
        when k.virtual_key_id is null then 'virtual_key_unknown'
        when k.code is not null then k.code
        when k.account_id <> (r.hold).account_id then 'invalid_account'
        when (r.hold).config_node_id <> all (k.config_node_ids) then 'node_not_mounted'
      end,
      r.user_id
    )::data.hold_request
    from unnest(requests) with ordinality as r (ord, id, hold, code, user_id, place)
    left join lateral (
      select * from data.key_context c where c.virtual_key_id = (r.hold).virtual_key_id offset 0
    ) k on true
    order by r.place);
end
$$;

-- Reads the holds that a call is to end or extend, in the order of their accounts. Ids that are
-- null are malformed.
create or replace function data.read_hold_ids(requests jsonb)
returns data.hold_id[]
language plpgsql
stable
as $$
begin
  return array(
    select row(
      r.ord, data.text_of(r.request, 'id'), r.account_id, r.id, data.to_expires_in(r.request -> 'expires_in'),
      case
        when jsonb_typeof(r.request) <> 'object' then 'invalid_request'
        when r.id is null then 'invalid_id'
        when r.account_id is null then 'invalid_account_id'
      end
    )::data.hold_id
    from (
      select e.ord, e.request,
        data.to_uuid(data.text_of(e.request, 'account_id')) as account_id,
        data.to_uuid(data.text_of(e.request, 'id')) as id
      from jsonb_array_elements(requests) with ordinality as e (request, ord)
      offset 0 -- or each use would read again
    ) r
    order by r.account_id, r.ord);
end
$$;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
